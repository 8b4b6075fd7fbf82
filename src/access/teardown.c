/* The end of an access, whatever the cause. */
#include "access.h"
#include "pve/pve.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include "upstream/upstream.h"
#include <unistd.h>

void pba_access_free(PbaAccess *access)
{
    if (!access) {
        return;
    }
    pba_vfiles_free(access);
    if (access->socket_dir && access->owner == getpid() && !pba_socket_answers(access->socket)) {
        pba_run_dir_remove(access);
    }
    pba_owner_forget(access);
    g_free(access->target_id);
    g_free(access->run_dir);
    g_free(access->identity);
    g_free(access->fleecing_dir);
    g_clear_pointer(&access->fleecing, g_hash_table_unref);
    g_free(access->early_bitmap_name);
    g_free(access->socket_dir);
    g_free(access->socket);
    g_ptr_array_unref(access->disks);
    g_free(access);
}

void pba_access_end(PbaAccess *access)
{
    pba_vfiles_free(access);
    pba_run_dir_remove(access);
    pba_owner_forget(access);
    g_ptr_array_set_size(access->disks, 0);
    access->begun = false;
    access->server_up = false;
    access->exports = PBA_EXPORTS_NONE;
    access->teardown_failed = false;
    access->success_unknown = false;
}

static bool tear_down(PbaAccess *access, bool success, GError **error)
{
    GError *first = NULL;
    GError *files = NULL;

    if (!access->begun) {
        return true;
    }
    if (!pba_vfiles_end(access, &files) && pba_error_is_fatal(files)) {
        g_propagate_error(error, files);
        return false;
    }
    /* QEMU aborts if a bitmap is still exported when the access ends, or cannot join it. */
    if (pba_exports_remove(access, &first)) {
        GError *step = NULL;
        success = success && !access->teardown_failed;
        if (access->backend == PBA_BACKEND_PVE) {
            pba_pve_teardown(access, success, &step);
        } else {
            pba_upstream_teardown(access, success, &step);
        }
        pba_error_keep_first(&first, step, &access->hooks);
    }
    pba_error_keep_first(&first, files, &access->hooks);
    if (first) {
        g_propagate_error(error, first);
        return false;
    }
    return true;
}

/* Whether there is nothing left to be torn down by a later call. */
static bool is_over(PbaAccess *access, const GError *error)
{
    if (pba_error_is_fatal(error)) {
        /* A QEMU that quit has taken the access with it. */
        return error->code == PBA_ERROR_CONNECTION && pba_qmp_is_gone(access->qmp);
    }
    return access->backend == PBA_BACKEND_UPSTREAM && !access->server_up &&
           pba_upstream_is_clean(access);
}

/* Tears down, and keeps what a later call needs if there is something left to be torn down. */
bool pba_tear_down_and_end(PbaAccess *access, bool success, GError **error)
{
    g_autoptr(GError) local = NULL;

    bool done = tear_down(access, success, &local);
    bool over = done || is_over(access, local);
    if (!pba_error_is_fatal(local) && (over || access->recovering)) {
        pba_owner_unmark(access, over);
    }
    if (over) {
        pba_access_end(access);
    } else {
        access->teardown_failed = true;
    }
    pba_qmp_release(access->qmp);
    if (!done) {
        g_propagate_error(error, g_steal_pointer(&local));
    }
    return done;
}

bool pba_access_teardown(PbaAccess *access, bool success, GError **error)
{
    if (!pba_access_require_up(access, error)) {
        return false;
    }
    pba_qmp_release(access->qmp); /* a call that never returned may have left it half used */
    return pba_tear_down_and_end(access, success, error);
}

/* The mechanism file-handle: a virtual file per device over its NBD export. */
#include "access.h"
#include "src/base/base.h"
#include "vfile.h"

static void free_vfile(gpointer vfile)
{
    pba_vfile_free(vfile);
}

static bool start_files(PbaAccess *access, GError **error)
{
    for (guint i = 0; i < access->disks->len; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        PbaVolumeOptions options = {
            .device = disk->device,
            .path = access->socket,
            .bitmap = disk->bitmap_name,
            .size = disk->size,
        };
        /* A device's name may contain anything, so it is not used as the file's name. */
        g_autofree char *path = g_strdup_printf("%s/" PBA_VFILE_PREFIX "%u", access->socket_dir, i);
        bool is_whole = pba_bitmap_status(disk->action) != PBA_BITMAP_STATUS_REUSE;
        PbaVfile *vfile = pba_vfile_start(path, &options, is_whole, error);
        if (!vfile) {
            return false;
        }
        g_ptr_array_add(access->vfiles, vfile);
    }
    return true;
}

static bool serve_and_wait(PbaAccess *access, GError **error)
{
    for (guint i = 0; i < access->vfiles->len; i++) {
        pba_vfile_serve(access->vfiles->pdata[i]);
    }
    for (guint i = 0; i < access->vfiles->len; i++) {
        if (!pba_vfile_wait_ready(access->vfiles->pdata[i], &access->hooks, error)) {
            return false;
        }
    }
    return true;
}

bool pba_access_serve_files(PbaAccess *access, GError **error)
{
    if (access->serves_files) {
        return true;
    }
    /* Files of an earlier attempt may exist, because its end may have failed as well. */
    if (!pba_vfiles_end(access, error)) {
        return false;
    }
    access->vfiles = g_ptr_array_new_with_free_func(free_vfile);
    /* The servers are loaded while QEMU makes the exports, and connect all at once. */
    if (start_files(access, error) && pba_access_export(access, error) &&
        serve_and_wait(access, error)) {
        access->serves_files = true;
        return true;
    }
    GError *step = NULL;
    pba_vfiles_end(access, &step);
    pba_error_keep_first(error, step, &access->hooks);
    return false;
}

int pba_access_open_file(PbaAccess *access, size_t index, GError **error)
{
    if (!access->serves_files || index >= access->vfiles->len) {
        pba_error_set(error, PBA_ERROR_STATE, "no virtual file is being served");
        return -1;
    }
    return pba_vfile_open(access->vfiles->pdata[index], error);
}

bool pba_vfiles_end(PbaAccess *access, GError **error)
{
    GError *first = NULL;

    access->serves_files = false;
    for (guint i = 0; access->vfiles && i < access->vfiles->len; i++) {
        pba_vfile_tell_end(access->vfiles->pdata[i]);
    }
    for (guint i = 0; access->vfiles && i < access->vfiles->len; i++) {
        GError *step = NULL;
        pba_vfile_end(access->vfiles->pdata[i], &access->hooks, &step);
        pba_error_keep_first(&first, step, &access->hooks);
    }
    if (first) {
        g_propagate_error(error, first);
        return false;
    }
    g_clear_pointer(&access->vfiles, g_ptr_array_unref);
    return true;
}

void pba_vfiles_free(PbaAccess *access)
{
    access->serves_files = false;
    g_clear_pointer(&access->vfiles, g_ptr_array_unref);
}

/* The end of an access, for whatever reason. */
#include "backend.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include <unistd.h>

void pba_access_free(PbaAccess *access)
{
    if (!access) {
        return;
    }
    pba_vfiles_free(access);
    /* The server is checked last, because that needs a connection. */
    if (access->socket_dir && access->owner == getpid() && !pba_nbd_server_is_up(access)) {
        pba_run_dir_remove(access);
    }
    pba_owner_forget(access);
    g_string_chunk_free(access->texts);
    g_clear_pointer(&access->options.fleecing, g_hash_table_unref);
    g_free(access->identity);
    g_free(access->guest);
    g_free(access->backup_id);
    g_free(access->socket_dir);
    g_free(access->socket);
    g_free(access->nonce);
    g_free(access->end_mark);
    g_free(access->backend_data);
    pba_block_clear(&access->seen);
    g_clear_pointer(&access->migration, json_object_unref);
    g_ptr_array_unref(access->disks);
    g_ptr_array_unref(access->warnings);
    g_free(access);
}

/* The directory shows recovery that the NBD server does not belong to another program. */
static void leave_run_dir(PbaAccess *access)
{
    pba_log(&access->hooks, PBA_LOG_WARN,
            "the NBD server at '%s' is still up - recover, or the next setup, stops it",
            access->socket);
    pba_run_dir_disown(access);
}

void pba_access_end(PbaAccess *access)
{
    pba_vfiles_free(access);
    if (access->phase == PBA_PHASE_GONE && pba_nbd_server_is_up(access)) {
        /* The VM was not restarted: another program has deleted our marker. */
        leave_run_dir(access);
    }
    pba_run_dir_remove(access);
    pba_owner_forget(access);
    g_ptr_array_set_size(access->disks, 0);
    g_clear_pointer(&access->guest, g_free);
    g_clear_pointer(&access->nonce, g_free);
    g_clear_pointer(&access->end_mark, g_free);
    g_clear_pointer(&access->backup_id, g_free);
    pba_block_clear(&access->seen);
    g_clear_pointer(&access->backend_data, g_free);
    access->has_exported = false;
    access->tied = PBA_TIED_NO;
    if (access->phase != PBA_PHASE_NEW) {
        pba_access_enter(access, PBA_PHASE_NEW);
    }
}

static bool are_all_held(const PbaAccess *access, const PbaBlock *block)
{
    for (guint i = 0; i < access->disks->len; i++) {
        if (!pba_guard_holds(access->disks->pdata[i], block)) {
            return false;
        }
    }
    return true;
}

/* QEMU's state, as far as the teardown needs it. The disks of a dead process' access are not known;
 * the graph shows them. A hold shows that its disk is there, whatever became of the guest device.
 */
static bool query_state(PbaAccess *access, PbaBlock *block, GError **error)
{
    bool with_graph = access->backend->ends_by_graph || access->is_recovery;

    if (!with_graph) {
        block->nodes = pba_block_query_nodes(access->qmp, error);
        if (!block->nodes) {
            return false;
        }
        if (are_all_held(access, block)) {
            block->devices = json_array_new();
            return true;
        }
    }
    return pba_block_query(access->qmp, with_graph, block, error);
}

/* The exports are gone. One query returns our marker and what is to be undone: after a restart of
 * the VM, the nodes of a later access have the same names. */
static bool undo_rest(PbaAccess *access, bool success, bool is_shared, GError **error)
{
    g_auto(PbaBlock) block = {0};
    /* Before the queries: this connects, and in QEMU before 8.2 (06e0f098d612) nbd-server-stop
     * waits forever, with the guest, for a client that is in the middle of the handshake. Two
     * commands later, QEMU has seen the end of this connection. */
    bool server_is_up = pba_nbd_server_is_up(access);

    return query_state(access, &block, error) && pba_owner_require(access, block.nodes, error) &&
           /* Before the rest, which does not need the server: so a later fault leaves no server
            * behind. */
           (!server_is_up || pba_nbd_server_stop(access, is_shared, error)) &&
           access->backend->teardown(access, &block, success, error) &&
           /* Last: nothing depends on it. */
           pba_audit_end(access, &block, error);
}

/* Undoes what is in QEMU. The phase afterwards shows the outcome. */
static bool undo(PbaAccess *access, bool success, GError **error)
{
    GError *first = NULL;
    GError *step = NULL;
    bool is_shared;

    /* Before the exports, which the virtual files read: so their readers get errors and do not wait
     * for a server. */
    if (!pba_vfiles_end(access, &first) && pba_error_is_fatal(first)) {
        g_propagate_error(error, first);
        return false;
    }
    /* The exports first: while a bitmap is exported, Proxmox' QEMU (to 11.0) aborts when the access
     * ends, and a stock one (7.2 to 11.0) refuses to join it. */
    if (pba_exports_remove(access, &is_shared, &step)) {
        undo_rest(access, success, is_shared, &step);
    }
    pba_error_keep_first(&first, step, &access->hooks);
    if (first) {
        g_propagate_error(error, first);
        return false;
    }
    if (access->phase == PBA_PHASE_ENDING) {
        pba_access_enter(access, PBA_PHASE_ENDED);
    }
    return true;
}

/* Whether nothing is left for a later call. */
static bool is_over(PbaAccess *access, const GError *error)
{
    if (error && pba_error_is_fatal(error)) {
        /* If QEMU has quit, the access has ended with it. */
        return error->code == PBA_ERROR_CONNECTION && pba_qmp_is_gone(access->qmp);
    }
    bool server_is_up = pba_nbd_server_is_up(access);
    return !server_is_up && access->backend->is_clean(access);
}

/* The rest of the teardown, when the bitmaps are right, or cannot be made right now. */
static void settle(PbaAccess *access, const GError *error)
{
    bool is_reachable = access->phase != PBA_PHASE_ENDING || !pba_error_is_fatal(error);

    if (access->phase == PBA_PHASE_ENDING) {
        pba_access_enter(access, is_over(access, error) ? PBA_PHASE_ENDED : PBA_PHASE_STUCK);
    }
    /* Our marker is deleted last: without it, other processes would undo what is there. */
    if (is_reachable &&
        (access->phase == PBA_PHASE_COMMITTED || access->phase == PBA_PHASE_ENDED)) {
        pba_owner_unmark(access, true);
    }
}

/* Once the backup is committed, nothing turns it into a failure: the caller would discard it, and
 * the next one would lack its data. Returns whether the outcome is the requested one. */
static bool conclude(PbaAccess *access, GError *error, GError **result)
{
    settle(access, error);
    bool committed = access->phase == PBA_PHASE_COMMITTED;
    if (committed && error) {
        pba_log(&access->hooks, PBA_LOG_WARN,
                "the backup is a success, but not all was undone - the next setup does that: %s",
                error->message);
        g_clear_error(&error);
    }
    if (access->phase != PBA_PHASE_STUCK) {
        pba_access_end(access);
    }
    pba_qmp_settle(access->qmp, false);
    pba_qmp_release(access->qmp);
    if (error) {
        g_propagate_error(result, error);
        return false;
    }
    return true;
}

bool pba_tear_down_and_end(PbaAccess *access, bool success, GError **error)
{
    GError *local = NULL;

    if (access->phase == PBA_PHASE_GONE) {
        pba_owner_set_gone_error(access, error);
        pba_access_end(access);
        return false;
    }
    if (access->phase == PBA_PHASE_CLAIMED) {
        /* Nothing but markers was added. */
        pba_owner_unmark(access, true);
        pba_access_end(access);
        pba_qmp_release(access->qmp);
        return true;
    }
    /* A call that a callback ended may already have joined the bitmaps; then only the rest
     * remains. */
    if (access->phase != PBA_PHASE_COMMITTED && access->phase != PBA_PHASE_ENDED) {
        pba_access_enter(access, PBA_PHASE_ENDING);
        undo(access, success, &local);
    }
    return conclude(access, local, error);
}

/* If a callback exits the program, the call never returns, and Perl destroys the object. */
static void end_interrupted_call(PbaAccess *access)
{
    pba_qmp_settle(access->qmp, false);
    pba_qmp_release(access->qmp); /* half of a reply may be in it */
    if (access->phase == PBA_PHASE_ENDING) {
        pba_access_enter(access, PBA_PHASE_STUCK);
    }
}

PbaOutcome pba_outcome_unknown(const PbaAccess *access, const char *done, const GError *unreachable,
                               GError **error)
{
    g_autofree char *hint =
        g_strdup_printf("whether %s is not known: the next backup may be a full one", done);

    pba_log(&access->hooks, PBA_LOG_WARN,
            "whether %s is not known, because QEMU cannot be asked (%s): the next backup may be a "
            "full one",
            done, unreachable->message);
    pba_error_add_hint(error, hint);
    return PBA_OUTCOME_UNKNOWN;
}

/* The end of a backup whose ID is given. */
static bool note_id(PbaAccess *access, const char *id, GError **error)
{
    if (id && access->tied != PBA_TIED_YES) {
        pba_error_set(error, PBA_ERROR_ARGUMENT,
                      "the access was set up without 'base', which an id for its bitmaps needs");
        return false;
    }
    if (id && !pba_companion_check_id(id, error)) {
        return false;
    }
    for (guint i = 0; id && i < access->disks->len; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        if (g_strcmp0(disk->base, id) == 0) {
            pba_error_set(error, PBA_ERROR_ARGUMENT,
                          "id '%s' is that of its earlier backup - "
                          "each backup needs a new one",
                          id);
            pba_error_add_device(error, disk->device);
            return false;
        }
    }
    g_free(access->backup_id);
    access->backup_id = g_strdup(id);
    return true;
}

bool pba_access_teardown(PbaAccess *access, bool success, const char *id, GError **error)
{
    end_interrupted_call(access);
    if (!pba_access_require_up(access, error) || !note_id(access, id, error)) {
        return false;
    }
    /* The failed attempt may have joined the bitmaps of some disks as after a failure. */
    bool is_too_late =
        success && (access->phase == PBA_PHASE_STUCK || access->phase == PBA_PHASE_ENDED);
    if (!pba_tear_down_and_end(access, success && !is_too_late, error)) {
        return false;
    }
    if (is_too_late) {
        pba_error_set(error, PBA_ERROR_STATE,
                      "the access is ended as after a failed backup, since its first teardown "
                      "failed - the next backup contains what this one contained");
    }
    return !is_too_late;
}

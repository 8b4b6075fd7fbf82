/* Markers in QEMU (owner.c says what they mean) are added before everything else of an access, and
 * deleted after it. */
#include "access.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include <string.h>

/* Read-only, because QEMU (7.2 to 11.0) would otherwise refuse a snapshot of the VM (savevm). */
bool pba_mark_add(PbaAccess *access, const char *name, uint64_t size, GError **error)
{
    return pba_qmp_run(access->qmp, "blockdev-add",
                       pba_json("{'driver': <'null-co'>, 'node-name': <%s>, 'size': <%x>, "
                                "'read-only': <true>}",
                                name, (gint64)size),
                       error);
}

static void unmark(PbaAccess *access, bool all, bool is_known);

/* If two processes add their markers at the same time, at least one of them sees the other, because
 * each looks again afterwards. is_known: QEMU has added the marker. */
static bool mark_and_look(PbaAccess *access, JsonArray **seen, bool *is_known, GError **error)
{
    g_autoptr(GError) refused = NULL;
    uint64_t size;
    bool found;

    pba_owner_note(access);
    g_autofree char *name = pba_owner_mark_name(access, error);
    if (!name || !pba_owner_mark_size(access, &size, error)) {
        return false;
    }
    *is_known = pba_mark_add(access, name, size, &refused);
    if (pba_error_is_fatal(refused)) {
        g_propagate_error(error, g_steal_pointer(&refused));
        return false;
    }
    g_autoptr(JsonArray) nodes = pba_block_query_nodes(access->qmp, error);
    if (!nodes || !pba_owner_find(access, nodes, &found, error)) {
        return false;
    }
    /* A failed teardown of this process may have left the marker behind. */
    if (refused && !found) {
        g_propagate_error(error, g_steal_pointer(&refused));
        return false;
    }
    if (!pba_owner_check(access, nodes, error)) {
        return false;
    }
    if (seen) {
        g_clear_pointer(seen, json_array_unref);
        *seen = g_steal_pointer(&nodes);
    }
    return true;
}

bool pba_owner_mark(PbaAccess *access, JsonArray **nodes, GError **error)
{
    bool is_known = false;

    if (mark_and_look(access, nodes, &is_known, error)) {
        return true;
    }
    /* Only our own marker: the rest may belong to the other process. If QEMU refused the marker,
     * this name may be that of a process at another place with the same PID and start time, for
     * example in another container. */
    unmark(access, false, is_known);
    pba_access_enter(access, PBA_PHASE_NEW);
    return false;
}

/* Our marker is deleted last: while it exists, no other process looks at the rest. */
typedef enum { MARK_STAYS, MARK_OF_END, MARK_OF_OTHERS, MARK_OWN, MARK_RANKS } MarkRank;

static MarkRank rank_of(const PbaAccess *access, JsonObject *node, const char *own, bool all)
{
    g_autofree char *devices = pba_target_prefix(access->target_id, PBA_DEVICE_ROLE);
    g_autofree char *ending = pba_ending_prefix(access->target_id);
    const char *name = node ? pba_json_find_string(node, "node-name") : NULL;

    if (!name || strcmp(name, own) == 0) {
        return name ? MARK_OWN : MARK_STAYS;
    }
    if (!all) {
        return MARK_STAYS;
    }
    return g_str_has_prefix(name, ending) ? MARK_OF_END
           : g_str_has_prefix(name, devices) ||
                   pba_owner_is_dead(access, name, pba_owner_node_size(node))
               ? MARK_OF_OTHERS
               : MARK_STAYS;
}

static bool delete_marks(PbaAccess *access, bool all, GError **error)
{
    g_autofree char *own = pba_owner_mark_name(access, error);
    g_autoptr(JsonArray) nodes = own ? pba_block_query_nodes(access->qmp, error) : NULL;
    bool found;

    if (!nodes || !pba_owner_find(access, nodes, &found, error)) {
        return false;
    }
    for (MarkRank rank = MARK_STAYS + 1; found && rank < MARK_RANKS; rank++) {
        for (guint i = 0; i < json_array_get_length(nodes); i++) {
            JsonObject *node = pba_json_element(nodes, i);
            if (rank_of(access, node, own, all) == rank &&
                !pba_node_delete(access, pba_block_node_name(nodes, i), error)) {
                return false;
            }
        }
    }
    return true;
}

/* Without checking the marker: the names are unique to this access, so nothing else is hit if the
 * VM was restarted. */
static bool delete_own_marks(PbaAccess *access, GError **error)
{
    g_autofree char *own = pba_owner_mark_name(access, error);

    return own && (!access->end_mark || pba_node_delete(access, access->end_mark, error)) &&
           pba_node_delete(access, own, error);
}

/* Over a new connection the removal may succeed. After a time-out it is not tried again: unlike a
 * hold (see guard.c), a marker does not matter once this process has ended. A signal handler that
 * died interrupts one command, not the next one too. */
static bool is_worth_a_retry(const GError *error)
{
    return !g_error_matches(error, PBA_ERROR, PBA_ERROR_TIMEOUT);
}

/* is_known: QEMU has had our marker, so no query is needed. */
static void unmark(PbaAccess *access, bool all, bool is_known)
{
    g_autoptr(GError) error = NULL;

    bool done = !access->is_recovery && is_known && delete_own_marks(access, &error);
    if (!done && !pba_error_is_fatal(error)) {
        /* For the remains of a dead process' access, or if the objects with these names are
         * gone. */
        g_clear_error(&error);
        done = delete_marks(access, all, &error);
    }
    if (!done && is_worth_a_retry(error)) {
        g_clear_error(&error);
        pba_qmp_release(access->qmp);
        done = delete_marks(access, all, &error);
    }
    if (!done) {
        pba_log(
            &access->hooks, PBA_LOG_WARN,
            "the marker of this process stays in QEMU, so that other processes cannot set up an "
            "access until it ends: %s",
            error->message); // NOLINT(clang-analyzer-core.NullDereference): set, as done is false
    }
    pba_owner_forget(access);
}

void pba_owner_unmark(PbaAccess *access, bool all)
{
    unmark(access, all, true);
}

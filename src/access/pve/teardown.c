/* The end of an access by Proxmox' own commands. Some calls crash the VM, so everything that can be
 * checked is checked beforehand. */
#include "pve.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include <string.h>

#define STAYS_UP                                                                                   \
    " was removed while the access was up, and QEMU would crash at a teardown: the access stays "  \
    "up until the VM is stopped"
#define DISK_GONE "the guest device or its node" STAYS_UP
#define BITMAP_GONE "its dirty bitmap" STAYS_UP
#define BITMAP_BUSY                                                                                \
    "another program exports or uses its dirty bitmap, and QEMU would abort at a teardown: "       \
    "end that (block-export-del), then try again"

/* QEMU (pve-qemu-kvm to 11.0.0) crashes when it tears down an access whose bitmap or node was
 * removed in the meantime, and aborts when another program exports the bitmap. */
static const char *find_danger(const PbaDisk *disk, const PbaBlock *block)
{
    JsonObject *bitmap = disk->bitmap_name
                             ? pba_block_find_bitmap(block, disk->bitmap_node, disk->bitmap_name)
                             : NULL;

    /* For a disk without a hold, as in an access of another version. The device's root may now be
     * QEMU's filter, so its node's name does not find the disk. */
    if (!pba_guard_holds(disk, block) &&
        ((disk->qdev && !pba_block_find_device(block, disk->qdev)) ||
         !pba_block_find_node(block, disk->root_node))) {
        return DISK_GONE;
    }
    /* When QEMU ends the access, it removes its own bitmap, and the target's records again. */
    bool is_frozen = bitmap && !pba_json_find_bool(bitmap, "recording");
    if (disk->bitmap_name &&
        (!bitmap || (is_frozen && pba_pve_is_access_up(block) &&
                     !pba_block_find_bitmap(block, disk->bitmap_node, PBA_PVE_BACKGROUND)))) {
        return BITMAP_GONE;
    }
    if (bitmap && pba_json_find_bool(bitmap, "busy")) {
        return BITMAP_BUSY;
    }
    return NULL;
}

/* Whether a node with a background bitmap lacks the target's, or has one that is in use, or a
 * frozen one has no background bitmap. With the early form of the command, the bitmap's name is not
 * known, so any frozen one counts. */
static const char *find_stale_danger(const PbaAccess *access, PbaBitmapWalk at, bool is_up)
{
    bool has_background = false;
    bool has_target = false;
    bool is_frozen = false;
    bool is_busy = false;

    while (pba_bitmaps_next(&at)) {
        if (strcmp(at.name, PBA_PVE_BACKGROUND) == 0) {
            has_background = true;
        } else if (pba_pve_may_be_targets(access, at.name, at.info)) {
            has_target = true;
            is_frozen |= !pba_json_find_bool(at.info, "recording");
            is_busy |= pba_json_find_bool(at.info, "busy");
        }
    }
    if ((has_background && !has_target) || (is_up && is_frozen && !has_background)) {
        return BITMAP_GONE;
    }
    return has_background && is_busy ? BITMAP_BUSY : NULL;
}

/* QEMU's filter above a disk that was unplugged without a hold, or whose hold was deleted since. No
 * name reveals it, but only its snapshot still uses the filter. A node with a name was added by
 * blockdev-add and stays when the filter goes, whether a guest device uses it or not: qemu-server
 * adds a TPM state's volume so. Needs the graph. */
static bool has_lost_disk(const PbaBlock *block, const char *node)
{
    JsonObject *entry = pba_block_find_node(block, node);

    if (!entry || g_strcmp0(pba_json_find_string(entry, "drv"), "copy-before-write") != 0 ||
        !pba_block_has_parent(block, node) ||
        pba_block_has_parent_but(block, node, "snapshot-access")) {
        return false;
    }
    const char *disk = pba_block_find_child(block, node, "file");
    return disk && *disk == '#';
}

/* The same for an access of a dead process, of which only names are known. */
static bool check_stale_safe(PbaAccess *access, const PbaBlock *block, GError **error)
{
    bool is_up = pba_pve_is_access_up(block);
    const char *danger = NULL;
    const char *device = NULL;

    for (guint i = 0; !danger && i < access->disks->len; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        danger = disk->device_gone && !pba_guard_holds(disk, block) ? DISK_GONE : NULL;
        device = disk->device;
    }
    for (guint i = 0; !danger && i < json_array_get_length(block->nodes); i++) {
        device = pba_block_node_name(block->nodes, i);
        danger = has_lost_disk(block, device)
                     ? DISK_GONE
                     : find_stale_danger(access, pba_bitmaps_of(block, device), is_up);
    }
    if (danger) {
        pba_error_set(error, PBA_ERROR_STATE, "%s", danger);
        pba_error_add_command(error, "backup-access-teardown");
        pba_error_add_device(error, device ? device : "");
    }
    return !danger;
}

static bool check_safe(PbaAccess *access, const PbaBlock *block, GError **error)
{
    for (guint i = 0; i < access->disks->len; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        const char *danger = find_danger(disk, block);
        if (danger) {
            pba_error_set(error, PBA_ERROR_STATE, "%s", danger);
            pba_error_add_command(error, "backup-access-teardown");
            pba_error_add_device(error, disk->device);
            return false;
        }
    }
    return true;
}

/* Our objects in QEMU at one moment. */
static bool is_marked_as_ending(const PbaAccess *access, const PbaBlock *block)
{
    g_autofree char *prefix = pba_ending_prefix(access->target_id);
    return pba_block_has_nodes(block, prefix);
}

/* Whether an access with bitmaps is active. */
static bool has_background(const PbaBlock *block)
{
    return pba_block_has_bitmap(block, PBA_PVE_BACKGROUND);
}

static bool has_bitmaps(const PbaAccess *access)
{
    for (guint i = 0; i < access->disks->len; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        if (disk->bitmap_name) {
            return true;
        }
    }
    return false;
}

/* QEMU has cleared the bitmaps, or may have, and the process that requested this got no reply, or
 * is dead: removing them is better than keeping bitmaps that lack bits. They are removed from all
 * disks, because it is unknown which disks the access of a dead process had, and whether their
 * bitmaps had companions. */
static bool remove_bitmaps(PbaAccess *access, const PbaBlock *block, GError **error)
{
    g_autofree char *plain = pba_pve_bitmap(access, false);
    g_autofree char *tied = pba_pve_bitmap(access, true);
    g_autoptr(JsonArray) actions = json_array_new();

    for (guint i = 0; i < json_array_get_length(block->nodes); i++) {
        const char *node = pba_block_node_name(block->nodes, i);
        if (node && pba_tie_may_be(access, false)) {
            pba_actions_add_removal(actions, block, node, plain);
        }
        if (node && pba_tie_may_be(access, true)) {
            pba_actions_add_removal(actions, block, node, tied);
            pba_companion_remove(actions, block, node, access->target_id);
        }
    }
    if (!pba_actions_run(access->qmp, actions, error)) {
        return false;
    }
    pba_log(&access->hooks, PBA_LOG_WARN,
            "whether the backup ended as a success is not known: the next one is a full one");
    return true;
}

/* While the access is exported, no teardown may be sent. */
static bool check_no_exports(PbaAccess *access, GError **error)
{
    bool found;

    if (!pba_exports_find_any(access, &found, error)) {
        return false;
    }
    if (found) {
        pba_error_set(error, PBA_ERROR_STATE,
                      "previous backup of this guest not finished: its exports are still there");
    }
    return !found;
}

static bool tell_teardown(PbaAccess *access, bool tied, bool success, GError **error)
{
    g_autofree char *target = pba_pve_target(access, tied);

    return pba_qmp_run(access->qmp, "backup-access-teardown",
                       pba_json("{'target-id': <%s>, 'success': <%b>}", target, (gboolean)success),
                       error);
}

/* Whether this is QEMU's error for an access or a native backup of another program: then no access
 * of this target is active. Only asked for a dead process. If the error is not recognized, recovery
 * refuses; if it is recognized wrongly, our markers are deleted and QEMU refuses the next setup. No
 * bit is lost. */
static bool is_not_ours(const PbaAccess *access, const GError *error)
{
    return access->is_recovery && error->code == PBA_ERROR_QMP &&
           strstr(error->message, "got target");
}

/* For any error, because a caller's transport may report a time-out with QEMU's words for a
 * refusal. Over a new connection, so that QEMU has handled everything from the previous one. Only
 * bitmaps show the outcome. */
static PbaOutcome find_outcome(PbaAccess *access, GError **error)
{
    g_auto(PbaBlock) block = {0};
    g_autoptr(GError) unreachable = NULL;

    pba_qmp_release(access->qmp);
    if (pba_block_query(access->qmp, false, &block, &unreachable)) {
        GError *gone = NULL;
        /* Another VM may answer: then no step must be taken, because other processes' accesses have
         * the same names. */
        if (!pba_owner_require(access, block.nodes, &gone)) {
            g_clear_error(error);
            g_propagate_error(error, gone);
            return PBA_OUTCOME_UNKNOWN;
        }
        return has_background(&block) ? PBA_OUTCOME_NOT_DONE : PBA_OUTCOME_DONE;
    }
    return pba_outcome_unknown(access, "the access has ended", unreachable, error);
}

static PbaOutcome send_teardown(PbaAccess *access, bool success, GError **error)
{
    GError *local = NULL;

    if (tell_teardown(access, access->tied == PBA_TIED_YES, success, &local)) {
        return PBA_OUTCOME_DONE;
    }
    /* For a dead process, it is unknown which of the two names QEMU was given. */
    if (is_not_ours(access, local)) {
        g_clear_error(&local);
        if (tell_teardown(access, true, success, &local)) {
            return PBA_OUTCOME_DONE;
        }
    }
    PbaOutcome outcome = is_not_ours(access, local) ? PBA_OUTCOME_DONE
                         : has_bitmaps(access)      ? find_outcome(access, &local)
                                                    : PBA_OUTCOME_UNKNOWN;
    if (outcome == PBA_OUTCOME_DONE) {
        g_error_free(local);
    } else {
        g_propagate_error(error, local);
    }
    return outcome;
}

static bool mark_ending(PbaAccess *access, GError **error)
{
    access->end_mark = pba_ending_mark(access->target_id, access->nonce);
    return pba_mark_add(access, access->end_mark, 0, error);
}

static void unmark_ending(PbaAccess *access, GError **first)
{
    GError *step = NULL;

    if (access->end_mark && pba_node_delete(access, access->end_mark, &step)) {
        g_clear_pointer(&access->end_mark, g_free);
    }
    pba_error_keep_first(first, step, &access->hooks);
}

/* The marker is added before QEMU gets the command, and deleted when its reply has been handled. If
 * the process dies in between, or gets no reply, the next one finds the marker. */
static PbaOutcome commit(PbaAccess *access, const PbaBlock *block, GError **error)
{
    /* The IDs before the command, after which a new bitmap has no bits that its companion could
     * get. Whatever becomes of the command, from now on the bitmaps have at least what was written
     * since the instant of this backup: after a failure, that and everything that they had before.
     */
    if (has_bitmaps(access) &&
        (!mark_ending(access, error) || !pba_pve_give_ids(access, block, error))) {
        return error && pba_error_is_fatal(*error) ? PBA_OUTCOME_UNKNOWN : PBA_OUTCOME_NOT_DONE;
    }
    /* From here on, a signal would leave the outcome in doubt. */
    pba_qmp_settle(access->qmp, true);
    PbaOutcome outcome = send_teardown(access, true, error);
    if (outcome == PBA_OUTCOME_DONE) {
        pba_access_enter(access, PBA_PHASE_COMMITTED);
    } else {
        pba_qmp_settle(access->qmp, false);
    }
    return outcome;
}

/* The backup was to be a success, so both the caller and the log are told. */
static void end_as_failure(PbaAccess *access, GError **error)
{
    GError *step = NULL;

    pba_log(&access->hooks, PBA_LOG_WARN,
            "the access is ended as after a failed backup, since it could not be as a success: %s",
            (*error)->message);
    if (send_teardown(access, false, &step) == PBA_OUTCOME_DONE) {
        pba_error_add_hint(error, "the bitmaps are as after a failed backup");
        pba_access_enter(access, PBA_PHASE_ENDED);
    }
    pba_error_keep_first(error, step, &access->hooks);
}

static bool end_as_success(PbaAccess *access, const PbaBlock *block, GError **error)
{
    GError *local = NULL;

    PbaOutcome outcome = commit(access, block, &local);
    if (outcome == PBA_OUTCOME_NOT_DONE) {
        end_as_failure(access, &local);
    }
    if (local) {
        g_propagate_error(error, local);
    }
    return outcome == PBA_OUTCOME_DONE;
}

/* Whether a teardown would not crash QEMU. */
static bool check(PbaAccess *access, const PbaBlock *block, GError **error)
{
    /* For a dead process' access, or without a reply to setup, it is not known whose access is
     * active; only the bitmaps of all nodes show it. */
    if (access->is_recovery) {
        return check_no_exports(access, error) && check_stale_safe(access, block, error);
    }
    const PbaDisk *first = access->disks->pdata[0];

    return check_safe(access, block, error) &&
           (first->snapshot_node ||
            (check_no_exports(access, error) && check_stale_safe(access, block, error)));
}

/* Before the teardown, as for a success: see commit. An error only costs a full backup. */
static bool give_ids_of_failure(PbaAccess *access, const PbaBlock *block, GError **error)
{
    GError *local = NULL;

    if (!access->backup_id || pba_pve_give_ids(access, block, &local)) {
        return true;
    }
    if (pba_error_is_fatal(local)) {
        g_propagate_error(error, local);
        return false;
    }
    pba_log(&access->hooks, PBA_LOG_WARN,
            "the bitmaps do not get the ID of this backup, so the next one may be full: %s",
            local->message);
    g_error_free(local);
    return true;
}

static bool end_as_requested_failure(PbaAccess *access, const PbaBlock *block, GError **error)
{
    /* Only known before the teardown, which removes QEMU's background bitmap. */
    bool is_active = has_background(block);
    bool may_be_committed = is_marked_as_ending(access, block) && !is_active;

    return (!is_active || give_ids_of_failure(access, block, error)) &&
           send_teardown(access, false, error) == PBA_OUTCOME_DONE &&
           /* After the teardown, which crashes QEMU if a bitmap is missing: see find_danger. */
           (!may_be_committed || remove_bitmaps(access, block, error));
}

static bool end(PbaAccess *access, const PbaBlock *block, bool success, GError **error)
{
    /* A dead process that had put no hold on a disk had not sent the command, unless others have
     * deleted its holds: while there is its marker of an end, they must exist. */
    if ((access->disks->len == 0 && !is_marked_as_ending(access, block)) ||
        (!access->is_recovery && pba_pve_has_done_nothing(access, block))) {
        return true;
    }
    if (!check(access, block, error)) {
        return false;
    }
    if (success) {
        return end_as_success(access, block, error);
    }
    return end_as_requested_failure(access, block, error);
}

/* The marker of an earlier try may never have reached QEMU; then there is nothing to delete. */
static void forget_lost_mark(PbaAccess *access, const PbaBlock *block)
{
    if (!pba_block_find_node(block, access->end_mark)) {
        g_clear_pointer(&access->end_mark, g_free);
    }
}

bool pba_pve_teardown(PbaAccess *access, PbaBlock *block, bool success, GError **error)
{
    GError *first = NULL;

    forget_lost_mark(access, block);
    /* After QEMU's own teardown, which crashes (to 11.0) if a disk is missing; not if this teardown
     * is yet to come. */
    if (end(access, block, success, &first) || access->phase == PBA_PHASE_ENDED) {
        /* Before the holds, which show recovery that QEMU must be asked about an access. */
        unmark_ending(access, &first);
        pba_guards_drop(access, &first, block);
    }
    if (first) {
        g_propagate_error(error, first);
        return false;
    }
    return true;
}

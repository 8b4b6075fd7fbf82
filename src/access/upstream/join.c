/* Joins the target's bitmap and the background bitmap. Bits may be too many at any moment, but
 * never too few: a bitmap that cannot be trusted is removed, so that the next backup is a full one.
 *
 * A success takes two steps. The first one commits it: it removes the target's bitmaps and keeps
 * the background ones, which have everything that was written since the instant. A process that
 * finds this state makes a full backup, so nothing depends on whether the reply is seen. The second
 * step, after the reply was handled, makes the target's bitmaps from the background ones. A failure
 * takes one step. */
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include "upstream.h"
#include <string.h>

/* A disk with both bitmaps. */
typedef struct {
    const PbaDisk *disk;
    char *target;           /* name of the target's bitmap */
    GPtrArray *backgrounds; /* names of the others */
} Split;

typedef struct {
    PbaAccess *access;
    const PbaBlock *block; /* what QEMU had before; borrowed */
    GPtrArray *splits;
} Join;

static void split_free(gpointer data)
{
    Split *split = data;

    g_free(split->target);
    g_ptr_array_unref(split->backgrounds);
    g_free(split);
}

static void join_clear(Join *join)
{
    g_clear_pointer(&join->splits, g_ptr_array_unref);
}

G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Join, join_clear)

/* QEMU loads persistent bitmaps as inconsistent if it did not store them when it ended: they can
 * only be removed. */
static bool is_inconsistent(JsonObject *info)
{
    return info && pba_json_find_bool(info, "inconsistent");
}

/* The names of the disk's background bitmap of the access; for a dead process' access, all that
 * exist, both that of its bitmap with a companion and that of the one without. */
static GPtrArray *find_backgrounds(const PbaAccess *access, const PbaBlock *block,
                                   const PbaDisk *disk, bool tied)
{
    GPtrArray *found = g_ptr_array_new_with_free_func(g_free);
    PbaBitmapWalk at = pba_bitmaps_of(block, disk->bitmap_node);
    g_autofree char *own =
        access->is_recovery ? NULL : pba_background_bitmap(access->target_id, access->nonce, tied);

    while (pba_bitmaps_next(&at)) {
        const char *target = pba_background_target(at.name);
        if (target && pba_is_tied_background(at.name) == tied &&
            (own ? strcmp(at.name, own) == 0 : strcmp(target, access->target_id) == 0)) {
            g_ptr_array_add(found, g_strdup(at.name));
        }
    }
    return found;
}

static bool is_any_inconsistent(const PbaBlock *block, const PbaDisk *disk, JsonObject *target,
                                GPtrArray *backgrounds)
{
    bool inconsistent = is_inconsistent(target);

    for (guint i = 0; i < backgrounds->len; i++) {
        inconsistent |=
            is_inconsistent(pba_block_find_bitmap(block, disk->bitmap_node, backgrounds->pdata[i]));
    }
    return inconsistent;
}

/* In mode none, there is only a background bitmap, which nothing depends on. */
static bool has_mode_none(const PbaAccess *access, const PbaDisk *disk)
{
    return !access->is_recovery && disk->mode == PBA_BITMAP_MODE_NONE;
}

/* Removes a bitmap that cannot be trusted, together with its companion. */
static bool drop_bitmap(const Join *join, const PbaDisk *disk, const char *name, GError **error)
{
    PbaAccess *access = join->access;

    if (!pba_bitmap_drop(access, disk, join->block, name, error)) {
        pba_error_add_device(error, disk->device);
        return false;
    }
    if (pba_block_find_bitmap(join->block, disk->bitmap_node, name) &&
        !has_mode_none(access, disk)) {
        pba_log(
            &access->hooks, PBA_LOG_WARN,
            "device %s: bitmap '%s' may lack bits and is removed: the next backup is a full one",
            disk->device, name);
    }
    return true;
}

static bool drop_all(const Join *join, const PbaDisk *disk, const char *target,
                     GPtrArray *backgrounds, GError **error)
{
    const PbaHooks *hooks = &join->access->hooks;
    GError *first = NULL;
    GError *last = NULL;

    for (guint i = 0; i < backgrounds->len; i++) {
        GError *step = NULL;
        drop_bitmap(join, disk, backgrounds->pdata[i], &step);
        pba_error_keep_first(&first, step, hooks);
    }
    drop_bitmap(join, disk, target, &last);
    pba_error_keep_first(&first, last, hooks);
    if (first) {
        g_propagate_error(error, first);
    }
    return !first;
}

/* One of the two bitmaps that the target may have on the disk. */
static bool find_split(Join *join, const PbaDisk *disk, bool tied, GError **error)
{
    const PbaAccess *access = join->access;
    g_autofree char *name = access->backend->bitmap(access, tied);
    JsonObject *target = pba_block_find_bitmap(join->block, disk->bitmap_node, name);
    g_autoptr(GPtrArray) backgrounds = find_backgrounds(access, join->block, disk, tied);
    bool inconsistent = is_any_inconsistent(join->block, disk, target, backgrounds);

    if (target && backgrounds->len > 0 && !inconsistent) {
        Split *split = g_new0(Split, 1);
        split->disk = disk;
        split->target = g_steal_pointer(&name);
        split->backgrounds = g_steal_pointer(&backgrounds);
        g_ptr_array_add(join->splits, split);
        return true;
    }
    if (backgrounds->len > 0) {
        /* Inconsistent, or from a success whose process died before its second step, or was not
         * told of its first one. */
        return drop_all(join, disk, name, backgrounds, error);
    }
    /* Frozen by an access that no longer exists; its background bitmap is gone, too. */
    return !target || inconsistent || pba_json_find_bool(target, "recording") ||
           drop_bitmap(join, disk, name, error);
}

/* Finds the disks with both bitmaps, and removes single ones that are useless. For a dead process'
 * access, it is not known whether its bitmaps had companions. */
static bool find_splits(Join *join, GError **error)
{
    PbaAccess *access = join->access;
    GError *first = NULL;

    for (guint i = 0; i < access->disks->len; i++) {
        for (int tied = 0; tied <= 1; tied++) {
            GError *step = NULL;
            if (pba_tie_may_be(access, tied)) {
                find_split(join, access->disks->pdata[i], tied, &step);
            }
            pba_error_keep_first(&first, step, &access->hooks);
        }
    }
    if (first) {
        g_propagate_error(error, first);
    }
    return !first;
}

/* Adds what a step does to one disk to a transaction. */
typedef void (*SplitStep)(const Join *join, const Split *split, JsonArray *actions);

/* The first action of any step: if our own background bitmap does not exist any more, the access is
 * not ours any more, and QEMU refuses the whole transaction. An action block-dirty-bitmap-enable
 * would instead crash QEMU (7.2 to 11.0) if the bitmap does not exist. */
static void add_merge(const Split *split, JsonArray *actions)
{
    JsonArray *sources = json_array_new();

    for (guint i = 0; i < split->backgrounds->len; i++) {
        json_array_add_element(
            sources, pba_bitmap_ref(split->disk->bitmap_node, split->backgrounds->pdata[i]));
    }
    pba_bitmap_add_merge(actions, split->disk, split->target, sources);
}

static void add_removal(const Split *split, JsonArray *actions)
{
    for (guint i = 0; i < split->backgrounds->len; i++) {
        pba_actions_add_ref(actions, "block-dirty-bitmap-remove", split->disk->bitmap_node,
                            split->backgrounds->pdata[i]);
    }
}

/* The companion stays: without its bitmap it means nothing, and its bits are still needed. */
static void add_commit(G_GNUC_UNUSED const Join *join, const Split *split, JsonArray *actions)
{
    add_merge(split, actions);
    pba_actions_add_ref(actions, "block-dirty-bitmap-remove", split->disk->bitmap_node,
                        split->target);
}

/* Replaces the companion by one with the ID of this backup, or by none if there is no ID. */
static void add_id(JsonArray *actions, const PbaAccess *access, const PbaDisk *disk,
                   const PbaBlock *block)
{
    const char *old = pba_companion_find(block, disk->bitmap_node, access->target_id);

    if (access->backup_id && old) {
        PbaCompanion companion = pba_disk_companion(access, disk, access->backup_id);
        g_autofree char *name = pba_companion_name(&companion);
        pba_companion_add(actions, disk->bitmap_node, name, old, PBA_GRANULARITY,
                          pba_upstream_disk(disk)->persistent);
    }
    pba_companion_remove(actions, block, disk->bitmap_node, access->target_id);
}

/* A transaction does not stop the guest's writes to a disk in an iothread (QEMU 10.0, 11.0). A
 * write that ends between a merge and the next action is only in the background bitmap, until the
 * target's bitmap records. So it is merged once more after that. Without an ID of this backup, the
 * companion stays as it is: the bitmap remains relative to the same backup. */
static void add_failure(const Join *join, const Split *split, JsonArray *actions)
{
    add_merge(split, actions);
    pba_actions_add_ref(actions, "block-dirty-bitmap-enable", split->disk->bitmap_node,
                        split->target);
    add_merge(split, actions);
    if (join->access->backup_id) {
        add_id(actions, join->access, split->disk, join->block);
    }
    add_removal(split, actions);
}

/* The second step of a success. The target's bitmap exists again, with the background bitmap's
 * bits, before that is removed, which alone had them. One transaction adds the bitmap and the
 * companion with the ID of this backup: at no moment is either of them beside one of an earlier
 * backup. */
static void add_finish(const Join *join, const Split *split, JsonArray *actions)
{
    pba_actions_add(actions, "block-dirty-bitmap-add",
                    pba_bitmap_add_arguments(split->disk, split->target));
    add_merge(split, actions);
    if (join->access->tied == PBA_TIED_YES) {
        add_id(actions, join->access, split->disk, join->block);
    }
    add_removal(split, actions);
}

/* One transaction for all disks. */
static bool run_step(const Join *join, SplitStep step, GError **error)
{
    g_autoptr(JsonArray) actions = json_array_new();

    for (guint i = 0; i < join->splits->len; i++) {
        step(join, join->splits->pdata[i], actions);
    }
    return pba_actions_run(join->access->qmp, actions, error);
}

static bool run_single_step(const Join *join, SplitStep step, const Split *split, GError **error)
{
    g_autoptr(JsonArray) actions = json_array_new();

    step(join, split, actions);
    return pba_actions_run(join->access->qmp, actions, error);
}

/* One disk by itself, after the transaction for all has failed. If even that fails, its bitmaps are
 * removed. */
static bool step_or_drop(const Join *join, SplitStep step, const Split *split, GError **error)
{
    GError *local = NULL;

    if (run_single_step(join, step, split, &local)) {
        return true;
    }
    /* After a fatal error, the step may have been executed; the next setup finds out. The target's
     * bitmap has the same name in every process' access, so our marker must still exist. */
    if (!pba_error_is_fatal(local) && pba_owner_holds(join->access)) {
        drop_bitmap(join, split->disk, split->target, NULL);
        for (guint i = 0; i < split->backgrounds->len; i++) {
            pba_bitmap_remove(join->access, split->disk, split->backgrounds->pdata[i], NULL);
        }
    }
    pba_error_add_device(&local, split->disk->device);
    g_propagate_error(error, local);
    return false;
}

static bool step_each(const Join *join, SplitStep step, GError **error)
{
    GError *first = NULL;

    for (guint i = 0; i < join->splits->len && !pba_error_is_fatal(first); i++) {
        GError *local = NULL;
        step_or_drop(join, step, join->splits->pdata[i], &local);
        pba_error_keep_first(&first, local, &join->access->hooks);
    }
    if (first) {
        g_propagate_error(error, first);
    }
    return !first;
}

static bool join_as_failure(const Join *join, GError **error)
{
    g_autoptr(GError) local = NULL;

    if (join->splits->len == 0 || run_step(join, add_failure, &local)) {
        return true;
    }
    if (pba_error_is_fatal(local)) {
        g_propagate_error(error, g_steal_pointer(&local));
        return false;
    }
    return step_each(join, add_failure, error);
}

/* Whether one of these names exists shows the outcome of a transaction. Over a new connection, so
 * that QEMU has handled everything from the previous one. */
static bool look_again(const Join *join, bool *has_targets, bool *has_backgrounds, GError **error)
{
    g_auto(PbaBlock) block = {0};

    *has_targets = *has_backgrounds = false;
    pba_qmp_release(join->access->qmp);
    if (!pba_block_query(join->access->qmp, false, &block, error)) {
        return false;
    }
    for (guint i = 0; i < join->splits->len; i++) {
        const Split *split = join->splits->pdata[i];
        const char *node = split->disk->bitmap_node;
        *has_targets |= pba_block_find_bitmap(&block, node, split->target) != NULL;
        *has_backgrounds |=
            pba_block_find_bitmap(&block, node, split->backgrounds->pdata[0]) != NULL;
    }
    return true;
}

/* After any error, be it a lost reply or a refusal (a caller's transport may report a time-out as
 * one), QEMU's bitmaps show whether the step was executed. */
static PbaOutcome find_outcome(const Join *join, GError **error)
{
    g_autoptr(GError) unreachable = NULL;
    bool has_targets;
    bool has_backgrounds;

    if (look_again(join, &has_targets, &has_backgrounds, &unreachable)) {
        return !has_targets && has_backgrounds ? PBA_OUTCOME_DONE : PBA_OUTCOME_NOT_DONE;
    }
    return pba_outcome_unknown(join->access, "the backup was committed as a success", unreachable,
                               error);
}

/* Whether the background bitmaps are gone: then the second step is done. */
static bool is_finished(const Join *join)
{
    bool has_targets;
    bool has_backgrounds;

    return look_again(join, &has_targets, &has_backgrounds, NULL) && !has_backgrounds;
}

/* After the commit, an error only costs a full backup. If a command was lost, it is sent once
 * more. */
static void finish(const Join *join)
{
    g_autoptr(GError) error = NULL;

    if (run_step(join, add_finish, NULL) || is_finished(join) ||
        run_step(join, add_finish, &error) || is_finished(join)) {
        return;
    }
    pba_log(&join->access->hooks, PBA_LOG_WARN,
            "the backup succeeded, but its bitmaps could not be cleared: %s",
            error->message); // NOLINT(clang-analyzer-core.NullDereference): set by what failed
    if (!pba_error_is_fatal(error)) {
        step_each(join, add_finish, NULL);
    }
}

static PbaOutcome commit(const Join *join, GError **error)
{
    PbaAccess *access = join->access;
    GError *local = NULL;
    PbaOutcome outcome = PBA_OUTCOME_DONE;

    /* From here on, a signal would leave the outcome in doubt. */
    pba_qmp_settle(access->qmp, true);
    if (join->splits->len > 0 && !run_step(join, add_commit, &local)) {
        outcome = find_outcome(join, &local);
    }
    if (outcome == PBA_OUTCOME_DONE) {
        g_clear_error(&local);
        pba_access_enter(access, PBA_PHASE_COMMITTED);
        if (join->splits->len > 0) {
            finish(join);
        }
        return PBA_OUTCOME_DONE;
    }
    pba_qmp_settle(access->qmp, false);
    g_propagate_error(error, local);
    return outcome;
}

/* The backup was to be a success, so both the caller and the log are told. */
static void end_as_failure(const Join *join, GError **error)
{
    GError *step = NULL;

    pba_log(&join->access->hooks, PBA_LOG_WARN,
            "the bitmaps are merged as after a failed backup, because the success could not be "
            "committed: %s",
            (*error)->message);
    if (join_as_failure(join, &step)) {
        pba_error_add_hint(error, "the bitmaps are as after a failed backup");
        pba_access_enter(join->access, PBA_PHASE_ENDED);
    } else {
        g_clear_error(error); /* the first error is in the log, and this one names the device */
        g_propagate_error(error, step);
    }
}

bool pba_bitmaps_join(PbaAccess *access, PbaBlock *block, bool success, GError **error)
{
    g_auto(Join) join = {
        .access = access,
        .block = block,
        .splits = g_ptr_array_new_with_free_func(split_free),
    };
    GError *first = NULL;

    bool found = find_splits(&join, &first);
    if (found && success) {
        PbaOutcome outcome = commit(&join, &first);
        if (outcome == PBA_OUTCOME_NOT_DONE) {
            end_as_failure(&join, &first);
        }
    } else if (!pba_error_is_fatal(first)) {
        GError *step = NULL;
        join_as_failure(&join, &step);
        pba_error_keep_first(&first, step, &access->hooks);
    }
    if (first) {
        g_propagate_error(error, first);
        return false;
    }
    return true;
}

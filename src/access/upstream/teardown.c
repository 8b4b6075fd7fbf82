/* Undoes what setup.c has done, or a part of it, based on QEMU's current state and not on our own
 * records. */
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include "upstream.h"
#include <string.h>

const char *pba_upstream_root(const PbaBlock *block, const PbaDisk *disk)
{
    const PbaUpstreamDisk *nodes = pba_upstream_disk(disk);
    const char *file = pba_block_find_child(block, nodes->raw, "file");

    if (!file || strcmp(file, nodes->filter) == 0) {
        file = pba_block_find_child(block, nodes->filter, "file");
    }
    return file ? file : pba_block_find_child(block, disk->hold_node, "backing");
}

/* Undoes the cut, again of all disks or of none (blockdev-reopen of a list, QEMU since 6.1). */
static void bypass_filters(PbaAccess *access, GError **first, const PbaBlock *block)
{
    g_autoptr(JsonArray) options = json_array_new();
    GError *step = NULL;

    for (guint i = 0; i < access->disks->len; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        const char *file = pba_block_find_child(block, pba_upstream_disk(disk)->raw, "file");
        const char *root = pba_upstream_root(block, disk);
        if (file && root && strcmp(file, root) != 0) {
            json_array_add_element(options, pba_raw_options(disk, root));
        }
    }
    if (json_array_get_length(options) > 0) {
        pba_qmp_run(access->qmp, "blockdev-reopen",
                    pba_json_wrap_array("options", g_steal_pointer(&options)), &step);
        pba_error_keep_first(first, step, &access->hooks);
    }
}

static void drop_fleecing(PbaAccess *access, GError **first, const PbaBlock *block,
                          const PbaDisk *disk)
{
    if (disk->fleecing_node && pba_is_own_node(disk->fleecing_node)) {
        pba_disk_drop_node(access, first, block, disk, disk->fleecing_node);
    }
}

/* QEMU's current state, queried after each step that changes the graph: others may have changed it
 * too, and QEMU may have been restarted and have nodes of a later access with the same names. QEMU
 * does not undo the cut of that access while its snapshot exists (copy-before-write does not share
 * writes then), so the refusal may be the first sign of it. False, with an error: nothing is
 * known. */
static bool look_again(PbaAccess *access, GError **first, PbaBlock *block)
{
    GError *step = NULL;

    if (pba_error_is_fatal(*first)) {
        return false;
    }
    if (pba_block_query(access->qmp, true, block, &step) &&
        pba_owner_require(access, block->nodes, &step)) {
        return true;
    }
    if (access->phase == PBA_PHASE_GONE) {
        g_clear_error(first);
    }
    pba_error_keep_first(first, step, &access->hooks);
    return false;
}

/* Tried again, because others may have added a node since the graph was queried. */
static bool bypass_as_seen(PbaAccess *access, GError **first, PbaBlock *block)
{
    GError *step = NULL;

    if (pba_error_is_fatal(*first)) {
        return false;
    }
    bypass_filters(access, &step, block);
    if (!step) {
        return look_again(access, first, block);
    }
    if (!look_again(access, &step, block)) {
        pba_error_keep_first(first, step, &access->hooks);
        return false;
    }
    g_clear_error(&step);
    bypass_filters(access, first, block);
    return look_again(access, first, block);
}

/* A job that another program began on the raw node during the access. Without our filter, the node
 * shows the disk as it is, so it can stay until the job has ended. */
static bool is_in_use(PbaAccess *access, const PbaBlock *block, const PbaDisk *disk)
{
    g_autofree char *user = pba_company_user(block, pba_upstream_disk(disk)->raw);

    if (user) {
        pba_log(&access->hooks, PBA_LOG_WARN,
                "device %s: node '%s' cannot be removed, because %s uses it - the next backup, or "
                "recover, removes the node when its user has ended. Until then, QEMU refuses "
                "snapshots, mirrors and commits of this disk",
                disk->device, pba_upstream_disk(disk)->raw, user);
    }
    return user != NULL;
}

/* Only if the guest device uses our node: a qom-set of the current value makes QEMU abort (7.2 to
 * 11.0: "old_bs != new_bs"). A device that was unplugged since is not found. */
static bool set_root(PbaAccess *access, const PbaBlock *block, const PbaDisk *disk, GError **error)
{
    const PbaUpstreamDisk *own = pba_upstream_disk(disk);
    const char *root = pba_upstream_root(block, disk);

    if (!own->guest_device || !root || !pba_block_find_user(block, own->raw) ||
        pba_qmp_run(access->qmp, "qom-set",
                    pba_json("{'path': <%s>, 'property': <'drive'>, 'value': <%s>}",
                             own->guest_device, root),
                    error)) {
        return true;
    }
    pba_error_add_device(error, disk->device);
    return false;
}

/* Tried again, because another program may have begun a job since the graph was queried: its filter
 * does not share writes, so QEMU refuses to take the guest device away from it. Returns false if
 * the state of QEMU is unknown. */
static bool give_root_back(PbaAccess *access, GError **first, PbaBlock *block, const PbaDisk *disk,
                           bool *stays)
{
    GError *step = NULL;

    *stays = is_in_use(access, block, disk);
    if (*stays || pba_error_is_fatal(*first) || set_root(access, block, disk, &step)) {
        return true;
    }
    if (!look_again(access, &step, block)) {
        pba_error_keep_first(first, step, &access->hooks);
        return false;
    }
    g_clear_error(&step);
    *stays = is_in_use(access, block, disk) || !set_root(access, block, disk, &step);
    pba_error_keep_first(first, step, &access->hooks);
    return true;
}

static bool undo_disk(PbaAccess *access, GError **first, PbaBlock *block, const PbaDisk *disk)
{
    const PbaUpstreamDisk *nodes = pba_upstream_disk(disk);
    bool stays;

    /* QEMU does not delete a node that has a user. So the order is: the guest device and the guard,
     * which is above it, before the raw node; the filter before the fleecing image, which is its
     * target. */
    if (!give_root_back(access, first, block, disk, &stays)) {
        return false;
    }
    pba_disk_drop_node(access, first, block, disk, nodes->filter);
    /* A raw node that stays keeps its guard: the header of an overlay over it would have its name
     * or its options. */
    if (!stays) {
        pba_disk_drop_node(access, first, block, disk, disk->guard_node);
        pba_disk_drop_node(access, first, block, disk, nodes->raw);
    }
    drop_fleecing(access, first, block, disk);
    /* Last: this may wait for a job, and by now the guest uses its own disk again. */
    if (!pba_error_is_fatal(*first)) {
        GError *step = NULL;
        pba_dirty_source_drop(access, disk, block, &step);
        pba_error_keep_first(first, step, &access->hooks);
    }
    return true;
}

/* Returns false with an error if the state of QEMU is unknown or the access is no longer ours.
 * block is the state afterwards. */
static bool undo_graph(PbaAccess *access, GError **first, PbaBlock *block)
{
    GPtrArray *disks = access->disks;

    /* The snapshots first: while a filter has one, QEMU does not undo the cut (cbw_child_perm, 7.2
     * to 11.0), because the snapshot's content would change. */
    for (guint i = 0; i < disks->len; i++) {
        const PbaDisk *disk = disks->pdata[i];
        pba_disk_drop_node(access, first, block, disk, disk->snapshot_node);
    }
    /* All filters before any guest device: the snapshots are gone, but a filter that remains would
     * still copy what the guest overwrites. */
    if (!bypass_as_seen(access, first, block)) {
        return false;
    }
    for (guint i = 0; i < disks->len; i++) {
        if (!undo_disk(access, first, block, disks->pdata[i])) {
            return false;
        }
    }
    return look_again(access, first, block);
}

bool pba_upstream_teardown(PbaAccess *access, PbaBlock *block, bool success, GError **error)
{
    GError *first = NULL;

    if (!undo_graph(access, &first, block)) {
        g_propagate_error(error, first);
        return false;
    }
    if (success && first && !pba_error_is_fatal(first)) {
        pba_log(&access->hooks, PBA_LOG_WARN,
                "the bitmaps are merged as after a failed backup, because teardown could not undo "
                "everything");
    }
    /* The bitmaps after the graph: until then, the background bitmaps record the guest's writes,
     * whatever happens to the nodes. */
    if (!pba_error_is_fatal(first)) {
        GError *step = NULL;
        pba_bitmaps_join(access, block, success && !first, &step);
        pba_error_keep_first(&first, step, &access->hooks);
    }
    /* After the bitmaps, because they hold the bitmaps' nodes. */
    pba_guards_drop(access, &first, block);
    if (first) {
        g_propagate_error(error, first);
        return false;
    }
    return true;
}

static bool has_background(const PbaAccess *access, const PbaBlock *block, const char *node)
{
    JsonObject *plain = pba_block_find_background(block, node, access->target_id, false);
    JsonObject *tied = pba_block_find_background(block, node, access->target_id, true);

    return (plain && !pba_block_is_sealed(block, node, plain)) ||
           (tied && !pba_block_is_sealed(block, node, tied));
}

bool pba_upstream_is_clean(PbaAccess *access)
{
    g_auto(PbaBlock) block = {0};

    if (!pba_block_query(access->qmp, false, &block, NULL)) {
        return false;
    }
    for (guint i = 0; i < json_array_get_length(block.nodes); i++) {
        const char *name = pba_block_node_name(block.nodes, i);
        if (name && ((pba_is_own_node(name) && !pba_is_owner_mark(name)) ||
                     has_background(access, &block, name))) {
            return false;
        }
    }
    return true;
}

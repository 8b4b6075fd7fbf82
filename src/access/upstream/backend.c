/* The backend's table, and its short functions. */
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include "upstream.h"

/* The raw node is inserted between a guest device and its disk, so a node alone is not enough. */
static bool resolve_node(G_GNUC_UNUSED PbaDisk *disk, const PbaBlock *block, GError **error)
{
    return pba_disk_set_unknown_error(block, error);
}

/* The name of the drive, or else of the guest's device; node names change, at least when a snapshot
 * is taken. */
static char *identify(const char *name, JsonObject *device)
{
    const char *drive = device ? pba_json_find_string(device, "device") : NULL;
    const char *qdev = device ? pba_json_find_string(device, "qdev") : NULL;

    if (drive && *drive) {
        return g_strdup_printf("drive %s", drive);
    }
    if (!qdev || !*qdev) {
        return g_strdup_printf("node %s", name);
    }
    g_autofree char *id = pba_block_qdev_id(qdev);
    g_autofree char *path = pba_block_qom_path(id ? id : qdev);
    return g_strdup_printf("device %s", path);
}

static char *bitmap(const PbaAccess *access, bool tied)
{
    return tied ? pba_tied_bitmap(access->target_id) : pba_target_bitmap(access->target_id);
}

/* Proxmox' QEMU excludes the clean parts from the snapshot from the start; here they are
 * discarded. */
static void after_export(PbaAccess *access)
{
    for (guint i = 0; i < access->disks->len; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        if (disk->action == PBA_BITMAP_ACTION_USED) {
            pba_trim_clean_parts(access, disk);
        }
    }
}

static bool is_background(const char *name)
{
    return pba_background_target(name) != NULL;
}

/* The disk below our nodes. */
static bool resolve_stale(PbaAccess *dead, PbaDisk *disk, const PbaBlock *block, GError **error)
{
    pba_upstream_name_nodes(dead, disk);
    disk->snapshot_node = pba_disk_name(dead, "snap", disk);
    disk->fleecing_node = pba_disk_name(dead, "fleece", disk);

    JsonObject *raw = pba_block_find_node(block, pba_upstream_disk(disk)->raw);
    const char *root = pba_upstream_root(block, disk);
    disk->root_node = g_strdup(root);
    disk->bitmap_node = root ? g_strdup(pba_block_skip_filters(block, root)) : NULL;
    disk->read_only = raw && pba_json_find_bool(raw, "ro");
    JsonObject *user = pba_block_find_user(block, pba_upstream_disk(disk)->raw);
    const char *qdev = user ? pba_json_find_string(user, "qdev") : NULL;
    return (!raw || pba_block_node_size(raw, &disk->size, error)) &&
           (!qdev || pba_upstream_find_guest_device(dead, disk, qdev, error));
}

/* They are split while there is a background bitmap, or the target's bitmap does not record. Below
 * an overlay, they stay so until the image is the top one again: no backup needs them there. */
static const char *find_repair(const PbaBlock *block, const char *node, const char *target_id,
                               bool tied)
{
    g_autofree char *name = tied ? pba_tied_bitmap(target_id) : pba_target_bitmap(target_id);
    JsonObject *target = pba_block_find_bitmap(block, node, name);
    JsonObject *background = pba_block_find_background(block, node, target_id, tied);
    bool is_good = target && !pba_json_find_bool(target, "inconsistent");

    if (pba_block_is_sealed(block, node, target) || pba_block_is_sealed(block, node, background)) {
        return NULL;
    }
    if (is_good && background && !pba_json_find_bool(background, "inconsistent")) {
        return "was joined with its background bitmap, as after a failed backup";
    }
    return background || (is_good && !pba_json_find_bool(target, "recording"))
               ? "was removed, since it may lack bits"
               : NULL;
}

static const char *bitmap_repair(const PbaBlock *block, const char *node, const char *target_id)
{
    const char *repair = find_repair(block, node, target_id, false);
    return repair ? repair : find_repair(block, node, target_id, true);
}

/* QEMU has no such commands. */
static bool find_foreign(G_GNUC_UNUSED const PbaBlock *block, G_GNUC_UNUSED char **target_id)
{
    return false;
}

static bool is_access_up(G_GNUC_UNUSED const PbaBlock *block)
{
    return false;
}

/* What is brought back has the names of a dead process' access, and is undone like one. */
static bool has_strays(G_GNUC_UNUSED const PbaAccess *access, G_GNUC_UNUSED const PbaBlock *block)
{
    return false;
}

static bool drop_strays(G_GNUC_UNUSED PbaAccess *access, G_GNUC_UNUSED GPtrArray *lines,
                        G_GNUC_UNUSED GError **error)
{
    return true;
}

static bool add_status(G_GNUC_UNUSED PbaQmp *qmp, G_GNUC_UNUSED JsonObject *status,
                       G_GNUC_UNUSED GError **error)
{
    return true;
}

const PbaBackend pba_upstream_backend = {
    .name = "upstream",
    .suits = pba_upstream_suits,
    .resolve_node = resolve_node,
    .identify = identify,
    .check = pba_upstream_check,
    .prepare = pba_upstream_prepare,
    .cut = pba_upstream_cut,
    .finish = pba_upstream_finish,
    .teardown = pba_upstream_teardown,
    .is_clean = pba_upstream_is_clean,
    .reads_by_cluster = pba_upstream_reads_by_cluster,
    .stop_waits = pba_upstream_stop_waits,
    .after_export = after_export,
    .plain_bitmap = pba_target_bitmap,
    .bitmap = bitmap,
    .bitmap_target = pba_bitmap_target,
    .is_background = is_background,
    .ends_by_graph = true,
    .resolve_stale = resolve_stale,
    .bitmap_repair = bitmap_repair,
    .find_foreign = find_foreign,
    .is_access_up = is_access_up,
    .has_strays = has_strays,
    .drop_strays = drop_strays,
    .add_status = add_status,
};

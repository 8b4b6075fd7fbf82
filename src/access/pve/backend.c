/* The backend's table, and its short functions. */
#include "pve.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include <string.h>

/* QEMU's command (to 11.0) accepts any node with that name. While an access is active, its filter
 * hides the nodes of guest devices; then QEMU itself must say whose access that is. */
static bool resolve_node(PbaDisk *disk, const PbaBlock *block, GError **error)
{
    JsonObject *node = pba_block_find_node(block, disk->device);

    if (!node) {
        return pba_disk_set_unknown_error(block, error);
    }
    disk->root_node = g_strdup(disk->device);
    return pba_block_node_size(node, &disk->size, error);
}

/* The drive's name: that of its block backend, or of its node. */
static char *identify(const char *name, JsonObject *device)
{
    const char *drive = device ? pba_json_find_string(device, "device") : NULL;

    return g_strdup_printf("drive %s", drive && *drive ? drive : name);
}

/* QEMU's command has done everything. */
static bool finish(G_GNUC_UNUSED PbaAccess *access, G_GNUC_UNUSED GError **error)
{
    return true;
}

/* QEMU (to 11.0) does not report an access without bitmaps. */
static bool is_clean(G_GNUC_UNUSED PbaAccess *access)
{
    return false;
}

/* The commands are newer than the bugs that would require this: see upstream/versions.c. */
static bool reads_by_cluster(G_GNUC_UNUSED const PbaAccess *access)
{
    return false;
}

/* The commands are newer than QEMU 8.2: see upstream/versions.c. */
static bool stop_waits(G_GNUC_UNUSED const PbaAccess *access)
{
    return false;
}

/* QEMU (to 11.0) excludes the clean parts from the snapshot from the start. */
static void after_export(G_GNUC_UNUSED PbaAccess *access)
{
}

static bool is_background(const char *name)
{
    return strcmp(name, PBA_PVE_BACKGROUND) == 0;
}

/* A bitmap of a target has the target's name, or with a companion the prefix and that name. */
static const char *bitmap_target(const char *name)
{
    if (is_background(name) || pba_is_companion(name) || pba_audit_key(name)) {
        return NULL;
    }
    return pba_is_tied_bitmap(name) ? pba_bitmap_target(name) : name;
}

static char *plain_bitmap(const char *target_id)
{
    return g_strdup(target_id);
}

/* QEMU's command only needs the target. */
static bool resolve_stale(PbaAccess *dead, PbaDisk *disk, G_GNUC_UNUSED const PbaBlock *block,
                          G_GNUC_UNUSED GError **error)
{
    pba_guards_name(dead, disk);
    return true;
}

/* QEMU itself joins them when it ends an access. */
static const char *bitmap_repair(G_GNUC_UNUSED const PbaBlock *block,
                                 G_GNUC_UNUSED const char *node,
                                 G_GNUC_UNUSED const char *target_id)
{
    return NULL;
}

/* Only its bitmaps show it: the target's is frozen, and there is a background bitmap. */
static bool find_foreign(const PbaBlock *block, char **target_id)
{
    for (guint i = 0; i < json_array_get_length(block->nodes); i++) {
        PbaBitmapWalk at = pba_bitmaps_of(block, pba_block_node_name(block->nodes, i));
        const char *frozen = NULL;
        bool has_background = false;
        while (pba_bitmaps_next(&at)) {
            const char *target = bitmap_target(at.name);
            has_background |= is_background(at.name);
            frozen = target && !pba_json_find_bool(at.info, "recording") ? target : frozen;
        }
        if (has_background) {
            *target_id = g_strdup(frozen);
            return true;
        }
    }
    return false;
}

/* QEMU's report about the last backup or access, even if it is over. */
static bool add_status(PbaQmp *qmp, JsonObject *status, GError **error)
{
    g_autoptr(GError) refused = NULL;
    g_autoptr(JsonArray) infos = pba_qmp_query_array(qmp, "query-pbs-bitmap-info", NULL, &refused);

    if (pba_error_is_fatal(refused)) {
        g_propagate_error(error, g_steal_pointer(&refused));
        return false;
    }
    if (infos) {
        json_object_set_array_member(status, "bitmap-info", g_steal_pointer(&infos));
    }
    return true;
}

const PbaBackend pba_pve_backend = {
    .name = "pve",
    .suits = pba_pve_suits,
    .resolve_node = resolve_node,
    .identify = identify,
    .check = pba_pve_check,
    .prepare = pba_pve_prepare,
    .cut = pba_pve_cut,
    .finish = finish,
    .teardown = pba_pve_teardown,
    .is_clean = is_clean,
    .reads_by_cluster = reads_by_cluster,
    .stop_waits = stop_waits,
    .after_export = after_export,
    .plain_bitmap = plain_bitmap,
    .bitmap = pba_pve_bitmap,
    .bitmap_target = bitmap_target,
    .is_background = is_background,
    .resolve_stale = resolve_stale,
    .bitmap_repair = bitmap_repair,
    .find_foreign = find_foreign,
    .is_access_up = pba_pve_is_access_up,
    .has_strays = pba_pve_has_strays,
    .drop_strays = pba_pve_drop_strays,
    .add_status = add_status,
};

/* Companions of the bitmaps of Proxmox' commands, which QEMU's own teardown handles. */
#include "pve.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include <string.h>

char *pba_pve_target(const PbaAccess *access, bool tied)
{
    return tied ? pba_tied_bitmap(access->target_id)
                : access->backend->plain_bitmap(access->target_id);
}

char *pba_pve_bitmap(const PbaAccess *access, bool tied)
{
    bool is_named = pba_pve_has_early_form(access) && access->options.bitmap_name;
    const char *name = is_named ? access->options.bitmap_name : access->target_id;

    return tied ? pba_tied_bitmap(name) : access->backend->plain_bitmap(name);
}

/* With the early form of the command, the bitmap's name is not known, so any frozen one counts. */
bool pba_pve_may_be_targets(const PbaAccess *access, const char *name, JsonObject *info)
{
    const char *target = access->backend->bitmap_target(name);

    if (!target) {
        return false;
    }
    return pba_pve_has_early_form(access) ? !pba_json_find_bool(info, "recording")
                                          : strcmp(target, access->target_id) == 0;
}

static void check_base(PbaAccess *access, PbaDisk *disk, const PbaBlock *block, JsonArray *actions)
{
    g_autofree char *bitmap = pba_pve_bitmap(access, true);
    g_autofree char *plain = pba_pve_bitmap(access, false);
    bool exists = pba_block_find_bitmap(block, disk->bitmap_node, bitmap) != NULL;

    /* Another program has an access to this disk, possibly for this target. QEMU refuses ours, but
     * would crash at the end of that one if its bitmap were missing. A guest device's disk is below
     * QEMU's filter then, but not one that is given by its node, such as a TPM state. */
    if (pba_block_find_bitmap(block, disk->bitmap_node, PBA_PVE_BACKGROUND)) {
        return;
    }
    pba_actions_add_removal(actions, block, disk->bitmap_node, plain);
    if (disk->mode == PBA_BITMAP_MODE_USE && exists && pba_tie_fits(access, disk, block)) {
        return;
    }
    if (disk->mode == PBA_BITMAP_MODE_USE && exists) {
        pba_tie_log_reason(access, disk);
    }
    if (disk->mode != PBA_BITMAP_MODE_NONE) { /* else QEMU removes it, and says so */
        pba_actions_add_removal(actions, block, disk->bitmap_node, bitmap);
    }
    pba_companion_remove(actions, block, disk->bitmap_node, access->target_id);
}

bool pba_pve_check_ties(PbaAccess *access, const PbaBlock *block, GError **error)
{
    g_autoptr(JsonArray) actions = json_array_new();

    if (access->tied != PBA_TIED_YES) {
        return true;
    }
    for (guint i = 0; i < access->disks->len; i++) {
        check_base(access, access->disks->pdata[i], block, actions);
    }
    return pba_actions_run(access->qmp, actions, error);
}

/* Action of a transaction: adds the disk's companion with the ID of the access. A new bitmap, which
 * has none yet, has every bit set until QEMU ends the access. */
static void add_companion(JsonArray *actions, const PbaAccess *access, const PbaDisk *disk,
                          const PbaBlock *block)
{
    const char *from = disk->action == PBA_BITMAP_ACTION_USED
                           ? pba_companion_find(block, disk->bitmap_node, access->target_id)
                           : disk->bitmap_name;
    JsonObject *info = from ? pba_block_find_bitmap(block, disk->bitmap_node, from) : NULL;
    PbaCompanion companion = pba_disk_companion(access, disk, access->backup_id);
    g_autofree char *name = pba_companion_name(&companion);
    uint64_t granularity;

    if (info && pba_json_size(info, "granularity", &granularity, NULL)) {
        pba_companion_add(actions, disk->bitmap_node, name, from, granularity, false);
    }
}

/* An earlier try may have given it. */
static bool has_id(const PbaAccess *access, const PbaDisk *disk, const PbaBlock *block)
{
    const char *name = pba_companion_find(block, disk->bitmap_node, access->target_id);

    return name && access->backup_id && g_strcmp0(pba_companion_id(name), access->backup_id) == 0;
}

bool pba_pve_give_ids(PbaAccess *access, const PbaBlock *block, GError **error)
{
    g_autoptr(JsonArray) actions = json_array_new();

    for (guint i = 0; access->tied == PBA_TIED_YES && i < access->disks->len; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        if (!disk->bitmap_name || has_id(access, disk, block)) {
            continue;
        }
        if (access->backup_id) {
            add_companion(actions, access, disk, block);
        }
        pba_companion_remove(actions, block, disk->bitmap_node, access->target_id);
    }
    return pba_actions_run(access->qmp, actions, error);
}

/* Each disk of an access has such a node, which belongs to no disk of the guest. The filter below
 * it does not show an access: a backup job has one, too. */
bool pba_pve_is_access_up(const PbaBlock *block)
{
    for (guint i = 0; i < json_array_get_length(block->nodes); i++) {
        JsonObject *node = pba_json_element(block->nodes, i);
        const char *driver = node ? pba_json_find_string(node, "drv") : NULL;
        if (g_strcmp0(driver, "snapshot-access") == 0) {
            return true;
        }
    }
    return false;
}

static bool is_stray(const PbaAccess *access, const PbaBitmapWalk *at)
{
    g_autofree char *plain = pba_pve_bitmap(access, false);
    g_autofree char *tied = pba_pve_bitmap(access, true);

    return strcmp(at->name, PBA_PVE_BACKGROUND) == 0 ||
           (!pba_json_find_bool(at->info, "recording") &&
            (strcmp(at->name, plain) == 0 || strcmp(at->name, tied) == 0));
}

bool pba_pve_has_strays(const PbaAccess *access, const PbaBlock *block)
{
    PbaBitmapWalk at = pba_bitmaps_everywhere(block);
    bool found = false;

    while (!found && pba_bitmaps_next(&at)) {
        found = is_stray(access, &at);
    }
    return found && !pba_pve_is_access_up(block);
}

static void find_strays(const PbaAccess *access, const PbaBlock *block, const char *node,
                        JsonArray *actions, GPtrArray *lines)
{
    PbaBitmapWalk at = pba_bitmaps_of(block, node);
    bool found = false;

    while (pba_bitmaps_next(&at)) {
        if (is_stray(access, &at)) {
            pba_actions_add_removal(actions, block, node, at.name);
            g_ptr_array_add(lines, pba_line("bitmap '%s' of node '%s' was removed: it is of an "
                                            "access that was not torn down, and came with the "
                                            "guest's state",
                                            at.name, node));
            found = true;
        }
    }
    if (found) {
        pba_companion_remove(actions, block, node, access->target_id);
    }
}

bool pba_pve_drop_strays(PbaAccess *access, GPtrArray *lines, GError **error)
{
    g_auto(PbaBlock) block = {0};
    g_autoptr(GPtrArray) found = g_ptr_array_new_with_free_func(g_free);
    g_autoptr(JsonArray) actions = json_array_new();

    if (!pba_block_query(access->qmp, false, &block, error)) {
        return false;
    }
    guint count = pba_pve_is_access_up(&block) ? 0 : json_array_get_length(block.nodes);
    for (guint i = 0; i < count; i++) {
        find_strays(access, &block, pba_block_node_name(block.nodes, i), actions, found);
    }
    if (!pba_actions_run(access->qmp, actions, error)) {
        return false;
    }
    g_ptr_array_extend_and_steal(lines, g_steal_pointer(&found));
    return true;
}

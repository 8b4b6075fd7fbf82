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

static bool needs_companion(const PbaAccess *access, const PbaDisk *disk)
{
    return access->tied == PBA_TIED_YES && disk->bitmap_name &&
           disk->action != PBA_BITMAP_ACTION_USED;
}

bool pba_pve_open_ties(PbaAccess *access, GError **error)
{
    g_auto(PbaBlock) block = {0};
    g_autoptr(JsonArray) actions = json_array_new();

    for (guint i = 0; i < access->disks->len; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        uint64_t granularity;
        if (!needs_companion(access, disk)) {
            continue;
        }
        if (!block.nodes && !pba_block_query(access->qmp, false, &block, error)) {
            return false;
        }
        JsonObject *info = pba_block_find_bitmap(&block, disk->bitmap_node, disk->bitmap_name);
        if (info && pba_json_size(info, "granularity", &granularity, NULL)) {
            pba_tie_add_open(actions, access, disk, disk->bitmap_name, granularity, false);
        }
    }
    return pba_actions_run(access->qmp, actions, error);
}

static char *companion_name(const PbaAccess *access, const PbaDisk *disk, const char *id)
{
    PbaCompanion companion = pba_disk_companion(access, disk, id);
    return pba_companion_name(&companion);
}

/* The granularity of the companion that the disk gets at the end of an access, if it gets one. */
static bool find_granularity(const PbaAccess *access, const PbaDisk *disk, const PbaBlock *block,
                             const char **companion, uint64_t *granularity)
{
    const char *node = disk->bitmap_name ? disk->bitmap_node : NULL;
    *companion = pba_companion_find(block, node, access->target_id);
    JsonObject *info = *companion ? pba_block_find_bitmap(block, node, *companion) : NULL;

    return info && pba_json_size(info, "granularity", granularity, NULL);
}

/* Replaces every companion of the access' disks by one without an ID, or by none if there will be
 * no ID. The name contains a nonce of this access, so that a late command of an earlier access
 * cannot hit it. */
bool pba_pve_take_ids(PbaAccess *access, const PbaBlock *block, GError **error)
{
    g_autoptr(JsonArray) actions = json_array_new();

    for (guint i = 0; access->tied == PBA_TIED_YES && i < access->disks->len; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        const char *node = disk->bitmap_name ? disk->bitmap_node : NULL;
        g_autofree char *name = companion_name(access, disk, access->nonce);
        const char *old;
        uint64_t granularity;
        bool is_known = find_granularity(access, disk, block, &old, &granularity);
        if (g_strcmp0(old, name) == 0) {
            continue;
        }
        if (access->backup_id && is_known) {
            pba_companion_add(actions, node, name, old, granularity, false);
        }
        pba_companion_remove(actions, block, node, access->target_id);
    }
    return pba_actions_run(access->qmp, actions, error);
}

/* Replaces the companions of pba_pve_take_ids. */
static bool give_ids(PbaAccess *access, const PbaBlock *block, GError **error)
{
    g_autoptr(JsonArray) actions = json_array_new();

    for (guint i = 0; i < access->disks->len; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        g_autofree char *open = companion_name(access, disk, access->nonce);
        g_autofree char *name = companion_name(access, disk, access->backup_id);
        const char *old;
        uint64_t granularity;
        if (find_granularity(access, disk, block, &old, &granularity)) {
            pba_companion_add(actions, disk->bitmap_node, name, open, granularity, false);
            pba_actions_add_ref(actions, "block-dirty-bitmap-remove", disk->bitmap_node, open);
        }
    }
    return pba_actions_run(access->qmp, actions, error);
}

void pba_pve_give_ids(PbaAccess *access, const PbaBlock *block)
{
    g_autoptr(GError) error = NULL;

    if (access->backup_id && !give_ids(access, block, &error)) {
        pba_log(&access->hooks, PBA_LOG_WARN,
                "cannot note in the bitmaps which backup they are relative to, so the next one is "
                "full: %s",
                error->message);
    }
}

/* Nodes of an access that belong to no disk show that one is active. */
bool pba_pve_is_access_up(const PbaBlock *block)
{
    for (guint i = 0; i < json_array_get_length(block->nodes); i++) {
        JsonObject *node = pba_json_element(block->nodes, i);
        const char *driver = node ? pba_json_find_string(node, "drv") : NULL;
        if (g_strcmp0(driver, "snapshot-access") == 0 ||
            g_strcmp0(driver, "copy-before-write") == 0) {
            return true;
        }
    }
    return false;
}

static bool is_stray(const PbaAccess *access, const PbaBitmapWalk *at)
{
    return strcmp(at->name, PBA_PVE_BACKGROUND) == 0 ||
           (!pba_json_find_bool(at->info, "recording") &&
            g_strcmp0(access->backend->bitmap_target(at->name), access->target_id) == 0);
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

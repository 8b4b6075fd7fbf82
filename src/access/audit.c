/* An audit: the whole disk is read, so that what its bitmap calls clean can be compared with the
 * backup that the bitmap is relative to. While the bitmap is used, its clean parts cannot be read
 * (Proxmox' QEMU leaves them out of the snapshot), so the bitmap is started anew, and a copy of it
 * is exported beside it. */
#include "access.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"

/* Whether there is a bitmap to audit; if not, setup says why, and everything is read anyway. */
static bool is_auditable(PbaAccess *access, PbaDisk *disk, const PbaBlock *block)
{
    if (!disk->audit || disk->mode != PBA_BITMAP_MODE_USE) {
        return false;
    }
    g_free(disk->bitmap_node);
    disk->bitmap_node = g_strdup(pba_block_skip_filters(block, disk->root_node));
    return disk->bitmap_node && pba_tie_fits(access, disk, block);
}

/* The copy records writes as soon as it exists, so it lacks none from before the instant. */
static bool add_copy(PbaAccess *access, PbaDisk *disk, const PbaBlock *block, JsonArray *actions,
                     GError **error)
{
    g_autofree char *bitmap = pba_access_bitmap(access);
    JsonObject *info = pba_block_find_bitmap(block, disk->bitmap_node, bitmap);
    uint64_t granularity;

    if (!pba_json_size(info, "granularity", &granularity, error)) {
        return false;
    }
    disk->audit_bitmap = pba_audit_bitmap(access->target_id, access->nonce);
    pba_actions_add(actions, "block-dirty-bitmap-add",
                    pba_json("{'node': <%s>, 'name': <%s>, 'granularity': <%t>}", disk->bitmap_node,
                             disk->audit_bitmap, (guint64)granularity));
    pba_actions_add_merge(actions, disk->bitmap_node, disk->audit_bitmap, bitmap);
    return true;
}

bool pba_audit_begin(PbaAccess *access, const PbaBlock *block, GError **error)
{
    g_autoptr(JsonArray) actions = json_array_new();

    for (guint i = 0; i < access->disks->len; i++) {
        PbaDisk *disk = access->disks->pdata[i];
        if (!is_auditable(access, disk, block)) {
            continue;
        }
        if (!add_copy(access, disk, block, actions, error)) {
            pba_error_add_device(error, disk->device);
            return false;
        }
        disk->mode = PBA_BITMAP_MODE_NEW;
        pba_access_begin_changes(access);
    }
    return pba_actions_run(access->qmp, actions, error);
}

bool pba_audit_freeze(PbaAccess *access, GError **error)
{
    g_autoptr(JsonArray) actions = json_array_new();

    for (guint i = 0; i < access->disks->len; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        if (disk->audit_bitmap) {
            pba_actions_add_ref(actions, "block-dirty-bitmap-disable", disk->bitmap_node,
                                disk->audit_bitmap);
        }
    }
    return pba_actions_run(access->qmp, actions, error);
}

/* Removals of the target's copies. */
static JsonArray *removals(const PbaAccess *access, const PbaBlock *block)
{
    JsonArray *actions = json_array_new();
    PbaBitmapWalk at = pba_bitmaps_everywhere(block);

    while (pba_bitmaps_next(&at)) {
        if (pba_is_audit_of(at.name, access->target_id)) {
            pba_actions_add_ref(actions, "block-dirty-bitmap-remove", at.node, at.name);
        }
    }
    return actions;
}

/* With QEMU's current state: since block, teardown may have deleted the last node that held the
 * disk of an unplugged device, and QEMU refuses the removals of all disks if one of the nodes is
 * gone. */
bool pba_audit_end(PbaAccess *access, const PbaBlock *block, GError **error)
{
    g_autoptr(JsonArray) seen = removals(access, block);
    g_auto(PbaBlock) now = {0};

    if (json_array_get_length(seen) == 0) {
        return true;
    }
    if (!pba_block_query(access->qmp, false, &now, error)) {
        return false;
    }
    g_autoptr(JsonArray) actions = removals(access, &now);
    return pba_actions_run(access->qmp, actions, error);
}

/* The end of an access by Proxmox' own commands. Some calls crash the VM, so everything that can be
 * looked at is looked at before. */
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

/* QEMU crashes when it tears down an access whose bitmap or node was removed meanwhile, and aborts
 * when another program exports the bitmap. */
static const char *find_danger(const PbaDisk *disk, const PbaBlock *block)
{
    JsonObject *bitmap = disk->bitmap_name
                             ? pba_block_find_bitmap(block, disk->bitmap_node, disk->bitmap_name)
                             : NULL;

    /* The device's root may be QEMU's filter now, so its node's name does not find it. */
    if ((disk->qdev && !pba_block_find_device(block, disk->qdev)) ||
        !pba_block_find_node(block, disk->root_node)) {
        return DISK_GONE;
    }
    if (disk->bitmap_name && !bitmap) {
        return BITMAP_GONE;
    }
    if (bitmap && pba_json_find_bool(bitmap, "busy")) {
        return BITMAP_BUSY;
    }
    return NULL;
}

/* Whether a node with a background bitmap lacks the target's, or has one that is in use. The name
 * is not known of a QEMU with the early form of the command; there any frozen one will do. */
static const char *find_left_danger(const PbaAccess *access, JsonObject *node)
{
    JsonArray *bitmaps = pba_json_find_array(node, "dirty-bitmaps");
    bool has_background = false;
    bool has_target = false;
    bool is_busy = false;

    for (guint i = 0; bitmaps && i < json_array_get_length(bitmaps); i++) {
        JsonObject *info = pba_json_element(bitmaps, i);
        const char *name = info ? pba_json_find_string(info, "name") : NULL;
        if (g_strcmp0(name, PBA_PVE_BACKGROUND) == 0) {
            has_background = true;
        } else if (name &&
                   (access->form == PBA_FORM_DEVICES ? strcmp(name, access->target_id) == 0
                                                     : !pba_json_find_bool(info, "recording"))) {
            has_target = true;
            is_busy |= pba_json_find_bool(info, "busy");
        }
    }
    if (has_background && !has_target) {
        return BITMAP_GONE;
    }
    return has_background && is_busy ? BITMAP_BUSY : NULL;
}

/* The same for an access of a dead process, of which only names are known. */
static bool check_left_safe(PbaAccess *access, const PbaBlock *block, GError **error)
{
    const char *danger = NULL;
    const char *device = NULL;

    for (guint i = 0; !danger && i < access->disks->len; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        danger = disk->device_gone ? DISK_GONE : NULL;
        device = disk->device;
    }
    for (guint i = 0; !danger && i < json_array_get_length(block->nodes); i++) {
        JsonObject *node = pba_json_element(block->nodes, i);
        danger = node ? find_left_danger(access, node) : NULL;
        device = pba_block_node_name(block->nodes, i);
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

/* Whether the bitmaps were cleared is not known: better none than ones that lack bits. */
static bool remove_bitmaps(PbaAccess *access, GError **error)
{
    for (guint i = 0; i < access->disks->len; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        if (disk->bitmap_name && !pba_qmp_run(access->qmp, "block-dirty-bitmap-remove",
                                              pba_json("{'node': <%s>, 'name': <%s>}",
                                                       disk->bitmap_node, disk->bitmap_name),
                                              error)) {
            pba_error_add_device(error, disk->device);
            return false;
        }
    }
    pba_log(&access->hooks, PBA_LOG_WARN,
            "whether the backup ended as a success is not known: the next one is a full one");
    return true;
}

/* While an access is exported, nothing that we do may come to a teardown. */
static bool check_no_exports(PbaAccess *access, GError **error)
{
    bool found;

    if (!pba_exports_find(access, PBA_EXPORT_PREFIX, &found, error)) {
        return false;
    }
    if (found) {
        pba_error_set(error, PBA_ERROR_STATE,
                      "previous backup of this guest not finished: its exports are still there");
    }
    return !found;
}

static JsonNode *teardown_arguments(const PbaAccess *access, bool success)
{
    return pba_json("{'target-id': <%s>, 'success': <%b>}", access->target_id, (gboolean)success);
}

/* QEMU's word for an access, or a native backup, of somebody else: then none of this target is up.
 */
static bool is_not_ours(const PbaAccess *access, const GError *error)
{
    return access->recovering && error->code == PBA_ERROR_QMP &&
           strstr(error->message, "got target");
}

bool pba_pve_teardown(PbaAccess *access, bool success, GError **error)
{
    g_auto(PbaBlock) block = {0};
    g_autoptr(GError) refused = NULL;
    const PbaDisk *first = access->disks->len > 0 ? access->disks->pdata[0] : NULL;

    /* A dead process that had marked no device had sent nothing. */
    if (!first) {
        return true;
    }
    /* Without a reply to setup it is not known whose access is up. */
    bool is_known = first->snapshot_node && !access->recovering;
    if ((!is_known && !check_no_exports(access, error)) ||
        !pba_block_query(access->qmp, false, &block, error) ||
        !(access->recovering ? check_left_safe : check_safe)(access, &block, error)) {
        return false;
    }
    if (!pba_qmp_run(access->qmp, "backup-access-teardown", teardown_arguments(access, success),
                     &refused) &&
        !is_not_ours(access, refused)) {
        /* Also where it is QEMU's answer: a caller's transport says the same of a time-out. */
        access->success_unknown |= success;
        g_propagate_error(error, g_steal_pointer(&refused));
        return false;
    }
    return !access->success_unknown || remove_bitmaps(access, error);
}

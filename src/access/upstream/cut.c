/* The instant of all disks, for which a guest may be frozen, and the steps that can only follow
 * it. */
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include "upstream.h"

static bool cut(PbaAccess *access, GError **error)
{
    JsonArray *options = json_array_new();

    for (guint i = 0; i < access->disks->len; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        json_array_add_element(options, pba_raw_options(disk, pba_upstream_disk(disk)->filter));
    }
    return pba_qmp_run(access->qmp, "blockdev-reopen", pba_json_wrap_array("options", options),
                       error);
}

/* Freezes the target's bitmaps, and removes those that mode none does not need. Bits that were set
 * since the cut do no harm. */
static bool freeze_bitmaps(PbaAccess *access, const PbaBlock *block, GError **error)
{
    g_autofree char *name = pba_access_bitmap(access);
    g_autoptr(JsonArray) actions = json_array_new();

    for (guint i = 0; i < access->disks->len; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        if (disk->bitmap_name) {
            pba_actions_add_ref(actions, "block-dirty-bitmap-disable", disk->bitmap_node, name);
        } else {
            pba_bitmap_removals(actions, access, disk, block, name);
        }
    }
    return pba_actions_run(access->qmp, actions, error);
}

static bool add_snapshot(PbaAccess *access, PbaDisk *disk, GError **error)
{
    disk->snapshot_node = pba_disk_name(access, "snap", disk);
    return pba_qmp_run(access->qmp, "blockdev-add",
                       pba_json("{'driver': <'snapshot-access'>, 'node-name': <%s>, 'file': <%s>, "
                                "'discard': <'unmap'>}",
                                disk->snapshot_node, pba_upstream_disk(disk)->filter),
                       error);
}

/* Queries QEMU's bitmaps once more: they may have changed since the access was prepared, and QEMU
 * (7.2, 10.0) crashes on a transaction with a bitmap of a missing node. */
static bool look_again(PbaAccess *access, PbaBlock *now, GError **error)
{
    now->nodes = pba_block_query_nodes(access->qmp, error);
    for (guint i = 0; now->nodes && i < access->disks->len; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        if (!pba_block_find_node(now, disk->bitmap_node) ||
            (disk->bitmap_name &&
             !pba_block_find_bitmap(now, disk->bitmap_node, disk->bitmap_name))) {
            pba_error_set(error, PBA_ERROR_STATE,
                          "the disk or its bitmap was removed while the backup began - try again");
            pba_error_add_device(error, disk->device);
            return false;
        }
    }
    return now->nodes != NULL;
}

bool pba_upstream_cut(PbaAccess *access, GError **error)
{
    g_auto(PbaBlock) now = {0};

    return look_again(access, &now, error) &&
           /* The instant of all disks. */
           cut(access, error) &&
           /* Not before the cut: a write in between would be in the snapshot but not in the bitmap
            * that selects what is read. Not later: guest writes from now on need not be in that
            * bitmap. */
           freeze_bitmaps(access, &now, error);
}

/* Not before the cut: a filter with a user does not share writes of its disk (QEMU's
 * cbw_child_perm, 7.2 to 11.0), and until the cut the guest's writes bypass the filter. */
bool pba_upstream_finish(PbaAccess *access, GError **error)
{
    return pba_upstream_each_disk(access, add_snapshot, error);
}

/* One disk of an access, and deleting its nodes. */
#include "access.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"

void pba_disk_free(gpointer data)
{
    PbaDisk *disk = data;

    g_free(disk->device);
    g_free(disk->key);
    g_free(disk->base);
    g_free(disk->base_disk);
    g_free(disk->identity);
    g_free(disk->reason);
    g_free(disk->qdev);
    g_free(disk->root_node);
    g_free(disk->bitmap_node);
    g_free(disk->snapshot_node);
    g_free(disk->bitmap_name);
    g_free(disk->audit_bitmap);
    g_free(disk->hold_node);
    g_free(disk->guard_node);
    g_free(disk->fleecing_node);
    if (disk->free_backend_data) {
        disk->free_backend_data(disk->backend_data);
    }
    g_free(disk);
}

bool pba_disk_set_unknown_error(const PbaBlock *block, GError **error)
{
    g_autofree char *names = pba_block_disk_names(block);

    pba_error_set(error, PBA_ERROR_ARGUMENT,
                  "there is no such block device in this guest, which has %s",
                  *names ? names : "none");
    return false;
}

char *pba_disk_name(const PbaAccess *access, const char *role, const PbaDisk *disk)
{
    return pba_key_name(access->target_id, role, disk->key);
}

bool pba_node_delete(PbaAccess *access, const char *node, GError **error)
{
    return pba_qmp_run(access->qmp, "blockdev-del", pba_json("{'node-name': <%s>}", node), error);
}

void pba_disk_drop_node(PbaAccess *access, GError **first, const PbaBlock *block,
                        const PbaDisk *disk, const char *node)
{
    GError *step = NULL;

    if (!pba_error_is_fatal(*first) && pba_block_find_node(block, node) &&
        !pba_node_delete(access, node, &step)) {
        pba_error_add_device(&step, disk->device);
        pba_error_keep_first(first, step, &access->hooks);
    }
}

/* One disk of an access. */
#include "access.h"
#include "src/base/base.h"

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

bool pba_disk_set_unknown_error(GError **error)
{
    pba_error_set(error, PBA_ERROR_ARGUMENT, "there is no such block device in this guest");
    return false;
}

char *pba_disk_name(const PbaAccess *access, const char *role, const PbaDisk *disk)
{
    return pba_key_name(access->target_id, role, disk->key);
}

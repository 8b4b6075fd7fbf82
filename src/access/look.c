/* Whether the devices have changed since setup looked. */
#include "access.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include <string.h>

static bool is_as_seen(const PbaDisk *disk, const PbaBlock *now, GError **error)
{
    JsonObject *device = pba_block_find_device(now, disk->device);
    const char *qdev = device ? pba_json_find_string(device, "qdev") : NULL;
    uint64_t size;

    /* A node that the disk is named by may be at another guest device now. */
    if (!device || g_strcmp0(qdev, disk->qdev) != 0 ||
        g_strcmp0(pba_block_device_node(device), disk->root_node) != 0) {
        pba_error_set(error, PBA_ERROR_STATE,
                      "was unplugged, or its medium changed, while the backup began - try again");
        return false;
    }
    if (!pba_block_device_size(device, &size, error)) {
        return false;
    }
    if (size != disk->size) {
        pba_error_set(error, PBA_ERROR_STATE,
                      "was resized from %" G_GUINT64_FORMAT " to %" G_GUINT64_FORMAT
                      " bytes while the backup began - try again",
                      disk->size, size);
    }
    return size == disk->size;
}

bool pba_access_look_again(PbaAccess *access, GError **error)
{
    g_auto(PbaBlock) now = {
        .nodes = json_array_ref(access->seen.nodes),
        .graph = access->seen.graph ? json_object_ref(access->seen.graph) : NULL,
    };

    now.devices = pba_qmp_query_array(access->qmp, "query-block", NULL, error);
    for (guint i = 0; now.devices && i < access->disks->len; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        /* QEMU itself refuses a missing node that no device has. */
        bool has_device = pba_block_find_device(&access->seen, disk->device) != NULL;
        if (has_device && !is_as_seen(disk, &now, error)) {
            pba_error_add_device(error, disk->device);
            return false;
        }
    }
    return now.devices != NULL;
}

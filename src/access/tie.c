/* Which backup the bitmaps of an access are relative to. */
#include "backend.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include <string.h>

char *pba_access_bitmap(const PbaAccess *access)
{
    return access->backend->bitmap(access, access->tied == PBA_TIED_YES);
}

bool pba_tie_may_be(const PbaAccess *access, bool tied)
{
    return access->tied == (tied ? PBA_TIED_YES : PBA_TIED_NO) || access->tied == PBA_TIED_UNKNOWN;
}

bool pba_tie_ask_guest(PbaAccess *access, GError **error)
{
    if (access->tied != PBA_TIED_YES || access->guest) {
        return true;
    }
    g_autoptr(JsonObject) reply = pba_qmp_query_object(access->qmp, "query-uuid", NULL, error);
    access->guest = reply ? g_strdup(pba_json_string(reply, "UUID", error)) : NULL;
    return access->guest != NULL;
}

PbaCompanion pba_disk_companion(const PbaAccess *access, const PbaDisk *disk, const char *id)
{
    return (PbaCompanion){.target_id = access->target_id,
                          .guest = access->guest,
                          .disk = disk->identity,
                          .name = disk->device,
                          .size = disk->size,
                          .id = id};
}

bool pba_tie_fits(const PbaAccess *access, PbaDisk *disk, const PbaBlock *block)
{
    g_autofree char *bitmap = pba_access_bitmap(access);
    PbaCompanion wanted = pba_disk_companion(access, disk, disk->base);

    g_free(disk->reason);
    if (disk->base_disk && strcmp(disk->base_disk, disk->identity) != 0) {
        disk->reason = g_strdup_printf("the base backup is of another disk: %s, not %s",
                                       disk->base_disk, disk->identity);
        return false;
    }
    /* A name may move from one disk to another, so a base that was found by name only counts if the
     * disk had that name at that backup. */
    if (disk->base_disk) {
        wanted.name = NULL;
    }
    disk->reason = pba_companion_problem(block, disk->bitmap_node, bitmap, &wanted);
    return !disk->reason;
}

void pba_tie_log_reason(const PbaAccess *access, const PbaDisk *disk)
{
    pba_log(&access->hooks, PBA_LOG_INFO, "device %s: its bitmap is not used: %s", disk->device,
            disk->reason);
}

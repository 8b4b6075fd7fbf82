/* Letting go of the clean parts of a snapshot (upstream backend).
 *
 * An incremental backup does not read what is clean, so old data there need not be kept when the
 * guest overwrites it. Proxmox' QEMU leaves those parts out from the start; here they are discarded
 * right after the cut. That also makes them unreadable, as they are there. */
#include "access.h"
#include "error.h"

/* In a map with more pieces than this, sending the discards takes longer than it saves. */
#define MAX_REGIONS 256

typedef struct {
    uint64_t offset;
    uint64_t length;
} Region;

/* False if the map cannot be read or has too many regions. */
static bool read_regions(PbaVolume *volume, GArray *regions, GError **error)
{
    Region region;

    while (pba_volume_next_dirty_region(volume, &region.offset, &region.length, error)) {
        if (region.length == 0) {
            return true;
        }
        if (regions->len == MAX_REGIONS) {
            return false;
        }
        g_array_append_val(regions, region);
    }
    return false;
}

static bool discard_gaps(PbaVolume *volume, GArray *regions, GError **error)
{
    uint64_t end = 0;
    uint64_t size = pba_volume_size(volume);

    for (guint i = 0; i <= regions->len; i++) {
        const Region *region = i < regions->len ? &g_array_index(regions, Region, i) : NULL;
        uint64_t begin = region ? region->offset : size;
        if (begin > end && !pba_volume_discard(volume, end, begin - end, error)) {
            return false;
        }
        end = region ? region->offset + region->length : size;
    }
    return true;
}

void pba_trim_clean_parts(PbaAccess *access, const PbaDisk *disk)
{
    g_autoptr(GArray) regions = g_array_new(FALSE, FALSE, sizeof(Region));
    g_autoptr(GError) error = NULL;
    PbaVolumeOptions options = {
        .device = disk->device,
        .path = access->socket,
        .bitmap = disk->bitmap_name,
        .size = disk->size,
    };
    g_autoptr(PbaVolume) volume = pba_volume_open(&options, &access->hooks, &error);

    if (volume && read_regions(volume, regions, &error)) {
        discard_gaps(volume, regions, &error);
    }
    if (error) {
        pba_log(&access->hooks, PBA_LOG_WARN, "the clean parts stay in the snapshot: %s",
                error->message);
    }
}

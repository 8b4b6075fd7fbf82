/* Discards the clean parts of a snapshot (upstream backend).
 *
 * An incremental backup does not read clean parts, so QEMU need not copy their old data when the
 * guest overwrites it. Proxmox' QEMU excludes those parts from the start; here they are discarded
 * right after the cut. This also makes them unreadable, as with Proxmox' QEMU. */
#include "src/base/base.h"
#include "src/volume/volume.h"
#include "upstream.h"

/* With more pieces than this, sending the discards takes longer than they save. */
#define MAX_REGIONS 64

static void append_range(GArray *ranges, uint64_t begin, uint64_t end)
{
    PbaRange range = {.begin = begin, .end = end};

    if (begin < end) {
        g_array_append_val(ranges, range);
    }
}

/* The gaps between the dirty regions. False if the map cannot be read or has too many regions. */
static bool read_clean_ranges(PbaVolume *volume, GArray *ranges, GError **error)
{
    uint64_t offset;
    uint64_t length;
    uint64_t end = 0;

    for (unsigned regions = 0; regions <= MAX_REGIONS; regions++) {
        if (!pba_volume_next_dirty_region(volume, &offset, &length, error)) {
            return false;
        }
        if (length == 0) {
            append_range(ranges, end, pba_volume_size(volume));
            return true;
        }
        append_range(ranges, end, offset);
        end = offset + length;
    }
    return false;
}

void pba_trim_clean_parts(PbaAccess *access, const PbaDisk *disk)
{
    g_autoptr(GArray) ranges = g_array_new(FALSE, FALSE, sizeof(PbaRange));
    g_autoptr(GError) error = NULL;
    PbaVolumeOptions options = {
        .device = disk->device,
        .path = access->socket,
        .bitmap = disk->bitmap_name,
        .size = disk->size,
    };
    PbaNbdVolume *nbd = pba_nbd_open(&options, &access->hooks, &error);
    g_autoptr(PbaVolume) volume = nbd ? &nbd->volume : NULL;

    if (volume && read_clean_ranges(volume, ranges, &error)) {
        pba_nbd_discard_ranges(nbd, (PbaRange *)ranges->data, ranges->len, &error);
    }
    if (error) {
        pba_log(&access->hooks, PBA_LOG_WARN,
                "the clean parts of the snapshot could not be discarded, so the fleecing image may "
                "grow larger: %s",
                error->message);
    }
}

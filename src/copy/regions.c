#include "regions.h"
#include "src/volume/volume.h"

#define MORE 0x80u

PbaRegions *pba_regions_new(void)
{
    PbaRegions *regions = g_new0(PbaRegions, 1);

    regions->bytes = g_byte_array_new();
    return regions;
}

void pba_regions_free(PbaRegions *regions)
{
    if (regions) {
        g_byte_array_unref(regions->bytes);
        g_free(regions);
    }
}

static void put(PbaRegions *regions, uint64_t number)
{
    uint8_t byte;

    do {
        byte = (uint8_t)(number & ~MORE);
        number >>= 7;
        byte |= number ? MORE : 0;
        g_byte_array_append(regions->bytes, &byte, 1);
    } while (number);
}

static uint64_t get(const PbaRegions *regions, PbaRegionsCursor *cursor)
{
    uint64_t number = 0;
    unsigned shift = 0;
    uint8_t byte;

    do {
        byte = regions->bytes->data[cursor->next++];
        number |= (uint64_t)(byte & ~MORE) << shift;
        shift += 7;
    } while (byte & MORE);
    return number;
}

/* The lowest bit distinguishes bytes and clusters. Volumes are smaller than 2^63. */
static void put_distance(PbaRegions *regions, uint64_t distance)
{
    put(regions, distance % PBA_CLUSTER ? distance << 1 | 1 : distance / PBA_CLUSTER << 1);
}

static uint64_t get_distance(const PbaRegions *regions, PbaRegionsCursor *cursor)
{
    uint64_t number = get(regions, cursor);

    return number & 1 ? number >> 1 : (number >> 1) * PBA_CLUSTER;
}

void pba_regions_add(PbaRegions *regions, uint64_t offset, uint64_t length)
{
    put_distance(regions, offset - regions->end);
    put_distance(regions, length);
    regions->end = offset + length;
}

void pba_regions_take(const PbaRegions *regions, PbaRegionsCursor *cursor, uint64_t *offset,
                      uint64_t *length)
{
    *offset = cursor->end;
    *length = 0;
    if (cursor->next < regions->bytes->len) {
        *offset += get_distance(regions, cursor);
        *length = get_distance(regions, cursor);
        cursor->end = *offset + *length;
    }
}

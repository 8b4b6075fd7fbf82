#include "regions.h"

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

static uint64_t get(PbaRegions *regions)
{
    uint64_t number = 0;
    unsigned shift = 0;
    uint8_t byte;

    do {
        byte = regions->bytes->data[regions->next++];
        number |= (uint64_t)(byte & ~MORE) << shift;
        shift += 7;
    } while (byte & MORE);
    return number;
}

void pba_regions_add(PbaRegions *regions, uint64_t offset, uint64_t length)
{
    put(regions, offset - regions->added);
    put(regions, length);
    regions->added = offset + length;
}

void pba_regions_take(PbaRegions *regions, uint64_t *offset, uint64_t *length)
{
    *offset = regions->taken;
    *length = 0;
    if (regions->next < regions->bytes->len) {
        *offset += get(regions);
        *length = get(regions);
        regions->taken = *offset + *length;
    }
}

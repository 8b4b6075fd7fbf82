/* Operations on a volume that do not depend on its source. */
#include "volume.h"
#include "src/base/base.h"
#include <inttypes.h>
#include <string.h>

#define MAX_READ (32u << 20)

void pba_volume_break(PbaVolume *volume, const GError *error)
{
    if (!volume->broken) {
        volume->broken = g_strdup(error->message);
    }
}

bool pba_volume_check(const PbaVolume *volume, GError **error)
{
    if (!volume->broken) {
        return true;
    }
    pba_error_set(error, PBA_ERROR_NBD,
                  "the volume cannot be used any more after an earlier error - %s", volume->broken);
    return false;
}

uint64_t pba_volume_size(const PbaVolume *volume)
{
    return volume->size;
}

static bool check_range(const PbaVolume *volume, uint64_t offset, uint64_t length, GError **error)
{
    if (length > 0 && offset <= volume->size && length <= volume->size - offset) {
        return true;
    }
    pba_error_set(error, PBA_ERROR_ARGUMENT,
                  "the range at offset %" PRIu64 " of length %" PRIu64
                  " is empty or not inside the volume of %" PRIu64 " bytes",
                  offset, length, volume->size);
    pba_error_add_device(error, volume->device);
    return false;
}

bool pba_volume_pread(PbaVolume *volume, void *buffer, uint64_t offset, uint64_t length,
                      GError **error)
{
    if (!check_range(volume, offset, length, error)) {
        return false;
    }
    if (length > MAX_READ) {
        pba_error_set(error, PBA_ERROR_ARGUMENT, "a single read has at most %u bytes, not %" PRIu64,
                      MAX_READ, length);
        pba_error_add_device(error, volume->device);
        return false;
    }
    return volume->reader->pread(volume, buffer, offset, length, error);
}

PbaRange pba_volume_whole_clusters(const PbaVolume *volume, PbaRange range)
{
    return pba_whole_clusters(range, volume->size, volume->sizes.cluster);
}

bool pba_volume_discard(PbaVolume *volume, uint64_t offset, uint64_t length, GError **error)
{
    if (!check_range(volume, offset, length, error)) {
        return false;
    }
    PbaRange range = pba_volume_whole_clusters(volume, (PbaRange){offset, offset + length});
    for (uint64_t at = range.begin; at < range.end; at += PBA_MAX_DISCARD) {
        if (!volume->reader->discard(volume, at, MIN(range.end - at, PBA_MAX_DISCARD), error)) {
            return false;
        }
    }
    return true;
}

PbaMap *pba_volume_map(PbaVolume *volume, uint64_t begin)
{
    return volume->reader->new_map(volume, begin);
}

void pba_map_free(PbaMap *map)
{
    if (map) {
        map->reader->free_map(map);
    }
}

bool pba_volume_next_region(PbaVolume *volume, PbaMap *map, uint64_t *offset, uint64_t *length,
                            bool *later, GError **error)
{
    if (later) {
        *later = false;
    }
    return pba_volume_check(volume, error) &&
           volume->reader->next_region(volume, map, offset, length, later, error);
}

bool pba_volume_next_dirty_region(PbaVolume *volume, uint64_t *offset, uint64_t *length,
                                  GError **error)
{
    return pba_volume_next_region(volume, volume->map, offset, length, NULL, error);
}

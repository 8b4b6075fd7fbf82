/* Which parts of a volume are copied: region after region, each split at its holes. */
#include "course.h"

#define SECTOR 4096u

static bool next_known(PbaCourse *course, uint64_t *offset, uint64_t *length, GError **error)
{
    *offset = course->known_end;
    if (!pba_digest_file_next(pba_digests_known(course->digests), offset, length, error)) {
        return false;
    }
    course->known_end = *offset + *length;
    return true;
}

static bool next_region(PbaCourse *course, uint64_t *offset, uint64_t *length, bool *later,
                        GError **error)
{
    if (course->only_known) {
        return next_known(course, offset, length, error);
    }
    return pba_volume_next_region(course->volume, course->map, offset, length, later, error) &&
           (*later || *length == 0 || !course->digests ||
            pba_digests_check_region(course->digests, *offset, *length, error));
}

static bool begin_region(PbaCourse *course, GError **error)
{
    uint64_t offset;
    uint64_t length;
    bool later = false;

    if (!next_region(course, &offset, &length, &later, error)) {
        return false;
    }
    if (later || length == 0) {
        course->next = later ? PBA_NEXT_LATER : PBA_NEXT_NOTHING;
        return true;
    }
    course->regions++;
    course->offset = offset;
    course->left = length;
    course->next = PBA_NEXT_UNKNOWN;
    if (course->holes) {
        pba_holes_begin(course->holes, offset, length);
    }
    return true;
}

/* What the rest of the region starts with. */
static void find_next(PbaCourse *course)
{
    if (course->holes) {
        course->next = pba_holes_next(course->holes, course->offset, &course->next_length);
    } else {
        course->next = PBA_NEXT_DATA;
        course->next_length = course->left;
    }
}

bool pba_course_next(PbaCourse *course, GError **error)
{
    if (course->left == 0 && !begin_region(course, error)) {
        return false;
    }
    if (course->left > 0 && course->next < PBA_NEXT_DATA) {
        find_next(course);
    }
    return true;
}

uint32_t pba_course_length(const PbaCourse *course, const PbaSink *sink, uint32_t max,
                           uint32_t align)
{
    if (course->next_length <= max) {
        return (uint32_t)course->next_length;
    }
    uint32_t unit = max >= sink->block && sink->block ? sink->block
                    : max >= PBA_CLUSTER              ? PBA_CLUSTER
                                                      : SECTOR;
    unit = MAX(unit, align);
    uint64_t end = (course->offset + max) / unit * unit;
    return end > course->offset ? (uint32_t)(end - course->offset) : max;
}

void pba_course_take(PbaCourse *course, uint32_t length)
{
    course->offset += length;
    course->left -= length;
    course->next_length -= length;
    if (course->next_length == 0) {
        course->next = PBA_NEXT_UNKNOWN;
    }
}

static bool count_dirty(PbaVolume *volume, uint64_t *total, GError **error)
{
    uint64_t offset;
    uint64_t length;
    PbaMap *map = pba_volume_map(volume, 0);
    bool read;

    do {
        read = pba_volume_next_region(volume, map, &offset, &length, NULL, error);
        *total += read ? length : 0;
    } while (read && length > 0);
    pba_map_free(map);
    return read;
}

bool pba_course_total(const PbaCourse *course, uint64_t *total, GError **error)
{
    PbaCourse known = {.digests = course->digests};
    uint64_t offset;
    uint64_t length = 1;

    *total = 0;
    if (!course->only_known) {
        return count_dirty(course->volume, total, error);
    }
    while (length > 0) {
        if (!next_known(&known, &offset, &length, error)) {
            return false;
        }
        *total += length;
    }
    return true;
}

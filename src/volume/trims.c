#include "trims.h"

PbaRange pba_whole_clusters(PbaRange range, uint64_t size, uint64_t cluster)
{
    uint64_t begin = (range.begin + cluster - 1) / cluster * cluster;
    uint64_t end = range.end == size ? size : range.end / cluster * cluster;

    return (PbaRange){begin, MAX(begin, end)};
}

static void delete_range(PbaTrims *trims, unsigned index)
{
    trims->count--;
    for (unsigned i = index; i < trims->count; i++) {
        trims->ranges[i] = trims->ranges[i + 1];
    }
}

static bool insert_range(PbaTrims *trims, unsigned index, PbaRange range)
{
    if (trims->count == PBA_TRIMS_MAX) {
        return false;
    }
    for (unsigned i = trims->count; i > index; i--) {
        trims->ranges[i] = trims->ranges[i - 1];
    }
    trims->ranges[index] = range;
    trims->count++;
    return true;
}

bool pba_trims_add(PbaTrims *trims, uint64_t offset, uint64_t length)
{
    PbaRange range = {offset, offset + length};
    unsigned next = 0;

    while (next < trims->count && trims->ranges[next].begin < offset) {
        next++;
    }
    bool joins_next = next < trims->count && trims->ranges[next].begin == range.end;
    if (next > 0 && trims->ranges[next - 1].end == offset) {
        trims->ranges[next - 1].end = joins_next ? trims->ranges[next].end : range.end;
        if (joins_next) {
            delete_range(trims, next);
        }
        return true;
    }
    if (joins_next) {
        trims->ranges[next].begin = offset;
        return true;
    }
    return insert_range(trims, next, range);
}

/* The part of a range that one request may cover. */
static PbaRange next_discard(const PbaTrims *trims, PbaRange range)
{
    PbaRange whole = pba_whole_clusters(range, trims->size, trims->cluster);

    whole.end = MIN(whole.end, whole.begin + PBA_MAX_DISCARD);
    return whole;
}

bool pba_trims_take(PbaTrims *trims, uint64_t at_least, PbaRange *range)
{
    for (unsigned i = 0; i < trims->count; i++) {
        PbaRange from = trims->ranges[i];
        PbaRange whole = next_discard(trims, from);
        if (whole.end - whole.begin < at_least || whole.end == whole.begin) {
            continue;
        }
        /* The part of a cluster before it is dropped if it would need another range and there is no
         * room. */
        trims->ranges[i].begin = whole.end;
        if (whole.end == from.end) {
            delete_range(trims, i);
        }
        if (whole.begin > from.begin) {
            insert_range(trims, i, (PbaRange){from.begin, whole.begin});
        }
        *range = whole;
        return true;
    }
    return false;
}

bool pba_trims_take_first(PbaTrims *trims, PbaRange *range)
{
    if (trims->count == 0) {
        return false;
    }
    *range = next_discard(trims, trims->ranges[0]);
    if (range->end > range->begin && range->end + trims->cluster <= trims->ranges[0].end) {
        trims->ranges[0].begin = range->end;
    } else {
        delete_range(trims, 0);
    }
    return true;
}

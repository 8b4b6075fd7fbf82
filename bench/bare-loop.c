/*
 * The floor of the dirty region benchmark: a minimal program with libnbd that reads a dirty bitmap.
 * Counts regions and bytes, and prints them with its time.
 *
 *     bare-loop URI CONTEXT [first]
 *
 * With "first", it ends at the first dirty region.
 */

#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bare.h"

/* Aligned, and below 4 GiB, the limit of older servers. */
#define MAX_REQUEST (UINT64_C(4) * 1024 * 1024 * 1024 - 1024 * 1024)

struct count {
    uint64_t offset;
    uint64_t regions;
    uint64_t bytes;
    bool dirty;
};

static int on_extents(void *data, const char *context, uint64_t offset, uint32_t *entries,
                      size_t n_entries, int *error)
{
    struct count *count = data;

    (void)context;
    (void)error;
    for (size_t i = 0; i + 1 < n_entries; i += 2) {
        bool dirty = entries[i + 1] & 1;

        if (dirty) {
            count->bytes += entries[i];
            count->regions += !count->dirty;
        }
        count->dirty = dirty;
        offset += entries[i];
    }
    count->offset = offset;
    return 0;
}

static long peak_kib(void)
{
    char line[256];
    long kib = -1;
    FILE *status = fopen("/proc/self/status", "r");

    while (status && fgets(line, sizeof(line), status)) {
        if (sscanf(line, "VmHWM: %ld", &kib) == 1) {
            break;
        }
    }
    if (status) {
        fclose(status);
    }
    return kib;
}

static void go_through(struct nbd_handle *nbd, struct count *count, bool only_first)
{
    int64_t size = nbd_get_size(nbd);

    if (size < 0) {
        fail("size");
    }
    while (count->offset < (uint64_t)size && !(only_first && count->regions)) {
        uint64_t before = count->offset;
        uint64_t left = (uint64_t)size - before;
        nbd_extent_callback callback = {.callback = on_extents, .user_data = count};

        if (nbd_block_status(nbd, left < MAX_REQUEST ? left : MAX_REQUEST, before, callback, 0)) {
            fail("block status");
        }
        if (count->offset <= before) {
            fprintf(stderr, "no progress at %" PRIu64 "\n", before);
            exit(EXIT_FAILURE);
        }
    }
}

int main(int argc, char **argv)
{
    struct count count = {0};
    bool only_first = argc > 3 && strcmp(argv[3], "first") == 0;

    if (argc < 3) {
        fprintf(stderr, "usage: %s URI CONTEXT [first]\n", argv[0]);
        return EXIT_FAILURE;
    }
    long memory = peak_kib();
    double start = now();
    struct nbd_handle *nbd = nbd_create();

    if (!nbd || nbd_add_meta_context(nbd, argv[2]) || nbd_connect_uri(nbd, argv[1])) {
        fail("connect");
    }
    go_through(nbd, &count, only_first);
    printf("%" PRIu64 " %" PRIu64 " %.6f %ld\n", count.regions, count.bytes, now() - start,
           peak_kib() - memory);
    nbd_shutdown(nbd, 0);
    nbd_close(nbd);
    return EXIT_SUCCESS;
}

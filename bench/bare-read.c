/*
 * The floor of the increment's copy: a minimal program with libnbd that reads pieces of a disk.
 * Reads LENGTH bytes every STEP bytes, over one connection, with many requests in flight, and
 * prints bytes and seconds.
 *
 *     bare-read URI LENGTH STEP
 */

#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

#include "bare.h"

#define IN_FLIGHT 64

struct request {
    char *buffer;
    bool busy;
};

static int on_read(void *data, int *error)
{
    struct request *request = data;

    if (*error) {
        fprintf(stderr, "read: error %d\n", *error);
        exit(EXIT_FAILURE);
    }
    request->busy = false;
    return 1;
}

static int on_extents(void *data, const char *context, uint64_t offset, uint32_t *entries,
                      size_t n_entries, int *error)
{
    (void)data, (void)context, (void)offset, (void)entries, (void)n_entries, (void)error;
    return 0;
}

/* After one answer of this kind, qemu-nbd keeps its buffers and is faster. A copy asks too. */
static void ask_for_status(struct nbd_handle *nbd)
{
    nbd_extent_callback callback = {.callback = on_extents};
    int64_t size = nbd_get_size(nbd);

    if (nbd_can_meta_context(nbd, LIBNBD_CONTEXT_BASE_ALLOCATION) == 1 &&
        nbd_block_status(nbd, size < 1 << 30 ? size : 1 << 30, 0, callback, 0) == -1) {
        fail("block status");
    }
}

static uint64_t read_pieces(struct nbd_handle *nbd, uint64_t length, uint64_t step)
{
    struct request requests[IN_FLIGHT] = {0};
    uint64_t size = (uint64_t)nbd_get_size(nbd);
    uint64_t bytes = 0;

    for (int i = 0; i < IN_FLIGHT; i++) {
        requests[i].buffer = malloc(length);
    }
    for (uint64_t offset = 0; offset + length <= size || nbd_aio_in_flight(nbd) > 0;) {
        for (int i = 0; i < IN_FLIGHT && offset + length <= size; i++) {
            nbd_completion_callback callback = {.callback = on_read, .user_data = &requests[i]};
            if (requests[i].busy) {
                continue;
            }
            requests[i].busy = true;
            if (nbd_aio_pread(nbd, requests[i].buffer, length, offset, callback, 0) == -1) {
                fail("read");
            }
            offset += step;
            bytes += length;
        }
        if (nbd_poll(nbd, -1) == -1) {
            fail("poll");
        }
    }
    return bytes;
}

int main(int argc, char **argv)
{
    if (argc != 4) {
        fprintf(stderr, "usage: %s URI LENGTH STEP\n", argv[0]);
        return EXIT_FAILURE;
    }
    double start = now();
    struct nbd_handle *nbd = nbd_create();

    if (!nbd || nbd_set_pread_initialize(nbd, false) ||
        nbd_add_meta_context(nbd, LIBNBD_CONTEXT_BASE_ALLOCATION) ||
        nbd_connect_uri(nbd, argv[1])) {
        fail("connect");
    }
    ask_for_status(nbd);
    uint64_t bytes = read_pieces(nbd, strtoull(argv[2], NULL, 10), strtoull(argv[3], NULL, 10));
    printf("%" PRIu64 " %.6f\n", bytes, now() - start);
    nbd_shutdown(nbd, 0);
    nbd_close(nbd);
    return EXIT_SUCCESS;
}

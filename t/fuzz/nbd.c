/* An NBD server (NBD spec: fixed newstyle, structured replies) that answers as the input says. Its
 * first three bytes are the disk's size, what the client does and how the server presents itself;
 * then there is a record for each answer: kind, length, bytes (see answer_record). After the last
 * record all answers are good ones. The server is in nbd-server.c. */
#include "nbd.h"
#include "src/volume/volume.h"

/* The limit for one input. */
#define MAX_REGIONS 200

/* What the client does, a bit each. */
#define DO_COPY 1u
#define DO_READ 2u
#define DO_DISCARD 4u
#define WITHOUT_BITMAP 8u
#define WITH_PROGRESS 16u
#define KNOWS_SIZE 32u

static const uint64_t sizes[] = {0,
                                 1,
                                 512,
                                 4608,
                                 65536,
                                 1 << 20,
                                 (1 << 20) + 512,
                                 64 << 20,
                                 UINT64_C(300) << 20,
                                 UINT64_C(3) << 30,
                                 (UINT64_C(5) << 30) + 4608,
                                 UINT64_C(20) << 30,
                                 UINT64_C(1) << 44,
                                 INT64_MAX};

static const char *socket_path;

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    socket_path = nbd_listen();
    return 0;
}

/* The client */

static bool take_data(void *opaque, uint64_t offset, const void *data, size_t length)
{
    uint64_t *end = opaque;

    CHECK(length > 0 && offset >= *end && offset <= input.size && length <= input.size - offset);
    CHECK(((const char *)data)[0] == ((const char *)data)[length - 1] || length > 1);
    *end = offset + length;
    return true;
}

static bool take_progress(void *opaque, uint64_t done, uint64_t total)
{
    (void)opaque;
    (void)done; /* a map that changes in between is an error at the end */
    CHECK(total <= input.size);
    return true;
}

static void copy(PbaVolume *volume, unsigned does)
{
    PbaCopyStatistics statistics;
    GError *error = NULL;
    uint64_t end = 0;
    PbaCopyOptions options = {
        .limit_fd = -1,
        .fd = -1,
        .write = take_data,
        .opaque = &end,
        .progress = does & WITH_PROGRESS ? take_progress : NULL,
        .request_size = 4096,
        .connections = 3,
        .discard = does & DO_DISCARD,
    };

    bool done = pba_volume_copy(volume, &options, &statistics, &error);
    CHECK(statistics.bytes_read == statistics.bytes_written + statistics.bytes_zero || !done);
    check_outcome(done, &error);
}

static void use_region(PbaVolume *volume, unsigned does, uint64_t offset, uint64_t length)
{
    static char buffer[4096];
    GError *error = NULL;

    if (does & DO_READ) {
        check_outcome(pba_volume_pread(volume, buffer, offset, MIN(length, sizeof(buffer)), &error),
                      &error);
    }
    if (does & DO_DISCARD) {
        check_outcome(pba_volume_discard(volume, offset, length, &error), &error);
    }
}

/* Regions ascend, do not touch, and are inside the volume. */
static void walk(PbaVolume *volume, unsigned does)
{
    uint64_t next = 0;
    uint64_t offset;
    uint64_t length;

    for (unsigned i = 0; i < MAX_REGIONS; i++) {
        GError *error = NULL;
        bool done = pba_volume_next_dirty_region(volume, &offset, &length, &error);
        check_outcome(done, &error);
        if (!done || length == 0) {
            return;
        }
        CHECK(offset >= next && offset <= input.size && length <= input.size - offset);
        next = offset + length + 1;
        use_region(volume, does, offset, length);
    }
}

static void run_client(unsigned does)
{
    static unsigned clients;
    /* Requests that one input leaves in flight must not affect the next one. */
    g_autofree char *device = g_strdup_printf("disk%u", clients++);
    PbaVolumeOptions options = {
        .device = device,
        .path = socket_path,
        .bitmap = does & WITHOUT_BITMAP ? NULL : "bitmap",
        .size = does & KNOWS_SIZE ? input.size : UINT64_MAX,
    };
    GError *error = NULL;
    PbaVolume *volume = pba_volume_open(&options, NULL, &error);

    bool done = volume != NULL;
    check_outcome(done, &error);
    if (done) {
        input.size = pba_volume_size(volume); /* by a record, it may be another one */
    }
    if (done && does & DO_COPY) {
        copy(volume, does);
    } else if (done) {
        walk(volume, does);
    }
    pba_volume_free(volume);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 3) {
        return 0;
    }
    input.next = data + 3;
    input.end = data + size;
    input.size = sizes[data[0] % G_N_ELEMENTS(sizes)];
    input.presents = data[2];
    input.requests = 0;
    fake_begin(nbd_take_turn);
    run_client(data[1]);
    nbd_end_clients();
    fake_end();
    return 0;
}

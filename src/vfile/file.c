/* The file. It answers the kernel's requests from slots, which are pieces of the volume that have
 * been read or are being read. A read uses the existing slots and fills the gaps with exactly the
 * missing bytes; read-ahead fills slots in advance. */
#include "server.h"
#include "src/volume/volume.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>

/* Bytes of one request: QEMU takes half the CPU time of requests for single clusters. */
#define MAX_PIECE (1u << 20)
/* The limit of all memory, and of the part that read-ahead may use. */
#define MAX_SLOTS 512u
#define MAX_BYTES (32u << 20)
#define MAX_AHEAD 32u
#define MAX_AHEAD_BYTES (4u << 20)
/* Discards that are answered before they are done. */
#define MAX_EARLY_TRIMS 16u

typedef struct {
    PbaRequest nbd; /* first, because the connection returns it; its length does not change */
    uint64_t skip;  /* of the buffer: parts that were discarded since it was loaded */
    bool loaded;
    bool ahead;   /* kept until the reader has passed it */
    bool dropped; /* discarded, or not needed any more: freed once it is loaded. Not requested again
                     until then: see PBA_BY_CLUSTER. */
} Slot;

typedef enum {
    LOAD_AHEAD,
    LOAD_PART, /* part of a range that a reader waits for */
    LOAD_LAST, /* the last such part */
} LoadReason;

/* A request that waits for slots, or for a trim. */
typedef struct {
    PbaFile *file;
    fuse_req_t request;
    uint64_t begin;
    uint64_t end;
    bool in_order; /* by the reader that read-ahead follows */
    GList link;
} Reading;

typedef struct {
    PbaRequest nbd;     /* first */
    fuse_req_t request; /* NULL: it has been answered */
    PbaRange range;
    GList link;
} Trim;

struct PbaFile {
    PbaConnection *connection;
    PbaAhead *ahead;
    PbaSeeks *seeks;
    PbaSizes sizes;
    GPtrArray *slots;           /* Slot, in use */
    GPtrArray *free_buffers[2]; /* of PBA_FILE_BLOCK and of MAX_PIECE */
    uint64_t bytes;             /* of the slots' buffers */
    unsigned ahead_slots;
    uint64_t ahead_bytes;
    GQueue readings;  /* Reading.link, oldest first */
    GQueue trims;     /* Trim.link, under way */
    bool trim_failed; /* a discard that had been answered already */
    bool starved;     /* an older reading got no slot */
};

PbaFile *pba_file_new(PbaConnection *connection, PbaAhead *ahead, PbaSeeks *seeks)
{
    PbaFile *file = g_new0(PbaFile, 1);
    file->connection = connection;
    file->ahead = ahead;
    file->seeks = seeks;
    file->sizes = *pba_connection_sizes(connection);
    file->slots = g_ptr_array_new();
    for (gsize i = 0; i < G_N_ELEMENTS(file->free_buffers); i++) {
        file->free_buffers[i] = g_ptr_array_new();
    }
    return file;
}

/* Slots */

static Slot *find_slot(const PbaFile *file, uint64_t offset, bool dropped)
{
    for (guint i = 0; i < file->slots->len; i++) {
        Slot *slot = file->slots->pdata[i];
        if (slot->dropped == dropped && offset - slot->nbd.offset < slot->nbd.length) {
            return slot;
        }
    }
    return NULL;
}

/* The beginning of the next slot after offset, even a dropped one, at most end. */
static uint64_t gap_end(const PbaFile *file, uint64_t offset, uint64_t end)
{
    for (guint i = 0; i < file->slots->len; i++) {
        const Slot *slot = file->slots->pdata[i];
        if (slot->nbd.offset > offset) {
            end = MIN(end, slot->nbd.offset);
        }
    }
    return end;
}

static uint64_t capacity_for(uint64_t length)
{
    return length <= PBA_FILE_BLOCK ? PBA_FILE_BLOCK : MAX_PIECE;
}

static void take_buffer(PbaFile *file, PbaRequest *nbd)
{
    nbd->capacity = capacity_for(nbd->length);
    GPtrArray *free_buffers = file->free_buffers[nbd->capacity == MAX_PIECE];
    nbd->buffer =
        free_buffers->len > 0
            ? g_ptr_array_steal_index_fast(free_buffers, free_buffers->len - 1)
            : g_malloc0(nbd->capacity); /* no old data, even if a server leaves parts out */
    file->bytes += nbd->capacity;
}

static void give_buffer_back(PbaFile *file, const PbaRequest *nbd)
{
    g_ptr_array_add(file->free_buffers[nbd->capacity == MAX_PIECE], nbd->buffer);
    file->bytes -= nbd->capacity;
}

static void count_ahead(PbaFile *file, Slot *slot, bool ahead)
{
    if (slot->ahead != ahead) {
        file->ahead_slots += ahead ? 1 : -1u;
        file->ahead_bytes += ahead ? slot->nbd.capacity : -slot->nbd.capacity;
        slot->ahead = ahead;
    }
}

/* Begins to read a piece; NULL if all memory is in use. */
static Slot *load(PbaFile *file, uint64_t offset, uint64_t length, LoadReason reason)
{
    if (file->slots->len >= MAX_SLOTS || file->bytes + capacity_for(length) > MAX_BYTES) {
        return NULL;
    }
    Slot *slot = g_new0(Slot, 1);
    slot->nbd.offset = offset;
    slot->nbd.length = length;
    take_buffer(file, &slot->nbd);
    slot->nbd.urgent = reason == LOAD_LAST;
    count_ahead(file, slot, reason == LOAD_AHEAD);
    g_ptr_array_add(file->slots, slot);
    pba_connection_submit(file->connection, &slot->nbd);
    return slot;
}

/* Frees a slot, now or as soon as it is loaded. */
static void drop_slot(PbaFile *file, Slot *slot)
{
    count_ahead(file, slot, false);
    slot->dropped = true;
    if (slot->loaded) {
        g_ptr_array_remove_fast(file->slots, slot);
        give_buffer_back(file, &slot->nbd);
        g_free(slot);
    }
}

static bool is_wanted(const PbaFile *file, const Slot *slot)
{
    if (slot->ahead) {
        return true;
    }
    for (GList *link = file->readings.head; link; link = link->next) {
        const Reading *reading = link->data;
        // NOLINTNEXTLINE(clang-analyzer-unix.Malloc): end_reading unlinks what it frees
        if (slot->nbd.offset < reading->end &&
            reading->begin < slot->nbd.offset + slot->nbd.length) {
            return true;
        }
    }
    return false;
}

/* Drops slots that overlap the range; a reader that waits for one loads it again. A loaded slot
 * keeps its part after the range, or else the part before it: sequential readers discard what they
 * have read. */
static void drop_slots(PbaFile *file, uint64_t begin, uint64_t end)
{
    for (guint i = file->slots->len; i-- > 0;) {
        Slot *slot = file->slots->pdata[i];
        uint64_t slot_end = slot->nbd.offset + slot->nbd.length;
        if (slot->dropped || slot->nbd.offset >= end || begin >= slot_end) {
            continue;
        }
        if (!slot->loaded || (begin <= slot->nbd.offset && slot_end <= end)) {
            drop_slot(file, slot);
        } else if (end < slot_end) {
            slot->skip += end - slot->nbd.offset;
            slot->nbd.length = slot_end - end;
            slot->nbd.offset = end;
        } else {
            slot->nbd.length = begin - slot->nbd.offset;
        }
    }
}

/* Frees slots of read-ahead up to here that no reader waits for. */
static void release_slots(PbaFile *file, uint64_t end)
{
    for (guint i = file->slots->len; i-- > 0;) {
        Slot *slot = file->slots->pdata[i];
        if (slot->nbd.offset + slot->nbd.length <= end) {
            count_ahead(file, slot, false);
        }
        if (slot->loaded && !is_wanted(file, slot)) {
            drop_slot(file, slot);
        }
    }
}

/* Requests pieces in bursts, because each request wakes the connection's thread and QEMU. */
static void read_ahead(PbaFile *file)
{
    uint64_t offset;
    uint64_t length;

    if (file->ahead_slots > MAX_AHEAD / 2 || file->ahead_bytes > MAX_AHEAD_BYTES / 2) {
        return;
    }
    while (file->ahead_slots < MAX_AHEAD && file->ahead_bytes < MAX_AHEAD_BYTES &&
           file->slots->len < MAX_SLOTS && file->bytes + MAX_PIECE <= MAX_BYTES &&
           pba_ahead_next(file->ahead, MAX_PIECE, &offset, &length)) {
        if (!find_slot(file, offset, false) && !find_slot(file, offset, true)) {
            load(file, offset, gap_end(file, offset, offset + length) - offset, LOAD_AHEAD);
        }
    }
}

/* Reading */

static void end_reading(Reading *reading)
{
    g_queue_unlink(&reading->file->readings, &reading->link);
    g_free(reading);
}

/* Collects the slots of a range, and requests the missing ones. Returns their number; 0 if the
 * range is not complete yet. */
static int collect(PbaFile *file, uint64_t begin, uint64_t end, struct iovec *parts)
{
    Slot *missing = NULL;
    int count = 0;

    for (uint64_t at = begin; at < end;) {
        Slot *slot = find_slot(file, at, false);
        Slot *dropped = slot ? NULL : find_slot(file, at, true);
        if (dropped) {
            g_atomic_int_set(&dropped->nbd.urgent, true);
        } else if (!slot && !file->starved) {
            uint64_t stop = gap_end(file, at, MIN(end, at + MAX_PIECE));
            slot = load(file, at, stop - at, stop < end ? LOAD_PART : LOAD_LAST);
            file->starved = !slot;
        }
        if (!slot) {
            return 0;
        }
        uint64_t skip = at - slot->nbd.offset;
        uint64_t length = MIN(slot->nbd.length - skip, end - at);
        missing = slot->loaded ? missing : slot;
        parts[count].iov_base = (char *)slot->nbd.buffer + slot->skip + skip;
        parts[count].iov_len = length;
        count++;
        at += length;
    }
    if (missing) {
        /* They usually arrive in order, so one wake-up suffices. */
        g_atomic_int_set(&missing->nbd.urgent, true);
    }
    return missing ? 0 : count;
}

static void on_read_interrupt(fuse_req_t request, void *opaque)
{
    (void)request;
    Reading *reading = opaque;
    fuse_reply_err(reading->request, EINTR);
    end_reading(reading);
}

/* Such a range is unreadable for readers, even if QEMU has not freed it yet. */
static bool is_being_trimmed(const PbaFile *file, uint64_t begin, uint64_t end)
{
    for (GList *link = file->trims.head; link; link = link->next) {
        const Trim *trim = link->data;
        if (trim->range.begin < end && begin < trim->range.end) {
            return true;
        }
    }
    return false;
}

void pba_file_read(fuse_req_t request, fuse_ino_t inode, size_t length, off_t offset,
                   struct fuse_file_info *info)
{
    (void)inode;
    (void)info;
    PbaFile *file = fuse_req_userdata(request);
    struct iovec parts[MAX_SLOTS];
    uint64_t begin = MIN((uint64_t)offset, file->sizes.size);
    uint64_t end = begin + MIN(length, file->sizes.size - begin);

    if (begin == end) {
        fuse_reply_buf(request, NULL, 0);
        return;
    }
    if ((begin | end) % file->sizes.block != 0) {
        fuse_reply_err(request, EINVAL); /* as with a file that is open with O_DIRECT */
        return;
    }
    if (is_being_trimmed(file, begin, end)) {
        fuse_reply_err(request, EIO);
        return;
    }
    const Slot *slot = find_slot(file, begin, false);
    bool in_order = slot && slot->ahead;
    if (!pba_ahead_note_read(file->ahead, begin, end, in_order)) {
        release_slots(file, UINT64_MAX);
    }
    int count = collect(file, begin, end, parts);
    if (count > 0) {
        fuse_reply_iov(request, parts, count);
        release_slots(file, in_order ? end : 0);
        return;
    }
    Reading *reading = g_new0(Reading, 1);
    *reading = (Reading){file, request, begin, end, in_order, {0}};
    reading->link.data = reading;
    g_queue_push_tail_link(&file->readings, &reading->link);
    fuse_req_interrupt_func(request, on_read_interrupt, reading);
}

/* Answers the requests that can be answered. The oldest one gets free memory first. */
static void serve_readings(PbaFile *file)
{
    struct iovec parts[MAX_SLOTS];
    GList *next;

    file->starved = false;
    for (GList *link = file->readings.head; link; link = next) {
        Reading *reading = link->data;
        next = link->next;
        int count = collect(file, reading->begin, reading->end, parts);
        if (count > 0) {
            uint64_t passed = reading->in_order ? reading->end : 0;
            fuse_reply_iov(reading->request, parts, count);
            end_reading(reading);
            release_slots(file, passed);
        }
    }
}

/* If a piece cannot be read, a range that contains it completely fails, too. A range with only a
 * part of it tries that part by itself. */
static void fail_slot(PbaFile *file, Slot *slot)
{
    GList *next;

    for (GList *link = file->readings.head; link; link = next) {
        Reading *reading = link->data;
        next = link->next;
        // NOLINTNEXTLINE(clang-analyzer-unix.Malloc): end_reading unlinks what it frees
        if (reading->begin <= slot->nbd.offset &&
            slot->nbd.offset + slot->nbd.length <= reading->end) {
            fuse_reply_err(reading->request, EIO);
            end_reading(reading);
        }
    }
    if (slot->ahead) {
        pba_ahead_stop(file->ahead);
    }
    drop_slot(file, slot);
}

static void finish_slot(PbaFile *file, Slot *slot)
{
    slot->loaded = true;
    if (slot->dropped || (!slot->nbd.error && !is_wanted(file, slot))) {
        drop_slot(file, slot);
    } else if (slot->nbd.error) {
        fail_slot(file, slot);
    }
}

/* Discarding
 *
 * The kernel sends one discard of a file at a time, so each would cost a round trip to QEMU. Some
 * are therefore answered at once; an error of such a discard is reported by the next one. */

static void on_trim_interrupt(fuse_req_t request, void *opaque)
{
    (void)request;
    Trim *trim = opaque;
    fuse_reply_err(trim->request, EINTR);
    trim->request = NULL;
}

static void finish_trim(PbaFile *file, Trim *trim)
{
    if (trim->request) {
        fuse_reply_err(trim->request, trim->nbd.error ? EIO : 0);
    } else {
        file->trim_failed |= trim->nbd.error != 0;
    }
    drop_slots(file, trim->range.begin, trim->range.end); /* read-ahead may have requested it */
    g_queue_unlink(&file->trims, &trim->link);
    g_free(trim);
}

static void start_trim(PbaFile *file, fuse_req_t request, PbaRange range)
{
    bool early = file->trims.length < MAX_EARLY_TRIMS;
    Trim *trim = g_new0(Trim, 1);

    *trim = (Trim){
        .nbd = {.is_trim = true,
                .urgent = !early,
                .offset = range.begin,
                .length = range.end - range.begin},
        .request = early ? NULL : request,
        .range = range,
    };
    trim->link.data = trim;
    drop_slots(file, range.begin, range.end);
    pba_ahead_note_discard(file->ahead, range.begin, range.end);
    g_queue_push_tail_link(&file->trims, &trim->link);
    pba_connection_submit(file->connection, &trim->nbd);
    if (early) {
        fuse_reply_err(request, 0);
    } else {
        fuse_req_interrupt_func(request, on_trim_interrupt, trim);
    }
}

void pba_file_fallocate(fuse_req_t request, fuse_ino_t inode, int mode, off_t offset, off_t length,
                        struct fuse_file_info *info)
{
    (void)inode;
    (void)info;
    PbaFile *file = fuse_req_userdata(request);
    uint64_t begin = MIN((uint64_t)offset, file->sizes.size);
    uint64_t end = begin + MIN((uint64_t)length, file->sizes.size - begin);

    if (mode != (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)) {
        fuse_reply_err(request, EOPNOTSUPP);
        return;
    }
    if (file->trim_failed) {
        file->trim_failed = false;
        fuse_reply_err(request, EIO);
        return;
    }
    /* QEMU before 9.1 (507175197b) aborts on parts of one. */
    PbaRange range =
        pba_whole_clusters((PbaRange){begin, end}, file->sizes.size, file->sizes.cluster);
    if (range.begin == range.end) {
        fuse_reply_err(request, 0);
    } else {
        start_trim(file, request, range);
    }
}

const PbaSizes *pba_file_sizes(const PbaFile *file)
{
    return &file->sizes;
}

PbaSeeks *pba_file_seeks(const PbaFile *file)
{
    return file->seeks;
}

void pba_file_turn(PbaFile *file)
{
    PbaRequest *done;

    while ((done = pba_connection_take_done(file->connection, file->starved))) {
        while (done) {
            PbaRequest *request = done;
            done = request->next;
            if (request->is_trim) {
                finish_trim(file, (Trim *)request);
            } else {
                finish_slot(file, (Slot *)request);
            }
        }
        serve_readings(file);
        read_ahead(file);
    }
    read_ahead(file);
}

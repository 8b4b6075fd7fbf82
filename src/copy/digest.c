/* The digest of every block that a copy reads, computed by threads of the pool between read and
 * write. A thread owns its data, as when it reads a file: the end of the copy does not wait for it,
 * because calls on the files of digests may hang. */
#include "digest.h"
#include "src/base/base.h"
#include <errno.h>
#include <inttypes.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <string.h>

struct PbaDigests {
    EVP_MD *algorithm;
    uint64_t size; /* of the volume */
    uint32_t block;
    uint8_t zero[PBA_DIGEST_SIZE]; /* of a block of zeroes */
    uint8_t end[PBA_DIGEST_SIZE];  /* of zeroes of the last block's length */
    PbaDigestFile *out;            /* owned; NULL: none */
    bool leaves_zeroes;            /* out: unwritten slots stand for zeroes */
    bool leaves_unchanged; /* blocks with the expected digest, and their slots, are not written */
    GPtrArray *expected;   /* of PbaDigestFile, the newest first; owned */
};

typedef enum { FOUND_UNKNOWN, FOUND_SAME, FOUND_OTHER } Found;

struct PbaDigestJob {
    PbaJob job;
    PbaDigests *digests;
    PbaPiece *piece;
    char *buffer;
    size_t room;
    const char *data; /* NULL: all of it is zeroes */
    uint64_t first;   /* number of its first block */
    uint32_t length;
    size_t count;    /* of blocks */
    uint8_t *values; /* a digest for each */
    uint8_t *slots;  /* room for that many slots of a file */
    uint8_t *found;  /* a Found for each */
    int error;
    const PbaDigestFile *error_file; /* NULL: libcrypto */
};

/* In a thread */

static const uint8_t *zero_digest(const PbaDigests *digests, size_t length)
{
    return length == digests->block ? digests->zero : digests->end;
}

static bool hash(const PbaDigests *digests, EVP_MD_CTX *context, const char *data, size_t length,
                 uint8_t *value)
{
    return EVP_DigestInit_ex2(context, digests->algorithm, NULL) == 1 &&
           EVP_DigestUpdate(context, data, length) == 1 &&
           EVP_DigestFinal_ex(context, value, NULL) == 1;
}

static size_t length_of(const struct PbaDigestJob *self, size_t i)
{
    size_t at = i * self->digests->block;

    return MIN(self->digests->block, self->length - at);
}

bool pba_digests_compute(const PbaDigests *digests, const char *data, size_t length,
                         uint8_t *values)
{
    EVP_MD_CTX *context = EVP_MD_CTX_new();
    bool good = context != NULL;

    for (size_t at = 0; good && at < length; at += digests->block) {
        size_t part = MIN(digests->block, length - at);
        if (!data || pba_is_zero(data + at, part)) {
            memcpy(values, zero_digest(digests, part), PBA_DIGEST_SIZE);
        } else {
            good = hash(digests, context, data + at, part, values);
        }
        values += PBA_DIGEST_SIZE;
    }
    EVP_MD_CTX_free(context);
    return good;
}

static bool compute(struct PbaDigestJob *self)
{
    bool good = pba_digests_compute(self->digests, self->data, self->length, self->values);

    self->error = good ? 0 : ENOMEM;
    return good;
}

static bool is_zero_digest(const struct PbaDigestJob *self, size_t i, const uint8_t *values)
{
    return memcmp(values + i * PBA_DIGEST_SIZE, zero_digest(self->digests, length_of(self, i)),
                  PBA_DIGEST_SIZE) == 0;
}

static bool is_kept(const struct PbaDigestJob *self, size_t i)
{
    return !(self->digests->leaves_zeroes && is_zero_digest(self, i, self->values)) &&
           !(self->digests->leaves_unchanged && self->found[i] == FOUND_SAME);
}

/* A new file has zeroes where nothing was written. */
static void keep(struct PbaDigestJob *self)
{
    PbaDigestFile *out = self->digests->out;
    size_t count;

    self->error_file = out;
    for (size_t i = 0; out && !self->error && i < self->count; i += MAX(count, 1)) {
        for (count = 0; i + count < self->count && is_kept(self, i + count);) {
            count++;
        }
        if (count > 0) {
            self->error = pba_digest_file_write(out, self->first + i, count,
                                                self->values + i * PBA_DIGEST_SIZE);
        }
    }
}

/* Adds the digests of one file for blocks that no newer file has. */
static void note_known(struct PbaDigestJob *self, const PbaDigestFile *file, const uint8_t *slots)
{
    for (size_t i = 0; i < self->count; i++) {
        const uint8_t *slot = slots + i * PBA_DIGEST_SIZE;
        if (pba_digest_is_unset(slot)) {
            slot = pba_digest_file_is_complete(file)
                       ? zero_digest(self->digests, length_of(self, i))
                       : NULL;
        }
        if (slot && self->found[i] == FOUND_UNKNOWN) {
            bool same = memcmp(slot, self->values + i * PBA_DIGEST_SIZE, PBA_DIGEST_SIZE) == 0;
            self->found[i] = same ? FOUND_SAME : FOUND_OTHER;
        }
    }
}

static bool compare(struct PbaDigestJob *self)
{
    const GPtrArray *files = self->digests->expected;

    for (guint i = 0; i < files->len && !self->error; i++) {
        const PbaDigestFile *file = g_ptr_array_index(files, i);
        self->error_file = file;
        self->error = pba_digest_file_read(file, self->first, self->count, self->slots);
        if (!self->error) {
            note_known(self, file, self->slots);
        }
    }
    return !self->error;
}

static void run_job(PbaJob *job)
{
    struct PbaDigestJob *self = (struct PbaDigestJob *)job;

    if (compute(self) && compare(self)) {
        keep(self);
    }
}

static void free_job(struct PbaDigestJob *self)
{
    pba_digests_unref(self->digests);
    g_free(self->values);
    g_free(self->slots);
    g_free(self->found);
    g_free(self);
}

/* The job owns the piece's buffer now. */
static void leave_job(PbaJob *job)
{
    struct PbaDigestJob *self = (struct PbaDigestJob *)job;

    pba_buffer_free(self->buffer, self->room);
    free_job(self);
}

/* In the copy's thread */

static void job_done(PbaJob *job)
{
    struct PbaDigestJob *self = (struct PbaDigestJob *)job;

    self->piece->digests = self;
    self->piece->state = PBA_PIECE_HASHED;
}

void pba_digests_begin(PbaDigests *digests, PbaPool *pool, PbaPiece *piece)
{
    struct PbaDigestJob *self = g_new0(struct PbaDigestJob, 1);

    self->job = (PbaJob){.run = run_job, .done = job_done, .leave = leave_job};
    self->digests = pba_digests_ref(digests);
    self->piece = piece;
    self->buffer = piece->buffer;
    self->room = piece->room;
    self->data = piece->holes == piece->length ? NULL : piece->data;
    self->first = piece->offset / digests->block;
    self->length = piece->length;
    self->count = pba_whole_blocks(piece->length, digests->block) / digests->block;
    self->values = g_malloc(self->count * PBA_DIGEST_SIZE);
    self->slots = g_malloc(self->count * PBA_DIGEST_SIZE);
    self->found = g_malloc0(self->count);
    piece->state = PBA_PIECE_HASHING;
    pba_pool_submit(pool, &self->job);
}

void pba_digests_forget(PbaPiece *piece)
{
    if (piece->digests) {
        free_job(g_steal_pointer(&piece->digests));
    }
}

static bool fail_file(const PbaDigestFile *file, int problem, GError **error)
{
    pba_error_set(error, PBA_ERROR_SYSTEM, "digests: %s failed - %s",
                  file ? pba_digest_file_path(file) : "libcrypto", g_strerror(problem));
    return false;
}

/* A range whose blocks differ from the expected ones. */
static bool tell_damage(const PbaCopyOptions *options, uint64_t offset, uint64_t length,
                        GError **error)
{
    if (!options->damaged) {
        pba_error_set(error, PBA_ERROR_CONTENT,
                      "%" PRIu64 " bytes at offset %" PRIu64 " do not match their digests", length,
                      offset);
        return false;
    }
    if (!options->damaged(options->opaque, offset, length)) {
        pba_error_set(error, PBA_ERROR_INTERRUPTED, "the function for damage failed");
        return false;
    }
    return true;
}

static bool tell_found(const struct PbaDigestJob *self, const PbaCopyOptions *options,
                       PbaCopyStatistics *statistics, GError **error)
{
    uint64_t offset = self->first * self->digests->block;
    uint64_t damaged = 0; /* bytes before the block */

    for (size_t i = 0; i < self->count; i++) {
        size_t length = length_of(self, i);
        bool is_last = i + 1 == self->count || self->found[i + 1] != FOUND_OTHER;
        offset += length;
        damaged = self->found[i] == FOUND_OTHER ? damaged + length : 0;
        statistics->bytes_unknown += self->found[i] == FOUND_UNKNOWN ? length : 0;
        if (damaged > 0 && is_last) {
            statistics->bytes_damaged += damaged;
            if (!tell_damage(options, offset - damaged, damaged, error)) {
                return false;
            }
        }
    }
    return true;
}

bool pba_digests_tell(const PbaDigests *digests, PbaPiece *piece, const PbaCopyOptions *options,
                      PbaCopyStatistics *statistics, GError **error)
{
    const struct PbaDigestJob *job = piece->digests;

    if (job->error) {
        return fail_file(job->error_file, job->error, error);
    }
    if (digests->expected->len > 0 && !digests->leaves_unchanged &&
        !tell_found(job, options, statistics, error)) {
        return false;
    }
    if (options->digests &&
        !options->digests(options->opaque, piece->offset, job->values, job->count)) {
        pba_error_set(error, PBA_ERROR_INTERRUPTED, "the function for digests failed");
        return false;
    }
    return true;
}

static bool is_unchanged(const PbaPiece *piece, size_t at, size_t length)
{
    const struct PbaDigestJob *job = piece->digests;
    bool unchanged = job && job->digests->leaves_unchanged;

    for (size_t end = at + length; unchanged && at < end; at += job->digests->block) {
        unchanged = job->found[at / job->digests->block] == FOUND_SAME;
    }
    return unchanged;
}

const uint8_t *pba_digests_values(const PbaPiece *piece)
{
    const struct PbaDigestJob *job = piece->digests;

    return job->values + (piece->offset / job->digests->block - job->first) * PBA_DIGEST_SIZE;
}

/* The end of a run of unchanged units, or of changed ones. */
static size_t end_of(const PbaPiece *piece, size_t at, size_t unit, bool unchanged)
{
    while (at < piece->whole_length) {
        size_t length = MIN(unit, piece->whole_length - at);
        if (is_unchanged(piece, at, length) != unchanged) {
            break;
        }
        at += length;
    }
    return at;
}

bool pba_digests_next_part(PbaPiece *piece, uint32_t align)
{
    const struct PbaDigestJob *job = piece->digests;
    size_t unit = job ? MAX(job->digests->block, align) : piece->whole_length;
    size_t begin = (size_t)(piece->offset - piece->whole_offset);
    size_t at = end_of(piece, begin + piece->length, unit, true);

    piece->data += at - begin;
    piece->offset = piece->whole_offset + at;
    piece->length = (uint32_t)(end_of(piece, at, unit, false) - at);
    piece->holes = job && !job->data ? piece->length : 0;
    return piece->length > 0;
}

bool pba_digests_check_region(const PbaDigests *digests, uint64_t offset, uint64_t length,
                              GError **error)
{
    uint64_t end = offset + length;

    if (offset % digests->block == 0 && (end % digests->block == 0 || end == digests->size)) {
        return true;
    }
    pba_error_set(error, PBA_ERROR_ARGUMENT,
                  "the dirty region of %" PRIu64 " bytes at offset %" PRIu64
                  " does not consist of whole blocks of %" PRIu32
                  " bytes - 'digest-block' must not exceed the granularity of the bitmap",
                  length, offset, digests->block);
    return false;
}

/* The end */

typedef struct {
    PbaJob job;
    PbaDigestFile *file;
    PbaDigestsEnd *end; /* for done */
    int error;
} EndJob;

static void run_end(PbaJob *job)
{
    EndJob *self = (EndJob *)job;

    self->error = pba_digest_file_finish(self->file);
}

static void leave_end(PbaJob *job)
{
    EndJob *self = (EndJob *)job;

    pba_digest_file_unref(self->file);
    g_free(self);
}

static void end_done(PbaJob *job)
{
    EndJob *self = (EndJob *)job;

    *self->end = (PbaDigestsEnd){.done = true, .error = self->error};
    leave_end(job);
}

void pba_digests_finish(PbaDigests *digests, PbaPool *pool, PbaDigestsEnd *end)
{
    *end = (PbaDigestsEnd){.done = !digests->out};
    if (digests->out) {
        EndJob *self = g_new0(EndJob, 1);
        self->job = (PbaJob){.run = run_end, .done = end_done, .leave = leave_end};
        self->file = pba_digest_file_ref(digests->out);
        self->end = end;
        pba_pool_submit(pool, &self->job);
    }
}

bool pba_digests_check_end(const PbaDigests *digests, const PbaDigestsEnd *end, GError **error)
{
    return !end->error || fail_file(digests->out, end->error, error);
}

/* Options */

static void unref_file(gpointer file)
{
    pba_digest_file_unref(file);
}

static bool open_files(PbaDigests *digests, const PbaCopyOptions *options, GError **error)
{
    for (size_t i = 0; options->expected && options->expected[i]; i++) {
        PbaDigestFile *file =
            pba_digest_file_open(options->expected[i], digests->size, &digests->block, error);
        if (!file) {
            return false;
        }
        g_ptr_array_add(digests->expected, file);
    }
    digests->block = digests->block ? digests->block : PBA_DIGEST_BLOCK;
    if (!options->digest_file) {
        return true;
    }
    digests->out = pba_digest_file_begin(options->digest_file, digests->size, digests->block,
                                         options->digests_increment, error);
    digests->leaves_zeroes = !options->digests_increment;
    return digests->out != NULL;
}

static bool prepare(PbaDigests *digests, GError **error)
{
    char *zeroes = pba_zeroes_new(digests->block, error);
    EVP_MD_CTX *context = EVP_MD_CTX_new();
    size_t rest = digests->size % digests->block;

    if (!zeroes) {
        EVP_MD_CTX_free(context);
        return false;
    }
    digests->algorithm = EVP_MD_fetch(NULL, "SHA256", NULL);
    bool good = context && digests->algorithm &&
                hash(digests, context, zeroes, digests->block, digests->zero) &&
                hash(digests, context, zeroes, rest, digests->end);
    EVP_MD_CTX_free(context);
    pba_buffer_free(zeroes, digests->block);
    return good || fail_file(NULL, ENOTSUP, error);
}

bool pba_digests_new(const PbaCopyOptions *options, uint64_t size, PbaDigests **digests,
                     GError **error)
{
    /* A thread may be computing while the process ends. */
    OPENSSL_init_crypto(OPENSSL_INIT_NO_ATEXIT, NULL);
    *digests = g_atomic_rc_box_new0(PbaDigests);
    (*digests)->size = size;
    (*digests)->block = options->digest_block;
    (*digests)->leaves_unchanged = options->skip_expected;
    (*digests)->expected = g_ptr_array_new_with_free_func(unref_file);
    return open_files(*digests, options, error) && prepare(*digests, error);
}

static void clear(gpointer opaque)
{
    PbaDigests *digests = opaque;

    EVP_MD_free(digests->algorithm);
    pba_digest_file_unref(digests->out);
    g_ptr_array_unref(digests->expected);
}

void pba_digests_unref(PbaDigests *digests)
{
    if (digests) {
        g_atomic_rc_box_release_full(digests, clear);
    }
}

PbaDigests *pba_digests_ref(PbaDigests *digests)
{
    return g_atomic_rc_box_acquire(digests);
}

uint32_t pba_digests_block(const PbaDigests *digests)
{
    return digests->block;
}

PbaDigestFile *pba_digests_known(const PbaDigests *digests)
{
    return g_ptr_array_index(digests->expected, 0);
}

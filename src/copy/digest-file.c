/* A file of digests.
 *
 * The header takes one page, so that the slots of unknown blocks are holes:
 * "PBA-DIGESTS\n", the version and the algorithm as text, then big-endian the volume's size, the
 * block size and flags. It is written last: a copy that fails leaves no file of digests. */
#include "digest.h"
#include "src/base/base.h"
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define HEADER 4096u
#define VERSION "1"
#define ALGORITHM "SHA-256"
#define IS_COMPLETE 1u
/* The number of slots that are searched at a time. */
#define SCAN 2048u

typedef struct {
    char magic[12];
    char version[4];
    char algorithm[16];
    uint64_t size;
    uint32_t block;
    uint32_t flags;
} Header;

struct PbaDigestFile {
    int fd;
    char *path;
    uint64_t size; /* of the volume */
    uint32_t block;
    bool is_complete;
    bool is_new; /* has no header yet */
};

static Header make_header(const PbaDigestFile *file)
{
    return (Header){
        .magic = "PBA-DIGESTS\n",
        .version = VERSION,
        .algorithm = ALGORITHM,
        .size = GUINT64_TO_BE(file->size),
        .block = GUINT32_TO_BE(file->block),
        .flags = GUINT32_TO_BE(file->is_complete ? IS_COMPLETE : 0),
    };
}

static uint64_t blocks_of(const PbaDigestFile *file)
{
    return file->size / file->block + (file->size % file->block ? 1 : 0);
}

static off_t place_of(uint64_t block)
{
    return (off_t)(HEADER + block * PBA_DIGEST_SIZE);
}

static int transfer(int fd, uint8_t *data, size_t length, off_t at, bool is_write)
{
    while (length > 0) {
        ssize_t count = is_write ? pwrite(fd, data, length, at) : pread(fd, data, length, at);
        if (count < 0 && errno == EINTR) {
            continue;
        }
        if (count <= 0) {
            return count == 0 ? ENODATA : errno;
        }
        data += count;
        length -= (size_t)count;
        at += count;
    }
    return 0;
}

int pba_digest_file_read(const PbaDigestFile *file, uint64_t first, size_t count, uint8_t *slots)
{
    return transfer(file->fd, slots, count * PBA_DIGEST_SIZE, place_of(first), false);
}

int pba_digest_file_write(const PbaDigestFile *file, uint64_t first, size_t count,
                          const uint8_t *slots)
{
    return transfer(file->fd, (uint8_t *)slots, count * PBA_DIGEST_SIZE, place_of(first), true);
}

/* The header, which is not trusted. */
static bool read_header(PbaDigestFile *file, uint64_t size, uint32_t block, GError **error)
{
    Header found = {0};
    struct stat stat;
    int problem = transfer(file->fd, (uint8_t *)&found, sizeof(found), 0, false);

    file->size = size;
    file->block = GUINT32_FROM_BE(found.block);
    file->is_complete = (GUINT32_FROM_BE(found.flags) & IS_COMPLETE) != 0;
    Header wanted = make_header(file);
    if (problem && problem != ENODATA) {
        pba_error_set(error, PBA_ERROR_SYSTEM, "cannot read %s - %s", file->path,
                      g_strerror(problem));
    } else if (memcmp(found.magic, wanted.magic, sizeof(found.magic)) != 0 ||
               !pba_digest_block_is_good(file->block)) {
        pba_error_set(error, PBA_ERROR_CONTENT, "%s is not a file of digests", file->path);
    } else if (memcmp(found.version, wanted.version, sizeof(found.version)) != 0 ||
               memcmp(found.algorithm, wanted.algorithm, sizeof(found.algorithm)) != 0 ||
               found.flags != wanted.flags) {
        pba_error_set(error, PBA_ERROR_UNSUPPORTED, "%s was made by a later version of this module",
                      file->path);
    } else if (found.size != wanted.size || (block && block != file->block)) {
        pba_error_set(error, PBA_ERROR_ARGUMENT,
                      "%s is of a volume of %" PRIu64 " bytes in blocks of %" PRIu32
                      ", not %" PRIu64 " in blocks of %" PRIu32,
                      file->path, GUINT64_FROM_BE(found.size), file->block, size,
                      block ? block : file->block);
    } else if (fstat(file->fd, &stat) == -1 || stat.st_size != place_of(blocks_of(file))) {
        pba_error_set(error, PBA_ERROR_CONTENT, "%s has the wrong length for its volume",
                      file->path);
    } else {
        return true;
    }
    return false;
}

static PbaDigestFile *file_new(const char *path, int flags, GError **error)
{
    int fd = open(path, flags | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, 0600);

    if (fd == -1) {
        pba_error_set(error, PBA_ERROR_SYSTEM, "cannot open %s - %s", path, g_strerror(errno));
        return NULL;
    }
    PbaDigestFile *file = g_atomic_rc_box_new0(PbaDigestFile);
    file->fd = fd;
    file->path = g_strdup(path);
    return file;
}

PbaDigestFile *pba_digest_file_open(const char *path, uint64_t size, uint32_t *block,
                                    GError **error)
{
    PbaDigestFile *file = file_new(path, O_RDONLY, error);

    if (!file || !read_header(file, size, *block, error)) {
        pba_digest_file_unref(file);
        return NULL;
    }
    *block = file->block;
    return file;
}

bool pba_digest_is_unset(const uint8_t *slot)
{
    static const uint8_t unset[PBA_DIGEST_SIZE];

    return memcmp(slot, unset, sizeof(unset)) == 0;
}

/* Also false for the remains of a failed copy, which can then be repeated. */
static bool is_begun(const PbaDigestFile *file)
{
    uint8_t begin[PBA_DIGEST_SIZE];

    return transfer(file->fd, begin, sizeof(begin), 0, false) == 0 && !pba_digest_is_unset(begin);
}

static bool begin(PbaDigestFile *file, uint64_t size, uint32_t block, bool is_increment,
                  GError **error)
{
    if (is_increment && is_begun(file)) {
        return read_header(file, size, block, error);
    }
    file->size = size;
    file->block = block;
    file->is_complete = !is_increment;
    file->is_new = true;
    if (ftruncate(file->fd, 0) == 0 && ftruncate(file->fd, place_of(blocks_of(file))) == 0) {
        return true;
    }
    pba_error_set(error, PBA_ERROR_SYSTEM, "cannot write %s - %s", file->path, g_strerror(errno));
    return false;
}

PbaDigestFile *pba_digest_file_begin(const char *path, uint64_t size, uint32_t block,
                                     bool is_increment, GError **error)
{
    PbaDigestFile *file = file_new(path, O_RDWR | O_CREAT, error);

    if (!file || !begin(file, size, block, is_increment, error)) {
        pba_digest_file_unref(file);
        return NULL;
    }
    return file;
}

PbaDigestFile *pba_digest_file_ref(PbaDigestFile *file)
{
    return g_atomic_rc_box_acquire(file);
}

static void close_file(gpointer opaque)
{
    PbaDigestFile *file = opaque;

    close(file->fd);
    g_free(file->path);
}

void pba_digest_file_unref(PbaDigestFile *file)
{
    if (file) {
        g_atomic_rc_box_release_full(file, close_file);
    }
}

const char *pba_digest_file_path(const PbaDigestFile *file)
{
    return file->path;
}

bool pba_digest_file_is_complete(const PbaDigestFile *file)
{
    return file->is_complete;
}

int pba_digest_file_finish(PbaDigestFile *file)
{
    Header header = make_header(file);
    int problem = fdatasync(file->fd) == 0 ? 0 : errno;

    if (!problem && file->is_new) {
        problem = transfer(file->fd, (uint8_t *)&header, sizeof(header), 0, true);
        file->is_new = false;
    }
    return problem ? problem : fdatasync(file->fd) == 0 ? 0 : errno;
}

/* Adds the slots from *at on to the run. Returns false if the run ends in them. */
static bool scan(const uint8_t *slots, size_t count, uint64_t *at, uint64_t *run)
{
    for (size_t i = 0; i < count; i++) {
        bool known = !pba_digest_is_unset(slots + i * PBA_DIGEST_SIZE);
        if (!known && *run > 0) {
            return false;
        }
        *run += known ? 1 : 0;
        *at += known ? 0 : 1;
    }
    return true;
}

bool pba_digest_file_next(const PbaDigestFile *file, uint64_t *offset, uint64_t *length,
                          GError **error)
{
    uint8_t slots[SCAN * PBA_DIGEST_SIZE];
    uint64_t blocks = blocks_of(file);
    uint64_t first = pba_whole_blocks(*offset, file->block) / file->block;
    uint64_t run = file->is_complete ? blocks - MIN(first, blocks) : 0;
    bool goes_on = !file->is_complete;

    while (goes_on && first + run < blocks) {
        size_t count = (size_t)MIN(SCAN, blocks - first - run);
        int problem = pba_digest_file_read(file, first + run, count, slots);
        if (problem) {
            pba_error_set(error, PBA_ERROR_SYSTEM, "cannot read %s - %s", file->path,
                          g_strerror(problem));
            return false;
        }
        goes_on = scan(slots, count, &first, &run);
    }
    *offset = first * file->block;
    *length = run == 0 ? 0 : MIN(run * file->block, file->size - *offset);
    return true;
}

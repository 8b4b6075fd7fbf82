#define _GNU_SOURCE /* fallocate() */
#include "target-file.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

/* The number of writers to a device, or to a file without the page cache. */
#define DIRECT_WRITERS 4
/* The block size of most file systems. */
static const PbaBlocks blocks = {.size = 4096};

/* Writing */

static bool write_data(int fd, PbaPiece *piece, size_t at, size_t length)
{
    while (length > 0) {
        uint64_t offset = piece->offset + at;
        ssize_t count = pwrite(fd, piece->data + at, length, (off_t)offset);
        if (count < 0 && errno == EINTR) {
            continue;
        }
        if (count <= 0) {
            pba_piece_fail(piece, count == 0 ? EIO : errno, offset);
            return false;
        }
        at += (size_t)count;
        length -= (size_t)count;
    }
    return true;
}

static bool is_unsupported(int error)
{
    return error == EOPNOTSUPP || error == ENODEV || error == ENOSYS || error == EINVAL ||
           error == ESPIPE || error == EPERM;
}

/* Makes zeroes without writing them. *done is false if the target cannot do this. */
static bool make_hole(PbaTargetFile *target, PbaPiece *piece, size_t at, size_t length, bool *done)
{
    static const int modes[] = {
        [PBA_ZERO_BY_HOLE] = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
        [PBA_ZERO_BY_RANGE] = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE,
    };
    uint64_t offset = piece->offset + at;

    while (target->zero_way != PBA_ZERO_BY_WRITING) {
        if (fallocate(target->fd, modes[target->zero_way], (off_t)offset, (off_t)length) == 0) {
            *done = true;
            return true;
        }
        if (is_unsupported(errno)) {
            target->zero_way++;
        } else if (errno != EINTR) {
            pba_piece_fail(piece, errno, offset);
            return false;
        }
    }
    *done = false;
    return true;
}

static bool write_zeroes(PbaTargetFile *target, PbaPiece *piece, size_t at, size_t length)
{
    bool done = piece->offset + at >= target->zero_from;

    if (!done && !make_hole(target, piece, at, length, &done)) {
        return false;
    }
    piece->zero += done ? (uint32_t)length : 0;
    return done || write_data(target->fd, piece, at, length);
}

void pba_target_file_write(PbaTargetFile *target, PbaPiece *piece)
{
    bool zero;

    for (size_t at = 0; at < piece->length;) {
        size_t run = pba_piece_run(piece, at, &blocks, &zero);
        if (!(zero ? write_zeroes(target, piece, at, run)
                   : write_data(target->fd, piece, at, run))) {
            return;
        }
        at += run;
    }
}

int pba_target_file_finish(PbaTargetFile *target)
{
    int error = !target->flushes || fdatasync(target->fd) == 0 ? 0 : errno;

    /* A file system without fsync, such as some with FUSE, reports errors only here. */
    if (close(target->fd) != 0 && !error) {
        error = errno;
    }
    target->fd = -1;
    return error;
}

/* Opening */

/* Sets the size too, because an image of another size cannot be restored. */
static int prepare_file(PbaTargetFile *target, uint64_t old_size)
{
    /* With the page cache, the kernel permits one write at a time: others would only spin. */
    target->writers = fcntl(target->fd, F_GETFL) & O_DIRECT ? DIRECT_WRITERS : 1;
    target->flushes = true;
    target->zero_from = old_size;
    if (target->is_increment && old_size != target->size) {
        target->found_size = old_size;
        return ENODATA;
    }
    return old_size == target->size || ftruncate(target->fd, (off_t)target->size) == 0 ? 0 : errno;
}

static int prepare_device(PbaTargetFile *target)
{
    target->writers = DIRECT_WRITERS;
    target->flushes = true;
    if (ioctl(target->fd, BLKGETSIZE64, &target->found_size) == -1) {
        return errno;
    }
    return target->found_size < target->size ? ENOSPC : 0;
}

int pba_target_file_open(PbaTargetFile *target)
{
    struct stat stat;

    target->writers = 1;
    target->zero_from = UINT64_MAX;
    if (target->path) {
        /* The new file is as confidential as the disk. */
        int make = target->is_increment ? 0 : O_CREAT;
        target->fd = open(target->path, O_WRONLY | make | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, 0600);
    }
    if (target->fd == -1 || fstat(target->fd, &stat) == -1) {
        return errno;
    }
    if (S_ISREG(stat.st_mode)) {
        return prepare_file(target, (uint64_t)stat.st_size);
    }
    if (S_ISBLK(stat.st_mode)) {
        return prepare_device(target);
    }
    /* Anything with offsets, such as /dev/null. */
    return lseek(target->fd, 0, SEEK_CUR) != -1 ? 0 : errno;
}

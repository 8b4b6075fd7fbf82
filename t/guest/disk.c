/* The test guest: finds, reads and writes its disks. */
#define _GNU_SOURCE
#include "agent.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <linux/fs.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define SECTOR 512

static struct disk disks[MAX_DISKS];
static int disk_count;

/* Reads the serial number, by which the host names a disk. sysfs has it as text for virtio-blk, and
 * in the page "unit serial number" for SCSI. */
static bool read_serial(const char *name, char *serial, size_t size)
{
    char path[PATH_MAX], page[256];

    snprintf(path, sizeof path, "/sys/block/%s/serial", name);
    if (read_small(path, serial, size) > 0)
        return true;
    snprintf(path, sizeof path, "/sys/block/%s/device/vpd_pg80", name);
    ssize_t n = read_small(path, page, sizeof page);
    if (n <= 4)
        return false;
    snprintf(serial, size, "%.*s", (int)n - 4, page + 4);
    return true;
}

static struct disk *find_disk(const char *id)
{
    for (int i = 0; i < disk_count; i++)
        if (!strcmp(disks[i].id, id))
            return &disks[i];
    return NULL;
}

static void add_disk(const char *name)
{
    struct disk *d = &disks[disk_count];
    char serial[64], path[PATH_MAX], ro[8] = "0";

    if (disk_count == MAX_DISKS || !read_serial(name, serial, sizeof serial) || find_disk(serial))
        return;
    snprintf(path, sizeof path, "/sys/block/%s/ro", name);
    read_small(path, ro, sizeof ro);
    snprintf(d->path, sizeof d->path, "/dev/%.20s", name);
    int mode = *ro == '1' ? O_RDONLY : O_RDWR;
    d->fd = open(d->path, mode | O_DIRECT | O_CLOEXEC);
    if (d->fd < 0)
        return;
    snprintf(d->id, sizeof d->id, "%s", serial);
    disk_count++;
}

int scan_disks(void)
{
    DIR *dir = opendir("/sys/block");
    struct dirent *e;

    while (dir && (e = readdir(dir)))
        if (!strncmp(e->d_name, "vd", 2) || !strncmp(e->d_name, "sd", 2))
            add_disk(e->d_name);
    if (dir)
        closedir(dir);
    return disk_count;
}

struct disk *need_disk(const char *id)
{
    struct disk *d = find_disk(id);
    if (!d) {
        scan_disks(); /* the disk may be new */
        d = find_disk(id);
    }
    if (!d)
        fail("no disk '%s'", id);
    return d;
}

uint64_t disk_size(const struct disk *d)
{
    uint64_t size = 0;
    return ioctl(d->fd, BLKGETSIZE64, &size) ? 0 : size;
}

void cmd_hello(int n, char **w)
{
    char list[MAX_DISKS * 96];
    size_t used = 0;

    (void)n, (void)w;
    scan_disks();
    list[0] = 0;
    for (int i = 0; i < disk_count; i++)
        used += snprintf(list + used, sizeof list - used, " %s=%" PRIu64, disks[i].id,
                         disk_size(&disks[i]));
    ok("version=%d%s", AGENT_VERSION, list);
}

/* Parses DISK OFFSET LENGTH, which most commands have. False: an error was sent. */
static bool parse_range(int n, char **w, struct disk **d, uint64_t *offset, uint64_t *length)
{
    if (n < 4 || !parse_u64(w[2], offset) || !parse_u64(w[3], length)) {
        fail("usage: %s DISK OFFSET LENGTH", w[0]);
        return false;
    }
    if (!(*d = need_disk(w[1])))
        return false;
    uint64_t size = disk_size(*d);
    if (*offset > size || *length > size - *offset) {
        fail("range is past the end of %s (%" PRIu64 ")", w[1], size);
        return false;
    }
    return true;
}

void cmd_write(int n, char **w)
{
    struct disk *d;
    uint64_t offset, length, byte;

    if (n != 5 || !parse_u64(w[4], &byte) || byte > 255) {
        fail("usage: write DISK OFFSET LENGTH BYTE");
        return;
    }
    if (!parse_range(n, w, &d, &offset, &length))
        return;
    memset(chunk, (int)byte, CHUNK);
    while (length > 0) {
        size_t part = length < CHUNK ? length : CHUNK;
        ssize_t done = pwrite(d->fd, chunk, part, offset);
        if (done <= 0) {
            fail("write at %" PRIu64 ": %s", offset, strerror(errno));
            return;
        }
        offset += done;
        length -= done;
    }
    if (fdatasync(d->fd))
        fail("flush: %s", strerror(errno));
    else
        ok_nothing();
}

void cmd_discard(int n, char **w)
{
    struct disk *d;
    uint64_t range[2];
    bool trim = !strcmp(w[0], "trim");

    if (!parse_range(n, w, &d, &range[0], &range[1]))
        return;
    if (ioctl(d->fd, trim ? BLKDISCARD : BLKZEROOUT, range) || fdatasync(d->fd))
        fail("%s: %s", w[0], strerror(errno));
    else
        ok_nothing();
}

/* Reads a range in chunks, and passes them to each() in order. */
static bool read_range(struct disk *d, uint64_t offset, uint64_t length,
                       void (*each)(const unsigned char *, size_t, void *), void *opaque)
{
    while (length > 0) {
        size_t part = length < CHUNK ? length : CHUNK;
        ssize_t done = pread(d->fd, chunk, part, offset);
        if (done <= 0) {
            fail("read at %" PRIu64 ": %s", offset, done ? strerror(errno) : "end of disk");
            return false;
        }
        each((unsigned char *)chunk, done, opaque);
        offset += done;
        length -= done;
    }
    return true;
}

static void add_words(const unsigned char *p, size_t length, void *opaque)
{
    uint64_t *sum = opaque;
    for (size_t i = 0; i + 4 <= length; i += 4)
        *sum += (uint32_t)p[i] << 24 | p[i + 1] << 16 | p[i + 2] << 8 | p[i + 3];
}

/* The sum of the big-endian 32-bit words, modulo 2^64. The host computes it with one unpack(). */
void cmd_read_sum(int n, char **w)
{
    struct disk *d;
    uint64_t offset = 0, length, sum = 0;

    if (n == 2) {
        if (!(d = need_disk(w[1])))
            return;
        length = disk_size(d);
    } else if (!parse_range(n, w, &d, &offset, &length)) {
        return;
    }
    if (read_range(d, offset, length, add_words, &sum))
        ok("%" PRIu64, sum);
}

static void add_bytes(const unsigned char *p, size_t length, void *opaque)
{
    unsigned char **to = opaque;
    memcpy(*to, p, length);
    *to += length;
}

/* Accepts any range. O_DIRECT requires whole sectors, so the sectors around the range are read. */
void cmd_read(int n, char **w)
{
    static unsigned char data[MAX_LINE / 2 + 2 * SECTOR];
    static char hex[MAX_LINE + 1];
    struct disk *d;
    uint64_t offset, length;
    unsigned char *to = data;

    if (!parse_range(n, w, &d, &offset, &length))
        return;
    if (length > MAX_LINE / 2) {
        fail("at most %d bytes", MAX_LINE / 2);
        return;
    }
    uint64_t first = offset / SECTOR * SECTOR;
    uint64_t end = (offset + length + SECTOR - 1) / SECTOR * SECTOR;
    if (!read_range(d, first, end - first, add_bytes, &to))
        return;
    for (uint64_t i = 0; i < length; i++)
        sprintf(hex + 2 * i, "%02x", data[offset - first + i]);
    hex[2 * length] = 0;
    ok("%s", hex);
}

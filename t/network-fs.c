/* A FUSE file system over a directory, for tests. It behaves like a network file system: no flock,
 * no holes, an open file that is removed stays under another name (libfuse does this), and errors
 * of a server.
 *
 * network-fs SOURCE FAULTS MOUNTPOINT: each line of the file FAULTS is an operation, an errno and a
 * part of the paths for which it fails. The file is read again for each operation. With the errno
 * HANG, everything waits until that line is gone. */
#define FUSE_USE_VERSION 31
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#define HANG 9999

static const char *faults;
static int source;

static int find_fault(const char *operation, const char *path)
{
    char name[32];
    char part[256];
    int error = 0;
    int found = 0;
    FILE *file = fopen(faults, "r");

    while (file && !found && fscanf(file, "%31s %d %255s", name, &error, part) == 3) {
        found = strcmp(name, operation) == 0 && strstr(path, part) != NULL ? error : 0;
    }
    if (file) {
        fclose(file);
    }
    return found;
}

static int fault(const char *operation, const char *path)
{
    int error;

    while ((error = find_fault(operation, path)) == HANG) {
        usleep(10000);
    }
    return -error;
}

static const char *below(const char *path)
{
    return path[1] ? path + 1 : ".";
}

static int result(long status)
{
    return status < 0 ? -errno : (int)status;
}

#define TRY(operation, path, call)                                                                 \
    do {                                                                                           \
        int failed = fault(operation, path);                                                       \
        return failed ? failed : result(call);                                                     \
    } while (0)

static void *fs_init(struct fuse_conn_info *connection, struct fuse_config *config)
{
    (void)connection;
    config->attr_timeout = config->entry_timeout = config->negative_timeout = 0;
    return NULL;
}

static int fs_getattr(const char *path, struct stat *status, struct fuse_file_info *info)
{
    (void)info;
    TRY("stat", path, fstatat(source, below(path), status, AT_SYMLINK_NOFOLLOW));
}

static int fs_readdir(const char *path, void *buffer, fuse_fill_dir_t fill, off_t offset,
                      struct fuse_file_info *info, enum fuse_readdir_flags flags)
{
    int failed = fault("readdir", path);
    int fd = failed ? -1 : openat(source, below(path), O_RDONLY | O_DIRECTORY);
    DIR *directory = fd < 0 ? NULL : fdopendir(fd);
    struct dirent *entry;

    (void)offset;
    (void)info;
    (void)flags;
    if (!directory) {
        return failed ? failed : -errno;
    }
    while ((entry = readdir(directory)) != NULL) {
        fill(buffer, entry->d_name, NULL, 0, 0);
    }
    closedir(directory);
    return 0;
}

static int open_file(const char *path, int flags, mode_t mode, struct fuse_file_info *info)
{
    int failed = fault("open", path);
    int fd = failed ? -1 : openat(source, below(path), flags, mode);

    if (fd < 0) {
        return failed ? failed : -errno;
    }
    info->fh = (uint64_t)fd;
    return 0;
}

static int fs_open(const char *path, struct fuse_file_info *info)
{
    return open_file(path, info->flags, 0, info);
}

static int fs_create(const char *path, mode_t mode, struct fuse_file_info *info)
{
    return open_file(path, info->flags, mode, info);
}

static int fs_release(const char *path, struct fuse_file_info *info)
{
    (void)path;
    return result(close((int)info->fh));
}

static int fs_read(const char *path, char *data, size_t size, off_t at, struct fuse_file_info *info)
{
    TRY("read", path, pread((int)info->fh, data, size, at));
}

static int fs_write(const char *path, const char *data, size_t size, off_t at,
                    struct fuse_file_info *info)
{
    TRY("write", path, pwrite((int)info->fh, data, size, at));
}

static int fs_truncate(const char *path, off_t size, struct fuse_file_info *info)
{
    int fd = info ? (int)info->fh : openat(source, below(path), O_WRONLY);
    int status = fd < 0 ? -errno : result(ftruncate(fd, size));

    if (!info && fd >= 0) {
        close(fd);
    }
    return status;
}

static int fs_fsync(const char *path, int is_data, struct fuse_file_info *info)
{
    (void)is_data;
    TRY("fsync", path, fsync((int)info->fh));
}

static int fs_fsyncdir(const char *path, int is_data, struct fuse_file_info *info)
{
    (void)is_data;
    (void)info;
    return fault("fsyncdir", path);
}

static int fs_flock(const char *path, struct fuse_file_info *info, int how)
{
    TRY("flock", path, flock((int)info->fh, how));
}

static int fs_unlink(const char *path)
{
    TRY("unlink", path, unlinkat(source, below(path), 0));
}

static int fs_rmdir(const char *path)
{
    TRY("unlink", path, unlinkat(source, below(path), AT_REMOVEDIR));
}

static int fs_mkdir(const char *path, mode_t mode)
{
    TRY("mkdir", path, mkdirat(source, below(path), mode));
}

static int fs_rename(const char *from, const char *to, unsigned int flags)
{
    (void)flags;
    TRY("rename", to, renameat(source, below(from), source, below(to)));
}

static int fs_chmod(const char *path, mode_t mode, struct fuse_file_info *info)
{
    (void)info;
    return result(fchmodat(source, below(path), mode, 0));
}

static int fs_utimens(const char *path, const struct timespec *times, struct fuse_file_info *info)
{
    (void)info;
    return result(utimensat(source, below(path), times, 0));
}

static int fs_statfs(const char *path, struct statvfs *status)
{
    (void)path;
    return result(fstatvfs(source, status));
}

static const struct fuse_operations operations = {
    .init = fs_init,
    .getattr = fs_getattr,
    .readdir = fs_readdir,
    .open = fs_open,
    .create = fs_create,
    .release = fs_release,
    .read = fs_read,
    .write = fs_write,
    .truncate = fs_truncate,
    .fsync = fs_fsync,
    .fsyncdir = fs_fsyncdir,
    .flock = fs_flock,
    .unlink = fs_unlink,
    .rmdir = fs_rmdir,
    .mkdir = fs_mkdir,
    .rename = fs_rename,
    .chmod = fs_chmod,
    .utimens = fs_utimens,
    .statfs = fs_statfs,
};

int main(int argc, char **argv)
{
    if (argc != 4) {
        return 2;
    }
    source = open(argv[1], O_RDONLY | O_DIRECTORY);
    faults = argv[2];
    char *arguments[] = {argv[0], argv[3], "-f", "-s", NULL};
    return source < 0 ? 1 : fuse_main(4, arguments, &operations, NULL);
}

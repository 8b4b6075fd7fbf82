/* The kernel's requests for the file. Those that need no server are answered here; file.c has the
 * rest. */
#define _GNU_SOURCE /* O_DIRECT, SEEK_DATA */
#include "server.h"
#include "src/volume/volume.h"
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#define ATTRIBUTES_S 3600.0

/* cp and tar only look for holes in a file that has fewer blocks than its size needs. They take a
 * file without blocks as one without data. */
static void fill_attributes(const PbaFile *file, struct stat *status)
{
    const PbaSizes *sizes = pba_file_sizes(file);
    blkcnt_t blocks = (blkcnt_t)((sizes->size + 511) / 512);
    bool may_have_holes = pba_file_seeks(file) && blocks > 1;

    *status = (struct stat){
        .st_ino = FUSE_ROOT_ID,
        .st_mode = S_IFREG | 0600,
        .st_nlink = 1,
        .st_uid = geteuid(),
        .st_gid = getegid(),
        .st_size = (off_t)sizes->size,
        .st_blksize = PBA_FILE_BLOCK,
        .st_blocks = blocks - (may_have_holes ? 1 : 0),
    };
}

static void on_getattr(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *info)
{
    (void)inode;
    (void)info;
    struct stat status;
    fill_attributes(fuse_req_userdata(request), &status);
    fuse_reply_attr(request, &status, ATTRIBUTES_S);
}

/* Reports the smallest size of a punched hole that frees space. */
static void on_statfs(fuse_req_t request, fuse_ino_t inode)
{
    (void)inode;
    const PbaSizes *sizes = pba_file_sizes(fuse_req_userdata(request));
    struct statvfs status = {
        .f_bsize = sizes->cluster,
        .f_frsize = sizes->cluster,
        .f_blocks = (sizes->size + sizes->cluster - 1) / sizes->cluster,
        .f_files = 1,
    };
    fuse_reply_statfs(request, &status);
}

/* The page cache serves small reads, such as tar's of 512 bytes. The file of a part is read without
 * it: the kernel would read ahead across the edges of regions. */
static void on_open(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *info)
{
    (void)inode;
    bool is_whole = pba_file_seeks(fuse_req_userdata(request)) != NULL;
    info->direct_io = !is_whole || info->flags & O_DIRECT;
    info->noflush = 1; /* nothing is written, so closing needs no server */
    fuse_reply_open(request, info);
}

/* The snapshot cannot be written to; its file is opened for writing only to punch holes. */
static void on_write(fuse_req_t request, fuse_ino_t inode, const char *data, size_t length,
                     off_t offset, struct fuse_file_info *info)
{
    (void)inode;
    (void)data;
    (void)length;
    (void)offset;
    (void)info;
    fuse_reply_err(request, EOPNOTSUPP);
}

/* Without an answer, the kernel treats everything as data and does not ask again. */
static void on_lseek(fuse_req_t request, fuse_ino_t inode, off_t offset, int whence,
                     struct fuse_file_info *info)
{
    (void)inode;
    (void)info;
    PbaSeeks *seeks = pba_file_seeks(fuse_req_userdata(request));

    if (!seeks) {
        fuse_reply_err(request, ENOSYS);
    } else if (offset < 0 || (whence != SEEK_DATA && whence != SEEK_HOLE)) {
        fuse_reply_err(request, EINVAL);
    } else {
        pba_seeks_ask(seeks, request, (uint64_t)offset, whence);
    }
}

const struct fuse_lowlevel_ops pba_file_operations = {
    .getattr = on_getattr,
    .statfs = on_statfs,
    .open = on_open,
    .read = pba_file_read,
    .write = on_write,
    .fallocate = pba_file_fallocate,
    .lseek = on_lseek,
};

/* The floor of bench vfile: a FUSE file whose content is in this process's memory.
 *
 *   memory-file FILE IMAGE: serves IMAGE (in memory-backed storage) at FILE until SIGTERM */
#define FUSE_USE_VERSION 35
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static char *memory;
static off_t size;

static void on_getattr(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *info)
{
    (void)info;
    struct stat status = {
        .st_ino = inode, .st_mode = S_IFREG | 0600, .st_nlink = 1, .st_size = size};
    fuse_reply_attr(request, &status, 3600);
}

static void on_open(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *info)
{
    (void)inode;
    info->direct_io = 1;
    fuse_reply_open(request, info);
}

static void on_read(fuse_req_t request, fuse_ino_t inode, size_t length, off_t offset,
                    struct fuse_file_info *info)
{
    (void)inode;
    (void)info;
    size_t left = offset < size ? (size_t)(size - offset) : 0;
    fuse_reply_buf(request, memory + offset, length < left ? length : left);
}

static const struct fuse_lowlevel_ops operations = {
    .getattr = on_getattr,
    .open = on_open,
    .read = on_read,
};

int main(int argc, char **argv)
{
    char *words[] = {(char *)"memory-file"};
    struct fuse_args arguments = FUSE_ARGS_INIT(1, words);
    struct stat status;
    int fd = argc == 3 ? open(argv[2], O_RDONLY) : -1;

    if (fd < 0 || fstat(fd, &status) != 0) {
        return EXIT_FAILURE;
    }
    size = status.st_size;
    /* Populated, so that page faults are not measured. */
    memory = mmap(NULL, (size_t)size, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
    struct fuse_session *session =
        fuse_session_new(&arguments, &operations, sizeof(operations), NULL);
    if (memory == MAP_FAILED || !session || fuse_set_signal_handlers(session) != 0 ||
        fuse_session_mount(session, argv[1]) != 0) {
        return EXIT_FAILURE;
    }
    fuse_session_loop(session);
    fuse_session_unmount(session);
    return EXIT_SUCCESS;
}

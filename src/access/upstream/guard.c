/* Nodes that make QEMU refuse what would lose the guest's writes while an access is up.
 *
 * A mirror of the raw node or of the disk would take the guest along to its target when it is
 * completed, and so would a commit; an overlay over the raw node has our nodes' names in its
 * header, which are nowhere once the access is over. So two nodes stand above them: "guard" on the
 * raw node, and "hold" on the disk. Each is a qcow2 image without data, read-only, that has what it
 * guards for its backing file. Nobody uses them, so they ask for no permission. But of a backing
 * file QEMU makes no external snapshot and does not resize it (bdrv_backing_attach), and what has a
 * node above it cannot be mirrored, committed or snapshotted internally (qmp_get_root_bs): 7.2
 * to 10.0.
 *
 * A disk configured by -drive goes with its device when that is unplugged. The hold keeps it until
 * its bitmaps have been joined: on an action for a bitmap of a node that is gone QEMU crashes. */
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include "upstream.h"
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

/* Version 2, clusters of 512 bytes, no guest clusters; the second cluster is an empty refcount
 * table. */
static const unsigned char image[1024] = {
    [0] = 'Q', 'F', 'I', 0xfb, 0, 0, 0, 2, [23] = 9, [54] = 2, [59] = 1,
};

static bool create_image(const PbaAccess *access, const char *path, GError **error)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);

    if (fd < 0 || write(fd, image, sizeof(image)) != sizeof(image) ||
        !pba_user_give_file(access, fd)) {
        pba_error_set(error, PBA_ERROR_SYSTEM, "cannot write '%s' - %s", path, g_strerror(errno));
        if (fd >= 0) {
            close(fd);
        }
        return false;
    }
    close(fd);
    return true;
}

static bool add_guard(PbaAccess *access, const char *path, const char *node, const char *guarded,
                      GError **error)
{
    return pba_qmp_run(access->qmp, "blockdev-add",
                       pba_json("{'driver': <'qcow2'>, 'node-name': <%s>, 'read-only': <true>, "
                                "'file': <{'driver': <'file'>, 'filename': <%s>}>, "
                                "'backing': <%s>}",
                                node, path, guarded),
                       error);
}

static bool add_guards(PbaAccess *access, const char *path, GError **error)
{
    for (guint i = 0; i < access->disks->len; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        const PbaUpstreamDisk *nodes = pba_upstream_disk(disk);
        if (!add_guard(access, path, nodes->hold, disk->root_node, error) ||
            !add_guard(access, path, nodes->guard, nodes->raw, error)) {
            pba_error_add_device(error, disk->device);
            return false;
        }
    }
    return true;
}

bool pba_guards_add(PbaAccess *access, GError **error)
{
    g_autofree char *path = g_build_filename(access->socket_dir, PBA_GUARD_NAME, NULL);

    bool done = create_image(access, path, error) && add_guards(access, path, error);
    /* QEMU has it open. */
    unlink(path);
    return done;
}

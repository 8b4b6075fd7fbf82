/* Nodes that hold the guest's disks during an access, and make QEMU refuse operations that would
 * lose the guest's writes.
 *
 * When a mirror of the node that the guest device uses is completed, the guest would move to the
 * mirror's target, and with a commit to the commit's target. An overlay over one of our nodes would
 * have our nodes' names in its header, and these do not exist after the access. So two nodes are
 * put above them: "hold" on the disk, and "guard" on our raw node, or on Proxmox' QEMU on the node
 * below the disk's throttle filter, where QEMU inserts its own. Each is a read-only qcow2 image
 * without data that has the guarded node as its backing file. They have no user, so they ask for no
 * permissions. But QEMU makes no external snapshot of a backing file and does not resize it
 * (bdrv_backing_attach), and a node with a node above it cannot be mirrored, committed or
 * snapshotted internally (qmp_get_root_bs): 7.2 to 11.0.
 *
 * When a disk that is configured by -drive is unplugged, its node disappears with the device; a
 * node that is configured by -blockdev may be deleted then. The hold keeps it until its bitmaps
 * have been joined: QEMU crashes on an action for a bitmap of a missing node, and Proxmox' QEMU (to
 * 11.0) crashes when it ends an access to it. */
#include "access.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include <errno.h>
#include <fcntl.h>
#include <string.h>
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

void pba_guards_name(const PbaAccess *access, PbaDisk *disk)
{
    disk->guard_node = pba_disk_name(access, PBA_GUARD_ROLE, disk);
    disk->hold_node = pba_disk_name(access, PBA_HOLD_ROLE, disk);
}

static bool add_guards(PbaAccess *access, const char *path, PbaGuarded guarded, GError **error)
{
    for (guint i = 0; i < access->disks->len; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        const char *other = guarded(disk);
        if (!add_guard(access, path, disk->hold_node, disk->root_node, error) ||
            (strcmp(other, disk->root_node) != 0 &&
             !add_guard(access, path, disk->guard_node, other, error))) {
            pba_error_add_device(error, disk->device);
            return false;
        }
    }
    return true;
}

static char *image_path(const PbaAccess *access)
{
    return g_build_filename(access->socket_dir, PBA_GUARD_NAME, NULL);
}

char *pba_guards_image(const PbaAccess *access)
{
    g_autofree char *path = image_path(access);
    return pba_user_run_path(access, path);
}

bool pba_guards_add(PbaAccess *access, PbaGuarded guarded, GError **error)
{
    g_autofree char *path = image_path(access);
    g_autofree char *seen = pba_guards_image(access);
    bool done = create_image(access, path, error) && add_guards(access, seen, guarded, error);
    /* QEMU has it open. */
    unlink(path);
    return done;
}

/* A raw node that another program uses stays below the guest device, and its guard with it. */
static bool must_stay(const PbaAccess *access, const PbaDisk *disk, const PbaBlock *block)
{
    g_autofree char *raw = pba_disk_name(access, PBA_RAW_ROLE, disk);
    return pba_block_find_node(block, raw) != NULL;
}

static void delete_guards(PbaAccess *access, GError **first, const PbaBlock *block)
{
    for (guint i = 0; i < access->disks->len; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        if (!must_stay(access, disk, block)) {
            pba_disk_drop_node(access, first, block, disk, disk->guard_node);
        }
        pba_disk_drop_node(access, first, block, disk, disk->hold_node);
    }
}

/* False after an error that ended the join: QEMU may still have bitmaps of this access. Other
 * errors do not count: a refused transaction may be the first sign of a later access, whose nodes
 * have the same names. */
static bool may_drop(PbaAccess *access, const GError *first)
{
    bool is_joined = access->phase == PBA_PHASE_ENDED || access->phase == PBA_PHASE_COMMITTED;

    return !first || ((is_joined || !pba_error_is_fatal(first)) && pba_owner_holds(access));
}

/* Tried twice, whatever the error, once the backup is committed: there is no other teardown, and
 * until the next setup the holds would block other programs' operations on the disks. */
void pba_guards_drop(PbaAccess *access, GError **first, const PbaBlock *block)
{
    g_auto(PbaBlock) now = {0};
    GError *step = NULL;

    if (!may_drop(access, *first)) {
        return;
    }
    delete_guards(access, &step, block);
    if (step && (access->phase == PBA_PHASE_COMMITTED || !pba_error_is_fatal(step))) {
        pba_qmp_release(access->qmp);
        if (pba_block_query(access->qmp, false, &now, NULL)) {
            g_clear_error(&step);
            delete_guards(access, &step, &now);
        }
    }
    pba_error_keep_first(first, step, &access->hooks);
}

bool pba_guard_holds(const PbaDisk *disk, const PbaBlock *block)
{
    return disk->hold_node && pba_block_find_node(block, disk->hold_node);
}

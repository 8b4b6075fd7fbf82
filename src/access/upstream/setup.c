/* Setup on a stock QEMU: upstream's own commands do what backup-access-setup does.
 *
 *   before:  guest device -> root node
 *   during:  guest device -> raw -> copy-before-write -> root node
 *                                    |        \-> fleecing node
 *                            snapshot-access -> NBD export
 *
 * All raw nodes are put in place first, one by one. Then a single blockdev-reopen points them all
 * at their filters: QEMU (since 6.1) drains them and changes all or none, and that is the instant.
 */
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include "upstream.h"
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <unistd.h>

/* QEMU (7.2 to 11.0) would let two disks keep their old data in one image, each in the other's
 * place. */
static bool is_fleecing_in_use(const PbaAccess *access, const PbaDisk *disk, const PbaBlock *block)
{
    for (guint i = 0; i < access->disks->len; i++) {
        const PbaDisk *other = access->disks->pdata[i];
        if (other != disk && g_strcmp0(other->fleecing_node, disk->fleecing_node) == 0) {
            return true;
        }
    }
    return pba_block_has_parent(block, disk->fleecing_node);
}

static bool check_callers_fleecing(const PbaAccess *access, const PbaDisk *disk,
                                   const PbaBlock *block, GError **error)
{
    JsonObject *node = pba_block_find_node(block, disk->fleecing_node);
    uint64_t size;

    if (!node) {
        pba_error_set(error, PBA_ERROR_ARGUMENT, "fleecing node '%s' does not exist",
                      disk->fleecing_node);
        return false;
    }
    if (is_fleecing_in_use(access, disk, block)) {
        pba_error_set(error, PBA_ERROR_ARGUMENT, "fleecing node '%s' is in use by something else",
                      disk->fleecing_node);
        return false;
    }
    if (!pba_block_node_size(node, &size, error)) {
        return false;
    }
    if (size != disk->size) {
        pba_error_set(error, PBA_ERROR_ARGUMENT,
                      "fleecing node '%s' must have exactly the size of the device: it has %" PRIu64
                      " bytes instead of %" PRIu64,
                      disk->fleecing_node, size, disk->size);
        return false;
    }
    /* Discards are sent in units of 64 KiB, and QEMU before 9.1 (507175197b) aborts on parts of a
     * cluster. */
    JsonObject *image = pba_json_find_object(node, "image");
    if (json_object_has_member(image, "cluster-size")) {
        uint64_t cluster;
        if (!pba_json_size(image, "cluster-size", &cluster, error)) {
            return false;
        }
        if (cluster > PBA_GRANULARITY) {
            pba_error_set(error, PBA_ERROR_ARGUMENT,
                          "fleecing node '%s' has clusters of %" PRIu64 " bytes - at most %u work",
                          disk->fleecing_node, cluster, PBA_GRANULARITY);
            return false;
        }
    }
    return true;
}

static bool check_fleecing(PbaAccess *access, PbaDisk *disk, const PbaBlock *block, GError **error)
{
    const char *node = access->options.fleecing
                           ? g_hash_table_lookup(access->options.fleecing, disk->device)
                           : NULL;

    if (node) {
        disk->fleecing_node = g_strdup(node);
        return check_callers_fleecing(access, disk, block, error);
    }
    if (!access->options.fleecing_dir) {
        pba_error_set(error, PBA_ERROR_ARGUMENT,
                      "has no fleecing image - give 'fleecing-dir' or a node in 'fleecing'");
        return false;
    }
    disk->fleecing_node = pba_disk_name(access, "fleece", disk);
    return true;
}

/* QEMU (7.2 to 11.0) stores bitmaps only in images of compat 1.1, and refuses to add one to an
 * older image. */
static bool can_store(const PbaAccess *access, const PbaDisk *disk, JsonObject *node)
{
    JsonObject *image = pba_json_find_object(node, "image");
    JsonObject *specific = image ? pba_json_find_object(image, "format-specific") : NULL;
    JsonObject *data = specific ? pba_json_find_object(specific, "data") : NULL;
    const char *compat = data ? pba_json_find_string(data, "compat") : NULL;

    if (g_strcmp0(compat, "0.10") != 0) {
        return true;
    }
    pba_log(&access->hooks, PBA_LOG_WARN,
            "device %s: its bitmap cannot be persistent, since its qcow2 image has compat 0.10 "
            "(qemu-img amend -o compat=1.1 changes that while the guest is off)",
            disk->device);
    return false;
}

static bool check_bitmap(PbaAccess *access, PbaDisk *disk, const PbaBlock *block, GError **error)
{
    g_autofree char *name = pba_access_bitmap(access);
    JsonObject *info = pba_block_find_bitmap(block, disk->bitmap_node, name);
    JsonObject *node = pba_block_find_node(block, disk->bitmap_node);
    const char *driver = node ? pba_json_find_string(node, "drv") : NULL;

    if (info && pba_json_find_bool(info, "busy")) {
        pba_error_set(
            error, PBA_ERROR_STATE,
            "its bitmap '%s' is in use by another operation - wait until that ends, then try "
            "again",
            name);
        return false;
    }
    pba_upstream_disk(disk)->persistent = access->options.persistent &&
                                          g_strcmp0(driver, "qcow2") == 0 &&
                                          can_store(access, disk, node);
    return true;
}

/* Refuses a disk whose raw node an earlier access has left behind, because another program uses it
 * (is_in_use in teardown.c): its name is needed, and bitmaps do not belong on it. */
static bool check_left_raw(const PbaDisk *disk, const PbaBlock *block, GError **error)
{
    const char *left =
        pba_is_own_node(disk->root_node) ? disk->root_node : pba_upstream_disk(disk)->raw;

    /* Without such a user, another process is just removing it. */
    g_autofree char *user = pba_block_find_node(block, left) ? pba_company_user(block, left) : NULL;
    if (!user) {
        return true;
    }
    pba_error_set(
        error, PBA_ERROR_STATE,
        "node '%s' of an earlier access is still there, because %s uses it - end that, or "
        "commit it if it is an overlay (block-commit), then try again",
        left, user);
    return false;
}

static bool check_disk(PbaAccess *access, PbaDisk *disk, const PbaBlock *block, GError **error)
{
    if (!disk->qdev) {
        pba_error_set(error, PBA_ERROR_UNSUPPORTED,
                      "no guest device uses it - leave it out of the backup");
        return false;
    }
    disk->bitmap_node = g_strdup(pba_block_skip_filters(block, disk->root_node));
    if (!disk->bitmap_node) {
        pba_error_set(error, PBA_ERROR_PROTOCOL,
                      "its block graph ends in a filter without a child");
        return false;
    }
    JsonObject *node = pba_block_find_node(block, disk->bitmap_node);
    if (node && g_strcmp0(pba_json_find_string(node, "drv"), "copy-before-write") == 0) {
        pba_error_set(error, PBA_ERROR_STATE,
                      "node '%s' of another program copies what the guest overwrites - end what "
                      "has put it there, then try again",
                      disk->bitmap_node);
        return false;
    }
    pba_upstream_name_nodes(access, disk);
    return check_left_raw(disk, block, error) && check_fleecing(access, disk, block, error) &&
           check_bitmap(access, disk, block, error);
}

bool pba_upstream_check(PbaAccess *access, const PbaBlock *block, GError **error)
{
    for (guint i = 0; i < access->disks->len; i++) {
        PbaDisk *disk = access->disks->pdata[i];
        if (!check_disk(access, disk, block, error)) {
            pba_error_add_device(error, disk->device);
            return false;
        }
    }
    return pba_upstream_check_iothreads(access, error);
}

/* Sparse, private, and with a unique name: the directory may contain images of other guests. */
static char *create_fleecing_file(PbaAccess *access, uint64_t size, GError **error)
{
    g_autofree char *name = pba_own_name(access->target_id, "fleece", access->identity);
    g_autofree char *dir = pba_trusted_dir("fleecing-dir", access->options.fleecing_dir, error);
    if (!dir) {
        return NULL;
    }
    g_autofree char *path = g_strdup_printf("%s/%s-XXXXXX", dir, name);
    int fd = g_mkstemp_full(path, O_RDWR | O_CLOEXEC, 0600);

    if (fd < 0 || ftruncate(fd, (off_t)size) != 0 || !pba_user_give_file(access, fd)) {
        pba_error_set(error, PBA_ERROR_SYSTEM, "cannot create fleecing image '%s' - %s", path,
                      g_strerror(errno));
        if (fd >= 0) {
            close(fd);
            unlink(path);
        }
        return NULL;
    }
    close(fd);
    return g_steal_pointer(&path);
}

static bool add_fleecing(PbaAccess *access, PbaDisk *disk, GError **error)
{
    if (!pba_is_own_node(disk->fleecing_node)) {
        return true;
    }
    g_autofree char *path = create_fleecing_file(access, disk->size, error);
    if (!path) {
        return false;
    }
    /* Without discard=unmap, a trim succeeds but frees nothing (7.2 to 11.0). */
    g_autofree char *seen = pba_user_fleecing_path(access, path);
    bool added = pba_qmp_run(access->qmp, "blockdev-add",
                             pba_json("{'driver': <'file'>, 'node-name': <%s>, 'filename': <%s>, "
                                      "'discard': <'unmap'>}",
                                      disk->fleecing_node, seen),
                             error);
    /* QEMU has opened the file. Without a name, its space is freed whichever process dies first. */
    unlink(path);
    return added;
}

JsonNode *pba_raw_options(const PbaDisk *disk, const char *file)
{
    JsonNode *options = pba_json("{'driver': <'raw'>, 'node-name': <%s>, 'file': <%s>, "
                                 "'size': <%x>, 'discard': <'unmap'>}",
                                 pba_upstream_disk(disk)->raw, file, (gint64)disk->size);
    pba_json_set_if(options, "read-only", disk->read_only);
    return options;
}

static bool add_raw(PbaAccess *access, PbaDisk *disk, GError **error)
{
    return pba_qmp_run(access->qmp, "blockdev-add", pba_raw_options(disk, disk->root_node), error);
}

static bool find_guest_device(PbaAccess *access, PbaDisk *disk, GError **error)
{
    return pba_upstream_find_guest_device(access, disk, disk->qdev, error);
}

static const char *guarded(const PbaDisk *disk)
{
    return pba_upstream_disk(disk)->raw;
}

static bool insert_raw(PbaAccess *access, PbaDisk *disk, GError **error)
{
    const PbaUpstreamDisk *own = pba_upstream_disk(disk);

    return pba_qmp_run(access->qmp, "qom-set",
                       pba_json("{'path': <%s>, 'property': <'drive'>, 'value': <%s>}",
                                own->guest_device, own->raw),
                       error);
}

/* The bitmap of a program without companions for this target: it is relative to another backup. */
static bool remove_plain(PbaAccess *access, const PbaDisk *disk, const PbaBlock *block,
                         GError **error)
{
    g_autofree char *plain = pba_target_bitmap(access->target_id);

    return access->tied != PBA_TIED_YES ||
           !pba_block_find_bitmap(block, disk->bitmap_node, plain) ||
           pba_bitmap_remove(access, disk, plain, error);
}

static bool is_usable(PbaAccess *access, PbaDisk *disk, const PbaBlock *block, JsonObject *info)
{
    if (disk->mode != PBA_BITMAP_MODE_USE || !info) {
        return false;
    }
    if (access->tied != PBA_TIED_YES) {
        return !pba_json_find_bool(info, "inconsistent") && pba_json_find_bool(info, "recording");
    }
    if (pba_tie_fits(access, disk, block)) {
        return true;
    }
    pba_tie_log_reason(access, disk);
    return false;
}

/* Prepares the target's bitmap for the mode: it records, and if it is new, all bits are set. */
static bool prepare_bitmap(PbaAccess *access, PbaDisk *disk, const PbaBlock *block, GError **error)
{
    g_autofree char *name = pba_access_bitmap(access);
    JsonObject *info = pba_block_find_bitmap(block, disk->bitmap_node, name);

    if (!remove_plain(access, disk, block, error)) {
        return false;
    }
    if (disk->mode == PBA_BITMAP_MODE_NONE) {
        pba_upstream_disk(disk)->persistent = false;
        return true;
    }
    if (is_usable(access, disk, block, info)) {
        disk->action = PBA_BITMAP_ACTION_USED;
        pba_upstream_disk(disk)->persistent = pba_json_find_bool(info, "persistent");
    } else {
        disk->action = disk->mode == PBA_BITMAP_MODE_NEW ? PBA_BITMAP_ACTION_NEW
                                                         : PBA_BITMAP_ACTION_MISSING_RECREATED;
        if (!pba_bitmap_drop(access, disk, block, name, error) ||
            !pba_bitmap_add_all_dirty(access, disk, error)) {
            return false;
        }
    }
    disk->bitmap_name = g_steal_pointer(&name);
    return true;
}

/* Also in mode none: while a node has a bitmap, QEMU does not load a snapshot of it
 * (snapshot-load), which would change the data below the filter. */
static bool add_background(PbaAccess *access, PbaDisk *disk, GError **error)
{
    g_autofree char *name =
        pba_background_bitmap(access->target_id, access->nonce, access->tied == PBA_TIED_YES);
    return pba_qmp_run(access->qmp, "block-dirty-bitmap-add", pba_bitmap_add_arguments(disk, name),
                       error);
}

/* No bitmap option: QEMU (7.2 to 11.0) copies that bitmap when the node is made, and bits set until
 * the cut would be missing in the copy. */
static bool add_filter(PbaAccess *access, PbaDisk *disk, GError **error)
{
    JsonNode *arguments = pba_json(
        "{'driver': <'copy-before-write'>, 'node-name': <%s>, 'file': <%s>, 'target': <%s>, "
        "'on-cbw-error': <'break-snapshot'>, 'cbw-timeout': <%u>, 'discard': <'unmap'>}",
        pba_upstream_disk(disk)->filter, disk->root_node, disk->fleecing_node,
        pba_upstream_cbw_timeout_s(access));
    pba_json_set_if(arguments, "read-only", disk->read_only);
    return pba_qmp_run(access->qmp, "blockdev-add", arguments, error);
}

bool pba_upstream_each_disk(PbaAccess *access, PbaDiskStep step, GError **error)
{
    for (guint i = 0; i < access->disks->len; i++) {
        PbaDisk *disk = access->disks->pdata[i];
        if (!step(access, disk, error)) {
            pba_error_add_device(error, disk->device);
            return false;
        }
    }
    return true;
}

static bool prepare_bitmaps(PbaAccess *access, const PbaBlock *block, GError **error)
{
    for (guint i = 0; i < access->disks->len; i++) {
        PbaDisk *disk = access->disks->pdata[i];
        if (!prepare_bitmap(access, disk, block, error)) {
            pba_error_add_device(error, disk->device);
            return false;
        }
    }
    return true;
}

bool pba_upstream_prepare(PbaAccess *access, const PbaBlock *block, GError **error)
{
    return
        /* Before the last check: a device that takes its place later has another path. */
        pba_upstream_each_disk(access, find_guest_device, error) &&
        /* First: if another NBD server runs, setup fails and nothing has been done to the guest
         * yet. */
        pba_nbd_server_start(access, error) &&
        /* Before the filters, whose targets they are. */
        pba_upstream_each_disk(access, add_fleecing, error) &&
        pba_upstream_each_disk(access, add_raw, error) &&
        /* After the nodes that they guard, and before the last check for other programs. */
        pba_guards_add(access, guarded, error) &&
        /* Before the cut, because setting all bits takes a job. From here on, the target's bitmap
         * records. */
        prepare_bitmaps(access, block, error) &&
        /* Before the cut: they must have everything that is written after it. Earlier bits do no
         * harm. */
        pba_upstream_each_disk(access, add_background, error) &&
        /* After its fleecing node. Until the cut, a filter has no user and copies nothing. */
        pba_upstream_each_disk(access, add_filter, error) &&
        /* From here on, the guards refuse most operations of other programs. The others find the
         * raw node above the disk, and stay below the guest's device. */
        pba_company_check_again(access, error) &&
        /* After that, when no job exists any more that could change a device's disk. A device that
         * has got another disk since, by the completion of a mirror or a change of its medium,
         * would otherwise get the earlier one back. */
        pba_access_look_again(access, error) &&
        /* One by one, at any time before the cut: qom-set changes one disk, the cut changes all at
         * once. */
        pba_upstream_each_disk(access, insert_raw, error);
}

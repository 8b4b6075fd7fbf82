/* Setup by Proxmox' own command (QAPI: backup-access-setup).
 *
 * A setup that fails half way cannot be undone, and some calls crash the VM (pve-qemu-kvm to
 * 11.0.0), so everything that can be checked is checked beforehand. */
#include "pve.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include <inttypes.h>
#include <string.h>

/* Reads the unit in which the fleecing image frees space. Before a write, QEMU copies whole
 * clusters of that image, but at least 64 KiB, and later frees them only as a whole (QEMU:
 * block_copy_calculate_cluster_size, cbw_co_pdiscard_snapshot). The clusters of an RBD image are
 * its objects. */
static bool read_cluster(PbaDisk *disk, JsonObject *node, JsonObject *device, GError **error)
{
    JsonObject *of = node ? node : pba_json_find_object(device, "inserted");
    JsonObject *image = pba_json_find_object(of, "image");

    return !image || !json_object_has_member(image, "cluster-size") ||
           pba_json_size(image, "cluster-size", &disk->cluster, error);
}

/* The fleecing image is attached as <device>-fleecing: a block backend or a node. */
static bool check_fleecing(PbaDisk *disk, const PbaBlock *block, GError **error)
{
    g_autofree char *name = g_strconcat(disk->device, "-fleecing", NULL);
    JsonObject *device = pba_block_find_device(block, name);
    JsonObject *node = pba_block_find_node(block, name);
    uint64_t size;

    if (!node && (!device || !pba_json_find_object(device, "inserted"))) {
        pba_error_set(
            error, PBA_ERROR_ARGUMENT,
            "its fleecing image '%s' is not attached - attach an image of exactly its size before "
            "setup",
            name);
        return false;
    }
    g_free(disk->fleecing_node);
    disk->fleecing_node = g_strdup(node ? name : pba_block_device_node(device));
    if (!(node ? pba_block_node_size(node, &size, error)
               : pba_block_device_size(device, &size, error))) {
        return false;
    }
    if (size != disk->size) {
        pba_error_set(
            error, PBA_ERROR_ARGUMENT,
            "fleecing image '%s' must have exactly the size of the device: it has %" PRIu64
            " bytes instead of %" PRIu64,
            name, size, disk->size);
        return false;
    }
    return read_cluster(disk, node, device, error);
}

/* QEMU looks the name up itself, and does not accept the IDs of guest devices. */
static bool check_name(const PbaDisk *disk, const PbaBlock *block, GError **error)
{
    JsonObject *device = pba_block_find_device(block, disk->device);
    const char *backend = device ? pba_json_find_string(device, "device") : NULL;

    if (strcmp(disk->root_node, disk->device) != 0 && g_strcmp0(backend, disk->device) != 0) {
        pba_error_set(error, PBA_ERROR_ARGUMENT,
                      "is the id of a guest device - give the name of its block device, '%s'",
                      backend && *backend ? backend : disk->root_node);
        return false;
    }
    return true;
}

/* Refuses what the early form of the command cannot express. */
static bool check_early_form(PbaAccess *access, const PbaBlock *block, GError **error)
{
    const PbaDisk *first = access->disks->pdata[0];

    for (guint i = 0; i < access->disks->len; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        if (disk->mode != first->mode) {
            pba_error_set(error, PBA_ERROR_UNSUPPORTED,
                          "this QEMU's early backup-access-setup has one bitmap mode for all "
                          "devices - '%s' differs from '%s' of device %s",
                          pba_bitmap_mode_name(disk->mode), pba_bitmap_mode_name(first->mode),
                          first->device);
            pba_error_add_device(error, disk->device);
            return false;
        }
        if (strpbrk(disk->device, ",;:")) {
            pba_error_set(
                error, PBA_ERROR_UNSUPPORTED,
                "this QEMU's early backup-access-setup takes a list of devices, so a name "
                "must not contain ',', ';' or ':' - give the disk another one");
            pba_error_add_device(error, disk->device);
            return false;
        }
    }
    /* A bitmap with a companion has been removed before. */
    g_autofree char *name = pba_access_bitmap(access);
    if (first->mode == PBA_BITMAP_MODE_NEW && access->tied != PBA_TIED_YES &&
        pba_block_has_bitmap(block, name)) {
        pba_error_set(error, PBA_ERROR_UNSUPPORTED,
                      "this QEMU's early backup-access-setup makes a new bitmap only under a new "
                      "name, and '%s' exists - give another 'bitmap-name'",
                      name);
        return false;
    }
    return true;
}

static bool find_nodes(const PbaAccess *access, PbaDisk *disk, const PbaBlock *block,
                       GError **error)
{
    pba_guards_name(access, disk);
    disk->bitmap_node = g_strdup(pba_block_skip_filters(block, disk->root_node));
    if (!disk->bitmap_node) {
        pba_error_set(error, PBA_ERROR_PROTOCOL,
                      "its block graph ends in a filter without a child");
    }
    return disk->bitmap_node != NULL;
}

bool pba_pve_check(PbaAccess *access, const PbaBlock *block, GError **error)
{
    for (guint i = 0; i < access->disks->len; i++) {
        PbaDisk *disk = access->disks->pdata[i];
        if (!check_name(disk, block, error) || !check_fleecing(disk, block, error) ||
            !find_nodes(access, disk, block, error)) {
            pba_error_add_device(error, disk->device);
            return false;
        }
    }
    return !pba_pve_has_early_form(access) || check_early_form(access, block, error);
}

static char *told_target(const PbaAccess *access)
{
    return pba_pve_target(access, access->tied == PBA_TIED_YES);
}

static JsonNode *devices_form(const PbaAccess *access)
{
    JsonArray *devices = json_array_new();

    for (guint i = 0; i < access->disks->len; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        json_array_add_element(devices, pba_json("{'device': <%s>, 'bitmap-mode': <%s>}",
                                                 disk->device, pba_bitmap_mode_name(disk->mode)));
    }
    JsonNode *arguments = pba_json_wrap_array("devices", devices);
    g_autofree char *target = told_target(access);
    json_object_set_string_member(json_node_get_object(arguments), "target-id", target);
    return arguments;
}

static JsonNode *devlist_form(const PbaAccess *access)
{
    g_autoptr(GString) list = g_string_new(NULL);
    const PbaDisk *first = access->disks->pdata[0];

    for (guint i = 0; i < access->disks->len; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        g_string_append_printf(list, "%s%s", i ? "," : "", disk->device);
    }
    g_autofree char *target = told_target(access);
    g_autofree char *bitmap = pba_access_bitmap(access);
    JsonNode *arguments = pba_json("{'target-id': <%s>, 'devlist': <%s>}", target, list->str);
    if (first->mode != PBA_BITMAP_MODE_NONE) {
        json_object_set_string_member(json_node_get_object(arguments), "bitmap-name", bitmap);
    }
    return arguments;
}

static bool read_bitmap(PbaDisk *disk, JsonObject *info, GError **error)
{
    const char *action = pba_json_find_string(info, "bitmap-action");

    if (!json_object_has_member(info, "bitmap-action")) {
        disk->action = PBA_BITMAP_ACTION_ABSENT;
        return true;
    }
    if (!pba_bitmap_action_parse(action ? action : "(no text)", &disk->action, error)) {
        return false;
    }
    if (pba_bitmap_status(disk->action) == PBA_BITMAP_STATUS_NONE) {
        return true;
    }
    g_free(disk->bitmap_node);
    disk->bitmap_node = g_strdup(pba_json_string(info, "bitmap-node-name", error));
    disk->bitmap_name =
        disk->bitmap_node ? g_strdup(pba_json_string(info, "bitmap-name", error)) : NULL;
    return disk->bitmap_name != NULL;
}

static bool read_info(PbaDisk *disk, JsonObject *info, GError **error)
{
    uint64_t size;

    disk->snapshot_node = g_strdup(pba_json_string(info, "node-name", error));
    if (!disk->snapshot_node || !pba_json_size(info, "size", &size, error)) {
        return false;
    }
    if (size != disk->size) {
        pba_error_set(error, PBA_ERROR_PROTOCOL,
                      "its size changed during setup, from %" PRIu64 " to %" PRIu64
                      " bytes - try again",
                      disk->size, size);
        return false;
    }
    return read_bitmap(disk, info, error);
}

static bool read_reply(PbaAccess *access, JsonArray *reply, GError **error)
{
    for (guint i = 0; i < access->disks->len; i++) {
        PbaDisk *disk = access->disks->pdata[i];
        JsonObject *info = pba_json_find_element(reply, "device", disk->device);
        if (!info) {
            pba_error_set(error, PBA_ERROR_INCOMPLETE, "QEMU's reply does not mention it");
        }
        if (!info || !read_info(disk, info, error)) {
            pba_error_add_command(error, "backup-access-setup");
            pba_error_add_device(error, disk->device);
            return false;
        }
    }
    return true;
}

/* Counts the nodes and bitmaps that QEMU adds for an access or for a native backup. */
static unsigned count_parts(const PbaBlock *block)
{
    unsigned count = 0;

    for (guint i = 0; i < json_array_get_length(block->nodes); i++) {
        JsonObject *node = pba_json_element(block->nodes, i);
        const char *driver = node ? pba_json_find_string(node, "drv") : NULL;
        const char *name = node ? pba_json_find_string(node, "node-name") : NULL;
        count += g_strcmp0(driver, "snapshot-access") == 0 ||
                 g_strcmp0(driver, "copy-before-write") == 0;
        count += name && pba_block_find_bitmap(block, name, PBA_PVE_BACKGROUND);
    }
    return count;
}

/* Whether this is QEMU's error for an access or a native backup of another program, from before it
 * changed anything. This only matters if its parts have appeared since this setup began to look:
 * either another program was faster, or QEMU failed half way. If the error is not recognized,
 * teardown is tried: QEMU refuses it for another target's access, and what would crash QEMU is
 * checked before; an access of this target ends as a failed backup. If it is recognized wrongly,
 * the half that QEMU has made remains, and QEMU refuses the next setup. No bit is lost either
 * way. */
static bool is_refusal(const GError *error)
{
    return error->code == PBA_ERROR_QMP && strstr(error->message, "not finished");
}

/* The access' backend_data after the command for setup was sent: QEMU's answer to it. QEMU does not
 * report an access without bitmaps. */
typedef struct {
    enum {
        ANSWER_NOT_KNOWN, /* no answer came, or setup was done */
        ANSWER_ERROR,
        ANSWER_OTHERS, /* another program has an access */
    } answer;
} Sent;

bool pba_pve_has_done_nothing(const PbaAccess *access, const PbaBlock *now)
{
    const Sent *sent = access->backend_data;

    return !sent || sent->answer == ANSWER_OTHERS ||
           (sent->answer == ANSWER_ERROR && count_parts(now) == count_parts(&access->seen));
}

/* QEMU's filter is inserted between the disk and its throttle filter. */
static const char *guarded(const PbaDisk *disk)
{
    return disk->bitmap_node;
}

bool pba_pve_prepare(PbaAccess *access, const PbaBlock *block, GError **error)
{
    return
        /* Before the command, which would continue with a bitmap that fits no backup. */
        pba_pve_check_ties(access, block, error) &&
        /* Before the command, which only QEMU's own teardown can undo: if another program's NBD
         * server runs, the command must not be sent. */
        pba_nbd_server_start(access, error) &&
        /* Before the command: its filter is inserted below these nodes, and this process may die
         * after sending it. QEMU does not report the devices of an access, so recovery needs their
         * holds. Before the last check for other programs. */
        pba_guards_add(access, guarded, error);
}

static JsonArray *ask(PbaAccess *access, GError **error)
{
    JsonNode *arguments =
        pba_pve_has_early_form(access) ? devlist_form(access) : devices_form(access);
    Sent *sent = g_new0(Sent, 1);
    GError *local = NULL;

    sent->answer = ANSWER_NOT_KNOWN;
    access->backend_data = sent;
    JsonArray *reply = pba_qmp_query_array(access->qmp, "backup-access-setup", arguments, &local);
    if (!reply) {
        sent->answer = pba_error_is_fatal(local) ? ANSWER_NOT_KNOWN
                       : is_refusal(local)       ? ANSWER_OTHERS
                                                 : ANSWER_ERROR;
        g_propagate_error(error, local);
    }
    return reply;
}

bool pba_pve_cut(PbaAccess *access, GError **error)
{
    /* The freeze before this may have taken minutes. If a backup job of a node below the disk's
     * throttle filter, which query-block does not show, ends after the command, QEMU (10.2) aborts.
     * A device that has lost its medium crashes QEMU (to 11.0.0), and if one device fails, the
     * nodes of those before it remain forever. */
    bool is_as_seen = pba_company_check_jobs(access, error) && pba_access_look_again(access, error);
    g_autoptr(JsonArray) reply = is_as_seen ? ask(access, error) : NULL;
    return reply && read_reply(access, reply, error);
}

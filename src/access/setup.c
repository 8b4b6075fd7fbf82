/* Setting an access up: what is asked for, checked, done, and undone where it fails. */
#include "backend.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include <string.h>

static bool note_requests(PbaAccess *access, const PbaDeviceRequest *requests, size_t count,
                          GError **error)
{
    g_ptr_array_set_size(access->disks, 0);
    if (count == 0) {
        pba_error_set(error, PBA_ERROR_ARGUMENT, "setup needs at least one device");
        return false;
    }
    for (size_t i = 0; i < count; i++) {
        if (!pba_check_utf8("device", requests[i].device ? requests[i].device : "", error)) {
            return false;
        }
        for (size_t j = 0; j < i; j++) {
            if (g_strcmp0(requests[i].device, requests[j].device) == 0) {
                pba_error_set(error, PBA_ERROR_ARGUMENT, "is listed twice");
                pba_error_add_device(error, requests[i].device);
                return false;
            }
        }
        PbaDisk *disk = g_new0(PbaDisk, 1);
        disk->device = g_strdup(requests[i].device);
        disk->key = pba_short_hash(disk->device);
        disk->mode = requests[i].mode;
        disk->base = g_strdup(requests[i].base);
        access->tied |= requests[i].tied;
        g_ptr_array_add(access->disks, disk);
        if (disk->base && !pba_companion_check_id(disk->base, error)) {
            pba_error_add_device(error, disk->device);
            return false;
        }
    }
    return true;
}

/* Fills in what QEMU has; refuses what cannot be backed up. */
static bool resolve_disk(PbaDisk *disk, const PbaBackend *backend, const PbaBlock *block,
                         GError **error)
{
    JsonObject *device = pba_block_find_device(block, disk->device);

    disk->identity = backend->identify(disk->device, device);
    if (!device) {
        return backend->resolve_node(disk, block, error);
    }
    if (!pba_json_find_object(device, "inserted")) {
        pba_error_set(error, PBA_ERROR_ARGUMENT,
                      "has no medium - leave empty removable drives out of the backup");
        return false;
    }
    disk->qdev = g_strdup(pba_json_find_string(device, "qdev"));
    disk->root_node = g_strdup(pba_block_device_node(device));
    disk->read_only = pba_json_find_bool(pba_json_find_object(device, "inserted"), "ro");
    if (!disk->root_node) {
        pba_error_set(error, PBA_ERROR_PROTOCOL, "query-block shows no node for it");
        return false;
    }
    return pba_block_device_size(device, &disk->size, error);
}

static bool resolve_disks(PbaAccess *access, const PbaBlock *block, GError **error)
{
    for (guint i = 0; i < access->disks->len; i++) {
        PbaDisk *disk = access->disks->pdata[i];
        if (!resolve_disk(disk, access->backend, block, error)) {
            pba_error_add_device(error, disk->device);
            return false;
        }
        for (guint j = 0; j < i; j++) {
            const PbaDisk *other = access->disks->pdata[j];
            if (strcmp(disk->root_node, other->root_node) == 0) {
                pba_error_set(error, PBA_ERROR_ARGUMENT, "is listed twice - also as '%s'",
                              other->device);
                pba_error_add_device(error, disk->device);
                return false;
            }
        }
    }
    return pba_company_check_disks(access, block, error);
}

static void undo_setup(PbaAccess *access)
{
    g_autoptr(GError) error = NULL;

    if (access->phase == PBA_PHASE_NEW) {
        pba_access_end(access);
    } else if (!pba_tear_down_and_end(access, false, &error)) {
        pba_log(&access->hooks, PBA_LOG_WARN, "undoing setup: %s", error->message);
    }
}

static void log_lines(const PbaAccess *access, const GPtrArray *lines)
{
    for (guint i = 0; i < lines->len; i++) {
        pba_log(&access->hooks, PBA_LOG_INFO, "%s", (const char *)lines->pdata[i]);
    }
}

static bool undo_leftovers(PbaAccess *access, PbaBlock *block, GError **error)
{
    g_autoptr(GPtrArray) lines = g_ptr_array_new_with_free_func(g_free);

    bool done = pba_recover_leftovers(access, block, lines, error);
    log_lines(access, lines);
    return done;
}

/* Our marker is there: nobody begins an access in between, whose bitmaps would be hit. */
static bool drop_strays(PbaAccess *access, PbaBlock *block, GError **error)
{
    g_autoptr(GPtrArray) lines = g_ptr_array_new_with_free_func(g_free);

    if (!access->backend->has_strays(access, block)) {
        return true;
    }
    bool done = access->backend->drop_strays(access, lines, error);
    log_lines(access, lines);
    /* What setup compares with must not have them any more. */
    return done && pba_block_query(access->qmp, true, block, error);
}

static bool set_up(PbaAccess *access, GError **error)
{
    g_auto(PbaBlock) block = {0};

    if (!pba_access_begin(access, error)) {
        return false;
    }
    access->nonce = pba_nonce_new(error);
    return access->nonce && pba_company_check_here(access, error) &&
           pba_tie_ask_guest(access, error) &&
           /* Before the disks are looked at: it changes the graph and the bitmaps. */
           undo_leftovers(access, &block, error) && resolve_disks(access, &block, error) &&
           access->backend->check(access, &block, error) &&
           /* Before the first change: another process sees from now on that this one is at work. */
           pba_owner_mark(access, error) &&
           /* After the marker, whose name it notes; before the NBD server, which listens there. */
           pba_run_dir_make(access, error) &&
           /* Before the command: with a stray background bitmap Proxmox' QEMU refuses it. */
           drop_strays(access, &block, error) && access->backend->setup(access, &block, error);
}

static bool require_down(const PbaAccess *access, GError **error)
{
    if (pba_access_is_up(access)) {
        pba_error_set(error, PBA_ERROR_STATE,
                      "previous backup for target '%s' not finished - tear it down first",
                      access->target_id);
        return false;
    }
    return true;
}

bool pba_access_sizes(PbaAccess *access, const PbaDeviceRequest *requests, size_t count,
                      uint64_t *sizes, GError **error)
{
    g_auto(PbaBlock) block = {0};

    if (!require_down(access, error)) {
        return false;
    }
    bool done =
        note_requests(access, requests, count, error) && pba_access_choose_backend(access, error) &&
        pba_block_query(access->qmp, true, &block, error) && resolve_disks(access, &block, error);
    for (size_t i = 0; done && i < count; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        sizes[i] = disk->size;
    }
    g_ptr_array_set_size(access->disks, 0);
    access->tied = false;
    pba_qmp_release(access->qmp);
    return done;
}

/* The id that the disk's bitmap has, if nothing speaks against the bitmap. */
static char *find_base(PbaAccess *access, PbaDisk *disk, const PbaBlock *block)
{
    disk->bitmap_node = g_strdup(pba_block_skip_filters(block, disk->root_node));
    const char *companion = pba_companion_find(block, disk->bitmap_node, access->target_id);
    disk->base = companion ? g_strdup(pba_companion_id(companion)) : NULL;
    return disk->base && pba_tie_fits(access, disk, block) ? g_strdup(disk->base) : NULL;
}

static bool look_for_bases(PbaAccess *access, PbaBlock *block, GError **error)
{
    return pba_access_begin(access, error) && pba_company_check_here(access, error) &&
           pba_tie_ask_guest(access, error) && undo_leftovers(access, block, error) &&
           pba_block_query(access->qmp, true, block, error) && resolve_disks(access, block, error);
}

bool pba_access_bases(PbaAccess *access, const PbaDeviceRequest *requests, size_t count,
                      char **bases, GError **error)
{
    g_auto(PbaBlock) block = {0};

    if (!require_down(access, error)) {
        return false;
    }
    bool done = note_requests(access, requests, count, error);
    access->tied = true;
    done = done && look_for_bases(access, &block, error);
    for (size_t i = 0; done && i < count; i++) {
        bases[i] = find_base(access, access->disks->pdata[i], &block);
    }
    g_ptr_array_set_size(access->disks, 0);
    access->tied = false;
    pba_qmp_release(access->qmp);
    return done;
}

bool pba_access_setup(PbaAccess *access, const PbaDeviceRequest *requests, size_t count,
                      GError **error)
{
    if (!require_down(access, error)) {
        return false;
    }
    GError *local = NULL;
    bool done = note_requests(access, requests, count, &local) && set_up(access, &local);
    if (done) {
        pba_access_enter(access, PBA_PHASE_UP);
    } else {
        pba_user_add_hint(access, &local);
        g_propagate_error(error, local);
        undo_setup(access);
    }
    pba_qmp_release(access->qmp);
    return done;
}

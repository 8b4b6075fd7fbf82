/* An access from check to teardown, whatever the backend. */
#include "access.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include <string.h>
#include <unistd.h>

/* BDRV_BITMAP_MAX_NAME_SIZE; the target-id is (part of) a bitmap's name. */
#define MAX_BITMAP_NAME 1023

/* What would reach QEMU as a name: QEMU crashes or leaks on some of these. */
static bool check_target_id(const char *id, GError **error)
{
    const char *problem = NULL;

    if (!id || !*id) {
        problem = "must not be empty";
    } else if (strcmp(id, "Proxmox") == 0 || strcmp(id, "Proxmox VE") == 0) {
        problem = "is reserved: QEMU's own backup uses it";
    } else if (!g_utf8_validate(id, -1, NULL)) {
        problem = "must be valid UTF-8";
    } else {
        g_autofree char *background = pba_background_bitmap(id);
        if (strlen(background) > MAX_BITMAP_NAME) {
            pba_error_set(error, PBA_ERROR_ARGUMENT,
                          "target-id is too long - %zu bytes, at most %zu can be part of the name "
                          "of a bitmap",
                          strlen(id), MAX_BITMAP_NAME - (strlen(background) - strlen(id)));
            return false;
        }
        return true;
    }
    pba_error_set(error, PBA_ERROR_ARGUMENT, "target-id '%s' %s", id ? id : "", problem);
    return false;
}

/* An option that may be left out is NULL then. */
static bool check_utf8(const char *name, const char *value, GError **error)
{
    if (!value || (*value && g_utf8_validate(value, -1, NULL))) {
        return true;
    }
    pba_error_set(error, PBA_ERROR_ARGUMENT, "%s must be valid UTF-8 and not empty", name);
    return false;
}

static bool check_dir(const char *name, const char *value, GError **error)
{
    if (!check_utf8(name, value, error)) {
        return false;
    }
    if (value && !g_path_is_absolute(value)) {
        pba_error_set(error, PBA_ERROR_ARGUMENT, "%s '%s' must be an absolute path", name, value);
        return false;
    }
    return true;
}

static bool check_fleecing(GHashTable *fleecing, GError **error)
{
    GHashTableIter iter;
    gpointer device, node;

    if (!fleecing) {
        return true;
    }
    g_hash_table_iter_init(&iter, fleecing);
    while (g_hash_table_iter_next(&iter, &device, &node)) {
        if (!check_utf8("a device of fleecing", device, error) ||
            !check_utf8("a node of fleecing", node, error)) {
            return false;
        }
    }
    return true;
}

PbaAccess *pba_access_new(PbaQmp *qmp, const PbaAccessOptions *options, const PbaHooks *hooks,
                          GError **error)
{
    if (!check_target_id(options->target_id, error)) {
        return NULL;
    }
    PbaAccess *access = pba_access_new_observer(qmp, options, hooks, error);
    if (access) {
        access->target_id = g_strdup(options->target_id);
    }
    return access;
}

PbaAccess *pba_access_new_observer(PbaQmp *qmp, const PbaAccessOptions *options,
                                   const PbaHooks *hooks, GError **error)
{
    if (!check_dir("run-dir", options->run_dir, error) ||
        !check_dir("fleecing-dir", options->fleecing_dir, error) ||
        !check_utf8("bitmap-name", options->bitmap_name, error) ||
        !check_fleecing(options->fleecing, error)) {
        return NULL;
    }
    PbaAccess *access = g_new0(PbaAccess, 1);
    access->owner = getpid();
    access->qmp = qmp;
    access->hooks = hooks ? *hooks : (PbaHooks){0};
    access->run_dir = g_strdup(options->run_dir);
    access->identity = g_strdup(options->identity);
    access->fleecing_dir = g_strdup(options->fleecing_dir);
    access->fleecing = options->fleecing ? g_hash_table_ref(options->fleecing) : NULL;
    access->early_bitmap_name = g_strdup(options->bitmap_name);
    access->persistent = options->persistent;
    access->no_recover = options->no_recover;
    access->disks = g_ptr_array_new_with_free_func(pba_disk_free);
    return access;
}

void pba_access_free(PbaAccess *access)
{
    if (!access) {
        return;
    }
    pba_vfiles_free(access);
    if (access->socket_dir && access->owner == getpid() && !pba_socket_answers(access->socket)) {
        pba_run_dir_remove(access);
    }
    pba_owner_forget(access);
    g_free(access->target_id);
    g_free(access->run_dir);
    g_free(access->identity);
    g_free(access->fleecing_dir);
    g_clear_pointer(&access->fleecing, g_hash_table_unref);
    g_free(access->early_bitmap_name);
    g_free(access->socket_dir);
    g_free(access->socket);
    g_ptr_array_unref(access->disks);
    g_free(access);
}

bool pba_access_is_up(const PbaAccess *access)
{
    return access->disks->len > 0;
}

const char *pba_access_socket(const PbaAccess *access)
{
    return access->socket;
}

size_t pba_access_device_count(const PbaAccess *access)
{
    return access->disks->len;
}

void pba_access_device_info(const PbaAccess *access, size_t index, PbaDeviceInfo *info)
{
    const PbaDisk *disk = access->disks->pdata[index];

    *info = (PbaDeviceInfo){
        .device = disk->device,
        .node_name = disk->snapshot_node,
        .size = disk->size,
        .bitmap_node_name = disk->bitmap_name ? disk->bitmap_node : NULL,
        .bitmap_name = disk->bitmap_name,
        .action = disk->action,
    };
}

static bool take_requests(PbaAccess *access, const PbaDeviceRequest *requests, size_t count,
                          GError **error)
{
    if (count == 0) {
        pba_error_set(error, PBA_ERROR_ARGUMENT, "setup needs at least one device");
        return false;
    }
    for (size_t i = 0; i < count; i++) {
        if (!check_utf8("device", requests[i].device ? requests[i].device : "", error)) {
            return false;
        }
        for (size_t j = 0; j < i; j++) {
            if (strcmp(requests[i].device, requests[j].device) == 0) {
                pba_error_set(error, PBA_ERROR_ARGUMENT, "is listed twice");
                pba_error_add_device(error, requests[i].device);
                return false;
            }
        }
        PbaDisk *disk = g_new0(PbaDisk, 1);
        disk->device = g_strdup(requests[i].device);
        disk->key = pba_short_hash(disk->device);
        disk->mode = requests[i].mode;
        g_ptr_array_add(access->disks, disk);
    }
    return true;
}

/* Proxmox' QEMU looks for any node of that name. While an access is up its filter hides the nodes
 * of guest devices; then QEMU itself must say whose access that is. */
static bool resolve_node(PbaDisk *disk, const PbaBlock *block, GError **error)
{
    JsonObject *node = pba_block_find_node(block, disk->device);

    if (!node) {
        pba_error_set(error, PBA_ERROR_ARGUMENT, "there is no such block device in this guest");
        return false;
    }
    disk->root_node = g_strdup(disk->device);
    return pba_block_node_size(node, &disk->size, error);
}

/* Fills in what QEMU has; refuses what cannot be backed up. */
static bool resolve_disk(PbaDisk *disk, PbaBackend backend, const PbaBlock *block, GError **error)
{
    JsonObject *device = pba_block_find_device(block, disk->device);

    if (!device && backend == PBA_BACKEND_PVE) {
        return resolve_node(disk, block, error);
    }
    if (!device) {
        pba_error_set(error, PBA_ERROR_ARGUMENT, "there is no such block device in this guest");
        return false;
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
    return true;
}

/* Where the caller's transport hides the socket, QEMU must tell who it is. */
static bool ensure_identity(PbaAccess *access, GError **error)
{
    if (access->identity) {
        return true;
    }
    g_autoptr(JsonObject) name = pba_qmp_query_object(access->qmp, "query-name", NULL, error);
    g_autoptr(JsonObject) uuid =
        name ? pba_qmp_query_object(access->qmp, "query-uuid", NULL, error) : NULL;
    if (!uuid) {
        return false;
    }
    const char *vm_name = pba_json_find_string(name, "name");
    const char *vm_uuid = pba_json_find_string(uuid, "UUID");
    access->identity = g_strdup_printf("%s:%s", vm_name ? vm_name : "", vm_uuid ? vm_uuid : "");
    return true;
}

static bool choose_backend(PbaAccess *access, GError **error)
{
    PbaCapabilities capabilities;

    if (!pba_capabilities(access->qmp, &capabilities, error)) {
        return false;
    }
    access->backend =
        strcmp(capabilities.backend, "pve") == 0 ? PBA_BACKEND_PVE : PBA_BACKEND_UPSTREAM;
    access->form =
        g_strcmp0(capabilities.form, "devlist") == 0 ? PBA_FORM_DEVLIST : PBA_FORM_DEVICES;
    access->qemu_version = capabilities.major * 100 + capabilities.minor;
    return true;
}

bool pba_access_begin(PbaAccess *access, GError **error)
{
    return choose_backend(access, error) && ensure_identity(access, error);
}

static void end_access(PbaAccess *access)
{
    pba_vfiles_free(access);
    pba_run_dir_remove(access);
    pba_owner_forget(access);
    g_ptr_array_set_size(access->disks, 0);
    access->begun = false;
    access->server_up = false;
    access->exports = PBA_EXPORTS_NONE;
    access->teardown_failed = false;
    access->success_unknown = false;
}

static bool tear_down(PbaAccess *access, bool success, GError **error)
{
    GError *first = NULL;
    GError *files = NULL;

    if (!access->begun) {
        return true;
    }
    if (!pba_vfiles_end(access, &files) && pba_error_is_fatal(files)) {
        g_propagate_error(error, files);
        return false;
    }
    /* QEMU aborts if a bitmap is still exported when the access ends, or cannot join it. */
    if (pba_exports_remove(access, &first)) {
        GError *step = NULL;
        success = success && !access->teardown_failed;
        if (access->backend == PBA_BACKEND_PVE) {
            pba_pve_teardown(access, success, &step);
        } else {
            pba_upstream_teardown(access, success, &step);
        }
        pba_error_keep_first(&first, step, &access->hooks);
    }
    pba_error_keep_first(&first, files, &access->hooks);
    if (first) {
        g_propagate_error(error, first);
        return false;
    }
    return true;
}

/* Whether there is nothing left to be torn down by a later call. */
static bool is_over(PbaAccess *access, const GError *error)
{
    if (pba_error_is_fatal(error)) {
        /* A QEMU that quit has taken the access with it. */
        return error->code == PBA_ERROR_CONNECTION && pba_qmp_is_gone(access->qmp);
    }
    return access->backend == PBA_BACKEND_UPSTREAM && !access->server_up &&
           pba_upstream_is_clean(access);
}

/* Tears down, and keeps what a later call needs if there is something left to be torn down. */
bool pba_tear_down_and_end(PbaAccess *access, bool success, GError **error)
{
    g_autoptr(GError) local = NULL;

    bool done = tear_down(access, success, &local);
    bool over = done || is_over(access, local);
    if (!pba_error_is_fatal(local) && (over || access->recovering)) {
        pba_owner_unmark(access, over);
    }
    if (over) {
        end_access(access);
    } else {
        access->teardown_failed = true;
    }
    pba_qmp_release(access->qmp);
    if (!done) {
        g_propagate_error(error, g_steal_pointer(&local));
    }
    return done;
}

static void undo_setup(PbaAccess *access)
{
    g_autoptr(GError) error = NULL;

    if (!access->begun && !access->marked) {
        end_access(access);
    } else if (!pba_tear_down_and_end(access, false, &error)) {
        pba_log(&access->hooks, PBA_LOG_WARN, "undoing setup: %s", error->message);
    }
}

static bool undo_left(PbaAccess *access, PbaBlock *block, GError **error)
{
    g_autoptr(GPtrArray) lines = g_ptr_array_new_with_free_func(g_free);

    bool done = pba_recover_left(access, block, lines, error);
    for (guint i = 0; i < lines->len; i++) {
        pba_log(&access->hooks, PBA_LOG_INFO, "%s", (const char *)lines->pdata[i]);
    }
    return done;
}

/* The disks of a guest that was migrated away are another QEMU's, and change there. */
static bool check_here(PbaAccess *access, GError **error)
{
    g_autoptr(JsonObject) reply = pba_qmp_query_object(access->qmp, "query-status", NULL, error);
    const char *status = reply ? pba_json_string(reply, "status", error) : NULL;

    if (status && strstr(status, "migrate")) {
        pba_error_set(error, PBA_ERROR_STATE,
                      "the guest is migrated to or from another machine (its state is '%s') - back "
                      "it up where it runs",
                      status);
        return false;
    }
    return status != NULL;
}

static bool set_up(PbaAccess *access, GError **error)
{
    g_auto(PbaBlock) block = {0};

    if (!pba_access_begin(access, error)) {
        return false;
    }
    bool pve = access->backend == PBA_BACKEND_PVE;
    return check_here(access, error) && undo_left(access, &block, error) &&
           resolve_disks(access, &block, error) &&
           (pve ? pba_pve_check(access, &block, error)
                : pba_upstream_check(access, &block, error)) &&
           pba_owner_mark(access, error) && pba_run_dir_make(access, error) &&
           (pve ? pba_pve_setup(access, error) : pba_upstream_setup(access, &block, error));
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
    bool done = take_requests(access, requests, count, error) && choose_backend(access, error) &&
                pba_block_query(access->qmp, true, &block, error) &&
                resolve_disks(access, &block, error);
    for (size_t i = 0; done && i < count; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        sizes[i] = disk->size;
    }
    g_ptr_array_set_size(access->disks, 0);
    pba_qmp_release(access->qmp);
    return done;
}

bool pba_access_setup(PbaAccess *access, const PbaDeviceRequest *requests, size_t count,
                      GError **error)
{
    if (!require_down(access, error)) {
        return false;
    }
    bool done = take_requests(access, requests, count, error) && set_up(access, error);
    if (!done) {
        undo_setup(access);
    }
    pba_qmp_release(access->qmp);
    return done;
}

static bool require_up(const PbaAccess *access, GError **error)
{
    if (!pba_access_is_up(access)) {
        pba_error_set(error, PBA_ERROR_STATE, "no access is set up - call setup first");
        return false;
    }
    return true;
}

bool pba_access_export(PbaAccess *access, GError **error)
{
    if (!require_up(access, error)) {
        return false;
    }
    if (access->exports == PBA_EXPORTS_ALL) {
        return true;
    }
    if (access->teardown_failed) {
        pba_error_set(error, PBA_ERROR_STATE, "the access is half torn down - call teardown again");
        return false;
    }
    bool done = pba_exports_add(access, error);
    pba_qmp_release(access->qmp);
    for (guint i = 0; done && i < access->disks->len; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        if (access->backend == PBA_BACKEND_UPSTREAM && disk->action == PBA_BITMAP_ACTION_USED) {
            pba_trim_clean_parts(access, disk);
        }
    }
    return done;
}

bool pba_access_teardown(PbaAccess *access, bool success, GError **error)
{
    if (!require_up(access, error)) {
        return false;
    }
    pba_qmp_release(access->qmp); /* a call that never returned may have left it half used */
    return pba_tear_down_and_end(access, success, error);
}

bool pba_access_recover(PbaAccess *access, GPtrArray *lines, GError **error)
{
    g_auto(PbaBlock) block = {0};

    bool done = pba_access_begin(access, error) && pba_recover_left(access, &block, lines, error);
    pba_qmp_release(access->qmp);
    return done;
}

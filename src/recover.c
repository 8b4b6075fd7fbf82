/* Finding and undoing what a dead process left. What an access has made is told by the names of
 * nodes and exports and by bitmaps; the rest is done by the ordinary end of an access that failed.
 */
#include "access.h"
#include "error.h"
#include "json.h"
#include "vfile.h"
#include <string.h>

/* What there is at one moment; the block graph is the caller's. */
typedef struct {
    PbaBlock *block;
    JsonArray *exports;
    GPtrArray *paths; /* on disk */
} Left;

static void left_clear(Left *left)
{
    g_clear_pointer(&left->exports, json_array_unref);
    g_clear_pointer(&left->paths, g_ptr_array_unref);
}

G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Left, left_clear)

static bool look(PbaAccess *access, PbaBlock *block, Left *left, GError **error)
{
    left_clear(left);
    left->block = block;
    left->paths = pba_run_dir_find_left(access);
    if (!pba_block_query(access->qmp, access->backend == PBA_BACKEND_UPSTREAM, block, error)) {
        return false;
    }
    left->exports = pba_qmp_query_array(access->qmp, "query-block-exports", NULL, error);
    return left->exports != NULL;
}

static const char *node_name(const Left *left, guint index)
{
    return pba_block_node_name(left->block->nodes, index);
}

static const char *export_id(const Left *left, guint index)
{
    JsonObject *export = pba_json_element(left->exports, index);
    return export ? pba_json_find_string(export, "id") : NULL;
}

/* Takes pba-ROLE-TARGET-DISK apart; the results point into it. */
static bool parse_own(const char *name, const char **target, const char **key)
{
    size_t length = strlen(name);

    if (!pba_is_own_node(name) || pba_is_owner_mark(name) || length < strlen("pba-x-") + 17) {
        return false;
    }
    *key = name + length - 8;
    *target = *key - 9;
    return (*target)[-1] == '-' && (*key)[-1] == '-' && strspn(*key, "0123456789abcdef") == 8 &&
           strspn(*target, "0123456789abcdef") == 8;
}

/* Whose name it is: NULL if not of an access at all, else this target's key or "". */
static const char *find_key(const PbaAccess *access, const char *name)
{
    g_autofree char *own = pba_short_hash(access->target_id);
    const char *target;
    const char *key;

    if (!name || !parse_own(name, &target, &key)) {
        return NULL;
    }
    return strncmp(target, own, 8) == 0 ? key : "";
}

static bool has_hash(const char *name, const char *key)
{
    g_autofree char *hash = name ? pba_short_hash(name) : NULL;
    return hash && strcmp(hash, key) == 0;
}

/* The name a device was given to setup by: any of those that pba_block_find_device takes. */
static char *find_device_name(const PbaBlock *block, const char *key)
{
    for (guint i = 0; i < json_array_get_length(block->devices); i++) {
        JsonObject *device = pba_json_element(block->devices, i);
        const char *qdev = device ? pba_json_find_string(device, "qdev") : NULL;
        g_auto(GStrv) parts = g_strsplit(qdev ? qdev : "", "/", 5);
        const char *backend = device ? pba_json_find_string(device, "device") : NULL;
        const char *id = g_strv_length(parts) > 3 ? parts[3] : NULL;
        const char *const names[] = {backend, qdev, id};
        for (size_t j = 0; j < G_N_ELEMENTS(names); j++) {
            if (has_hash(names[j], key)) {
                return g_strdup(names[j]);
            }
        }
    }
    for (guint i = 0; i < json_array_get_length(block->nodes); i++) {
        const char *name = pba_block_node_name(block->nodes, i);
        if (has_hash(name, key)) {
            return g_strdup(name);
        }
    }
    return NULL;
}

static PbaDisk *find_disk(const PbaAccess *dead, const char *key)
{
    for (guint i = 0; i < dead->disks->len; i++) {
        PbaDisk *disk = dead->disks->pdata[i];
        if (strcmp(disk->key, key) == 0) {
            return disk;
        }
    }
    return NULL;
}

static PbaDisk *disk_of(PbaAccess *dead, const PbaBlock *block, const char *key)
{
    PbaDisk *disk = find_disk(dead, key);

    if (disk) {
        return disk;
    }
    disk = g_new0(PbaDisk, 1);
    disk->key = g_strdup(key);
    disk->device = find_device_name(block, key);
    disk->device_gone = !disk->device;
    disk->device = disk->device ? disk->device : g_strdup_printf("(%s)", key);
    disk->raw_node = pba_disk_name(dead, "raw", disk);
    disk->filter_node = pba_disk_name(dead, "cbw", disk);
    disk->snapshot_node = pba_disk_name(dead, "snap", disk);
    disk->fleecing_node = pba_disk_name(dead, "fleece", disk);
    g_ptr_array_add(dead->disks, disk);
    return disk;
}

/* upstream: the disk below our nodes. */
static bool find_root(PbaDisk *disk, const PbaBlock *block, GError **error)
{
    JsonObject *raw = pba_block_find_node(block, disk->raw_node);
    const char *root = pba_upstream_root(block, disk);

    disk->root_node = g_strdup(root);
    disk->bitmap_node = root ? g_strdup(pba_block_skip_filters(block, root)) : NULL;
    disk->read_only = raw && pba_json_find_bool(raw, "ro");
    return !raw || pba_block_node_size(raw, &disk->size, error);
}

static bool has_disk_at(const PbaAccess *dead, const char *bitmap_node)
{
    for (guint i = 0; i < dead->disks->len; i++) {
        const PbaDisk *disk = dead->disks->pdata[i];
        if (g_strcmp0(disk->bitmap_node, bitmap_node) == 0) {
            return true;
        }
    }
    return false;
}

/* upstream: a background bitmap, or a target's that does not record. */
static bool is_split(const PbaAccess *access, const PbaBlock *block, const char *node)
{
    g_autofree char *target = pba_target_bitmap(access->target_id);
    g_autofree char *background = pba_background_bitmap(access->target_id);
    JsonObject *info = pba_block_find_bitmap(block, node, target);

    return pba_block_find_bitmap(block, node, background) ||
           (info && !pba_json_find_bool(info, "recording") &&
            !pba_json_find_bool(info, "inconsistent"));
}

/* Disks whose nodes are undone already, but not their bitmaps. */
static void find_split_bitmaps(PbaAccess *dead, const Left *left)
{
    for (guint i = 0; i < json_array_get_length(left->block->nodes); i++) {
        const char *node = node_name(left, i);
        if (node && is_split(dead, left->block, node) && !has_disk_at(dead, node)) {
            g_autofree char *key = pba_short_hash(node);
            PbaDisk *disk = disk_of(dead, left->block, key);
            g_free(disk->bitmap_node);
            disk->bitmap_node = g_strdup(node);
        }
    }
}

static bool find_disks(PbaAccess *dead, const Left *left, GError **error)
{
    for (guint i = 0; i < json_array_get_length(left->block->nodes); i++) {
        const char *key = find_key(dead, node_name(left, i));
        if (key && *key) {
            disk_of(dead, left->block, key);
        }
    }
    for (guint i = 0; i < json_array_get_length(left->exports); i++) {
        const char *key = find_key(dead, export_id(left, i));
        if (key && *key) {
            disk_of(dead, left->block, key);
        }
    }
    if (dead->backend == PBA_BACKEND_PVE) {
        return true;
    }
    for (guint i = 0; i < dead->disks->len; i++) {
        if (!find_root(dead->disks->pdata[i], left->block, error)) {
            return false;
        }
    }
    find_split_bitmaps(dead, left);
    return true;
}

/* The other target's name, as far as a bitmap tells it. */
static const char *find_other_target(const PbaAccess *access, const Left *left)
{
    g_autofree char *prefix = pba_background_bitmap("");

    for (guint i = 0; i < json_array_get_length(left->block->nodes); i++) {
        JsonObject *node = pba_json_element(left->block->nodes, i);
        JsonArray *bitmaps = node ? pba_json_find_array(node, "dirty-bitmaps") : NULL;
        const char *frozen = NULL;
        bool is_pve_access = false;
        for (guint j = 0; bitmaps && j < json_array_get_length(bitmaps); j++) {
            JsonObject *info = pba_json_element(bitmaps, j);
            const char *name = info ? pba_json_find_string(info, "name") : NULL;
            if (name && g_str_has_prefix(name, prefix) &&
                strcmp(name + strlen(prefix), access->target_id) != 0) {
                return name + strlen(prefix);
            }
            is_pve_access |= g_strcmp0(name, PBA_PVE_BACKGROUND) == 0;
            frozen = name && !pba_json_find_bool(info, "recording") ? name : frozen;
        }
        if (is_pve_access && frozen) {
            return frozen;
        }
    }
    return NULL;
}

static bool check_others(const PbaAccess *access, const Left *left, GError **error)
{
    guint nodes = json_array_get_length(left->block->nodes);
    guint exports = json_array_get_length(left->exports);

    for (guint i = 0; i < nodes + exports; i++) {
        const char *name = i < nodes ? node_name(left, i) : export_id(left, i - nodes);
        const char *key = find_key(access, name);
        if (key && !*key) {
            const char *target = find_other_target(access, left);
            pba_error_set(error, PBA_ERROR_STATE,
                          "previous backup of this guest not finished: a process that is gone left "
                          "its access for %s%s%s - call recover for that target-id",
                          target ? "target '" : "another target", target ? target : "",
                          target ? "'" : "");
            return false;
        }
    }
    return true;
}

static bool is_nothing(const PbaAccess *access, const Left *left)
{
    if (left->paths->len > 0) {
        return false;
    }
    for (guint i = 0; i < json_array_get_length(left->block->nodes); i++) {
        const char *name = node_name(left, i);
        if (name &&
            (find_key(access, name) || pba_is_owner_mark(name) ||
             (access->backend == PBA_BACKEND_UPSTREAM && is_split(access, left->block, name)))) {
            return false;
        }
    }
    for (guint i = 0; i < json_array_get_length(left->exports); i++) {
        if (find_key(access, export_id(left, i))) {
            return false;
        }
    }
    return true;
}

/* An access that stands for the dead one's. */
static PbaAccess *new_dead_access(const PbaAccess *access, GError **error)
{
    PbaAccessOptions options = {
        .target_id = access->target_id,
        .run_dir = access->run_dir,
        .identity = access->identity,
        .fleecing_dir = access->fleecing_dir,
        .bitmap_name = access->early_bitmap_name,
    };
    PbaAccess *dead = pba_access_new(access->qmp, &options, &access->hooks, error);

    if (dead) {
        dead->backend = access->backend;
        dead->form = access->form;
        dead->qemu_version = access->qemu_version;
        dead->recovering = true;
    }
    return dead;
}

static void add_line(GPtrArray *lines, const char *format, ...) G_GNUC_PRINTF(2, 3);

static void add_line(GPtrArray *lines, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    g_ptr_array_add(lines, g_strdup_vprintf(format, arguments));
    va_end(arguments);
}

/* Whether QEMU's NBD server listens there; then it is ours. */
static bool take_server(PbaAccess *dead, const char *path)
{
    g_autofree char *socket = pba_run_dir_left_socket(path);

    if (dead->server_up || !socket) {
        return false;
    }
    dead->socket = g_steal_pointer(&socket);
    dead->server_up = pba_nbd_server_answers(dead);
    if (!dead->server_up) {
        g_clear_pointer(&dead->socket, g_free);
        return false;
    }
    dead->socket_dir = g_strdup(path);
    pba_vfiles_remove_left(path);
    return true;
}

/* The directory of the server goes when that has gone, all else now: QEMU has the fleecing images
 * open that it needs. */
static void take_paths(PbaAccess *dead, const Left *left, GPtrArray *lines)
{
    for (guint i = 0; i < left->paths->len; i++) {
        const char *path = left->paths->pdata[i];
        if (take_server(dead, path)) {
            add_line(lines, "the NBD server at '%s' was stopped", dead->socket);
        } else if (pba_run_dir_remove_left(path)) {
            add_line(lines, "'%s' was removed", path);
        }
    }
}

static const char *device_of(const PbaAccess *dead, const char *key)
{
    const PbaDisk *disk = find_disk(dead, key);
    return disk ? disk->device : key;
}

static void describe_node(const PbaAccess *dead, const PbaBlock *block, const char *name,
                          GPtrArray *lines)
{
    g_autofree char *target = pba_target_bitmap(dead->target_id);
    g_autofree char *background = pba_background_bitmap(dead->target_id);
    const char *key = find_key(dead, name);

    if (key) {
        add_line(lines, "device %s: block node '%s' was removed", device_of(dead, key), name);
    } else if (pba_is_owner_mark(name)) {
        add_line(lines, "block node '%s', the mark of a process that is gone, was removed", name);
    } else if (dead->backend == PBA_BACKEND_UPSTREAM && is_split(dead, block, name)) {
        JsonObject *info = pba_block_find_bitmap(block, name, target);
        JsonObject *partner = pba_block_find_bitmap(block, name, background);
        bool good = info && partner && !pba_json_find_bool(info, "inconsistent") &&
                    !pba_json_find_bool(partner, "inconsistent");
        add_line(lines,
                 good ? "node '%s': its dirty bitmaps were joined, as after a failed backup"
                      : "node '%s': its dirty bitmap was removed, since it may lack bits",
                 name);
    }
}

static void describe(const PbaAccess *dead, const Left *left, GPtrArray *lines)
{
    g_autofree char *own = pba_owner_mark_name(NULL);

    for (guint i = 0; i < json_array_get_length(left->exports); i++) {
        const char *key = find_key(dead, export_id(left, i));
        if (key) {
            add_line(lines, "device %s: export '%s' was removed", device_of(dead, key),
                     export_id(left, i));
        }
    }
    for (guint i = 0; i < json_array_get_length(left->block->nodes); i++) {
        const char *name = node_name(left, i);
        if (name && g_strcmp0(name, own) != 0) {
            describe_node(dead, left->block, name, lines);
        }
    }
    if (dead->backend == PBA_BACKEND_PVE && dead->disks->len > 0) {
        add_line(lines, "the backup access of target '%s' was torn down as failed",
                 dead->target_id);
    }
}

/* With our own marker in QEMU nobody else does the same. What is there is looked at only then. */
static bool undo_marked(PbaAccess *dead, GPtrArray *lines, GError **error)
{
    g_auto(PbaBlock) block = {0};
    g_auto(Left) left = {0};
    g_autoptr(GPtrArray) done = g_ptr_array_new_with_free_func(g_free);

    if (!look(dead, &block, &left, error) || !check_others(dead, &left, error) ||
        !find_disks(dead, &left, error)) {
        pba_owner_unmark(dead, false);
        return false;
    }
    describe(dead, &left, done);
    take_paths(dead, &left, done);
    dead->begun = dead->disks->len > 0 || dead->server_up;
    if (!pba_tear_down_and_end(dead, false, error)) {
        return false;
    }
    while (done->len > 0) {
        g_ptr_array_add(lines, g_ptr_array_steal_index(done, 0));
    }
    return true;
}

bool pba_recover_left(PbaAccess *access, PbaBlock *block, GPtrArray *lines, GError **error)
{
    g_auto(Left) left = {0};

    if (!look(access, block, &left, error) || !pba_owner_check(access, block->nodes, error) ||
        !check_others(access, &left, error)) {
        return false;
    }
    if (is_nothing(access, &left)) {
        return true;
    }
    pba_log(
        &access->hooks, PBA_LOG_WARN,
        "a process that is gone left an access for target '%s': it is undone, as after a failed "
        "backup",
        access->target_id);
    g_autoptr(PbaAccess) dead = new_dead_access(access, error);
    if (!dead) {
        return false;
    }
    return pba_owner_mark(dead, error) && undo_marked(dead, lines, error) &&
           look(access, block, &left, error);
}

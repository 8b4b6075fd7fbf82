/* The status of backups in a QEMU and on disk, for people and monitoring. It changes nothing. */
#include "backend.h"
#include "leftovers.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"

typedef struct {
    PbaAccess *access;
    PbaBlock block;
    PbaLeftovers leftovers;
    GPtrArray *things;
    char *key;      /* of the target whose access is active; NULL: none, or not known */
    PbaOwner owner; /* the process that has an access; without a mark there is none */
    JsonArray *warnings;
} Status;

static void status_clear(Status *status)
{
    g_clear_pointer(&status->things, g_ptr_array_unref);
    g_clear_pointer(&status->warnings, json_array_unref);
    pba_leftovers_clear(&status->leftovers);
    pba_block_clear(&status->block);
    g_clear_pointer(&status->access, pba_access_free);
    g_free(status->key);
}

G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Status, status_clear)

/* Unknown texts are null. */
static void set_text(JsonObject *object, const char *key, const char *text)
{
    if (text) {
        json_object_set_string_member(object, key, text);
    } else {
        json_object_set_null_member(object, key);
    }
}

static void set_size(JsonObject *object, const char *key, uint64_t size)
{
    json_object_set_int_member(object, key, (gint64)MIN(size, (uint64_t)G_MAXINT64));
}

static void copy_flag(JsonObject *to, JsonObject *from, const char *key)
{
    json_object_set_int_member(to, key, pba_json_find_bool(from, key));
}

static void copy_size(JsonObject *to, const char *to_key, JsonObject *from, const char *from_key)
{
    uint64_t size;
    if (pba_json_size(from, from_key, &size, NULL)) {
        set_size(to, to_key, size);
    }
}

static void set_target(const Status *status, JsonObject *object, const char *key)
{
    g_autofree char *target = key ? pba_leftovers_target(&status->leftovers, key) : NULL;
    set_text(object, "target-id", target);
}

/* The owner of the access */

/* The marker of a live process; else of one whose state is unknown; else of a dead one. */
static void find_owner(Status *status)
{
    JsonArray *nodes = status->block.nodes;
    PbaOwner owner;

    for (guint i = 0; i < json_array_get_length(nodes); i++) {
        if (pba_owner_at(status->access, nodes, i, &owner) &&
            (!status->owner.mark || owner.state > status->owner.state)) {
            status->owner = owner;
            status->leftovers.is_live |= owner.state != PBA_OWNER_DEAD;
        }
    }
}

/* The first target that has something in QEMU. */
static const char *find_key(const Status *status)
{
    for (guint i = 0; i < status->things->len; i++) {
        const PbaLeftover *thing = status->things->pdata[i];
        if (thing->key && pba_is_own_node(thing->name)) {
            return thing->key;
        }
    }
    return NULL;
}

static JsonArray *devices_of(const Status *status)
{
    g_autoptr(GHashTable) seen = g_hash_table_new(g_str_hash, g_str_equal);
    JsonArray *devices = json_array_new();

    for (guint i = 0; i < status->things->len; i++) {
        const PbaLeftover *thing = status->things->pdata[i];
        if (thing->device && g_strcmp0(thing->key, status->key) == 0 &&
            pba_is_own_node(thing->name) && g_hash_table_add(seen, thing->device)) {
            json_array_add_string_element(devices, thing->device);
        }
    }
    return devices;
}

static JsonObject *foreign_access(const Status *status)
{
    g_autofree char *target = NULL;

    if (!status->access->backend->find_foreign(&status->block, &target)) {
        return NULL;
    }
    JsonObject *object = json_object_new();
    set_text(object, "target-id", target);
    set_text(object, "pid", NULL);
    set_text(object, "alive", NULL);
    json_object_set_array_member(object, "devices", json_array_new());
    return object;
}

/* NULL: no access is active, and no process is setting one up. */
static JsonObject *describe_access(Status *status)
{
    const char *key = find_key(status);

    if (!status->leftovers.is_live && !key) {
        return foreign_access(status);
    }
    JsonObject *object = json_object_new();
    status->key = g_strdup(key);
    g_autofree char *owners_key = key ? NULL : pba_owner_target_key(status->owner.size);
    set_target(status, object, key ? key : owners_key);
    if (status->owner.pid) {
        json_object_set_int_member(object, "pid", status->owner.pid);
    } else {
        set_text(object, "pid", NULL);
    }
    if (status->owner.state == PBA_OWNER_UNKNOWN) {
        set_text(object, "alive", NULL);
    } else {
        json_object_set_int_member(object, "alive", status->leftovers.is_live);
    }
    json_object_set_array_member(object, "devices", devices_of(status));
    return object;
}

/* Bitmaps and exports */

/* The ID of the backup that a bitmap is relative to, borrowed; NULL: not known. */
static const char *find_base(const Status *status, const char *node, const char *bitmap,
                             const char *target)
{
    const char *companion = target && pba_is_tied_bitmap(bitmap)
                                ? pba_companion_find(&status->block, node, target)
                                : NULL;
    return companion ? pba_companion_id(companion) : NULL;
}

static void add_bitmap(const Status *status, const PbaBitmapWalk *at, JsonArray *list)
{
    const PbaBackend *backend = status->access->backend;
    const char *target = backend->bitmap_target(at->name);
    bool is_background = backend->is_background(at->name);

    if (!target && !is_background) {
        return;
    }
    g_autofree char *device = pba_block_device_above(&status->block, at->node);
    JsonObject *object = json_object_new();
    set_text(object, "target-id", target);
    set_text(object, "device", device);
    set_text(object, "node", at->node);
    set_text(object, "name", at->name);
    set_text(object, "base", find_base(status, at->node, at->name, target));
    json_object_set_int_member(object, "background", is_background);
    copy_size(object, "dirty-bytes", at->info, "count");
    copy_size(object, "granularity", at->info, "granularity");
    copy_flag(object, at->info, "recording");
    copy_flag(object, at->info, "busy");
    copy_flag(object, at->info, "persistent");
    copy_flag(object, at->info, "inconsistent");
    json_array_add_object_element(list, object);
}

static JsonArray *describe_bitmaps(const Status *status)
{
    JsonArray *list = json_array_new();
    PbaBitmapWalk at = pba_bitmaps_everywhere(&status->block);

    while (pba_bitmaps_next(&at)) {
        add_bitmap(status, &at, list);
    }
    return list;
}

static JsonArray *describe_exports(const Status *status)
{
    JsonArray *list = json_array_new();

    for (guint i = 0; i < json_array_get_length(status->leftovers.exports); i++) {
        JsonObject *export = pba_json_element(status->leftovers.exports, i);
        const char *id = export ? pba_json_find_string(export, "id") : NULL;
        const char *target;
        const char *disk;
        if (!id) {
            continue;
        }
        bool ours = pba_leftovers_parse_name(id, &target, &disk);
        g_autofree char *device = ours ? pba_leftovers_device(&status->leftovers, disk) : NULL;
        JsonObject *object = json_object_new();
        set_text(object, "id", id);
        set_text(object, "type", pba_json_find_string(export, "type"));
        set_text(object, "node", pba_json_find_string(export, "node-name"));
        set_text(object, "device", device);
        json_object_set_int_member(object, "ours", ours);
        json_array_add_object_element(list, object);
    }
    return list;
}

/* Fleecing images */

/* The node of the image's file, below its format node. */
static JsonObject *find_file_node(const PbaBlock *block, const char *node)
{
    for (guint i = 0; node && i < json_array_get_length(block->nodes); i++) {
        const char *below = pba_block_find_child(block, node, "file");
        if (!below) {
            return pba_block_find_node(block, node);
        }
        node = below;
    }
    return NULL;
}

static void add_space(Status *status, JsonObject *object, JsonObject *node, const char *device,
                      const char *path)
{
    uint64_t free_bytes;
    bool is_nearly_full;

    if (!pba_fleecing_space(node, path, &free_bytes, &is_nearly_full)) {
        return;
    }
    set_size(object, "free-bytes", free_bytes);
    json_object_set_int_member(object, "nearly-full", is_nearly_full);
    if (is_nearly_full) {
        g_autofree char *text = pba_fleecing_warning(device, path, free_bytes);
        json_array_add_string_element(status->warnings, text);
    }
}

static void add_fleecing(Status *status, const char *filter, JsonArray *list)
{
    const PbaBlock *block = &status->block;
    const char *target = pba_block_find_child(block, filter, "target");
    const char *file = pba_block_find_child(block, filter, "file");
    JsonObject *node = target ? find_file_node(block, target) : NULL;
    JsonObject *image = node ? pba_json_find_object(node, "image") : NULL;
    const char *path = image ? pba_json_find_string(image, "filename") : NULL;
    const char *driver = node ? pba_json_find_string(node, "drv") : NULL;
    JsonObject *top = target ? pba_block_find_node(block, target) : NULL;
    JsonObject *top_image = top ? pba_json_find_object(top, "image") : NULL;

    if (!top_image || !image) {
        return;
    }
    g_autofree char *device = file ? pba_block_device_above(block, file) : NULL;
    JsonObject *object = json_object_new();
    set_text(object, "device", device);
    set_text(object, "node", target);
    set_text(object, "file", path);
    copy_size(object, "size", top_image, "virtual-size");
    copy_size(object, "image-bytes", image, "actual-size");
    if (path && g_strcmp0(driver, "file") == 0) {
        add_space(status, object, top, device ? device : filter, path);
    }
    json_array_add_object_element(list, object);
}

static JsonArray *describe_fleecing(Status *status)
{
    JsonArray *list = json_array_new();
    JsonArray *nodes = status->block.nodes;

    for (guint i = 0; i < json_array_get_length(nodes); i++) {
        JsonObject *node = pba_json_element(nodes, i);
        const char *name = node ? pba_json_find_string(node, "node-name") : NULL;
        if (name && g_strcmp0(pba_json_find_string(node, "drv"), "copy-before-write") == 0) {
            add_fleecing(status, name, list);
        }
    }
    return list;
}

/* Leftovers of dead processes */

static bool is_leftover(const Status *status, const PbaLeftover *thing)
{
    if (pba_is_owner_mark(thing->name)) {
        JsonObject *node = pba_block_find_node(&status->block, thing->name);
        return pba_owner_is_dead(status->access, thing->name, pba_owner_node_size(node));
    }
    return !status->leftovers.is_live || g_strcmp0(thing->key, status->key) != 0;
}

static JsonArray *describe_leftovers(const Status *status)
{
    JsonArray *list = json_array_new();

    for (guint i = 0; i < status->things->len; i++) {
        const PbaLeftover *thing = status->things->pdata[i];
        if (!is_leftover(status, thing)) {
            continue;
        }
        JsonObject *object = json_object_new();
        set_target(status, object, thing->key);
        set_text(object, "device", thing->device);
        set_text(object, "what", thing->what);
        json_object_set_int_member(object, "harmless", thing->harmless);
        json_array_add_object_element(list, object);
    }
    return list;
}

static bool query(Status *status, GError **error)
{
    return pba_access_begin(status->access, error) &&
           pba_leftovers_look(status->access, &status->block, &status->leftovers, error);
}

JsonNode *pba_status(PbaQmp *qmp, const PbaAccessOptions *options, const PbaAccess *known,
                     const PbaHooks *hooks, GError **error)
{
    g_auto(Status) status = {.access = pba_access_new_observer(qmp, options, hooks, error)};
    g_autoptr(JsonObject) object = json_object_new();

    if (status.access && known) {
        pba_access_know(status.access, known);
    }
    if (!status.access || !query(&status, error)) {
        pba_qmp_release(qmp);
        return NULL;
    }
    const PbaBackend *backend = status.access->backend;
    bool told = backend->add_status(qmp, object, error);
    pba_qmp_release(qmp);
    if (!told) {
        return NULL;
    }
    find_owner(&status);
    status.things = pba_leftovers_list(&status.leftovers);
    status.warnings = json_array_new();
    set_text(object, "backend", backend->name);
    JsonObject *up = describe_access(&status);
    if (up) {
        json_object_set_object_member(object, "access", up);
    } else {
        json_object_set_null_member(object, "access");
    }
    json_object_set_array_member(object, "bitmaps", describe_bitmaps(&status));
    json_object_set_array_member(object, "exports", describe_exports(&status));
    json_object_set_array_member(object, "fleecing", describe_fleecing(&status));
    json_object_set_array_member(object, "left-overs", describe_leftovers(&status));
    json_object_set_array_member(object, "warnings", g_steal_pointer(&status.warnings));
    JsonNode *node = json_node_alloc();
    json_node_init_object(node, object);
    return node;
}

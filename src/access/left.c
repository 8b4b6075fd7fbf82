#include "left.h"

#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include <string.h>

bool pba_left_look(PbaAccess *access, bool with_graph, PbaBlock *block, PbaLeft *left,
                   GError **error)
{
    pba_left_clear(left);
    left->access = access;
    left->block = block;
    left->paths = pba_run_dir_find_left(access);
    if (!pba_block_query(access->qmp, with_graph, block, error)) {
        return false;
    }
    left->exports = pba_qmp_query_array(access->qmp, "query-block-exports", NULL, error);
    return left->exports != NULL;
}

void pba_left_clear(PbaLeft *left)
{
    g_clear_pointer(&left->exports, json_array_unref);
    g_clear_pointer(&left->paths, g_ptr_array_unref);
}

static const char *node_name(const PbaLeft *left, guint index)
{
    return pba_block_node_name(left->block->nodes, index);
}

static const char *export_id(const PbaLeft *left, guint index)
{
    JsonObject *export = pba_json_element(left->exports, index);
    return export ? pba_json_find_string(export, "id") : NULL;
}

guint pba_left_name_count(const PbaLeft *left)
{
    return json_array_get_length(left->block->nodes) + json_array_get_length(left->exports);
}

const char *pba_left_name(const PbaLeft *left, guint index)
{
    guint nodes = json_array_get_length(left->block->nodes);
    return index < nodes ? node_name(left, index) : export_id(left, index - nodes);
}

static bool is_key(const char *text)
{
    return strspn(text, "0123456789abcdef") >= PBA_HASH_LENGTH;
}

bool pba_left_parse(const char *name, const char **target, const char **disk)
{
    size_t length = strlen(name);

    if (!pba_is_own_node(name) || pba_is_owner_mark(name) ||
        length < strlen("pba-x-") + (size_t)2 * PBA_HASH_LENGTH + 1) {
        return false;
    }
    *disk = name + length - PBA_HASH_LENGTH;
    *target = *disk - PBA_HASH_LENGTH - 1;
    return (*target)[-1] == '-' && (*disk)[-1] == '-' && is_key(*disk) && is_key(*target);
}

static bool has_hash(const char *name, const char *key)
{
    g_autofree char *hash = name ? pba_short_hash(name) : NULL;
    return hash && strncmp(hash, key, MIN(strlen(key), PBA_HASH_LENGTH)) == 0;
}

/* Any of the names that pba_block_find_device takes. */
char *pba_left_device(const PbaLeft *left, const char *disk)
{
    JsonArray *devices = left->block->devices;

    for (guint i = 0; i < json_array_get_length(devices); i++) {
        JsonObject *device = pba_json_element(devices, i);
        const char *qdev = device ? pba_json_find_string(device, "qdev") : NULL;
        g_autofree char *id = qdev ? pba_block_qdev_id(qdev) : NULL;
        const char *backend = device ? pba_json_find_string(device, "device") : NULL;
        const char *const names[] = {backend, qdev, id};
        for (size_t j = 0; j < G_N_ELEMENTS(names); j++) {
            if (has_hash(names[j], disk)) {
                return g_strdup(names[j]);
            }
        }
    }
    for (guint i = 0; i < json_array_get_length(left->block->nodes); i++) {
        if (has_hash(node_name(left, i), disk)) {
            return g_strdup(node_name(left, i));
        }
    }
    return NULL;
}

/* A bitmap's name has its target's in it. */
static char *find_in_bitmaps(const PbaLeft *left, JsonArray *bitmaps, const char *key)
{
    for (guint i = 0; bitmaps && i < json_array_get_length(bitmaps); i++) {
        JsonObject *info = pba_json_element(bitmaps, i);
        const char *name = info ? pba_json_find_string(info, "name") : NULL;
        const char *target = name ? pba_bitmap_target_of(left->access->backend, name) : NULL;
        if (target && has_hash(target, key)) {
            return g_strdup(target);
        }
    }
    return NULL;
}

char *pba_left_target(const PbaLeft *left, const char *key)
{
    char *target = NULL;

    for (guint i = 0; !target && i < json_array_get_length(left->block->nodes); i++) {
        JsonObject *node = pba_json_element(left->block->nodes, i);
        target =
            node ? find_in_bitmaps(left, pba_json_find_array(node, "dirty-bitmaps"), key) : NULL;
    }
    /* An access without bitmaps, or one of the early form of Proxmox' command. */
    for (guint i = 0; !target && i < left->paths->len; i++) {
        g_autofree char *told = pba_run_dir_target(left->paths->pdata[i]);
        target = told && has_hash(told, key) ? g_steal_pointer(&told) : NULL;
    }
    return target;
}

bool pba_left_is_split(const PbaBlock *block, const char *node, const char *target_id)
{
    g_autofree char *target = pba_target_bitmap(target_id);
    JsonObject *info = pba_block_find_bitmap(block, node, target);

    return pba_block_find_background(block, node, target_id) ||
           (info && !pba_json_find_bool(info, "recording") &&
            !pba_json_find_bool(info, "inconsistent"));
}

static void thing_free(gpointer data)
{
    PbaLeftThing *thing = data;

    g_free(thing->key);
    g_free(thing->device);
    g_free(thing->what);
    g_free(thing);
}

/* what is taken over. */
static PbaLeftThing *add_thing(GPtrArray *things, const char *name, const char *key, char *what,
                               const char *undone)
{
    PbaLeftThing *thing = g_new0(PbaLeftThing, 1);

    thing->name = name;
    thing->key = key ? g_strndup(key, PBA_HASH_LENGTH) : NULL;
    thing->what = what;
    thing->undone = undone;
    g_ptr_array_add(things, thing);
    return thing;
}

static void set_device(const PbaLeft *left, PbaLeftThing *thing, const char *disk)
{
    thing->device = pba_left_device(left, disk);
    thing->device = thing->device ? thing->device : g_strdup_printf("(%s)", disk);
}

static void add_exports(const PbaLeft *left, GPtrArray *things)
{
    for (guint i = 0; i < json_array_get_length(left->exports); i++) {
        const char *id = export_id(left, i);
        const char *target;
        const char *disk;
        if (id && pba_left_parse(id, &target, &disk)) {
            char *what = pba_line("export '%s'", id);
            set_device(left, add_thing(things, id, target, what, "was removed"), disk);
        }
    }
}

static bool are_joinable(const PbaBlock *block, const char *node, const char *target_id)
{
    g_autofree char *target = pba_target_bitmap(target_id);
    JsonObject *info = pba_block_find_bitmap(block, node, target);
    JsonObject *partner = pba_block_find_background(block, node, target_id);

    return info && partner && !pba_json_find_bool(info, "inconsistent") &&
           !pba_json_find_bool(partner, "inconsistent");
}

static void add_split_bitmaps(const PbaLeft *left, const char *node, GPtrArray *things)
{
    g_autoptr(GHashTable) seen = g_hash_table_new(g_str_hash, g_str_equal);
    JsonObject *entry = pba_block_find_node(left->block, node);
    JsonArray *bitmaps = pba_json_find_array(entry, "dirty-bitmaps");

    for (guint i = 0; bitmaps && i < json_array_get_length(bitmaps); i++) {
        JsonObject *info = pba_json_element(bitmaps, i);
        const char *name = info ? pba_json_find_string(info, "name") : NULL;
        const char *id = name ? pba_bitmap_target_of(left->access->backend, name) : NULL;
        if (!id || !pba_left_is_split(left->block, node, id) ||
            !g_hash_table_add(seen, (gpointer)id)) {
            continue;
        }
        g_autofree char *key = pba_short_hash(id);
        PbaLeftThing *thing =
            add_thing(things, node, key, pba_line("dirty bitmap of node '%s'", node),
                      are_joinable(left->block, node, id)
                          ? "was joined with its background bitmap, as after a failed backup"
                          : "was removed, since it may lack bits");
        thing->device = pba_block_device_above(left->block, node);
    }
}

static void add_owner(const PbaLeft *left, const char *node, GPtrArray *things)
{
    uint64_t size = pba_owner_node_size(pba_block_find_node(left->block, node));
    PbaOwnerState state;
    pid_t pid;

    pba_owner_read(left->access, node, size, &pid, &state);
    add_thing(things, node, NULL, pba_line("process mark '%s'", node),
              state == PBA_OWNER_UNKNOWN ? "was removed: its process, which cannot be judged from "
                                           "here, was taken for dead"
                                         : "was removed")
        ->harmless = true;
}

static void add_node(const PbaLeft *left, const char *node, GPtrArray *things)
{
    const char *target;
    const char *disk;

    if (pba_left_parse(node, &target, &disk)) {
        bool is_mark = g_str_has_prefix(node, "pba-" PBA_DEVICE_ROLE "-");
        char *what = pba_line(is_mark ? "its backup access (mark '%s')" : "block node '%s'", node);
        set_device(left,
                   add_thing(things, node, target, what, is_mark ? "was ended" : "was removed"),
                   disk);
    } else if (pba_is_owner_mark(node)) {
        add_owner(left, node, things);
    } else if (g_str_has_prefix(node, PBA_ENDING_PREFIX)) {
        add_thing(things, node, node + strlen(PBA_ENDING_PREFIX),
                  pba_line("the mark of a success that was being committed, '%s',", node),
                  "was removed");
    } else if (left->access->backend == PBA_BACKEND_UPSTREAM) {
        add_split_bitmaps(left, node, things);
    }
}

static void add_path(const char *path, bool is_live, GPtrArray *things)
{
    g_autofree char *socket = pba_run_dir_left_socket(path);
    bool answers = socket && !is_live && pba_socket_answers(socket);
    char *what = answers ? pba_line("the NBD server at '%s'", socket) : pba_line("'%s'", path);

    add_thing(things, path, pba_run_dir_key(path), what, answers ? "was stopped" : "was removed")
        ->harmless = !answers;
}

GPtrArray *pba_left_things(const PbaLeft *left)
{
    GPtrArray *things = g_ptr_array_new_with_free_func(thing_free);

    add_exports(left, things);
    for (guint i = 0; i < json_array_get_length(left->block->nodes); i++) {
        if (node_name(left, i)) {
            add_node(left, node_name(left, i), things);
        }
    }
    for (guint i = 0; i < left->paths->len; i++) {
        if (!pba_run_dir_is_live(left->access, left->paths->pdata[i])) {
            add_path(left->paths->pdata[i], left->is_live, things);
        }
    }
    return things;
}

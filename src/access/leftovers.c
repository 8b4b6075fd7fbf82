#include "leftovers.h"
#include "backend.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include <string.h>

/* If a code ref hides the socket, guests can have the same identity. Then the marker that is noted
 * in the directory of a dead process tells whether its NBD server is this guest's. */
static bool is_of_namesake(const PbaLeftovers *leftovers, const char *path)
{
    const PbaAccess *access = leftovers->access;
    g_autofree char *mark = access->options.identity ? NULL : pba_run_dir_mark(path);

    if (!mark || pba_block_find_node(leftovers->block, mark) || pba_run_dir_is_live(access, path)) {
        return false;
    }
    g_autofree char *socket = pba_run_dir_stale_server(path);
    return socket != NULL;
}

static void leave_out_namesakes(PbaLeftovers *leftovers)
{
    for (guint i = leftovers->paths->len; i-- > 0;) {
        if (is_of_namesake(leftovers, leftovers->paths->pdata[i])) {
            g_ptr_array_remove_index(leftovers->paths, i);
        }
    }
}

bool pba_leftovers_look(PbaAccess *access, PbaBlock *block, PbaLeftovers *leftovers, GError **error)
{
    pba_leftovers_clear(leftovers);
    leftovers->access = access;
    leftovers->block = block;
    if (!pba_block_query(access->qmp, true, block, error)) {
        return false;
    }
    leftovers->paths = pba_run_dir_find_stale(access, block);
    leave_out_namesakes(leftovers);
    /* A process adds its marker before its exports, and deletes it after them. */
    leftovers->exports = pba_block_has_nodes(block, PBA_OWN_PREFIX)
                             ? pba_qmp_query_array(access->qmp, "query-block-exports", NULL, error)
                             : json_array_new();
    return leftovers->exports != NULL;
}

void pba_leftovers_clear(PbaLeftovers *leftovers)
{
    g_clear_pointer(&leftovers->exports, json_array_unref);
    g_clear_pointer(&leftovers->paths, g_ptr_array_unref);
}

static const char *node_name(const PbaLeftovers *leftovers, guint index)
{
    return pba_block_node_name(leftovers->block->nodes, index);
}

static const char *export_id(const PbaLeftovers *leftovers, guint index)
{
    JsonObject *export = pba_json_element(leftovers->exports, index);
    return export ? pba_json_find_string(export, "id") : NULL;
}

guint pba_leftovers_name_count(const PbaLeftovers *leftovers)
{
    return json_array_get_length(leftovers->block->nodes) +
           json_array_get_length(leftovers->exports);
}

const char *pba_leftovers_name(const PbaLeftovers *leftovers, guint index)
{
    guint nodes = json_array_get_length(leftovers->block->nodes);
    return index < nodes ? node_name(leftovers, index) : export_id(leftovers, index - nodes);
}

static bool is_key(const char *text)
{
    return strspn(text, "0123456789abcdef") >= PBA_HASH_LENGTH;
}

bool pba_leftovers_parse_name(const char *name, const char **target, const char **disk)
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

/* Any name that pba_block_find_device accepts. */
char *pba_leftovers_device(const PbaLeftovers *leftovers, const char *disk)
{
    JsonArray *devices = leftovers->block->devices;

    for (guint i = 0; i < json_array_get_length(devices); i++) {
        JsonObject *device = pba_json_element(devices, i);
        g_autoptr(GPtrArray) names = device ? pba_block_device_names(device) : NULL;
        for (guint j = 0; names && j < names->len; j++) {
            if (has_hash(names->pdata[j], disk)) {
                return g_strdup(names->pdata[j]);
            }
        }
    }
    for (guint i = 0; i < json_array_get_length(leftovers->block->nodes); i++) {
        if (has_hash(node_name(leftovers, i), disk)) {
            return g_strdup(node_name(leftovers, i));
        }
    }
    return NULL;
}

char *pba_leftovers_target(const PbaLeftovers *leftovers, const char *key)
{
    PbaBitmapWalk at = pba_bitmaps_everywhere(leftovers->block);
    char *target = NULL;

    /* The name of a bitmap contains its target. */
    while (pba_bitmaps_next(&at)) {
        const char *told = leftovers->access->backend->bitmap_target(at.name);
        if (told && has_hash(told, key)) {
            return g_strdup(told);
        }
    }
    /* An access without bitmaps, or one by the early form of Proxmox' command. */
    for (guint i = 0; !target && i < leftovers->paths->len; i++) {
        g_autofree char *told = pba_run_dir_target(leftovers->paths->pdata[i]);
        target = told && has_hash(told, key) ? g_steal_pointer(&told) : NULL;
    }
    return target;
}

static void thing_free(gpointer data)
{
    PbaLeftover *thing = data;

    g_free(thing->key);
    g_free(thing->device);
    g_free(thing->what);
    g_free(thing);
}

/* what is taken over. */
static PbaLeftover *add_thing(GPtrArray *things, const char *name, const char *key, char *what,
                              const char *undone)
{
    PbaLeftover *thing = g_new0(PbaLeftover, 1);

    thing->name = name;
    thing->key = key ? g_strndup(key, PBA_HASH_LENGTH) : NULL;
    thing->what = what;
    thing->undone = undone;
    g_ptr_array_add(things, thing);
    return thing;
}

static void set_device(const PbaLeftovers *leftovers, PbaLeftover *thing, const char *disk)
{
    thing->device = pba_leftovers_device(leftovers, disk);
    thing->device = thing->device ? thing->device : g_strdup_printf("(%s)", disk);
}

static void add_exports(const PbaLeftovers *leftovers, GPtrArray *things)
{
    for (guint i = 0; i < json_array_get_length(leftovers->exports); i++) {
        const char *id = export_id(leftovers, i);
        const char *target;
        const char *disk;
        if (id && pba_leftovers_parse_name(id, &target, &disk)) {
            char *what = pba_line("export '%s'", id);
            set_device(leftovers, add_thing(things, id, target, what, "was removed"), disk);
        }
    }
}

static void add_bitmaps(const PbaLeftovers *leftovers, const char *node, GPtrArray *things)
{
    const PbaBackend *backend = leftovers->access->backend;
    g_autoptr(GHashTable) seen = g_hash_table_new(g_str_hash, g_str_equal);
    PbaBitmapWalk at = pba_bitmaps_of(leftovers->block, node);

    while (pba_bitmaps_next(&at)) {
        const char *id = backend->bitmap_target(at.name);
        const char *undone = id ? backend->bitmap_repair(leftovers->block, node, id) : NULL;
        if (!undone || !g_hash_table_add(seen, (gpointer)id)) {
            continue;
        }
        g_autofree char *key = pba_short_hash(id);
        PbaLeftover *thing =
            add_thing(things, node, key, pba_line("dirty bitmap of node '%s'", node), undone);
        thing->device = pba_block_device_above(leftovers->block, node);
    }
}

/* Adds the copies of bitmaps that an audit has made. */
static void add_copies(const PbaLeftovers *leftovers, const char *node, GPtrArray *things)
{
    PbaBitmapWalk at = pba_bitmaps_of(leftovers->block, node);

    while (pba_bitmaps_next(&at)) {
        const char *key = pba_audit_key(at.name);
        if (key) {
            add_thing(things, at.name, key, pba_line("bitmap '%s' of node '%s'", at.name, node),
                      "was removed");
        }
    }
}

static void add_owner(const PbaLeftovers *leftovers, const char *node, GPtrArray *things)
{
    uint64_t size = pba_owner_node_size(pba_block_find_node(leftovers->block, node));
    PbaOwner owner;

    pba_owner_read(leftovers->access, node, size, &owner);
    add_thing(things, node, NULL, pba_line("process mark '%s'", node),
              owner.state == PBA_OWNER_UNKNOWN
                  ? "was removed: its process was assumed to have ended (force)"
                  : "was removed")
        ->harmless = true;
}

static bool has_role(const char *node, const char *role)
{
    const char *own = node + strlen(PBA_OWN_PREFIX);
    return g_str_has_prefix(own, role) && own[strlen(role)] == '-';
}

/* What recover does to a node of an access. A raw node stays below the guest's device while a job
 * of another program uses it, and its guard with it: see is_in_use in upstream/teardown.c. */
static const char *node_undone(const PbaLeftovers *leftovers, const char *node)
{
    const char *key = node + strlen(PBA_OWN_PREFIX PBA_GUARD_ROLE);
    g_autofree char *raw = has_role(node, PBA_GUARD_ROLE)
                               ? g_strconcat(PBA_OWN_PREFIX PBA_RAW_ROLE, key, NULL)
                           : has_role(node, PBA_RAW_ROLE) ? g_strdup(node)
                                                          : NULL;
    g_autofree char *user = raw ? pba_company_user(leftovers->block, raw) : NULL;
    return user ? "stays until what stands on it has ended" : "was removed";
}

/* Whether the node shows that there is an access: it has one such node for each of its disks. */
static bool tells_access(const char *node)
{
    return has_role(node, PBA_HOLD_ROLE) || has_role(node, PBA_DEVICE_ROLE);
}

static void add_node(const PbaLeftovers *leftovers, const char *node, GPtrArray *things)
{
    const char *target;
    const char *disk;

    if (pba_leftovers_parse_name(node, &target, &disk)) {
        bool is_mark = tells_access(node);
        char *what = pba_line(is_mark ? "its backup access (node '%s')" : "block node '%s'", node);
        set_device(leftovers,
                   add_thing(things, node, target, what,
                             is_mark ? "was ended" : node_undone(leftovers, node)),
                   disk);
    } else if (pba_is_owner_mark(node)) {
        add_owner(leftovers, node, things);
    } else if (g_str_has_prefix(node, PBA_ENDING_PREFIX)) {
        add_thing(things, node, node + strlen(PBA_ENDING_PREFIX),
                  pba_line("the mark of a success that was being committed, '%s',", node),
                  "was removed");
    } else {
        add_bitmaps(leftovers, node, things);
        add_copies(leftovers, node, things);
    }
}

static void add_path(const char *path, bool is_live, GPtrArray *things)
{
    g_autofree char *socket = is_live ? NULL : pba_run_dir_stale_server(path);
    char *what = socket ? pba_line("the NBD server at '%s'", socket) : pba_line("'%s'", path);

    add_thing(things, path, pba_run_dir_key(path), what, socket ? "was stopped" : "was removed")
        ->harmless = !socket;
}

GPtrArray *pba_leftovers_list(const PbaLeftovers *leftovers)
{
    GPtrArray *things = g_ptr_array_new_with_free_func(thing_free);

    add_exports(leftovers, things);
    for (guint i = 0; i < json_array_get_length(leftovers->block->nodes); i++) {
        if (node_name(leftovers, i)) {
            add_node(leftovers, node_name(leftovers, i), things);
        }
    }
    for (guint i = 0; i < leftovers->paths->len; i++) {
        if (!pba_run_dir_is_live(leftovers->access, leftovers->paths->pdata[i])) {
            add_path(leftovers->paths->pdata[i], leftovers->is_live, things);
        }
    }
    return things;
}

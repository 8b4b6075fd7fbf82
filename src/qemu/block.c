#include "graph.h"

#include "src/qmp/qmp.h"
#include <string.h>

/* Drivers of nodes that show their child's data unchanged, so bitmaps belong below them. */
static const char *const filters[] = {"throttle", "copy-on-read", "compress", "preallocate", NULL};

JsonArray *pba_block_query_nodes(PbaQmp *qmp, GError **error)
{
    return pba_qmp_query_array(qmp, "query-named-block-nodes", pba_json("{'flat': <true>}"), error);
}

bool pba_block_query(PbaQmp *qmp, bool with_graph, PbaBlock *block, GError **error)
{
    pba_block_clear(block);
    block->devices = pba_qmp_query_array(qmp, "query-block", NULL, error);
    if (!block->devices) {
        return false;
    }
    block->nodes = pba_block_query_nodes(qmp, error);
    if (!block->nodes) {
        return false;
    }
    if (with_graph) {
        block->graph = pba_qmp_query_object(qmp, "x-debug-query-block-graph", NULL, error);
    }
    return !with_graph || block->graph;
}

void pba_block_clear(PbaBlock *block)
{
    g_clear_pointer(&block->devices, json_array_unref);
    g_clear_pointer(&block->nodes, json_array_unref);
    g_clear_pointer(&block->graph, json_object_unref);
}

bool pba_block_has_nodes(const PbaBlock *block, const char *prefix)
{
    for (guint i = 0; i < json_array_get_length(block->nodes); i++) {
        const char *name = pba_block_node_name(block->nodes, i);
        if (name && g_str_has_prefix(name, prefix)) {
            return true;
        }
    }
    return false;
}

const char *pba_block_device_node(JsonObject *device)
{
    JsonObject *inserted = pba_json_find_object(device, "inserted");
    return inserted ? pba_json_find_string(inserted, "node-name") : NULL;
}

/* The guest device that contains the one that query-block shows: a virtio disk, or a usb-storage,
 * which makes a SCSI disk of its own (QEMU: scsi_bus_legacy_add_drive). The caller frees it; NULL:
 * the device itself is shown. */
static char *containing_path(const char *path)
{
    static const char virtio[] = "/virtio-backend";
    static const char usb[] = "/legacy[0]";

    if (g_str_has_suffix(path, virtio)) {
        return g_strndup(path, strlen(path) - strlen(virtio));
    }
    if (!g_str_has_suffix(path, usb)) {
        return NULL;
    }
    g_autofree char *bus = g_strndup(path, strlen(path) - strlen(usb));
    return g_path_get_dirname(bus);
}

/* query-block shows the ID, or the QOM path of an object that has no ID. */
char *pba_block_qdev_id(const char *qdev)
{
    static const char peripheral[] = "/machine/peripheral/";
    g_autofree char *outer = containing_path(qdev);
    const char *path = outer ? outer : qdev;

    if (!g_str_has_prefix(path, peripheral)) {
        return *path == '/' ? NULL : g_strdup(path);
    }
    const char *id = path + strlen(peripheral);
    return *id && !strchr(id, '/') ? g_strdup(id) : NULL;
}

char *pba_block_qom_path(const char *qdev)
{
    return *qdev == '/' ? g_strdup(qdev) : g_strconcat("/machine/peripheral/", qdev, NULL);
}

GPtrArray *pba_block_device_names(JsonObject *device)
{
    GPtrArray *names = g_ptr_array_new_with_free_func(g_free);
    const char *backend = pba_json_find_string(device, "device");
    const char *qdev = pba_json_find_string(device, "qdev");
    char *path = qdev && *qdev ? pba_block_qom_path(qdev) : NULL;
    char *const all[] = {
        backend && *backend ? g_strdup(backend) : NULL,
        path ? pba_block_qdev_id(qdev) : NULL,
        path,
        path ? containing_path(path) : NULL,
    };

    for (size_t i = 0; i < G_N_ELEMENTS(all); i++) {
        if (all[i]) {
            g_ptr_array_add(names, all[i]);
        }
    }
    return names;
}

static bool has_name(JsonObject *device, const char *name)
{
    g_autoptr(GPtrArray) names = pba_block_device_names(device);

    return g_ptr_array_find_with_equal_func(names, name, g_str_equal, NULL);
}

JsonObject *pba_block_find_user(const PbaBlock *block, const char *node)
{
    for (guint i = 0; node && i < json_array_get_length(block->devices); i++) {
        JsonObject *device = pba_json_element(block->devices, i);
        if (device && g_strcmp0(pba_block_device_node(device), node) == 0) {
            return device;
        }
    }
    return NULL;
}

const char *pba_block_node_name(JsonArray *nodes, guint index)
{
    JsonObject *node = pba_json_element(nodes, index);
    return node ? pba_json_find_string(node, "node-name") : NULL;
}

JsonObject *pba_block_find_node(const PbaBlock *block, const char *node)
{
    return node ? pba_json_find_element(block->nodes, "node-name", node) : NULL;
}

static JsonArray *bitmaps_at(JsonObject *node)
{
    return node ? pba_json_find_array(node, "dirty-bitmaps") : NULL;
}

PbaBitmapWalk pba_bitmaps_of(const PbaBlock *block, const char *node)
{
    return (PbaBitmapWalk){.node = node, .bitmaps = bitmaps_at(pba_block_find_node(block, node))};
}

PbaBitmapWalk pba_bitmaps_everywhere(const PbaBlock *block)
{
    return (PbaBitmapWalk){.nodes = block->nodes};
}

static bool has_next(const PbaBitmapWalk *at)
{
    return at->bitmaps && at->next < json_array_get_length(at->bitmaps);
}

static bool next_node(PbaBitmapWalk *at)
{
    if (!at->nodes || at->next_node == json_array_get_length(at->nodes)) {
        return false;
    }
    at->node = pba_block_node_name(at->nodes, at->next_node);
    at->bitmaps = at->node ? bitmaps_at(pba_json_element(at->nodes, at->next_node)) : NULL;
    at->next = 0;
    at->next_node++;
    return true;
}

bool pba_bitmaps_next(PbaBitmapWalk *at)
{
    do {
        while (has_next(at)) {
            at->info = pba_json_element(at->bitmaps, at->next++);
            at->name = at->info ? pba_json_find_string(at->info, "name") : NULL;
            if (at->name) {
                return true;
            }
        }
    } while (next_node(at));
    return false;
}

static JsonObject *find_named(PbaBitmapWalk at, const char *bitmap)
{
    while (pba_bitmaps_next(&at)) {
        if (g_strcmp0(at.name, bitmap) == 0) {
            return at.info;
        }
    }
    return NULL;
}

JsonObject *pba_block_find_bitmap(const PbaBlock *block, const char *node, const char *bitmap)
{
    return find_named(pba_bitmaps_of(block, node), bitmap);
}

bool pba_block_has_bitmap(const PbaBlock *block, const char *bitmap)
{
    return find_named(pba_bitmaps_everywhere(block), bitmap) != NULL;
}

bool pba_block_is_sealed(const PbaBlock *block, const char *node, JsonObject *bitmap)
{
    JsonObject *image = pba_block_find_node(block, node);

    return bitmap && image && pba_json_find_bool(bitmap, "persistent") &&
           pba_json_find_bool(image, "ro");
}

JsonObject *pba_block_find_background(const PbaBlock *block, const char *node,
                                      const char *target_id, bool tied)
{
    PbaBitmapWalk at = pba_bitmaps_of(block, node);

    while (pba_bitmaps_next(&at)) {
        if (g_strcmp0(pba_background_target(at.name), target_id) == 0 &&
            pba_is_tied_background(at.name) == tied) {
            return at.info;
        }
    }
    return NULL;
}

/* Whether the node was not added by an access. */
static bool is_others(const char *node)
{
    return !pba_is_own_node(node);
}

/* Whether a user or program chose the name. Names that QEMU generates, also for the filters of
 * Proxmox' access, begin with a #. */
static bool is_named(const char *node)
{
    return is_others(node) && *node != '#';
}

/* The first node from node downwards for which passes is true; needs the graph. */
static const char *first_node(const PbaBlock *block, const char *node,
                              bool (*passes)(const char *node))
{
    /* A wrong graph may be a ring, so this takes no more steps than there are nodes. */
    for (guint i = 0; node && i < json_array_get_length(block->nodes); i++) {
        if (passes(node)) {
            return node;
        }
        node = pba_block_find_child(block, node, "file");
    }
    return NULL;
}

static bool is_filter(const PbaBlock *block, const char *node)
{
    JsonObject *entry = pba_block_find_node(block, node);
    const char *driver = entry ? pba_json_find_string(entry, "drv") : NULL;

    return driver && g_strv_contains(filters, driver);
}

/* Whether the name is that of the device's disk. The disk keeps the name of its node while our
 * nodes, or filters of other programs, are above it. */
static bool is_node_of(const PbaBlock *block, JsonObject *device, const char *name)
{
    const char *node = pba_block_device_node(device);

    /* A wrong graph may be a ring, so this takes no more steps than there are nodes. */
    for (guint i = 0; node && i < json_array_get_length(block->nodes); i++) {
        if (strcmp(node, name) == 0) {
            return true;
        }
        if (!block->graph ||
            (is_others(node) && !pba_graph_is_of_job(block, node) && !is_filter(block, node))) {
            return false;
        }
        const char *below = pba_block_find_child(block, node, "file");
        node = below ? below : pba_block_find_child(block, node, "backing");
    }
    return g_strcmp0(node, name) == 0;
}

JsonObject *pba_block_find_device(const PbaBlock *block, const char *name)
{
    JsonObject *by_node = NULL;

    for (guint i = 0; *name && i < json_array_get_length(block->devices); i++) {
        JsonObject *device = pba_json_element(block->devices, i);
        if (!device) {
            continue;
        }
        if (has_name(device, name)) {
            return device;
        }
        if (is_node_of(block, device, name)) {
            by_node = device;
        }
    }
    return by_node;
}

/* A name of the device other than the given one. */
static char *name_but(JsonObject *device, const char *name)
{
    g_autoptr(GPtrArray) names = pba_block_device_names(device);

    for (guint i = 0; i < names->len; i++) {
        if (strcmp(names->pdata[i], name) != 0) {
            return g_strdup(names->pdata[i]);
        }
    }
    const char *node = pba_block_device_node(device);
    return g_strdup(node ? node : name);
}

char *pba_block_rivals(const PbaBlock *block, const char *name)
{
    g_autoptr(GPtrArray) names = g_ptr_array_new_with_free_func(g_free);
    JsonObject *first = NULL;
    bool is_ambiguous = false;

    for (guint i = 0; i < json_array_get_length(block->devices); i++) {
        JsonObject *device = pba_json_element(block->devices, i);
        if (!device || !(has_name(device, name) || is_node_of(block, device, name))) {
            continue;
        }
        first = first ? first : device;
        /* One disk may have several devices. */
        is_ambiguous |= g_strcmp0(pba_block_device_node(device), pba_block_device_node(first)) != 0;
        g_ptr_array_add(names, name_but(device, name));
    }
    g_ptr_array_add(names, NULL);
    return is_ambiguous ? g_strjoinv(", ", (char **)names->pdata) : NULL;
}

static bool is_above(const PbaBlock *block, const char *node, const char *below)
{
    /* A wrong graph may be a ring, so this takes no more steps than there are nodes. */
    for (guint i = 0; node && i < json_array_get_length(block->nodes); i++) {
        if (strcmp(node, below) == 0) {
            return true;
        }
        node = pba_block_find_child(block, node, "file");
    }
    return false;
}

/* Whether the name is one such as libvirt-3-format, which libvirt renumbers with each snapshot and
 * start, or one that Image.pm gives to a node whose disk has another name. */
static bool is_numbered(const char *node)
{
    static const char *const prefixes[] = {"libvirt-", "unnamed-"};

    for (size_t i = 0; i < G_N_ELEMENTS(prefixes); i++) {
        if (g_str_has_prefix(node, prefixes[i]) && g_ascii_isdigit(node[strlen(prefixes[i])])) {
            return true;
        }
    }
    return false;
}

/* The name for users: the drive's ID, else the node's name if it is permanent, else the device's
 * ID, else its path. */
static char *device_name(const PbaBlock *block, JsonObject *device, const char *root)
{
    const char *name = pba_json_find_string(device, "device");
    const char *qdev = pba_json_find_string(device, "qdev");
    g_autofree char *id = qdev ? pba_block_qdev_id(qdev) : NULL;

    if (!name || !*name) {
        name = first_node(block, root, is_named);
    }
    if (name && !(id && is_numbered(name))) {
        return g_strdup(name);
    }
    char *outer = id || !qdev ? NULL : containing_path(qdev);
    return id ? g_steal_pointer(&id) : outer ? outer : g_strdup(qdev);
}

char *pba_block_device_above(const PbaBlock *block, const char *node)
{
    for (guint i = 0; i < json_array_get_length(block->devices); i++) {
        JsonObject *device = pba_json_element(block->devices, i);
        const char *root = device ? pba_block_device_node(device) : NULL;
        if (root && is_above(block, root, node)) {
            return device_name(block, device, root);
        }
    }
    return NULL;
}

char *pba_block_disk_names(const PbaBlock *block)
{
    g_autoptr(GPtrArray) names = g_ptr_array_new_with_free_func(g_free);

    for (guint i = 0; i < json_array_get_length(block->devices); i++) {
        JsonObject *device = pba_json_element(block->devices, i);
        const char *root = device ? pba_block_device_node(device) : NULL;
        char *name = root ? device_name(block, device, root) : NULL;
        if (name) {
            g_ptr_array_add(names, name);
        }
    }
    g_ptr_array_add(names, NULL);
    return g_strjoinv(", ", (char **)names->pdata);
}

static bool has_driver(const PbaBlock *block, gint64 id, const char *driver)
{
    JsonObject *node = pba_block_find_node(block, pba_graph_node_name(block, id));
    return node && g_strcmp0(pba_json_find_string(node, "drv"), driver) == 0;
}

bool pba_block_has_parent_but(const PbaBlock *block, const char *node, const char *driver)
{
    gint64 id = pba_graph_id(block, PBA_GRAPH_NODE, node);
    PbaEdgeWalk at = pba_graph_edges(block);

    while (id && pba_edges_next(&at)) {
        if (at.child == id && !(driver && has_driver(block, at.parent, driver))) {
            return true;
        }
    }
    return false;
}

bool pba_block_has_parent(const PbaBlock *block, const char *node)
{
    return pba_block_has_parent_but(block, node, NULL);
}

const char *pba_block_skip_filters(const PbaBlock *block, const char *node)
{
    /* A wrong graph may be a ring, so this takes no more steps than there are nodes. */
    for (guint i = 0; node && is_filter(block, node) && i < json_array_get_length(block->nodes);
         i++) {
        node = pba_block_find_child(block, node, "file");
    }
    return node;
}

bool pba_block_node_size(JsonObject *node, uint64_t *size, GError **error)
{
    JsonObject *image = pba_json_object(node, "image", error);
    return image && pba_json_size(image, "virtual-size", size, error);
}

bool pba_block_device_size(JsonObject *device, uint64_t *size, GError **error)
{
    JsonObject *inserted = pba_json_object(device, "inserted", error);
    return inserted && pba_block_node_size(inserted, size, error);
}

#include "graph.h"

#include "src/qmp/qmp.h"
#include <string.h>

/* Drivers of nodes that show their child's data unchanged, so bitmaps belong below them. */
static const char *const filters[] = {"throttle", "copy-on-read", "compress", "preallocate", NULL};

gint64 pba_graph_number(JsonObject *object, const char *key)
{
    return object ? json_object_get_int_member_with_default(object, key, 0) : 0;
}

/* The entry of that type with that name, or, if there is no name (NULL), with that ID. */
static JsonObject *find(const PbaBlock *block, const char *type, const char *name, gint64 id)
{
    JsonArray *entries = pba_json_find_array(block->graph, "nodes");

    for (guint i = 0; entries && i < json_array_get_length(entries); i++) {
        JsonObject *entry = pba_json_element(entries, i);
        if (entry && g_strcmp0(pba_json_find_string(entry, "type"), type) == 0 &&
            (name ? g_strcmp0(pba_json_find_string(entry, "name"), name) == 0
                  : pba_graph_number(entry, "id") == id)) {
            return entry;
        }
    }
    return NULL;
}

gint64 pba_graph_id(const PbaBlock *block, const char *type, const char *name)
{
    return name ? pba_graph_number(find(block, type, name, 0), "id") : 0;
}

static const char *node_name(const PbaBlock *block, gint64 id)
{
    JsonObject *entry = id ? find(block, PBA_GRAPH_NODE, NULL, id) : NULL;
    return entry ? pba_json_find_string(entry, "name") : NULL;
}

PbaEdgeWalk pba_graph_edges(const PbaBlock *block)
{
    return (PbaEdgeWalk){.edges = pba_json_find_array(block->graph, "edges")};
}

bool pba_edges_next(PbaEdgeWalk *at)
{
    if (!at->edges || at->next == json_array_get_length(at->edges)) {
        return false;
    }
    at->edge = pba_json_element(at->edges, at->next++);
    at->parent = pba_graph_number(at->edge, "parent");
    at->child = pba_graph_number(at->edge, "child");
    return true;
}

const char *pba_block_find_child(const PbaBlock *block, const char *node, const char *child)
{
    gint64 id = pba_graph_id(block, PBA_GRAPH_NODE, node);
    PbaEdgeWalk at = pba_graph_edges(block);

    while (id && pba_edges_next(&at)) {
        if (at.parent == id && g_strcmp0(pba_json_find_string(at.edge, "name"), child) == 0) {
            return node_name(block, at.child);
        }
    }
    return NULL;
}

bool pba_graph_is_of_job(const PbaBlock *block, const char *node)
{
    gint64 id = pba_graph_id(block, PBA_GRAPH_NODE, node);
    PbaEdgeWalk at = pba_graph_edges(block);

    while (id && pba_edges_next(&at)) {
        if (at.child == id && at.parent && find(block, PBA_GRAPH_JOB, NULL, at.parent)) {
            return true;
        }
    }
    return false;
}

static bool has_driver(const PbaBlock *block, gint64 id, const char *driver)
{
    JsonObject *node = pba_block_find_node(block, node_name(block, id));
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
    for (guint i = 0; node && i < json_array_get_length(block->nodes); i++) {
        JsonObject *entry = pba_block_find_node(block, node);
        const char *driver = entry ? pba_json_find_string(entry, "drv") : NULL;
        if (!driver || !g_strv_contains(filters, driver)) {
            return node;
        }
        node = pba_block_find_child(block, node, "file");
    }
    return node;
}

#include "graph.h"

#include "src/qmp/qmp.h"

gint64 pba_graph_number(JsonObject *object, const char *key)
{
    JsonNode *number = object ? json_object_get_member(object, key) : NULL;
    return number && JSON_NODE_HOLDS_VALUE(number) ? json_node_get_int(number) : 0;
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

const char *pba_graph_node_name(const PbaBlock *block, gint64 id)
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
            return pba_graph_node_name(block, at.child);
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

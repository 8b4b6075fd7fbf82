/* The block graph: QEMU's nodes, jobs and block backends, each with an ID, and the edges between
 * them. */
#ifndef PBA_QEMU_GRAPH_H
#define PBA_QEMU_GRAPH_H

#include "qemu.h"

/* The types of entries. */
#define PBA_GRAPH_NODE "block-driver"
#define PBA_GRAPH_JOB "block-job"
#define PBA_GRAPH_BACKEND "block-backend"

/* A number in an entry or an edge; 0: there is none. */
gint64 pba_graph_number(JsonObject *object, const char *key);
/* The ID of an entry; 0: there is none of that type and name. */
gint64 pba_graph_id(const PbaBlock *block, const char *type, const char *name);
/* A node's name, borrowed; NULL: there is no node with that ID. */
const char *pba_graph_node_name(const PbaBlock *block, gint64 id);

/* Iterates over the edges. */
typedef struct {
    gint64 parent;
    gint64 child;
    JsonObject *edge;
    JsonArray *edges;
    guint next;
} PbaEdgeWalk;

PbaEdgeWalk pba_graph_edges(const PbaBlock *block);
/* False after the last one. */
bool pba_edges_next(PbaEdgeWalk *at);

/* Whether a job works on the node: the node is the job's filter, or below that. */
bool pba_graph_is_of_job(const PbaBlock *block, const char *node);

#endif

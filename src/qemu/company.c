/* Detects other programs that work on a disk of the guest: their jobs, filters, nodes and users in
 * the block graph. query-block is not enough, because it hides the filters that jobs insert. */
#include "graph.h"

#include "src/qmp/qmp.h"
#include <string.h>

typedef struct {
    const PbaBlock *block;
    GHashTable *nodes; /* JsonObject by its id */
    GHashTable *below; /* ids: what the disk consists of */
    gint64 backend;    /* of the guest device; 0: none */
    gint64 top;        /* what the guest device uses */
} Company;

static void company_clear(Company *company)
{
    g_clear_pointer(&company->nodes, g_hash_table_unref);
    g_clear_pointer(&company->below, g_hash_table_unref);
}

G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Company, company_clear)

static gpointer as_key(gint64 id)
{
    return (gpointer)(gintptr)id;
}

static JsonObject *find(const Company *company, gint64 id)
{
    return g_hash_table_lookup(company->nodes, as_key(id));
}

static const char *text_of(const Company *company, gint64 id, const char *key)
{
    JsonObject *node = find(company, id);
    const char *text = node ? pba_json_find_string(node, key) : NULL;
    return text ? text : "";
}

static bool has_type(const Company *company, gint64 id, const char *type)
{
    return strcmp(text_of(company, id, "type"), type) == 0;
}

static const char *name_of(const Company *company, gint64 id)
{
    return text_of(company, id, "name");
}

static bool is_below(const Company *company, gint64 id)
{
    return g_hash_table_contains(company->below, as_key(id));
}

static gint64 child_of(const PbaBlock *block, gint64 parent)
{
    PbaEdgeWalk at = pba_graph_edges(block);

    while (parent && pba_edges_next(&at)) {
        if (at.parent == parent) {
            return at.child;
        }
    }
    return 0;
}

/* Whether the backend uses the node, itself or through filters of jobs. */
static bool uses(const PbaBlock *block, gint64 backend, const char *node)
{
    const char *at = pba_graph_node_name(block, child_of(block, backend));

    /* A wrong graph may be a ring, so this takes no more steps than there are nodes. */
    for (guint i = 0; at && i < json_array_get_length(block->nodes); i++) {
        if (g_strcmp0(at, node) == 0) {
            return true;
        }
        const char *below = pba_block_find_child(block, at, "file");
        at = below ? below : pba_block_find_child(block, at, "backing");
    }
    return false;
}

/* In the graph, the block backend has its own name, or the name of its guest device. One disk's
 * drive may have the name of another disk's device. */
static gint64 find_backend(const PbaBlock *block, JsonObject *device)
{
    const char *name = device ? pba_json_find_string(device, "device") : NULL;
    JsonArray *entries = pba_json_find_array(block->graph, "nodes");
    gint64 found = 0;

    if (device && (!name || !*name)) {
        name = pba_json_find_string(device, "qdev");
    }
    for (guint i = 0; name && entries && i < json_array_get_length(entries); i++) {
        JsonObject *entry = pba_json_element(entries, i);
        if (!entry || g_strcmp0(pba_json_find_string(entry, "type"), PBA_GRAPH_BACKEND) != 0 ||
            g_strcmp0(pba_json_find_string(entry, "name"), name) != 0) {
            continue;
        }
        gint64 id = pba_graph_number(entry, "id");
        if (uses(block, id, pba_block_device_node(device))) {
            return id;
        }
        found = found ? found : id;
    }
    return found;
}

/* Needs as many rounds as the graph is deep. */
static void collect_below(Company *company)
{
    guint before;

    g_hash_table_add(company->below, as_key(company->top));
    do {
        before = g_hash_table_size(company->below);
        PbaEdgeWalk at = pba_graph_edges(company->block);
        while (pba_edges_next(&at)) {
            if (is_below(company, at.parent)) {
                g_hash_table_add(company->below, as_key(at.child));
            }
        }
    } while (g_hash_table_size(company->below) > before);
}

static void company_init(Company *company, const PbaBlock *block, JsonObject *device,
                         const char *node)
{
    JsonArray *nodes = pba_json_find_array(block->graph, "nodes");

    company->block = block;
    company->nodes = g_hash_table_new(NULL, NULL);
    company->below = g_hash_table_new(NULL, NULL);
    for (guint i = 0; nodes && i < json_array_get_length(nodes); i++) {
        JsonObject *entry = pba_json_element(nodes, i);
        if (entry) {
            g_hash_table_insert(company->nodes, as_key(pba_graph_number(entry, "id")), entry);
        }
    }
    company->backend = find_backend(block, device);
    company->top = child_of(block, company->backend);
    if (!company->top) {
        company->top = pba_graph_id(block, PBA_GRAPH_NODE, node);
    }
    collect_below(company);
}

static bool has_permission(JsonObject *edge, const char *key, const char *permission)
{
    JsonArray *permissions = pba_json_find_array(edge, key);

    for (guint i = 0; permissions && i < json_array_get_length(permissions); i++) {
        JsonNode *node = json_array_get_element(permissions, i);
        if (JSON_NODE_HOLDS_VALUE(node) && g_strcmp0(json_node_get_string(node), permission) == 0) {
            return true;
        }
    }
    return false;
}

/* The node appears and disappears with the job, and the guest's writes go through it. */
static char *find_job(const Company *company)
{
    PbaEdgeWalk at = pba_graph_edges(company->block);

    while (pba_edges_next(&at)) {
        if (has_type(company, at.parent, PBA_GRAPH_JOB) && is_below(company, at.child)) {
            return g_strdup(name_of(company, at.parent));
        }
    }
    return NULL;
}

/* query-block shows the first node that is not an implicit filter. */
static char *describe_filter(const Company *company, const char *node)
{
    const char *top = name_of(company, company->top);

    return !company->backend || g_strcmp0(top, node) == 0
               ? NULL
               : g_strdup_printf(
                     "node '%s' of another program is between the guest and this disk's node '%s' "
                     "- end the program or job that added it, then try again",
                     top, node);
}

static char *describe_parent(const Company *company, gint64 parent, gint64 child, bool writes)
{
    const char *name = name_of(company, parent);
    const char *below = name_of(company, child);

    if (has_type(company, parent, PBA_GRAPH_NODE)) {
        return g_strdup_printf(
            "node '%s' of another program is on top of this disk's node '%s' - end the program "
            "that added it, or remove it (blockdev-del), then try again",
            name, below);
    }
    if (*name) {
        g_autofree char *id = pba_block_qdev_id(name);
        return g_strdup_printf("guest device '%s' also uses this disk's node '%s', and a node with "
                               "two devices cannot be backed up - exclude both, or unplug one",
                               id ? id : name, below);
    }
    return writes ? g_strdup_printf("another program can write to its node '%s', past the guest, "
                                    "by an export or the like - end that, then try again",
                                    below)
                  : NULL;
}

/* Checks the nodes from the one that the guest uses down to the first one that is not a filter. An
 * image below that may have several overlays. */
static char *describe_others(const Company *company, GHashTable *path)
{
    PbaEdgeWalk at = pba_graph_edges(company->block);

    while (pba_edges_next(&at)) {
        if (!g_hash_table_contains(path, as_key(at.child)) || at.parent == company->backend ||
            g_hash_table_contains(path, as_key(at.parent)) ||
            pba_is_own_node(name_of(company, at.parent)) ||
            has_type(company, at.parent, PBA_GRAPH_JOB)) {
            continue;
        }
        char *problem =
            describe_parent(company, at.parent, at.child, has_permission(at.edge, "perm", "write"));
        if (problem) {
            return problem;
        }
    }
    return NULL;
}

static GHashTable *find_path(const Company *company)
{
    GHashTable *path = g_hash_table_new(NULL, NULL);
    const char *node = name_of(company, company->top);
    const char *last = pba_block_skip_filters(company->block, node);

    for (guint i = 0; node && i < json_array_get_length(company->block->nodes); i++) {
        g_hash_table_add(path, as_key(pba_graph_id(company->block, PBA_GRAPH_NODE, node)));
        node =
            g_strcmp0(node, last) == 0 ? NULL : pba_block_find_child(company->block, node, "file");
    }
    return path;
}

char *pba_company_job(const PbaBlock *block, JsonObject *device, const char *node)
{
    g_auto(Company) company = {0};

    company_init(&company, block, device, node);
    return find_job(&company);
}

char *pba_company_problem(const PbaBlock *block, JsonObject *device, const char *node)
{
    g_auto(Company) company = {0};

    company_init(&company, block, device, node);
    g_autoptr(GHashTable) path = find_path(&company);
    char *problem = describe_filter(&company, node);
    return problem ? problem : describe_others(&company, path);
}

char *pba_company_user(const PbaBlock *block, const char *node)
{
    g_auto(Company) company = {0};

    company_init(&company, block, NULL, node);
    PbaEdgeWalk at = pba_graph_edges(block);
    while (company.top && pba_edges_next(&at)) {
        const char *name = name_of(&company, at.parent);
        bool is_backend = has_type(&company, at.parent, PBA_GRAPH_BACKEND);
        bool is_job = has_type(&company, at.parent, PBA_GRAPH_JOB);
        if (at.child != company.top || pba_is_own_node(name) || (is_backend && *name)) {
            continue;
        }
        return is_backend ? g_strdup("an export or the like")
                          : g_strdup_printf("%s '%s'", is_job ? "block job" : "node", name);
    }
    return NULL;
}

/* The edge from the guest device to its disk. */
static JsonObject *find_root_edge(const PbaBlock *block, JsonObject *device)
{
    gint64 backend = find_backend(block, device);
    PbaEdgeWalk at = pba_graph_edges(block);

    while (backend && pba_edges_next(&at)) {
        if (at.parent == backend) {
            return at.edge;
        }
    }
    return NULL;
}

bool pba_company_shares_writes(const PbaBlock *block, JsonObject *device)
{
    JsonObject *edge = find_root_edge(block, device);
    return edge && has_permission(edge, "shared-perm", "write");
}

/* QEMU says so since 10.0. Before that, the permissions show it (blk_root_inactivate,
 * blk_attach_dev): a guest device has none, or one of -drive the permission to read. */
bool pba_company_is_inactive(const PbaBlock *block, JsonObject *device, const char *node)
{
    JsonObject *info = pba_block_find_node(block, node);

    if (info && json_object_has_member(info, "active")) {
        return !pba_json_find_bool(info, "active");
    }
    const char *qdev = device ? pba_json_find_string(device, "qdev") : NULL;
    JsonObject *edge = qdev ? find_root_edge(block, device) : NULL;
    JsonArray *permissions = edge ? pba_json_find_array(edge, "perm") : NULL;
    bool is_fixed = info && pba_json_find_bool(info, "ro");

    return permissions && (json_array_get_length(permissions) == 0 ||
                           (!is_fixed && !has_permission(edge, "perm", "write") &&
                            has_permission(edge, "shared-perm", "write")));
}

/* Drivers that accept SCSI commands. */
static const char *const scsi_drivers[] = {"host_device", "iscsi", NULL};

bool pba_company_is_host_device(const PbaBlock *block, const char *node)
{
    /* A wrong graph may be a ring, so this takes no more steps than there are nodes. */
    for (guint i = 0; node && i < json_array_get_length(block->nodes); i++) {
        JsonObject *entry = pba_block_find_node(block, node);
        const char *driver = entry ? pba_json_find_string(entry, "drv") : NULL;
        if (driver && g_strv_contains(scsi_drivers, driver)) {
            return true;
        }
        node = pba_block_find_child(block, node, "file");
    }
    return false;
}

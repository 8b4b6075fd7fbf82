/* Other programs at a disk of the guest: their jobs, filters, nodes and users, as the block graph
 * shows them. query-block is not enough: it hides the filters that jobs insert. */
#include "qemu.h"

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

static gint64 number(JsonObject *object, const char *key)
{
    return object ? json_object_get_int_member_with_default(object, key, 0) : 0;
}

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

static JsonArray *edges_of(const PbaBlock *block)
{
    return pba_json_find_array(block->graph, "edges");
}

static guint edge_count(const PbaBlock *block)
{
    JsonArray *edges = edges_of(block);
    return edges ? json_array_get_length(edges) : 0;
}

static JsonObject *edge_at(const PbaBlock *block, guint index)
{
    return pba_json_element(edges_of(block), index);
}

static gint64 find_id(const PbaBlock *block, const char *type, const char *name)
{
    JsonArray *nodes = pba_json_find_array(block->graph, "nodes");

    for (guint i = 0; nodes && name && i < json_array_get_length(nodes); i++) {
        JsonObject *node = pba_json_element(nodes, i);
        if (node && g_strcmp0(pba_json_find_string(node, "type"), type) == 0 &&
            g_strcmp0(pba_json_find_string(node, "name"), name) == 0) {
            return number(node, "id");
        }
    }
    return 0;
}

/* In the graph, a block backend has its own name, or that of its guest device. */
static gint64 find_backend(const PbaBlock *block, JsonObject *device)
{
    const char *name = device ? pba_json_find_string(device, "device") : NULL;

    if (device && (!name || !*name)) {
        name = pba_json_find_string(device, "qdev");
    }
    return find_id(block, "block-backend", name);
}

static gint64 child_of(const PbaBlock *block, gint64 parent)
{
    for (guint i = 0; parent && i < edge_count(block); i++) {
        if (number(edge_at(block, i), "parent") == parent) {
            return number(edge_at(block, i), "child");
        }
    }
    return 0;
}

/* As many rounds as the graph is deep. */
static void collect_below(Company *company)
{
    guint before;

    g_hash_table_add(company->below, as_key(company->top));
    do {
        before = g_hash_table_size(company->below);
        for (guint i = 0; i < edge_count(company->block); i++) {
            JsonObject *edge = edge_at(company->block, i);
            if (is_below(company, number(edge, "parent"))) {
                g_hash_table_add(company->below, as_key(number(edge, "child")));
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
            g_hash_table_insert(company->nodes, as_key(number(entry, "id")), entry);
        }
    }
    company->backend = find_backend(block, device);
    company->top = child_of(block, company->backend);
    if (!company->top) {
        company->top = find_id(block, "block-driver", node);
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
    for (guint i = 0; i < edge_count(company->block); i++) {
        JsonObject *edge = edge_at(company->block, i);
        gint64 parent = number(edge, "parent");
        if (has_type(company, parent, "block-job") && is_below(company, number(edge, "child"))) {
            return g_strdup(name_of(company, parent));
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

    if (has_type(company, parent, "block-driver")) {
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

/* From what the guest uses down to the first node that is not a filter. An image below that may
 * have several overlays. */
static char *describe_others(const Company *company, GHashTable *path)
{
    for (guint i = 0; i < edge_count(company->block); i++) {
        JsonObject *edge = edge_at(company->block, i);
        gint64 parent = number(edge, "parent");
        gint64 child = number(edge, "child");
        if (!g_hash_table_contains(path, as_key(child)) || parent == company->backend ||
            g_hash_table_contains(path, as_key(parent)) ||
            pba_is_own_node(name_of(company, parent)) || has_type(company, parent, "block-job")) {
            continue;
        }
        char *problem =
            describe_parent(company, parent, child, has_permission(edge, "perm", "write"));
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
        g_hash_table_add(path, as_key(find_id(company->block, "block-driver", node)));
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
    for (guint i = 0; company.top && i < edge_count(block); i++) {
        JsonObject *edge = edge_at(block, i);
        gint64 parent = number(edge, "parent");
        const char *name = name_of(&company, parent);
        bool is_backend = has_type(&company, parent, "block-backend");
        if (number(edge, "child") != company.top || pba_is_own_node(name) ||
            (is_backend && *name)) {
            continue;
        }
        return is_backend
                   ? g_strdup("an export or the like")
                   : g_strdup_printf("%s '%s'",
                                     has_type(&company, parent, "block-job") ? "block job" : "node",
                                     name);
    }
    return NULL;
}

bool pba_company_shares_writes(const PbaBlock *block, JsonObject *device)
{
    gint64 backend = find_backend(block, device);

    for (guint i = 0; backend && i < edge_count(block); i++) {
        if (number(edge_at(block, i), "parent") == backend) {
            return has_permission(edge_at(block, i), "shared-perm", "write");
        }
    }
    return false;
}

/* Drivers that take SCSI commands. */
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

/* The replies of the QEMU in replies.c if its input has no line; and parsing of its input. */
#include "replies.h"
#include "src/qmp/wire.h"
#include <string.h>

#define MAX_CACHED 20000

static const char *const good_replies[][2] = {
    {"query-version", "{'return': {'qemu': {'major': 8, 'minor': 2, 'micro': 2}}}"},
    {"query-block",
     "{'return': [{'device': 'drive-scsi0', 'qdev': '/machine/peripheral/scsi0/virtio-backend',"
     " 'inserted': {'node-name': '#block1', 'ro': false, 'image': {'virtual-size': 67108864}}},"
     " {'device': 'drive-scsi1', 'qdev': 'scsi1', 'inserted': {'node-name': '#block2',"
     " 'ro': false, 'image': {'virtual-size': 50331648}}}]}"},
    {"query-named-block-nodes",
     "{'return': [{'node-name': '#block1', 'drv': 'raw', 'image': {'virtual-size': 67108864}},"
     " {'node-name': '#block2', 'drv': 'qcow2', 'image': {'virtual-size': 50331648}},"
     " {'node-name': 'drive-scsi0-fleecing', 'drv': 'raw', 'image': {'virtual-size': 67108864}},"
     " {'node-name': 'drive-scsi1-fleecing', 'drv': 'raw', 'image': {'virtual-size': 50331648}}]}"},
    {"x-debug-query-block-graph",
     "{'return': {'nodes': [{'id': 1, 'type': 'block-driver', 'name': '#block1'},"
     " {'id': 2, 'type': 'block-driver', 'name': '#block2'}], 'edges': []}}"},
    {"backup-access-setup",
     "{'return': [{'device': 'drive-scsi0', 'node-name': '#snap0', 'size': 67108864,"
     " 'bitmap-node-name': '#block1', 'bitmap-name': '" TARGET "', 'bitmap-action': 'used'},"
     " {'device': 'drive-scsi1', 'node-name': '#snap1', 'size': 50331648,"
     " 'bitmap-node-name': '#block2', 'bitmap-name': '" TARGET "', 'bitmap-action': 'new'}]}"},
    {"query-block-exports", "{'return': []}"},
    {"query-status", "{'return': {'status': 'running'}}"},
    {"query-iothreads", "{'return': []}"},
    {"query-jobs", "{'return': []}"},
    {"", "{'return': {}}"},
};

static const char *const commands[] = {
    "{'return': [{'name': 'blockdev-reopen'}, {'name': 'blockdev-backup'},"
    " {'name': 'block-export-add'}, {'name': 'block-dirty-bitmap-merge'},"
    " {'name': 'x-debug-query-block-graph'}]}",
    "{'return': [{'name': 'backup-access-setup'}]}",
};

static const char *const schemas[] = {
    "{'return': [{'name': 'backup-access-setup', 'meta-type': 'command', 'arg-type': '1'},"
    " {'name': '1', 'meta-type': 'object', 'members': [{'name': 'devices'}]}]}",
    "{'return': [{'name': 'backup-access-setup', 'meta-type': 'command', 'arg-type': '1'},"
    " {'name': '1', 'meta-type': 'object', 'members': [{'name': 'devlist'},"
    " {'name': 'bitmap-name'}]}]}",
};

static GHashTable *good;
static GHashTable *cache; /* NULL unless PBA_FUZZ_CACHE is set */
static JsonObject *good_commands[G_N_ELEMENTS(commands)];
static JsonObject *good_schemas[G_N_ELEMENTS(schemas)];

static JsonObject *parse(const char *text, size_t length)
{
    g_autoptr(PbaQmpWire) wire = pba_qmp_wire_new();
    return pba_qmp_wire_feed(wire, text, length, NULL) ? pba_qmp_wire_pop(wire) : NULL;
}

/* Most lines of an input occur in earlier inputs, and parsing them again would be most of the work.
 * But with the cache, uses of freed messages are not detected. */
JsonObject *replies_parse(const char *text, size_t length)
{
    if (!cache) {
        return parse(text, length);
    }
    g_autofree char *key = g_strndup(text, length);
    JsonObject *message = g_hash_table_lookup(cache, key);
    if (!message && (message = parse(text, length))) {
        if (g_hash_table_size(cache) >= MAX_CACHED) {
            g_hash_table_remove_all(cache);
        }
        g_hash_table_insert(cache, g_steal_pointer(&key), message);
    }
    return message ? json_object_ref(message) : NULL;
}

static JsonObject *parse_good(const char *text)
{
    g_autofree char *json = g_strdelimit(g_strdup(text), "'", '"');
    JsonObject *message = parse(json, strlen(json));
    CHECK(message != NULL);
    return message;
}

void replies_prepare(void)
{
    good = g_hash_table_new(g_str_hash, g_str_equal);
    for (size_t i = 0; i < G_N_ELEMENTS(good_replies); i++) {
        g_hash_table_insert(good, (char *)good_replies[i][0], parse_good(good_replies[i][1]));
    }
    for (size_t i = 0; i < 2; i++) {
        good_commands[i] = parse_good(commands[i]);
        good_schemas[i] = parse_good(schemas[i]);
    }
    if (g_getenv("PBA_FUZZ_CACHE")) {
        cache = g_hash_table_new_full(g_str_hash, g_str_equal, g_free,
                                      (GDestroyNotify)json_object_unref);
    }
}

JsonObject *replies_good(const char *command, bool pve, bool early)
{
    if (strcmp(command, "query-commands") == 0) {
        return good_commands[pve];
    }
    if (strcmp(command, "query-qmp-schema") == 0) {
        return good_schemas[early];
    }
    JsonObject *message = g_hash_table_lookup(good, command);
    return message ? message : g_hash_table_lookup(good, "");
}

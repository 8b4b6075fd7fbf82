/* block.c: searches in replies like the recorded ones, and in replies that no QEMU sends. */
#include "src/qemu/qemu.h"
#include "src/qmp/qmp.h"
#include "tap.h"
#include <string.h>

static JsonArray *parse_array(const char *text)
{
    g_autoptr(JsonNode) node = json_from_string(text, NULL);
    g_assert(node && JSON_NODE_HOLDS_ARRAY(node));
    return json_array_ref(json_node_get_array(node));
}

static JsonObject *parse_object(const char *text)
{
    g_autoptr(JsonNode) node = json_from_string(text, NULL);
    g_assert(node && JSON_NODE_HOLDS_OBJECT(node));
    return json_object_ref(json_node_get_object(node));
}

/* The shapes of a Proxmox QEMU (-blockdev with a throttle filter on top; older: -drive), a stock
 * one, and an empty drive. */
static const char devices[] =
    "[{\"io-status\": \"ok\", \"device\": \"\", \"locked\": false, \"inserted\": {\"image\": "
    "{\"virtual-size\": 67108864, \"format\": \"throttle\"}, \"ro\": false, \"node-name\": "
    "\"drive-scsi0\", \"drv\": \"throttle\"}, \"qdev\": \"scsi0\", \"type\": \"unknown\"}, "
    "{\"device\": \"drive-virtio0\", \"inserted\": {\"image\": {\"virtual-size\": 4608}, "
    "\"node-name\": \"#block119\", \"drv\": \"raw\"}, \"qdev\": "
    "\"/machine/peripheral/virtio0/virtio-backend\"}, "
    "{\"device\": \"\", \"inserted\": {\"image\": {\"virtual-size\": 540672}, \"node-name\": "
    "\"disk1\"}, \"qdev\": \"/machine/peripheral-anon/device[0]/virtio-backend\"}, "
    "{\"device\": \"ide2-cd0\", \"removable\": true, \"qdev\": \"ide2\"}, "
    "{\"device\": \"\", \"inserted\": {\"image\": {\"virtual-size\": 1}, \"node-name\": "
    "\"disk2\"}, "
    "\"qdev\": \"/machine/peripheral/data1\"}, "
    "{\"device\": \"\", \"inserted\": {\"image\": {\"virtual-size\": 1}, \"node-name\": "
    "\"disk3\"}, \"qdev\": \"/machine/peripheral/usb0/usb0.0/legacy[0]\"}, "
    "{\"device\": \"\", \"inserted\": {\"image\": {\"virtual-size\": 1}, \"node-name\": "
    "\"disk4\"}, \"qdev\": \"/machine/peripheral-anon/device[2]/scsi.0/legacy[0]\"}, "
    "7, null, [], {}, {\"device\": 5, \"qdev\": {}, \"inserted\": []}, "
    "{\"device\": \"odd\", \"inserted\": {\"image\": 5, \"node-name\": 7}}]";

static const char nodes[] =
    "[{\"node-name\": \"drive-scsi0\", \"drv\": \"throttle\", \"image\": {\"virtual-size\": "
    "67108864}}, "
    "{\"node-name\": \"cor\", \"drv\": \"copy-on-read\", \"image\": {}}, "
    "{\"node-name\": \"fmt0\", \"drv\": \"qcow2\", \"image\": {\"virtual-size\": -1}, "
    "\"dirty-bitmaps\": [{\"recording\": false, \"granularity\": 65536, \"count\": 0}, "
    "{\"name\": \"pba:t\", \"recording\": true}, 5, {\"name\": 7}]}, "
    "{\"node-name\": \"file0\", \"drv\": \"file\", \"dirty-bitmaps\": {}}, "
    "{\"node-name\": \"ring1\", \"drv\": \"throttle\"}, "
    "{\"node-name\": \"ring2\", \"drv\": \"compress\"}, "
    "{\"node-name\": \"self\", \"drv\": \"throttle\"}, "
    "{\"node-name\": \"cut\", \"drv\": \"preallocate\"}, "
    "{\"node-name\": \"nodriver\"}, {}, 5, null]";

static const char graph[] =
    "{\"nodes\": [{\"id\": 1, \"type\": \"block-backend\", \"name\": \"drive-scsi0\"}, "
    "{\"id\": 2, \"type\": \"block-driver\", \"name\": \"drive-scsi0\"}, "
    "{\"id\": 3, \"type\": \"block-driver\", \"name\": \"cor\"}, "
    "{\"id\": 4, \"type\": \"block-driver\", \"name\": \"fmt0\"}, "
    "{\"id\": 5, \"type\": \"block-driver\", \"name\": \"file0\"}, "
    "{\"id\": 6, \"type\": \"block-driver\", \"name\": \"ring1\"}, "
    "{\"id\": 7, \"type\": \"block-driver\", \"name\": \"ring2\"}, "
    "{\"id\": 8, \"type\": \"block-driver\", \"name\": \"self\"}, "
    "{\"id\": 9, \"type\": \"block-driver\", \"name\": \"cut\"}, "
    "{\"type\": \"block-driver\", \"name\": \"noid\"}, 5, {}], "
    "\"edges\": [{\"parent\": 1, \"child\": 2, \"name\": \"root\"}, "
    "{\"parent\": 2, \"child\": 3, \"name\": \"file\"}, "
    "{\"parent\": 3, \"child\": 5, \"name\": \"target\"}, "
    "{\"parent\": 3, \"child\": 4, \"name\": \"file\"}, "
    "{\"parent\": 4, \"child\": 5, \"name\": \"file\"}, "
    "{\"parent\": 6, \"child\": 7, \"name\": \"file\"}, "
    "{\"parent\": 7, \"child\": 6, \"name\": \"file\"}, "
    "{\"parent\": 8, \"child\": 8, \"name\": \"file\"}, "
    "{\"parent\": 9, \"child\": 4711, \"name\": \"file\"}, "
    "{\"parent\": {}, \"name\": \"file\"}, {\"child\": 3, \"name\": \"file\"}, 5, {}]}";

static void recorded(PbaBlock *block)
{
    *block = (PbaBlock){parse_array(devices), parse_array(nodes), parse_object(graph)};
}

static void test_devices(void)
{
    g_auto(PbaBlock) block;
    recorded(&block);
    static const struct {
        const char *name;
        const char *node; /* NULL: not found */
    } lookups[] = {
        {"drive-scsi0", "drive-scsi0"},
        {"scsi0", "drive-scsi0"},
        {"drive-virtio0", "#block119"},
        {"virtio0", "#block119"},
        {"#block119", "#block119"},
        {"/machine/peripheral/virtio0", "#block119"},
        {"/machine/peripheral/virtio0/virtio-backend", "#block119"},
        {"/machine/peripheral/scsi0", "drive-scsi0"},
        {"/machine/peripheral/scsi0/virtio-backend", NULL},
        {"/machine/peripheral-anon/device[0]", "disk1"},
        {"/machine/peripheral-anon/device[0]/virtio-backend", "disk1"},
        {"device[0]", NULL},
        {"disk1", "disk1"},
        {"data1", "disk2"},
        {"usb0", "disk3"},
        {"/machine/peripheral/usb0", "disk3"},
        {"/machine/peripheral/usb0/usb0.0/legacy[0]", "disk3"},
        {"/machine/peripheral/usb0/usb0.0", NULL},
        {"/machine/peripheral-anon/device[2]", "disk4"},
        {"legacy[0]", NULL},
        {"virtio", NULL},
        {"virtio0/virtio-backend", NULL},
        {"", NULL},
        {"scsi", NULL},
        {"drive-scsi00", NULL},
        {"/", NULL},
        {"peripheral", NULL},
        {"data", NULL},
        {"data11", NULL},
        {"nothing", NULL},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(lookups); i++) {
        JsonObject *device = pba_block_find_device(&block, lookups[i].name);
        const char *node = device ? pba_block_device_node(device) : NULL;
        is_text(node, lookups[i].node, "device '%s'", lookups[i].name);
    }
    JsonObject *empty = pba_block_find_device(&block, "ide2");
    ok(empty && !pba_block_device_node(empty), "an empty drive is found and has no node");
    ok(pba_block_find_user(&block, "disk1") == pba_block_find_device(&block, "disk1"),
       "the user of a node");
    ok(!pba_block_find_user(&block, "fmt0"), "a node without one");
}

static void test_rivals(void)
{
    g_auto(PbaBlock) block = {
        .devices = parse_array(
            "[{\"device\": \"a\", \"qdev\": \"b\", \"inserted\": {\"node-name\": \"n\"}}, "
            "{\"qdev\": \"n\", \"inserted\": {\"node-name\": \"c\"}}, "
            "{\"qdev\": \"/machine/peripheral-anon/device[0]\", \"inserted\": "
            "{\"node-name\": \"c\"}}, "
            "{\"device\": \"b\"}, 5]"),
        .nodes = json_array_new(),
    };
    static const struct {
        const char *name;
        const char *rivals;
    } names[] = {
        {"n", "a, /machine/peripheral/n"},
        {"b", "a, b"}, /* the second disk has no other name */
        {"a", NULL},
        {"c", NULL}, /* one disk of two devices */
        {"", NULL},
        {"x", NULL},
    };

    for (size_t i = 0; i < G_N_ELEMENTS(names); i++) {
        g_autofree char *rivals = pba_block_rivals(&block, names[i].name);
        is_text(rivals, names[i].rivals, "disks called '%s'", names[i].name);
    }
}

static void test_sizes(void)
{
    g_auto(PbaBlock) block;
    recorded(&block);
    uint64_t size = 0;
    GError *error = NULL;

    ok(pba_block_device_size(pba_block_find_device(&block, "virtio0"), &size, &error) &&
           size == 4608,
       "size of a device");
    ok(pba_block_node_size(pba_block_find_node(&block, "drive-scsi0"), &size, &error) &&
           size == 67108864,
       "size of a node");
    static const char *const odd_nodes[] = {"cor", "fmt0", "file0"};
    for (size_t i = 0; i < G_N_ELEMENTS(odd_nodes); i++) {
        ok(!pba_block_node_size(pba_block_find_node(&block, odd_nodes[i]), &size, &error) &&
               g_error_matches(error, PBA_ERROR, PBA_ERROR_PROTOCOL),
           "%s: no size, but an error", odd_nodes[i]);
        g_clear_error(&error);
    }
    static const char *const odd_devices[] = {"ide2", "odd"};
    for (size_t i = 0; i < G_N_ELEMENTS(odd_devices); i++) {
        ok(!pba_block_device_size(pba_block_find_device(&block, odd_devices[i]), &size, &error) &&
               g_error_matches(error, PBA_ERROR, PBA_ERROR_PROTOCOL),
           "%s: no size, but an error", odd_devices[i]);
        g_clear_error(&error);
    }
}

static void test_bitmaps(void)
{
    g_auto(PbaBlock) block;
    recorded(&block);

    JsonObject *bitmap = pba_block_find_bitmap(&block, "fmt0", "pba:t");
    ok(bitmap && pba_json_find_bool(bitmap, "recording"), "a bitmap beside nameless ones");
    ok(!pba_block_find_bitmap(&block, "fmt0", "pba:"), "the name must be the whole one");
    ok(!pba_block_find_bitmap(&block, "drive-scsi0", "pba:t"), "a node without bitmaps");
    ok(!pba_block_find_bitmap(&block, "file0", "pba:t"), "bitmaps that are no list");
    ok(!pba_block_find_bitmap(&block, "nothing", "pba:t"), "no such node");
    ok(!pba_block_find_node(&block, "nothing"), "a node that is not there");
}

static void test_graph(void)
{
    g_auto(PbaBlock) block;
    recorded(&block);

    is_text(pba_block_find_child(&block, "drive-scsi0", "file"), "cor",
            "a child of the node, not of the backend of that name");
    is_text(pba_block_find_child(&block, "cor", "target"), "file0", "a child of another kind");
    is_text(pba_block_find_child(&block, "file0", "file"), NULL, "no child");
    is_text(pba_block_find_child(&block, "cut", "file"), NULL, "an edge to nowhere");
    is_text(pba_block_find_child(&block, "noid", "file"), NULL, "a node without an id");
    is_text(pba_block_find_child(&block, "nothing", "file"), NULL, "no such node");

    is_text(pba_block_skip_filters(&block, "drive-scsi0"), "fmt0", "two filters skipped");
    is_text(pba_block_skip_filters(&block, "fmt0"), "fmt0", "no filter");
    is_text(pba_block_skip_filters(&block, "nodriver"), "nodriver", "no driver told");
    is_text(pba_block_skip_filters(&block, "cut"), NULL, "an open end");
    const char *end = pba_block_skip_filters(&block, "ring1");
    ok(!end || g_str_has_prefix(end, "ring"), "a ring comes to an end");
    end = pba_block_skip_filters(&block, "self");
    ok(!end || strcmp(end, "self") == 0, "a node above itself, too");
}

/* During an access: on Proxmox with a throttle filter, and with -drive; on a stock QEMU; and disks
 * whose nodes have generated names. */
static void test_device_above(void)
{
    g_auto(PbaBlock) block = {
        parse_array("[{'device': '', 'qdev': 'scsi0', 'inserted': {'node-name': '#block1'}}, "
                    "{'device': 'drive-ide0', 'qdev': 'ide0', 'inserted': {'node-name': "
                    "'#block4'}}, {'device': '', 'qdev': 'scsi2', 'inserted': {'node-name': "
                    "'pba-raw-2'}}, {'device': '', 'qdev': "
                    "'/machine/peripheral/data3/virtio-backend', 'inserted': {'node-name': "
                    "'#block8'}}, {'device': '', 'qdev': "
                    "'/machine/peripheral-anon/device[0]/virtio-backend', 'inserted': "
                    "{'node-name': '#block9'}}, {'device': '', 'qdev': 'long', 'inserted': "
                    "{'node-name': 'unnamed-0'}}, {'device': '', 'qdev': 'usb', 'inserted': "
                    "{'node-name': 'unnamed'}}]"),
        parse_array("[{}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}]"),
        parse_object("{'nodes': [{'id': 1, 'type': 'block-driver', 'name': '#block1'}, "
                     "{'id': 2, 'type': 'block-driver', 'name': 'drive-scsi0'}, "
                     "{'id': 3, 'type': 'block-driver', 'name': 'f0scsi0'}, "
                     "{'id': 4, 'type': 'block-driver', 'name': '#block4'}, "
                     "{'id': 5, 'type': 'block-driver', 'name': 'pba-raw-2'}, "
                     "{'id': 6, 'type': 'block-driver', 'name': 'pba-cbw-2'}, "
                     "{'id': 7, 'type': 'block-driver', 'name': 'disk2'}, "
                     "{'id': 8, 'type': 'block-driver', 'name': '#block8'}, "
                     "{'id': 9, 'type': 'block-driver', 'name': '#block9'}, "
                     "{'id': 10, 'type': 'block-driver', 'name': 'unnamed-0'}, "
                     "{'id': 11, 'type': 'block-driver', 'name': 'unnamed'}], "
                     "'edges': [{'parent': 1, 'child': 2, 'name': 'file'}, "
                     "{'parent': 2, 'child': 3, 'name': 'file'}, "
                     "{'parent': 5, 'child': 6, 'name': 'file'}, "
                     "{'parent': 6, 'child': 7, 'name': 'file'}]}"),
    };
    static const struct {
        const char *node;
        const char *device;
    } lookups[] = {
        {"f0scsi0", "drive-scsi0"},
        {"drive-scsi0", "drive-scsi0"},
        {"#block4", "drive-ide0"},
        {"disk2", "disk2"},
        {"#block8", "data3"},
        {"nothing", NULL},
        {"unnamed-0", "long"},
        {"unnamed", "unnamed"},
        {"#block9", "/machine/peripheral-anon/device[0]"},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(lookups); i++) {
        g_autofree char *device = pba_block_device_above(&block, lookups[i].node);
        is_text(device, lookups[i].device, "the device of node '%s'", lookups[i].node);
    }
}

static void test_odd_graphs(void)
{
    static const char *const graphs[] = {
        "{}",
        "{\"nodes\": 5, \"edges\": 6}",
        "{\"nodes\": [], \"edges\": []}",
        "{\"nodes\": [{\"id\": {\"a\": []}, \"type\": \"block-driver\", \"name\": \"n\"}], "
        "\"edges\": [{\"parent\": {\"a\": []}, \"child\": {\"a\": []}, \"name\": \"file\"}]}",
        "{\"nodes\": [{\"id\": 1, \"type\": \"block-driver\", \"name\": 1}], \"edges\": []}",
    };
    for (size_t i = 0; i < G_N_ELEMENTS(graphs); i++) {
        g_auto(PbaBlock) block = {parse_array("[]"), parse_array("[]"), parse_object(graphs[i])};
        const char *child = pba_block_find_child(&block, "n", "file");
        ok(!child || strcmp(child, "n") == 0, "graph %zu", i);
        ok(!pba_block_find_device(&block, "n") && !pba_block_find_node(&block, "n"),
           "no devices, no nodes");
    }
}

/* The replies of one QEMU, without one of them. */

typedef struct {
    const char *fails;
    GString *commands;
} Transport;

static JsonNode *transport(void *opaque, const char *command, JsonNode *arguments, GError **error)
{
    Transport *self = opaque;
    g_autofree char *text = json_to_string(arguments, FALSE);
    g_string_append_printf(self->commands, "%s%s ", command, text);
    if (g_strcmp0(self->fails, command) == 0) {
        g_set_error_literal(error, PBA_ERROR, PBA_ERROR_QMP, "told to fail");
        return NULL;
    }
    return json_from_string(g_str_has_prefix(command, "x-debug")  ? graph
                            : strcmp(command, "query-block") == 0 ? devices
                                                                  : nodes,
                            NULL);
}

static void test_query(void)
{
    Transport self = {NULL, g_string_new(NULL)};
    g_autoptr(PbaQmp) qmp = pba_qmp_new_transport(transport, &self, NULL);
    g_auto(PbaBlock) block = {0};
    GError *error = NULL;

    ok(pba_block_query(qmp, true, &block, &error) && block.graph, "with the graph");
    is_text(self.commands->str,
            "query-block{} query-named-block-nodes{\"flat\":true} x-debug-query-block-graph{} ",
            "what was asked");
    ok(pba_block_query(qmp, false, &block, &error) && !block.graph, "again without");
    static const char *const commands[] = {"query-block", "query-named-block-nodes",
                                           "x-debug-query-block-graph"};
    for (size_t i = 0; i < G_N_ELEMENTS(commands); i++) {
        self.fails = commands[i];
        ok(!pba_block_query(qmp, true, &block, &error), "%s fails", commands[i]);
        is_text(error ? pba_error_command(error) : NULL, commands[i], "the error names it");
        g_clear_error(&error);
    }
    g_string_free(self.commands, TRUE);
}

int main(void)
{
    test_devices();
    test_rivals();
    test_sizes();
    test_bitmaps();
    test_graph();
    test_device_above();
    test_odd_graphs();
    test_query();
    return done_testing();
}

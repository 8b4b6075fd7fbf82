/* companion.c: names of companions, and why a bitmap must not be used. */
#include "src/qemu/qemu.h"
#include "src/qmp/qmp.h"
#include "tap.h"
#include <string.h>

#define ID_1 "0123456789abcdef0123456789abcdef"
#define ID_2 "ffffffffffffffffffffffffffffffff"
#define SIZE (64 * 1048576)

static PbaCompanion companion_of(const char *id)
{
    return (PbaCompanion){.target_id = "mystore",
                          .guest = "11111111-2222-3333-4444-555555555555",
                          .disk = "device /machine/peripheral/scsi0",
                          .name = "disk0",
                          .size = SIZE,
                          .id = id};
}

static void test_ids(void)
{
    static const char *const bad[] = {"",
                                      "0",
                                      "0123456789ABCDEF0123456789ABCDEF",
                                      "0123456789abcdef0123456789abcde",
                                      "0123456789abcdef0123456789abcdef0",
                                      "0123456789abcdef0123456789abcde:",
                                      "\xc3\xbc%n"};
    for (size_t i = 0; i < G_N_ELEMENTS(bad); i++) {
        g_autoptr(GError) error = NULL;
        ok(!pba_companion_check_id(bad[i], &error) &&
               g_error_matches(error, PBA_ERROR, PBA_ERROR_ARGUMENT),
           "no id, number %zu", i);
    }
    g_autoptr(GError) error = NULL;
    ok(!pba_companion_check_id(NULL, &error), "no id at all");
    ok(pba_companion_check_id(ID_1, NULL), "an id");
}

static void test_names(void)
{
    PbaCompanion companion = companion_of(ID_1);
    PbaCompanion none = companion_of(NULL);
    g_autofree char *name = pba_companion_name(&companion);
    g_autofree char *without = pba_companion_name(&none);

    ok(pba_is_companion(name) && pba_is_companion(without), "%s is one", name);
    ok(pba_is_companion_of(name, "mystore"), "of its target");
    ok(!pba_is_companion_of(name, "mystore2"), "not of another one");
    is_text(pba_companion_id(name), ID_1, "its id");
    is_text(pba_companion_id(without), NULL, "one without an id has none");
    ok(pba_companion_is_named(name, "disk0"), "what the disk was called");
    ok(!pba_companion_is_named(name, "scsi0"), "and nothing else");
    ok(!pba_companion_is_named("pba-id:", ""), "an odd one is of no name");
    ok(strlen(name) <= 1023, "QEMU takes a name of %zu bytes", strlen(name));
    static const char *const others[] = {"",
                                         "mystore",
                                         "pba:mystore",
                                         PBA_TIED_PREFIX "mystore",
                                         "pba-background:mystore",
                                         "backup-access-background-bitmap"};
    for (size_t i = 0; i < G_N_ELEMENTS(others); i++) {
        ok(!pba_is_companion(others[i]) && !pba_companion_id(others[i]), "'%s' is none", others[i]);
    }
}

/* A node whose target's bitmap has a companion of that name in that state. */
static PbaBlock block_with(const char *bitmap_state, const char *name, const char *state)
{
    g_autofree char *text = g_strdup_printf(
        "[{\"node-name\": \"disk0\", \"dirty-bitmaps\": [{\"name\": \"" PBA_TIED_PREFIX
        "mystore\", \"granularity\": 65536, \"count\": 0, %s}, {\"name\": \"%s\", "
        "\"granularity\": 65536, %s}, 5, {}]}]",
        bitmap_state, name, state);
    g_autoptr(JsonNode) node = json_from_string(text, NULL);
    g_assert(node && JSON_NODE_HOLDS_ARRAY(node));
    return (PbaBlock){.nodes = json_array_ref(json_node_get_array(node)),
                      .devices = json_array_new()};
}

#define RECORDING "\"recording\": true, \"inconsistent\": false"
#define WHOLE "\"recording\": false, \"count\": 67108864"

static void check_problem(const char *bitmap_state, const char *name, const char *state,
                          const PbaCompanion *wanted, const char *expected)
{
    g_auto(PbaBlock) block = block_with(bitmap_state, name, state);
    g_autofree char *problem =
        pba_companion_problem(&block, "disk0", PBA_TIED_PREFIX "mystore", wanted);
    ok(expected ? problem && strstr(problem, expected) != NULL : !problem, "%s: %s",
       expected ? expected : "nothing speaks against it", problem ? problem : "good");
}

static void test_problems(void)
{
    PbaCompanion wanted = companion_of(ID_1);
    PbaCompanion nothing = companion_of(NULL);
    PbaCompanion old = companion_of(ID_2);
    PbaCompanion guest = companion_of(ID_1);
    PbaCompanion disk = companion_of(ID_1);
    PbaCompanion size = companion_of(ID_1);
    PbaCompanion alias = companion_of(ID_1);
    PbaCompanion any = companion_of(ID_1);
    guest.guest = "00000000-0000-0000-0000-000000000000";
    disk.disk = "scsi1";
    size.size = SIZE / 2;
    alias.name = "scsi0";
    any.name = NULL;
    g_autofree char *name = pba_companion_name(&wanted);
    g_autofree char *no_id = pba_companion_name(&nothing);
    g_autofree char *old_name = pba_companion_name(&old);
    g_autofree char *guest_name = pba_companion_name(&guest);
    g_autofree char *disk_name = pba_companion_name(&disk);
    g_autofree char *size_name = pba_companion_name(&size);
    g_autofree char *alias_name = pba_companion_name(&alias);

    check_problem(RECORDING, name, WHOLE, &wanted, NULL);
    check_problem(RECORDING, old_name, WHOLE, &wanted, "backup " ID_2 ", not " ID_1);
    check_problem(RECORDING, guest_name, WHOLE, &wanted, "another guest");
    check_problem(RECORDING, disk_name, WHOLE, &wanted, "another disk");
    check_problem(RECORDING, size_name, WHOLE, &wanted, "resized");
    check_problem(RECORDING, alias_name, WHOLE, &wanted, "under another name");
    check_problem(RECORDING, alias_name, WHOLE, &any, NULL);
    check_problem(RECORDING, disk_name, WHOLE, &any, "another disk");
    check_problem(RECORDING, no_id, WHOLE, &wanted, "not known to be relative");
    check_problem(RECORDING, name, WHOLE, &nothing, "no backup that the bitmap could be");
    check_problem(RECORDING, "other", WHOLE, &wanted, "not known to be relative");
    check_problem("\"recording\": false", name, WHOLE, &wanted, "stopped recording");
    check_problem("\"recording\": true, \"inconsistent\": true", name, WHOLE, &wanted,
                  "did not store");
    check_problem(RECORDING, name, "\"recording\": true, \"count\": 67108864", &wanted, "changed");
    check_problem(RECORDING, name, "\"recording\": false, \"inconsistent\": true", &wanted,
                  "did not store");
    check_problem(RECORDING, name, "\"recording\": false, \"count\": 67043328", &wanted, "resized");
    check_problem(RECORDING, name, "\"recording\": false", &wanted, "resized");
    check_problem(RECORDING, name, "\"recording\": false, \"count\": -1", &wanted, "resized");
    check_problem(RECORDING, "pba-id:", WHOLE, &wanted, "not known to be relative");
    g_autofree char *odd = g_strndup(name, strlen("pba-id:12345678:"));
    check_problem(RECORDING, odd, WHOLE, &wanted, "invalid name");
    g_auto(PbaBlock) block = block_with(RECORDING, name, WHOLE);
    g_autofree char *gone =
        pba_companion_problem(&block, "nowhere", PBA_TIED_PREFIX "mystore", &wanted);
    is_text(gone, "the bitmap does not exist any more", "no such node");
}

static void test_several(void)
{
    PbaCompanion companions[] = {companion_of(ID_1), companion_of(ID_2)};
    g_autofree char *first = pba_companion_name(&companions[0]);
    g_autofree char *second = pba_companion_name(&companions[1]);
    g_autofree char *state = g_strdup_printf(WHOLE "}, {\"name\": \"%s\", " WHOLE, second);
    g_auto(PbaBlock) block = block_with(RECORDING, first, state);
    g_autoptr(JsonArray) actions = json_array_new();

    is_text(pba_companion_find(&block, "disk0", "mystore"), NULL, "of two neither is true");
    is_text(pba_companion_find(&block, "disk0", "other"), NULL, "another target has none");
    pba_companion_remove(actions, &block, "disk0", "mystore");
    is_number(json_array_get_length(actions), 2, "both are removed");
    pba_companion_remove(actions, &block, "nowhere", "mystore");
    is_number(json_array_get_length(actions), 2, "none where there is none");
}

static void test_actions(void)
{
    g_autoptr(JsonArray) actions = json_array_new();

    pba_companion_add(actions, "disk0", "new", "old", 65536, true);
    JsonNode *node = json_node_alloc();
    json_node_init_array(node, actions);
    g_autofree char *text = json_to_string(node, FALSE);
    json_node_unref(node);
    is_text(
        text,
        "[{\"type\":\"block-dirty-bitmap-add\",\"data\":{\"node\":\"disk0\",\"name\":\"new\","
        "\"granularity\":65536,\"disabled\":true,\"persistent\":true}},"
        "{\"type\":\"block-dirty-bitmap-merge\",\"data\":{\"node\":\"disk0\",\"target\":\"new\","
        "\"bitmaps\":[\"old\"]}}]",
        "a new one with the bits of the old one");
}

int main(void)
{
    test_ids();
    test_names();
    test_problems();
    test_several();
    test_actions();
    return done_testing();
}

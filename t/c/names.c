/* Our names of nodes, exports and bitmaps must conform to QEMU's rules. */
#include "src/access/access.h"
#include "tap.h"
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* Everything that pba_own_name is called with. */
static const char *const roles[] = {"run",    "exp",  "raw",  "cbw", "snap",
                                    "fleece", "null", "fail", "job", "dev"};

/* QEMU: node names have at most 31 bytes (BlockDriverState.node_name); ids begin with a letter and
 * have letters, digits and "-._" (id_wellformed). */
static bool is_good_id(const char *name)
{
    bool good = strlen(name) <= 31 && g_ascii_isalpha(name[0]);
    for (const char *c = name; *c; c++) {
        good = good && (g_ascii_isalnum(*c) || strchr("-._", *c));
    }
    return good;
}

static void test_rules(void)
{
    g_autofree char *long_id = g_strnfill(1000, 'x');
    char *const targets[] = {(char *)"t", (char *)"snapshot-access:mystore", (char *)"\xc3\xbc %n/",
                             long_id};
    const char *const devices[] = {"drive-scsi0", "#block119", "/machine/peripheral/x\n",
                                   "\xc3\xbc", long_id};
    for (size_t t = 0; t < G_N_ELEMENTS(targets); t++) {
        for (size_t d = 0; d < G_N_ELEMENTS(devices); d++) {
            for (size_t r = 0; r < G_N_ELEMENTS(roles); r++) {
                g_autofree char *name = pba_own_name(targets[t], roles[r], devices[d]);
                ok(is_good_id(name) && pba_is_own_node(name), "%s, %zu, %zu: %s", roles[r], t, d,
                   name);
            }
        }
    }
}

static void test_told_apart(void)
{
    g_autoptr(GHashTable) seen = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, NULL);
    static const char *const targets[] = {"a", "b", "a:b", ""};
    static const char *const devices[] = {"a", "b", "drive-scsi0", "drive-scsi1"};
    unsigned count = 0;

    for (size_t t = 0; t < G_N_ELEMENTS(targets); t++) {
        for (size_t d = 0; d < G_N_ELEMENTS(devices); d++) {
            for (size_t r = 0; r < G_N_ELEMENTS(roles); r++) {
                g_hash_table_add(seen, pba_own_name(targets[t], roles[r], devices[d]));
                count++;
            }
        }
    }
    is_number(g_hash_table_size(seen), count, "no two have one name");
    g_autofree char *once = pba_own_name("a", "raw", "a");
    g_autofree char *again = pba_own_name("a", "raw", "a");
    is_text(again, once, "a later process finds the same name");
}

static void test_bitmaps(void)
{
    g_autofree char *target = pba_target_bitmap("my:store");
    g_autofree char *nonce = pba_nonce_new(NULL);
    g_autofree char *background = pba_background_bitmap("my:store", nonce, false);
    g_autofree char *tied = pba_background_bitmap("my:store", nonce, true);
    g_autofree char *old = pba_background_bitmap("my:store", NULL, false);

    ok(g_str_has_suffix(target, "my:store"), "the target's bitmap: %s", target);
    ok(g_str_has_suffix(background, "my:store"), "the background bitmap: %s", background);
    ok(strcmp(target, background) != 0 && strcmp(old, background) != 0, "they are told apart");
    is_text(pba_background_target(background), "my:store", "%s is of its target", background);
    is_text(pba_background_target(old), "my:store", "that of version 0.1.0, too: %s", old);
    is_text(pba_background_target(tied), "my:store", "that beside a companion, too: %s", tied);
    ok(pba_is_tied_background(tied) && !pba_is_tied_background(background) &&
           !pba_is_tied_background(old),
       "it is told apart");
    g_autofree char *with_id = pba_tied_bitmap("my:store");
    is_text(pba_bitmap_target(with_id), "my:store", "the bitmap with a companion: %s", with_id);
    ok(!pba_background_target(with_id) && strcmp(with_id, target) != 0, "is another one");
    ok(!pba_background_target(target) && !pba_background_target("pba-background-12:my:store"),
       "others are none");
    /* A target-id that looks like the prefix of another kind must not result in a name of that
     * kind. */
    g_autofree char *odd = pba_target_bitmap("background:my:store");
    g_autofree char *odder = pba_target_bitmap("-background:my:store");
    ok(strcmp(odd, old) != 0 && strcmp(odder, old) != 0 && !pba_background_target(odd),
       "no target-id makes one look like the other");
    ok(!pba_is_own_node("drive-scsi0") && !pba_is_own_node("pb") && !pba_is_own_node(""),
       "others' nodes are not ours");
}

static void test_owner(void)
{
    static const char *const damaged[] = {
        "pba-owner-",      "pba-owner-1",      "pba-owner-1-2x",
        "pba-owner--1-2",  "pba-owner-a-b",    "pba-owner-1-2-",
        "pba-owner-1-2-0", "pba-owner-1-2-3x", "pba-owner-4294967297-2",
    };
    PbaAccess first = {.target_id = (char *)"a"};
    PbaAccess second = {.target_id = (char *)"b", .mark_number = 1};
    uint64_t size = 0;
    uint64_t other_size = 0;
    g_autofree char *name = pba_owner_mark_name(&first, NULL);
    g_autofree char *other = pba_owner_mark_name(&second, NULL);

    ok(is_good_id(name) && pba_is_own_node(name) && pba_is_owner_mark(name), "marker %s", name);
    ok(is_good_id(other) && pba_is_owner_mark(other), "marker %s", other);
    ok(strcmp(name, other) != 0, "two accesses of a process are told apart");
    ok(pba_owner_mark_size(&first, &size, NULL) && size > 0 && size <= (uint64_t)1 << 62 &&
           size % 512 == 0,
       "its number is one that QEMU takes for a size");
    ok(pba_owner_mark_size(&second, &other_size, NULL) && other_size != size,
       "another target has another one");
    g_autofree char *key = pba_owner_target_key(size);
    g_autofree char *hash = pba_short_hash("a");
    ok(g_str_has_prefix(hash, key), "%s is of target %s", key, hash);
    for (size_t i = 0; i < G_N_ELEMENTS(damaged); i++) {
        PbaOwner owner;
        ok(pba_owner_read(&first, damaged[i], size, &owner) && owner.pid == 0 &&
               owner.state == PBA_OWNER_UNKNOWN,
           "%s is a marker that tells no process", damaged[i]);
    }
    ok(!pba_is_owner_mark("pba-raw-1-2"), "another node is no marker");
}

/* With GLib's random numbers, which continue the parent's, all children of a process would have the
 * same nonce. */
static void test_nonce_of_child(void)
{
    char of_child[PBA_NONCE_LENGTH + 1] = "";
    int ends[2];
    g_autofree char *before = pba_nonce_new(NULL);

    g_assert(pipe(ends) == 0);
    pid_t pid = fork();
    if (pid == 0) {
        char *nonce = pba_nonce_new(NULL);
        _exit(write(ends[1], nonce, PBA_NONCE_LENGTH) == PBA_NONCE_LENGTH ? 0 : 1);
    }
    g_assert(pid > 0 && waitpid(pid, NULL, 0) == pid);
    g_assert(read(ends[0], of_child, PBA_NONCE_LENGTH) == PBA_NONCE_LENGTH);
    close(ends[0]);
    close(ends[1]);
    g_autofree char *after = pba_nonce_new(NULL);
    ok(strlen(after) == PBA_NONCE_LENGTH && strcmp(before, after) != 0, "a nonce comes once");
    ok(strcmp(of_child, after) != 0, "also in a forked child");
}

int main(void)
{
    test_rules();
    test_owner();
    test_told_apart();
    test_bitmaps();
    test_nonce_of_child();
    return done_testing();
}

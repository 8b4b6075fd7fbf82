/* Finds and undoes what a dead process left behind. The bitmaps and the names of nodes and exports
 * show what its access has made; the rest is an ordinary teardown as after a failure. */
#include "backend.h"
#include "leftovers.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include "vfile.h"
#include <string.h>

static bool look(PbaAccess *access, PbaBlock *block, PbaLeftovers *leftovers, GError **error)
{
    return pba_leftovers_look(access, block, leftovers, error);
}

/* The disk's key in a name of this target: "" in a name of another target, NULL if the name is not
 * of an access. */
static const char *find_key(const PbaAccess *access, const char *name)
{
    g_autofree char *own = pba_short_hash(access->target_id);
    const char *target;
    const char *key;

    if (!name || !pba_leftovers_parse_name(name, &target, &key)) {
        return NULL;
    }
    return strncmp(target, own, PBA_HASH_LENGTH) == 0 ? key : "";
}

static PbaDisk *find_disk(const PbaAccess *dead, const char *key)
{
    for (guint i = 0; i < dead->disks->len; i++) {
        PbaDisk *disk = dead->disks->pdata[i];
        if (strcmp(disk->key, key) == 0) {
            return disk;
        }
    }
    return NULL;
}

/* The disk with that key, found or added; NULL on error. */
static PbaDisk *ensure_disk(PbaAccess *dead, const PbaLeftovers *leftovers, const char *key,
                            GError **error)
{
    PbaDisk *disk = find_disk(dead, key);

    if (disk) {
        return disk;
    }
    disk = g_new0(PbaDisk, 1);
    disk->key = g_strdup(key);
    disk->device = pba_leftovers_device(leftovers, key);
    disk->device_gone = !disk->device;
    disk->device = disk->device ? disk->device : g_strdup_printf("(%s)", key);
    g_ptr_array_add(dead->disks, disk);
    return dead->backend->resolve_stale(dead, disk, leftovers->block, error) ? disk : NULL;
}

static bool has_disk_at(const PbaAccess *dead, const char *bitmap_node)
{
    for (guint i = 0; i < dead->disks->len; i++) {
        const PbaDisk *disk = dead->disks->pdata[i];
        if (g_strcmp0(disk->bitmap_node, bitmap_node) == 0) {
            return true;
        }
    }
    return false;
}

/* Disks whose nodes are already undone, but whose bitmaps are not. */
static bool find_disks_by_bitmaps(PbaAccess *dead, const PbaLeftovers *leftovers, GError **error)
{
    JsonArray *nodes = leftovers->block->nodes;

    for (guint i = 0; i < json_array_get_length(nodes); i++) {
        const char *node = pba_block_node_name(nodes, i);
        if (!node || !dead->backend->bitmap_repair(leftovers->block, node, dead->target_id) ||
            has_disk_at(dead, node)) {
            continue;
        }
        g_autofree char *key = pba_short_hash(node);
        PbaDisk *disk = ensure_disk(dead, leftovers, key, error);
        if (!disk) {
            return false;
        }
        g_free(disk->bitmap_node);
        disk->bitmap_node = g_strdup(node);
    }
    return true;
}

static bool find_disks(PbaAccess *dead, const PbaLeftovers *leftovers, GError **error)
{
    for (guint i = 0; i < pba_leftovers_name_count(leftovers); i++) {
        const char *key = find_key(dead, pba_leftovers_name(leftovers, i));
        if (key && *key && !ensure_disk(dead, leftovers, key, error)) {
            return false;
        }
    }
    return find_disks_by_bitmaps(dead, leftovers, error);
}

/* The key of another target that has something in QEMU; NULL: there is none. */
static const char *find_other(const PbaAccess *access, const PbaLeftovers *leftovers)
{
    for (guint i = 0; i < pba_leftovers_name_count(leftovers); i++) {
        const char *name = pba_leftovers_name(leftovers, i);
        const char *key = find_key(access, name);
        const char *target;
        const char *disk;
        if (key && !*key && pba_leftovers_parse_name(name, &target, &disk)) {
            return target;
        }
    }
    return NULL;
}

static bool check_others(const PbaAccess *access, const PbaLeftovers *leftovers, GError **error)
{
    const char *other = find_other(access, leftovers);
    g_autofree char *target = other ? pba_leftovers_target(leftovers, other) : NULL;

    if (other) {
        pba_error_set(error, PBA_ERROR_STATE,
                      "previous backup of this guest not finished: a dead process left its access "
                      "for %s%s%s - call recover for that target-id",
                      target ? "target '" : "another target", target ? target : "",
                      target ? "'" : "");
    }
    return !other;
}

/* Refuses while a live process backs up this guest, and names the target as far as it is known. */
static bool check_owner(const PbaAccess *access, const PbaLeftovers *leftovers, GError **error)
{
    const char *other = find_other(access, leftovers);
    g_autofree char *target = other ? pba_leftovers_target(leftovers, other) : NULL;

    if (pba_owner_check(access, leftovers->block->nodes, error)) {
        return true;
    }
    if (target) {
        g_autofree char *hint = g_strdup_printf("its target is '%s'", target);
        pba_error_add_hint(error, hint);
    }
    return false;
}

/* Whether recover undoes it for this target. */
static bool is_ours(const PbaAccess *access, const PbaLeftover *thing)
{
    g_autofree char *own = pba_short_hash(access->target_id);
    return !thing->key || strcmp(thing->key, own) == 0;
}

/* Logs which processes are assumed to be dead because the caller gave force. */
static void log_assumed(const PbaAccess *access, const PbaLeftovers *leftovers)
{
    JsonArray *nodes = leftovers->block->nodes;
    PbaOwner owner;

    for (guint i = 0; access->options.force && i < json_array_get_length(nodes); i++) {
        if (pba_owner_at(access, nodes, i, &owner) && owner.state == PBA_OWNER_UNKNOWN) {
            g_autofree char *process = pba_owner_describe(owner.pid);
            pba_log(&access->hooks, PBA_LOG_WARN, "force: assuming that %s has ended", process);
        }
    }
}

typedef enum { STALE_NOTHING, STALE_HARMLESS, STALE_ACCESS } StaleState;

static StaleState find_state(const PbaAccess *access, const PbaLeftovers *leftovers)
{
    g_autoptr(GPtrArray) things = pba_leftovers_list(leftovers);
    StaleState state = STALE_NOTHING;

    for (guint i = 0; i < things->len; i++) {
        const PbaLeftover *thing = things->pdata[i];
        if (is_ours(access, thing)) {
            state = MAX(state, thing->harmless ? STALE_HARMLESS : STALE_ACCESS);
        }
    }
    return state;
}

/* Creates an access that represents that of the dead process. */
static PbaAccess *new_dead_access(const PbaAccess *access, GError **error)
{
    PbaAccess *dead = pba_access_new(access->qmp, &access->options, &access->hooks, error);

    if (dead) {
        pba_access_know(dead, access);
        dead->is_recovery = true;
        dead->tied = PBA_TIED_UNKNOWN;
    }
    return dead;
}

/* Whether QEMU's NBD server listens in that directory; then it is ours. */
static bool adopt_server(PbaAccess *dead, const char *path)
{
    if (dead->socket) {
        return false;
    }
    dead->socket = pba_run_dir_stale_server(path);
    if (!dead->socket) {
        return false;
    }
    dead->socket_dir = g_strdup(path);
    pba_vfiles_remove_stale(path);
    return true;
}

/* Removes the directory of the server after the server has ended, and everything else now: QEMU has
 * opened the fleecing images that it needs. */
static void sort_paths(PbaAccess *dead, const PbaLeftovers *leftovers)
{
    g_autofree char *own = pba_short_hash(dead->target_id);

    for (guint i = 0; i < leftovers->paths->len; i++) {
        const char *path = leftovers->paths->pdata[i];
        bool is_own = g_str_has_prefix(pba_run_dir_key(path), own);
        if (is_own && !pba_run_dir_is_live(dead, path) && !adopt_server(dead, path)) {
            pba_run_dir_remove_stale(path);
        }
    }
}

/* Whether recovery undoes it: not the marker of this process, nor a path that could not be
 * removed. */
static bool is_done(const PbaAccess *dead, const PbaLeftover *thing, const char *own_mark)
{
    return is_ours(dead, thing) && g_strcmp0(thing->name, own_mark) != 0 &&
           !(thing->harmless && g_file_test(thing->name, G_FILE_TEST_EXISTS));
}

/* Appends lines that say what the teardown will undo, and which paths have been removed. */
static void describe(const PbaAccess *dead, const PbaLeftovers *leftovers, GPtrArray *lines)
{
    g_autofree char *own_mark = pba_owner_mark_name(dead, NULL);
    g_autoptr(GPtrArray) things = pba_leftovers_list(leftovers);

    for (guint i = 0; i < things->len; i++) {
        const PbaLeftover *thing = things->pdata[i];
        g_autofree char *device =
            thing->device ? g_strdup_printf("device %s: ", thing->device) : g_strdup("");
        if (is_done(dead, thing, own_mark)) {
            g_ptr_array_add(lines, pba_line("%s%s %s", device, thing->what, thing->undone));
        }
    }
}

/* Looks only after its own marker is in QEMU: from then on, no other process recovers at the same
 * time. */
static bool undo_marked(PbaAccess *dead, GPtrArray *lines, GError **error)
{
    g_auto(PbaBlock) block = {0};
    g_auto(PbaLeftovers) leftovers = {0};
    g_autoptr(GPtrArray) done = g_ptr_array_new_with_free_func(g_free);

    if (!look(dead, &block, &leftovers, error) || !check_others(dead, &leftovers, error) ||
        !find_disks(dead, &leftovers, error)) {
        pba_owner_unmark(dead, false);
        return false;
    }
    /* Before the description: a path that cannot be removed must not be reported as removed. */
    sort_paths(dead, &leftovers);
    /* Before the teardown, because afterwards they do not exist any more. */
    describe(dead, &leftovers, done);
    if (find_state(dead, &leftovers) == STALE_ACCESS) {
        pba_access_begin_changes(dead);
    }
    if (!pba_tear_down_and_end(dead, false, error)) {
        /* A later call by any process handles the rest. */
        if (dead->phase == PBA_PHASE_STUCK) {
            pba_owner_unmark(dead, false);
        }
        pba_qmp_release(dead->qmp);
        return false;
    }
    g_ptr_array_extend_and_steal(lines, g_steal_pointer(&done));
    return true;
}

static bool refuse(const PbaAccess *access, GError **error)
{
    pba_error_set(error, PBA_ERROR_STATE,
                  "previous backup for target '%s' not finished: a dead process left its access - "
                  "call recover",
                  access->target_id);
    return false;
}

bool pba_recover_look(PbaAccess *access, PbaBlock *block, bool *is_stale, GError **error)
{
    g_auto(PbaLeftovers) leftovers = {0};

    *is_stale = false;
    if (!look(access, block, &leftovers, error) || !check_owner(access, &leftovers, error) ||
        !check_others(access, &leftovers, error)) {
        return false;
    }
    log_assumed(access, &leftovers);
    StaleState state = find_state(access, &leftovers);
    if (state == STALE_ACCESS && access->options.no_recover) {
        return refuse(access, error);
    }
    *is_stale = state != STALE_NOTHING && !access->options.no_recover;
    return true;
}

bool pba_recover_undo(PbaAccess *access, PbaBlock *block, GPtrArray *lines, GError **error)
{
    g_auto(PbaLeftovers) leftovers = {0};

    pba_log(&access->hooks, PBA_LOG_WARN,
            "undoing the access that a dead process left for target '%s', as after a failed backup",
            access->target_id);
    g_autoptr(PbaAccess) dead = new_dead_access(access, error);
    if (!dead) {
        return false;
    }
    return pba_owner_mark(dead, NULL, error) && undo_marked(dead, lines, error) &&
           /* Setup continues with a state without leftovers. */
           look(access, block, &leftovers, error);
}

/* While our marker is in QEMU, no process begins an access whose bitmaps could be hit. */
static bool drop_strays(PbaAccess *access, const PbaBlock *block, GPtrArray *lines, GError **error)
{
    if (!access->backend->has_strays(access, block)) {
        return true;
    }
    if (!pba_owner_mark(access, NULL, error)) {
        return false;
    }
    bool done = access->backend->drop_strays(access, lines, error);
    return pba_tear_down_and_end(access, false, done ? error : NULL) && done;
}

bool pba_access_recover(PbaAccess *access, GPtrArray *lines, GError **error)
{
    g_auto(PbaBlock) block = {0};
    bool is_stale;

    if (!pba_access_require_down(access, error)) {
        return false;
    }
    bool done = pba_access_begin(access, error) &&
                pba_recover_look(access, &block, &is_stale, error) &&
                (!is_stale || pba_recover_undo(access, &block, lines, error)) &&
                /* Afterwards: while an access is active, its bitmaps are not strays. */
                drop_strays(access, &block, lines, error);
    pba_qmp_release(access->qmp);
    if (!done) {
        pba_access_log_lines(access, lines); /* the caller gets the error in their place */
    }
    return done;
}

/* Sets an access up: checks the request, carries it out, and undoes it if a step fails. */
#include "backend.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include <string.h>

static bool note_requests(PbaAccess *access, const PbaDeviceRequest *requests, size_t count,
                          GError **error)
{
    g_ptr_array_set_size(access->disks, 0);
    if (count == 0) {
        pba_error_set(error, PBA_ERROR_ARGUMENT, "setup needs at least one device");
        return false;
    }
    for (size_t i = 0; i < count; i++) {
        if (!pba_check_utf8("device", requests[i].device ? requests[i].device : "", error)) {
            return false;
        }
        for (size_t j = 0; j < i; j++) {
            if (g_strcmp0(requests[i].device, requests[j].device) == 0) {
                pba_error_set(error, PBA_ERROR_ARGUMENT, "is listed twice");
                pba_error_add_device(error, requests[i].device);
                return false;
            }
        }
        PbaDisk *disk = g_new0(PbaDisk, 1);
        disk->device = g_strdup(requests[i].device);
        disk->key = pba_short_hash(disk->device);
        disk->mode = requests[i].mode;
        disk->base = g_strdup(requests[i].base);
        disk->base_disk = g_strdup(requests[i].identity);
        disk->audit = requests[i].tied && requests[i].audit;
        if (requests[i].tied) {
            access->tied = PBA_TIED_YES;
        }
        g_ptr_array_add(access->disks, disk);
        if (disk->base && !pba_companion_check_id(disk->base, error)) {
            pba_error_add_device(error, disk->device);
            return false;
        }
    }
    return true;
}

/* Fills in QEMU's state of the disk; refuses what cannot be backed up. */
static bool resolve_disk(PbaDisk *disk, const PbaBackend *backend, const PbaBlock *block,
                         GError **error)
{
    JsonObject *device = pba_block_find_device(block, disk->device);
    g_autofree char *rivals = pba_block_rivals(block, disk->device);

    if (rivals) {
        pba_error_set(error, PBA_ERROR_ARGUMENT,
                      "is the name of several disks - give another name of the one to back up: %s",
                      rivals);
        return false;
    }
    disk->identity = backend->identify(disk->device, device);
    if (!device) {
        return backend->resolve_node(disk, block, error);
    }
    if (!pba_json_find_object(device, "inserted")) {
        pba_error_set(error, PBA_ERROR_ARGUMENT,
                      "has no medium - leave empty removable drives out of the backup");
        return false;
    }
    disk->qdev = g_strdup(pba_json_find_string(device, "qdev"));
    disk->root_node = g_strdup(pba_block_device_node(device));
    disk->read_only = pba_json_find_bool(pba_json_find_object(device, "inserted"), "ro");
    if (!disk->root_node) {
        pba_error_set(error, PBA_ERROR_PROTOCOL, "query-block shows no block node for this device");
        return false;
    }
    return pba_block_device_size(device, &disk->size, error);
}

static bool resolve_disks(PbaAccess *access, const PbaBlock *block, GError **error)
{
    for (guint i = 0; i < access->disks->len; i++) {
        PbaDisk *disk = access->disks->pdata[i];
        if (!resolve_disk(disk, access->backend, block, error)) {
            pba_error_add_device(error, disk->device);
            return false;
        }
        for (guint j = 0; j < i; j++) {
            const PbaDisk *other = access->disks->pdata[j];
            if (strcmp(disk->root_node, other->root_node) == 0 ||
                strcmp(disk->identity, other->identity) == 0) {
                pba_error_set(error, PBA_ERROR_ARGUMENT, "is listed twice - also as '%s'",
                              other->device);
                pba_error_add_device(error, disk->device);
                return false;
            }
        }
    }
    return pba_company_check_disks(access, block, error);
}

void pba_access_undo_setup(PbaAccess *access)
{
    g_autoptr(GError) error = NULL;

    if (access->phase == PBA_PHASE_NEW) {
        pba_access_end(access);
    } else if (!pba_tear_down_and_end(access, false, &error)) {
        pba_log(&access->hooks, PBA_LOG_WARN, "undoing setup: %s", error->message);
    }
}

static bool undo_leftovers(PbaAccess *access, PbaBlock *block, GError **error)
{
    g_autoptr(GPtrArray) lines = g_ptr_array_new_with_free_func(g_free);
    bool is_stale;

    if (!pba_recover_look(access, block, &is_stale, error)) {
        return false;
    }
    if (!is_stale) {
        return true;
    }
    bool done =
        pba_company_check_here(access, error) && pba_recover_undo(access, block, lines, error);
    pba_access_log_lines(access, lines);
    return done;
}

/* While our marker is in QEMU, no process begins an access whose bitmaps could be hit. */
static bool drop_strays(PbaAccess *access, PbaBlock *block, GError **error)
{
    g_autoptr(GPtrArray) lines = g_ptr_array_new_with_free_func(g_free);

    if (!access->backend->has_strays(access, block)) {
        return true;
    }
    bool done = access->backend->drop_strays(access, lines, error);
    pba_access_log_lines(access, lines);
    /* Setup must not compare with the removed ones later. */
    return done && pba_block_query(access->qmp, true, block, error);
}

/* Queries before setup */

static bool look_for_bases(PbaAccess *access, PbaBlock *block, GError **error)
{
    return pba_access_begin(access, error) &&
           /* Before the companions are checked, because their names contain the guest. */
           pba_tie_ask_guest(access, error) &&
           /* Before the bitmaps are checked, because recovery may join or remove them. */
           undo_leftovers(access, block, error) && resolve_disks(access, block, error);
}

static const char other_name[] = "the disk was backed up under another name";

/* The ID of the backup that the disk's bitmap is relative to, unless the bitmap must not be
 * used. */
static PbaBase find_base(PbaAccess *access, PbaDisk *disk, const PbaBlock *block)
{
    g_autofree char *bitmap = pba_access_bitmap(access);

    disk->bitmap_node = g_strdup(pba_block_skip_filters(block, disk->root_node));
    const char *companion = pba_companion_find(block, disk->bitmap_node, access->target_id);
    disk->base = companion ? g_strdup(pba_companion_id(companion)) : NULL;
    disk->base_disk = g_strdup(disk->identity);
    bool fits = pba_block_find_bitmap(block, disk->bitmap_node, bitmap) &&
                pba_tie_fits(access, disk, block);
    bool is_alias = fits && !pba_companion_is_named(companion, disk->device);
    return (PbaBase){.size = disk->size,
                     .identity = g_strdup(disk->identity),
                     .node = *disk->root_node == '#' ? NULL : g_strdup(disk->root_node),
                     .id = fits ? g_strdup(disk->base) : NULL,
                     .is_alias = is_alias,
                     .reason = g_strdup(is_alias ? other_name : disk->reason)};
}

/* Nothing remains to be undone, and setup may follow. What was seen is kept for it, if not NULL. */
static void end_look(PbaAccess *access, PbaBlock *block)
{
    g_ptr_array_set_size(access->disks, 0);
    access->tied = PBA_TIED_NO;
    g_clear_pointer(&access->guest, g_free);
    pba_qmp_release(access->qmp);
    pba_block_clear(&access->seen);
    if (block) {
        access->seen = *block;
        *block = (PbaBlock){0};
    }
}

/* Sizes can be queried even while another process backs up the guest. has_leftovers: setup must
 * look again. */
static bool look_for_sizes(PbaAccess *access, PbaBlock *block, bool *has_leftovers, GError **error)
{
    GError *local = NULL;

    if (!pba_access_begin(access, error)) {
        return false;
    }
    if (!pba_recover_look(access, block, has_leftovers, &local)) {
        *has_leftovers = true;
        if (!block->graph || pba_error_is_fatal(local)) {
            g_propagate_error(error, local);
            return false;
        }
        g_error_free(local);
    }
    return resolve_disks(access, block, error);
}

bool pba_access_sizes(PbaAccess *access, const PbaDeviceRequest *requests, size_t count,
                      uint64_t *sizes, GError **error)
{
    g_auto(PbaBlock) block = {0};
    bool has_leftovers;

    if (!pba_access_require_down(access, error)) {
        return false;
    }
    bool done = note_requests(access, requests, count, error) &&
                look_for_sizes(access, &block, &has_leftovers, error);
    for (size_t i = 0; done && i < count; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        sizes[i] = disk->size;
    }
    end_look(access, done && !has_leftovers ? &block : NULL);
    return done;
}

bool pba_access_bases(PbaAccess *access, const PbaDeviceRequest *requests, size_t count,
                      PbaBase *bases, GError **error)
{
    g_auto(PbaBlock) block = {0};

    if (!pba_access_require_down(access, error)) {
        return false;
    }
    access->tied = PBA_TIED_YES;
    bool done =
        note_requests(access, requests, count, error) && look_for_bases(access, &block, error);
    for (size_t i = 0; done && i < count; i++) {
        bases[i] = find_base(access, access->disks->pdata[i], &block);
    }
    end_look(access, done ? &block : NULL);
    return done;
}

/* Setup */

/* Whether these are the nodes that were seen, except for our marker. If they are, the graph is the
 * same, too. */
static bool are_nodes_as_seen(PbaAccess *access, JsonArray *nodes)
{
    g_auto(PbaBlock) now = {.nodes = json_array_ref(nodes)};
    JsonArray *seen = access->seen.nodes;

    for (guint i = 0; i < json_array_get_length(seen); i++) {
        JsonObject *node = pba_block_find_node(&now, pba_block_node_name(seen, i));
        if (!node || pba_owner_node_size(node) != pba_owner_node_size(pba_json_element(seen, i))) {
            return false;
        }
    }
    return json_array_get_length(nodes) == json_array_get_length(seen) + 1;
}

/* Uses the state that was seen last, if it has not changed: a query of all state takes four
 * commands, and a caller may open a connection for each. */
static bool claim_as_seen(PbaAccess *access)
{
    g_autoptr(JsonArray) nodes = NULL;

    if (!access->seen.nodes || !resolve_disks(access, &access->seen, NULL) ||
        !access->backend->check(access, &access->seen, NULL) ||
        !pba_owner_mark(access, &nodes, NULL)) {
        return false;
    }
    /* After the marker: from then on, no other process of ours changes the state. */
    if (!are_nodes_as_seen(access, nodes)) {
        pba_owner_unmark(access, false);
        pba_access_enter(access, PBA_PHASE_NEW);
        return false;
    }
    json_array_unref(access->seen.nodes);
    access->seen.nodes = g_steal_pointer(&nodes);
    return true;
}

static bool claim(PbaAccess *access, const PbaDeviceRequest *requests, size_t count, GError **error)
{
    if (claim_as_seen(access)) {
        return true;
    }
    PbaBlock *block = &access->seen;
    return note_requests(access, requests, count, error) &&
           /* Before the disks are looked at, because it changes the graph and the bitmaps. */
           undo_leftovers(access, block, error) && resolve_disks(access, block, error) &&
           access->backend->check(access, block, error) &&
           /* Before the first change: from now on, another process sees that this one is active. */
           pba_owner_mark(access, &block->nodes, error);
}

static bool prepare(PbaAccess *access, const PbaDeviceRequest *requests, size_t count,
                    GError **error)
{
    PbaBlock *block = &access->seen;

    if (!note_requests(access, requests, count, error) || !pba_access_begin(access, error)) {
        return false;
    }
    access->nonce = pba_nonce_new(error);
    return access->nonce &&
           /* Before the first change: changes to a guest that is about to migrate are lost. */
           pba_company_check_here(access, error) &&
           /* Before the companions are checked, because their names contain the guest: at each
            * setup, because another guest may have been started at this socket. */
           pba_tie_ask_guest(access, error) && claim(access, requests, count, error) &&
           /* After the marker, whose name the directory stores; before the NBD server, which
            * listens there. */
           pba_run_dir_make(access, error) &&
           /* Before the command, which Proxmox' QEMU (to 11.0) refuses if there is a stray
            * background bitmap. */
           drop_strays(access, block, error) &&
           /* Before the bitmaps that it copies are started anew. */
           pba_audit_begin(access, block, error) && access->backend->prepare(access, block, error);
}

bool pba_access_prepare(PbaAccess *access, const PbaDeviceRequest *requests, size_t count,
                        GError **error)
{
    if (!pba_access_require_down(access, error)) {
        return false;
    }
    GError *local = NULL;
    bool done = prepare(access, requests, count, &local);
    if (done) {
        pba_access_enter(access, PBA_PHASE_PREPARED);
    } else {
        pba_user_add_hint(access, &local);
        g_propagate_error(error, local);
        pba_access_undo_setup(access);
        pba_qmp_release(access->qmp);
    }
    return done;
}

static bool require_phase(const PbaAccess *access, PbaPhase phase, GError **error)
{
    if (access->phase != phase) {
        pba_error_set(error, PBA_ERROR_STATE, "the access was torn down while it was set up");
    }
    return access->phase == phase;
}

bool pba_access_cut(PbaAccess *access, GError **error)
{
    bool done =
        require_phase(access, PBA_PHASE_PREPARED, error) && access->backend->cut(access, error);

    if (done) {
        pba_access_enter(access, PBA_PHASE_CUT);
    }
    return done;
}

bool pba_access_finish(PbaAccess *access, GError **error)
{
    bool done = require_phase(access, PBA_PHASE_CUT, error) &&
                access->backend->finish(access, error) &&
                /* After the instant, because they record until then; before the exports. */
                pba_audit_freeze(access, error);

    if (done) {
        pba_access_enter(access, PBA_PHASE_UP);
        pba_block_clear(&access->seen);
    }
    pba_qmp_release(access->qmp);
    return done;
}

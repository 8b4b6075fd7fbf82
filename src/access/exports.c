/* The NBD server in QEMU and our exports on it. */
#include "backend.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include "src/volume/volume.h"
#include <inttypes.h>
#include <string.h>
#include <unistd.h>

/* How long a client may take for the handshake, and how often that is checked. */
#define CLIENT_LIMIT_S 5
#define CLIENT_LOOK_MS 50

/* block-export-del waits for requests in flight; Proxmox allows it ten minutes. */
#define EXPORT_GONE_S 600

/* The access' own exports, or in recovery any export of the disk. */
static bool has_export_id(const PbaAccess *access, const PbaDisk *disk, const char *id)
{
    bool is_recovery = access->is_recovery;
    const char *nonce = is_recovery ? "" : access->nonce;
    g_autofree char *own = pba_export_id(access->target_id, nonce, disk->key);

    return is_recovery ? g_str_has_prefix(id, PBA_EXPORT_PREFIX) &&
                             g_str_has_suffix(id, own + strlen(PBA_EXPORT_PREFIX))
                       : strcmp(id, own) == 0;
}

/* The server is ours, but another program has deleted the marker of its live process: recovery
 * undoes everything else, but leaves the server of a live process alone, because it may serve
 * another guest with the same name and UUID. */
static void add_server_hint(const PbaAccess *access, GError **error)
{
    pid_t pid = pba_run_dir_live_server(access);
    g_autofree char *hint =
        pid ? g_strdup_printf("the NBD server seems to belong to process %d, whose marker was "
                              "deleted from QEMU: end that process, then try again",
                              (int)pid)
            : g_strdup("QEMU has only one NBD server: end the program that uses it, or, if no "
                       "program does, send QEMU 'nbd-server-stop', then try again");

    pba_error_add_hint(error, hint);
}

bool pba_nbd_server_start(PbaAccess *access, GError **error)
{
    /* 0: no limit. By default, QEMU since 9.1 (c8a76dbd90c2), and an older QEMU with that fix
     * backported, accepts at most 100 connections. The argument exists since 5.2. No other user can
     * connect, because the socket is in our private directory. */
    g_autofree char *path = pba_user_run_path(access, access->socket);
    JsonNode *arguments = pba_json("{'addr': <{'type': <'unix'>, 'data': <{'path': <%s>}>}>, "
                                   "'max-connections': <0>}",
                                   path);
    GError *local = NULL;

    /* Whatever the outcome: without a reply, QEMU may start the server before its next command. A
     * caller's transport reports a time-out like a refusal. */
    pba_access_begin_changes(access);
    bool done = pba_qmp_run(access->qmp, "nbd-server-start", arguments, &local);

    if (done) {
        return true;
    }
    /* Only the hint depends on QEMU's English message. */
    if (strstr(local->message, "already running")) {
        add_server_hint(access, &local);
    }
    g_propagate_error(error, local);
    return false;
}

/* The description of the export, which tells readers what to consider; NULL: nothing. */
static char *describe(const PbaAccess *access, const PbaDisk *disk)
{
    if (access->backend->reads_by_cluster(access)) {
        return g_strdup(PBA_BY_CLUSTER);
    }
    return disk->cluster > PBA_CLUSTER ? g_strdup_printf(PBA_DISCARDS_BY "%" PRIu64, disk->cluster)
                                       : NULL;
}

static bool add_export(PbaAccess *access, const PbaDisk *disk, GError **error)
{
    g_autofree char *id = pba_export_id(access->target_id, access->nonce, disk->key);
    g_autofree char *description = describe(access, disk);
    JsonNode *arguments = pba_json("{'id': <%s>, 'type': <'nbd'>, 'node-name': <%s>, 'name': <%s>, "
                                   "'writable': <true>}",
                                   id, disk->snapshot_node, disk->device);
    if (description) {
        json_object_set_string_member(json_node_get_object(arguments), "description", description);
    }
    /* Setup has frozen them: a reader must not see the map change. */
    if (disk->bitmap_name) {
        JsonArray *bitmaps = json_array_new();
        json_array_add_element(bitmaps, pba_bitmap_ref(disk->bitmap_node, disk->bitmap_name));
        if (disk->audit_bitmap) {
            json_array_add_element(bitmaps, pba_bitmap_ref(disk->bitmap_node, disk->audit_bitmap));
        }
        json_object_set_array_member(json_node_get_object(arguments), "bitmaps", bitmaps);
    }
    if (!pba_qmp_run(access->qmp, "block-export-add", arguments, error)) {
        pba_error_add_device(error, disk->device);
        return false;
    }
    return true;
}

/* If the exports cannot be queried, that does not prove that one is gone. */
static const char *export_id_of(JsonArray *exports, guint index, GError **error)
{
    JsonObject *export = pba_json_element(exports, index);
    const char *id = export ? pba_json_find_string(export, "id") : NULL;

    if (!id) {
        pba_error_set(error, PBA_ERROR_PROTOCOL, "an export in the reply has no id");
        pba_error_add_command(error, "query-block-exports");
    }
    return id;
}

/* All of QEMU's exports, each with an ID; NULL on error. */
static JsonArray *query_exports(PbaAccess *access, GError **error)
{
    g_autoptr(JsonArray) exports =
        pba_qmp_query_array(access->qmp, "query-block-exports", NULL, error);

    for (guint i = 0; exports && i < json_array_get_length(exports); i++) {
        if (!export_id_of(exports, i, error)) {
            return NULL;
        }
    }
    return g_steal_pointer(&exports);
}

bool pba_exports_find_any(PbaAccess *access, bool *found, GError **error)
{
    g_autoptr(JsonArray) exports = query_exports(access, error);

    *found = false;
    for (guint i = 0; exports && i < json_array_get_length(exports); i++) {
        *found |= g_str_has_prefix(export_id_of(exports, i, NULL), PBA_EXPORT_PREFIX);
    }
    return exports != NULL;
}

static const PbaDisk *find_disk(const PbaAccess *access, const char *id)
{
    for (guint i = 0; i < access->disks->len; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        if (has_export_id(access, disk, id)) {
            return disk;
        }
    }
    return NULL;
}

/* Another program has added it to our server. */
static bool is_others(JsonObject *export, const char *id)
{
    return g_strcmp0(pba_json_find_string(export, "type"), "nbd") == 0 &&
           !g_str_has_prefix(id, PBA_EXPORT_PREFIX);
}

/* An export's name identifies its access, but recovery removes the exports of any dead process.
 * While the monitor was released, the VM may have been restarted and another process may have set
 * up an access. If the marker is seen in QEMU after the export, this is still the QEMU of that
 * process. */
static bool may_remove(PbaAccess *access, GError **error)
{
    return !access->is_recovery || pba_owner_require_now(access, error);
}

/* One pass over the exports: deletes those that are ours and not in deleted. */
typedef struct {
    bool has_own;    /* there were such exports */
    bool has_begun;  /* some were deleted just now */
    bool has_others; /* another program has some on our server */
} Round;

static bool delete_exports(PbaAccess *access, JsonArray *exports, GHashTable *deleted, Round *round,
                           GError **error)
{
    GError *first = NULL;

    *round = (Round){0};
    for (guint i = 0; i < json_array_get_length(exports) && !pba_error_is_fatal(first); i++) {
        const char *id = export_id_of(exports, i, NULL);
        const PbaDisk *disk = find_disk(access, id);
        GError *step = NULL;
        round->has_own |= disk != NULL;
        round->has_others |= is_others(pba_json_element(exports, i), id);
        /* QEMU refuses to delete an export twice. An earlier call, or the dead process, may have
         * deleted one that waits for a client's requests. */
        if (!disk || g_hash_table_contains(deleted, id) ||
            pba_json_find_bool(pba_json_element(exports, i), "shutting-down")) {
            continue;
        }
        if (may_remove(access, &step) &&
            pba_qmp_run(access->qmp, "block-export-del",
                        pba_json("{'id': <%s>, 'mode': <'hard'>}", id), &step)) {
            g_hash_table_add(deleted, g_strdup(id));
            round->has_begun = true;
        } else {
            pba_error_add_device(&step, disk->device);
            pba_error_keep_first(&first, step, &access->hooks);
        }
    }
    if (first) {
        g_propagate_error(error, first);
    }
    return !first;
}

/* Deletes the exports that setup may have added, without a query. QEMU refuses if an export does
 * not exist; the caller queries them afterwards. */
static bool delete_own(PbaAccess *access, GHashTable *deleted, GError **error)
{
    for (guint i = 0; i < access->disks->len; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        g_autofree char *id = pba_export_id(access->target_id, access->nonce, disk->key);
        GError *local = NULL;
        if (pba_qmp_run(access->qmp, "block-export-del",
                        pba_json("{'id': <%s>, 'mode': <'hard'>}", id), &local)) {
            g_hash_table_add(deleted, g_steal_pointer(&id));
        } else if (pba_error_is_fatal(local)) {
            pba_error_add_device(&local, disk->device);
            g_propagate_error(error, local);
            return false;
        }
        g_clear_error(&local);
    }
    return true;
}

/* block-export-del may return before the export is gone. */
static bool remove_exports(PbaAccess *access, bool *has_others, GError **error)
{
    gint64 deadline = pba_deadline(EXPORT_GONE_S);
    unsigned pause_ms = 1;
    g_autoptr(GHashTable) deleted = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, NULL);

    if (access->has_exported && !delete_own(access, deleted, error)) {
        return false;
    }
    for (;;) {
        g_autoptr(JsonArray) exports = query_exports(access, error);
        Round round;
        if (!exports || !delete_exports(access, exports, deleted, &round, error)) {
            return false;
        }
        *has_others = round.has_others;
        if (!round.has_own) {
            return true;
        }
        if (!round.has_begun && !pba_qmp_pause(access->qmp, &pause_ms, deadline,
                                               "waiting for an export to go", error)) {
            return false;
        }
    }
}

/* Setup has frozen the bitmaps. QEMU counts whole bits, and the last one may reach beyond the end
 * of the disk. */
static void count_dirty(PbaAccess *access, JsonArray *nodes)
{
    g_auto(PbaBlock) block = {.nodes = json_array_ref(nodes)};

    for (guint i = 0; i < access->disks->len; i++) {
        PbaDisk *disk = access->disks->pdata[i];
        JsonObject *bitmap =
            disk->bitmap_name ? pba_block_find_bitmap(&block, disk->bitmap_node, disk->bitmap_name)
                              : NULL;
        uint64_t granularity;
        uint64_t count;
        if (bitmap && pba_json_size(bitmap, "count", &count, NULL) &&
            pba_json_size(bitmap, "granularity", &granularity, NULL) && granularity > 0) {
            disk->dirty = MIN(count, disk->size);
            disk->is_counted = count >= disk->size || disk->size % granularity == 0;
        }
    }
}

/* QEMU has only one NBD server: on another program's, our exports could be read by its clients. */
static bool check_server(const PbaAccess *access, GError **error)
{
    if (pba_nbd_server_is_up(access)) {
        return true;
    }
    pba_error_set(error, PBA_ERROR_STATE,
                  "the NBD server of this access, at '%s', was stopped by another program - tear "
                  "the access down, then set it up again",
                  access->socket);
    return false;
}

static bool add_exports(PbaAccess *access, GError **error)
{
    bool tried = access->phase == PBA_PHASE_EXPORTING;
    bool has_others;

    /* After a restart of the VM, the snapshots may be those of a later access. */
    g_autoptr(JsonArray) nodes = pba_block_query_nodes(access->qmp, error);
    if (!nodes || !pba_owner_require(access, nodes, error) ||
        /* An export takes the images back after a migration has handed them over, although the
         * guest now writes to them elsewhere (Proxmox' QEMU, 11.0; a stock one, 7.2 and 10.0, does
         * not hand over those of an access). If a migration is running, it fails because of the
         * export. */
        !pba_company_check_still_here(access, error) || !check_server(access, error)) {
        return false;
    }
    pba_fleecing_check(access, nodes);
    count_dirty(access, nodes);
    /* First, exports of an earlier attempt are removed: they have the names of the new ones, and
     * QEMU accepts a name only once. */
    if (tried && !remove_exports(access, &has_others, error)) {
        return false;
    }
    if (!tried) {
        pba_access_enter(access, PBA_PHASE_EXPORTING);
        access->has_exported = true;
    }
    if (access->backend->reads_by_cluster(access)) {
        pba_log(&access->hooks, PBA_LOG_INFO,
                "reading single clusters of 64 KiB, as this QEMU's snapshots require of every NBD "
                "client (doc/semantics.md)");
    }
    for (guint i = 0; i < access->disks->len; i++) {
        if (!add_export(access, access->disks->pdata[i], error)) {
            return false;
        }
    }
    pba_access_enter(access, PBA_PHASE_EXPORTED);
    return true;
}

bool pba_access_export(PbaAccess *access, GError **error)
{
    if (!pba_access_require_up(access, error)) {
        return false;
    }
    if (access->phase == PBA_PHASE_EXPORTED) {
        return true;
    }
    if (access->phase == PBA_PHASE_GONE) {
        pba_owner_set_gone_error(access, error);
        return false;
    }
    if (access->phase < PBA_PHASE_UP) { /* a caller's freeze or thaw */
        pba_error_set(error, PBA_ERROR_STATE, "the access is not set up yet");
        return false;
    }
    if (access->phase != PBA_PHASE_UP && access->phase != PBA_PHASE_EXPORTING) {
        pba_error_set(error, PBA_ERROR_STATE,
                      "the access is partly torn down - call teardown again");
        return false;
    }
    bool done = add_exports(access, error);
    /* Before the discards: they go over NBD and may take long, and others want the monitor. The
     * discards need the exports, so they come last. */
    pba_qmp_release(access->qmp);
    if (done) {
        access->backend->after_export(access);
    }
    return done;
}

bool pba_nbd_server_is_up(const PbaAccess *access)
{
    /* The server is ours if it listens in our directory, which no other access uses. */
    return access->socket && pba_socket_answers(access->socket);
}

/* Clients of exports are disconnected with their exports. The remaining ones are still in the
 * handshake. */
static bool wait_for_clients(PbaAccess *access, GError **error)
{
    static const char what[] = "waiting for clients of the NBD server";
    g_autofree char *path = pba_user_run_path(access, access->socket); /* as it was bound */
    gint64 until = pba_deadline(CLIENT_LIMIT_S);

    while (pba_socket_has_clients(path)) {
        if (g_get_monotonic_time() >= until) {
            pba_error_set(error, PBA_ERROR_STATE,
                          "a program has connected to the NBD server at '%s' and sends nothing "
                          "more - QEMU before 8.2 would stop the guest to wait for that program: "
                          "end it, then call teardown again",
                          access->socket);
            return false;
        }
        if (!pba_wait_ms(CLIENT_LOOK_MS, G_MAXINT64, &access->hooks, what, error)) {
            return false;
        }
    }
    return true;
}

/* Not while there is an export: QEMU (7.2 to 11.0) would wait for its end with the guest
 * stopped. */
static bool stop_server(PbaAccess *access, GError **error)
{
    return pba_qmp_run(access->qmp, "nbd-server-stop", NULL, error);
}

bool pba_nbd_server_stop(PbaAccess *access, bool is_shared, GError **error)
{
    if (is_shared) {
        unlink(access->socket); /* it belongs to the others from now on, and cannot be found there
                                   any more */
        pba_log(&access->hooks, PBA_LOG_WARN,
                "the NBD server keeps running, because another program has added exports to it");
        return true;
    }
    if (!access->backend->stop_waits(access)) {
        return stop_server(access, error);
    }
    /* Before the check for clients, so that none can connect between the check and the command. */
    pba_run_dir_hide_socket(access->socket_dir);
    bool done = wait_for_clients(access, error) && stop_server(access, error);
    if (!done) {
        pba_run_dir_show_socket(access->socket_dir);
    }
    return done;
}

bool pba_exports_remove(PbaAccess *access, bool *is_shared, GError **error)
{
    /* First: QEMU keeps an export until the requests of its clients, also of this process, are
     * done. */
    if (access->socket) {
        g_autofree char *path = pba_user_run_path(access, access->socket); /* as it was bound */
        pba_connections_cut(path, 0);
    }
    return remove_exports(access, is_shared, error);
}

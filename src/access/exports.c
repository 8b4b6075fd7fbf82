/* The NBD server in QEMU and our exports on it. */
#include "backend.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include "src/volume/volume.h"
#include <inttypes.h>
#include <string.h>

/* block-export-del waits for requests in flight; Proxmox allows it ten minutes. */
#define EXPORT_GONE_S 600

/* The access' own, or for that of a dead process any of the disk's. */
static bool has_export_id(const PbaAccess *access, const PbaDisk *disk, const char *id)
{
    bool is_recovery = pba_access_is_recovery(access);
    const char *nonce = is_recovery ? "" : access->nonce;
    g_autofree char *own = pba_export_id(access->target_id, nonce, disk->key);

    return is_recovery ? g_str_has_prefix(id, PBA_EXPORT_PREFIX) &&
                             g_str_has_suffix(id, own + strlen(PBA_EXPORT_PREFIX))
                       : strcmp(id, own) == 0;
}

bool pba_nbd_server_start(PbaAccess *access, GError **error)
{
    /* 0: no limit. Without it a QEMU since 9.1 (c8a76dbd90c2), and an older one whose distribution
     * has that fix, lets in 100. The argument is there since 5.2. Nobody else can connect: the
     * socket is in a directory of ours. */
    JsonNode *arguments = pba_json("{'addr': <{'type': <'unix'>, 'data': <{'path': <%s>}>}>, "
                                   "'max-connections': <0>}",
                                   access->socket);
    GError *local = NULL;
    bool done = pba_qmp_run(access->qmp, "nbd-server-start", arguments, &local);

    /* Without a reply it may have been started all the same. */
    if (done || pba_error_is_fatal(local) || pba_socket_answers(access->socket)) {
        pba_access_begin_changes(access);
    }
    if (done) {
        return true;
    }
    /* QEMU's English decides about a hint only. */
    if (strstr(local->message, "already running")) {
        pba_error_add_hint(&local, "QEMU has one NBD server only: end what another program does "
                                   "with it, then try again");
    }
    g_propagate_error(error, local);
    return false;
}

/* What a reader of the export has to know. */
static char *describe(const PbaAccess *access, const PbaDisk *disk)
{
    if (access->backend->reads_by_cluster(access)) {
        return g_strdup(PBA_BY_CLUSTER);
    }
    return disk->cluster > PBA_CLUSTER ? g_strdup_printf(PBA_DISCARDS_BY "%" PRIu64, disk->cluster)
                                       : g_strdup("");
}

static bool add_export(PbaAccess *access, const PbaDisk *disk, GError **error)
{
    g_autofree char *id = pba_export_id(access->target_id, access->nonce, disk->key);
    g_autofree char *description = describe(access, disk);
    JsonNode *arguments = pba_json("{'id': <%s>, 'type': <'nbd'>, 'node-name': <%s>, 'name': <%s>, "
                                   "'writable': <true>, 'description': <%s>}",
                                   id, disk->snapshot_node, disk->device, description);
    /* Setup has frozen it: a reader of the map must not see it change. */
    if (disk->bitmap_name) {
        JsonArray *bitmaps = json_array_new();
        json_array_add_element(bitmaps, pba_json("{'node': <%s>, 'name': <%s>}", disk->bitmap_node,
                                                 disk->bitmap_name));
        json_object_set_array_member(json_node_get_object(arguments), "bitmaps", bitmaps);
    }
    if (!pba_qmp_run(access->qmp, "block-export-add", arguments, error)) {
        pba_error_add_device(error, disk->device);
        return false;
    }
    return true;
}

/* What cannot be read is no proof that an export is gone. */
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

/* What there is to be found among the exports. */
typedef bool (*ExportTest)(const PbaAccess *access, const PbaDisk *disk, JsonObject *export,
                           const char *id);

/* The id of the first one that passes, the caller's to free; NULL: none does. */
static bool find_export(PbaAccess *access, ExportTest test, const PbaDisk *disk, char **found,
                        GError **error)
{
    g_autoptr(JsonArray) exports =
        pba_qmp_query_array(access->qmp, "query-block-exports", NULL, error);

    *found = NULL;
    for (guint i = 0; exports && i < json_array_get_length(exports); i++) {
        const char *id = export_id_of(exports, i, error);
        if (!id) {
            g_clear_pointer(found, g_free);
            return false;
        }
        if (!*found && test(access, disk, pba_json_element(exports, i), id)) {
            *found = g_strdup(id);
        }
    }
    return exports != NULL;
}

static bool belongs_to_disk(const PbaAccess *access, const PbaDisk *disk,
                            G_GNUC_UNUSED JsonObject *export, const char *id)
{
    return has_export_id(access, disk, id);
}

static bool belongs_to_any_access(G_GNUC_UNUSED const PbaAccess *access,
                                  G_GNUC_UNUSED const PbaDisk *disk,
                                  G_GNUC_UNUSED JsonObject *export, const char *id)
{
    return g_str_has_prefix(id, PBA_EXPORT_PREFIX);
}

/* Another program has put it on our server. */
static bool belongs_to_another_program(G_GNUC_UNUSED const PbaAccess *access,
                                       G_GNUC_UNUSED const PbaDisk *disk, JsonObject *export,
                                       const char *id)
{
    return g_strcmp0(pba_json_find_string(export, "type"), "nbd") == 0 &&
           !g_str_has_prefix(id, PBA_EXPORT_PREFIX);
}

bool pba_exports_find_any(PbaAccess *access, bool *found, GError **error)
{
    g_autofree char *id = NULL;

    bool asked = find_export(access, belongs_to_any_access, NULL, &id, error);
    *found = id != NULL;
    return asked;
}

/* block-export-del may return before the export is gone. */
static bool wait_export_gone(PbaAccess *access, const PbaDisk *disk, const char *removed,
                             GError **error)
{
    gint64 deadline = pba_deadline(EXPORT_GONE_S);
    unsigned pause_ms = 1;

    for (;;) {
        g_autofree char *id = NULL;
        if (!find_export(access, belongs_to_disk, disk, &id, error)) {
            return false;
        }
        if (g_strcmp0(id, removed) != 0) {
            return true;
        }
        if (!pba_qmp_pause(access->qmp, &pause_ms, deadline, "waiting for an export to go",
                           error)) {
            return false;
        }
    }
}

/* An export's name tells whose it is, but recovery removes those of any dead process. Its marker in
 * QEMU, seen after an export was, says that this is still the QEMU of that process: while the
 * monitor was given back the VM may have been started again, and another process have come. */
static bool may_remove(PbaAccess *access, GError **error)
{
    return !pba_access_is_recovery(access) || pba_owner_require_now(access, error);
}

/* Dead processes may have left several. */
static bool remove_exports(PbaAccess *access, const PbaDisk *disk, GError **error)
{
    for (;;) {
        g_autofree char *id = NULL;
        if (!find_export(access, belongs_to_disk, disk, &id, error)) {
            return false;
        }
        if (!id) {
            return true;
        }
        if (!may_remove(access, error) ||
            !pba_qmp_run(access->qmp, "block-export-del",
                         pba_json("{'id': <%s>, 'mode': <'hard'>}", id), error) ||
            !wait_export_gone(access, disk, id, error)) {
            pba_error_add_device(error, disk->device);
            return false;
        }
    }
}

bool pba_exports_add(PbaAccess *access, GError **error)
{
    bool tried = access->phase == PBA_PHASE_EXPORTING;

    /* After a restart of the VM the snapshots may be those of a later access. */
    if (!pba_owner_require_now(access, error)) {
        return false;
    }
    /* What an earlier try has left goes first: its exports have the names of the new ones, and QEMU
     * takes a name once. */
    for (guint i = 0; tried && i < access->disks->len; i++) {
        if (!remove_exports(access, access->disks->pdata[i], error)) {
            return false;
        }
    }
    if (!tried) {
        pba_access_enter(access, PBA_PHASE_EXPORTING);
    }
    if (access->backend->reads_by_cluster(access)) {
        pba_log(
            &access->hooks, PBA_LOG_INFO,
            "this QEMU has to be read by single clusters of 64 KiB, as PVE::BackupAccess::Volume "
            "does: other NBD clients can get wrong data");
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
    if (access->phase != PBA_PHASE_UP && access->phase != PBA_PHASE_EXPORTING) {
        pba_error_set(error, PBA_ERROR_STATE, "the access is half torn down - call teardown again");
        return false;
    }
    bool done = pba_exports_add(access, error);
    /* Before the discards: they go over NBD and may take long, and others want the monitor. They
     * come after the export, which is what they go to. */
    pba_qmp_release(access->qmp);
    if (done) {
        access->backend->after_export(access);
    }
    return done;
}

static bool stop_server(PbaAccess *access, GError **error)
{
    g_autofree char *other = NULL;

    /* It is ours while it listens in our directory, which no other access has, and our marker says
     * that no other process has undone this access. */
    if (!pba_socket_answers(access->socket)) {
        return true;
    }
    if (!pba_owner_require_now(access, error) ||
        !find_export(access, belongs_to_another_program, NULL, &other, error)) {
        return false;
    }
    if (other) {
        g_clear_pointer(&access->socket, g_free); /* theirs from now on */
        pba_log(&access->hooks, PBA_LOG_WARN,
                "the NBD server stays up: it has got exports that are not ours");
        return true;
    }
    return pba_qmp_run(access->qmp, "nbd-server-stop", NULL, error);
}

bool pba_exports_remove(PbaAccess *access, GError **error)
{
    GError *first = NULL;
    GError *step = NULL;

    /* First: QEMU keeps an export until the requests of its clients, also of this process, are
     * done.
     */
    if (access->socket) {
        pba_connections_cut(access->socket);
    }
    for (guint i = 0; i < access->disks->len && !pba_error_is_fatal(first); i++) {
        remove_exports(access, access->disks->pdata[i], &step);
        pba_error_keep_first(&first, g_steal_pointer(&step), &access->hooks);
    }
    /* Not while there is an export: QEMU would wait for its end with the guest stopped, 7.2 for
     * ever if a client is just connecting. */
    if (access->socket && !first) {
        stop_server(access, &step);
        pba_error_keep_first(&first, g_steal_pointer(&step), &access->hooks);
    }
    if (first) {
        g_propagate_error(error, first);
        return false;
    }
    return true;
}

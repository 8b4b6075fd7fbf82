/* Checks what other programs do to the guest's disks, before an access changes anything. */
#include "backend.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include <string.h>

/* "mirror, ready"; the caller frees it; NULL if QEMU does not say. */
static char *describe_job(PbaAccess *access, const char *id)
{
    g_autoptr(JsonArray) jobs = pba_qmp_query_array(access->qmp, "query-jobs", NULL, NULL);
    JsonObject *job = jobs ? pba_json_find_element(jobs, "id", id) : NULL;
    const char *type = job ? pba_json_find_string(job, "type") : NULL;
    const char *status = job ? pba_json_find_string(job, "status") : NULL;

    return type && status ? g_strdup_printf("%s, %s", type, status) : NULL;
}

/* Refuses a disk on which a job works. When the job ends, its nodes are deleted with everything
 * that we would have put on them. And qom-set would move the guest away from these nodes: a
 * mirror's target would lack all later writes. */
static bool check_job(PbaAccess *access, const PbaBlock *block, JsonObject *device,
                      const char *node, GError **error)
{
    g_autofree char *job = pba_company_job(block, device, node);

    if (!job) {
        return true;
    }
    g_autofree char *what = describe_job(access, job);
    pba_error_set(error, PBA_ERROR_STATE,
                  "block job '%s'%s%s%s uses this disk - wait until the job ends, or end it "
                  "(block-job-cancel, or job-dismiss if it is concluded), then try again",
                  job, what ? " (" : "", what ? what : "", what ? ")" : "");
    return false;
}

/* A property of a guest device, false if it does not have it. */
static bool get_flag(PbaAccess *access, const char *path, const char *property, bool *is_on,
                     GError **error)
{
    GError *local = NULL;
    g_autoptr(JsonNode) value =
        pba_qmp_execute(access->qmp, "qom-get",
                        pba_json("{'path': <%s>, 'property': <%s>}", path, property), &local);

    *is_on = value && JSON_NODE_HOLDS_VALUE(value) && json_node_get_boolean(value);
    if (pba_error_is_fatal(local)) {
        g_propagate_error(error, local);
        return false;
    }
    g_clear_error(&local);
    return true;
}

/* A flash chip, as of UEFI, does not have the property share-rw: there, QEMU only has no reason to
 * forbid writes by others (7.2 to 11.0). */
static bool check_shared(PbaAccess *access, const PbaBlock *block, JsonObject *device,
                         GError **error)
{
    if (access->options.allow_shared || !pba_company_shares_writes(block, device)) {
        return true;
    }
    const char *qdev = pba_json_find_string(device, "qdev");
    g_autofree char *path = qdev && *qdev ? pba_block_qom_path(qdev) : NULL;
    bool is_shared = true;
    if (path && !get_flag(access, path, "share-rw", &is_shared, error)) {
        return false;
    }
    if (is_shared) {
        pba_error_set(error, PBA_ERROR_UNSUPPORTED,
                      "others may write to this disk (share-rw), so a backup of it would not be of "
                      "one instant - exclude the disk (--exclude), or allow this (--allow-shared, "
                      "'allow-shared')");
    }
    return !is_shared;
}

/* The type of the object at that path; the caller frees it; NULL with an error. */
static char *find_type(PbaAccess *access, const char *path, GError **error)
{
    g_autofree char *parent = g_path_get_dirname(path);
    g_autofree char *name = g_path_get_basename(path);
    g_autoptr(JsonArray) objects =
        pba_qmp_query_array(access->qmp, "qom-list", pba_json("{'path': <%s>}", parent), error);
    JsonObject *object = objects ? pba_json_find_element(objects, "name", name) : NULL;
    const char *type = object ? pba_json_find_string(object, "type") : NULL;

    return objects ? g_strdup(type ? type : "") : NULL;
}

/* Refuses scsi-block, scsi-generic, and a virtio disk with scsi=on (QEMU before 9.1): the guest's
 * commands bypass QEMU's block layer, so bitmaps and filters do not see what they write; and a node
 * above the disk that shows only a part of it does not pass them on. */
static bool check_passed_through(PbaAccess *access, const PbaBlock *block, JsonObject *device,
                                 const char *node, GError **error)
{
    const char *qdev = device ? pba_json_find_string(device, "qdev") : NULL;

    if (!qdev || !pba_company_is_host_device(block, node)) {
        return true;
    }
    g_autofree char *path = pba_block_qom_path(qdev);
    g_autofree char *type = find_type(access, path, error);
    bool has_scsi;
    if (!type || !get_flag(access, path, "scsi", &has_scsi, error)) {
        return false;
    }
    const char *what = strcmp(type, "child<scsi-block>") == 0     ? "scsi-block"
                       : strcmp(type, "child<scsi-generic>") == 0 ? "scsi-generic"
                       : has_scsi                                 ? "virtio-blk with scsi=on"
                                                                  : NULL;
    if (what) {
        pba_error_set(error, PBA_ERROR_UNSUPPORTED,
                      "its guest device is a %s, whose writes bypass QEMU's bitmaps and filters - "
                      "exclude the disk, or use %s",
                      what, has_scsi ? "scsi=off" : "scsi-hd");
    }
    return !what;
}

/* QEMU's state does not always say so: a reset after a migration changes it to "prelaunch". QEMU
 * 7.2 would then open the image for writing, as soon as a node of it is exported. */
static bool check_active(const PbaBlock *block, JsonObject *device, const char *node,
                         GError **error)
{
    bool is_inactive = pba_company_is_inactive(block, device, node);

    if (is_inactive) {
        pba_error_set(error, PBA_ERROR_STATE,
                      "is inactive, as a migration or saving the guest to a file leaves it - back "
                      "the guest up where it runs, or resume it here first (cont)");
    }
    return !is_inactive;
}

static bool check_disk(PbaAccess *access, const PbaBlock *block, const PbaDisk *disk,
                       GError **error)
{
    JsonObject *device = pba_block_find_device(block, disk->device);

    if (!check_active(block, device, disk->root_node, error)) {
        return false;
    }
    if (!check_job(access, block, device, disk->root_node, error)) {
        return false;
    }
    /* For an access by QEMU's own commands, QEMU itself says whose it is; otherwise it is a
     * leftover to undo. */
    g_autofree char *problem = access->backend->is_access_up(block)
                                   ? NULL
                                   : pba_company_problem(block, device, disk->root_node);
    if (problem) {
        pba_error_set(error, PBA_ERROR_STATE, "%s", problem);
        return false;
    }
    return check_shared(access, block, device, error) &&
           check_passed_through(access, block, device, disk->root_node, error);
}

bool pba_company_check_disks(PbaAccess *access, const PbaBlock *block, GError **error)
{
    for (guint i = 0; i < access->disks->len; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        if (!check_disk(access, block, disk, error)) {
            pba_error_add_device(error, disk->device);
            return false;
        }
    }
    return true;
}

/* The node of a guard's file does not have one of our names, but its file does. */
static bool is_ours(JsonObject *node, const char *guards_image)
{
    const char *name = node ? pba_json_find_string(node, "node-name") : NULL;

    return name && (pba_is_own_node(name) ||
                    g_strcmp0(pba_json_find_string(node, "file"), guards_image) == 0);
}

/* Whether QEMU has only the nodes that setup saw, and ours. Then no other program has begun to work
 * on a disk, because each job adds a node of its own to the disk (QEMU 7.2 to 11.0). An export or a
 * second guest device adds none: QEMU refuses one that writes, unless the disk is shared
 * (share-rw). */
static bool are_seen_or_ours(const PbaAccess *access, JsonArray *nodes)
{
    g_autofree char *guards_image = pba_guards_image(access);
    guint seen = 0;

    for (guint i = 0; i < json_array_get_length(nodes); i++) {
        const char *name = pba_block_node_name(nodes, i);
        if (name && pba_block_find_node(&access->seen, name)) {
            seen++;
        } else if (!is_ours(pba_json_element(nodes, i), guards_image)) {
            return false;
        }
    }
    return seen == json_array_get_length(access->seen.nodes);
}

/* Uses one command if that suffices. */
bool pba_company_check_again(PbaAccess *access, GError **error)
{
    g_autoptr(JsonArray) nodes = pba_block_query_nodes(access->qmp, error);
    g_auto(PbaBlock) block = {0};

    return nodes &&
           (are_seen_or_ours(access, nodes) || (pba_block_query(access->qmp, true, &block, error) &&
                                                pba_company_check_disks(access, &block, error)));
}

bool pba_company_check_jobs(PbaAccess *access, GError **error)
{
    g_autoptr(JsonArray) jobs = pba_qmp_query_array(access->qmp, "query-jobs", NULL, error);

    return jobs && (json_array_get_length(jobs) == 0 || pba_company_check_again(access, error));
}

/* A migration transfers the bitmaps, so later changes on this side are lost; or the migration fails
 * at its end because of the access' nodes. */
static bool check_outgoing(PbaAccess *access, GError **error)
{
    static const char *const over[] = {"none", "completed", "failed", "cancelled", "colo", NULL};
    JsonObject *reply = pba_qmp_query_object(access->qmp, "query-migrate", NULL, error);
    const char *status = reply ? pba_json_find_string(reply, "status") : NULL;

    g_clear_pointer(&access->migration, json_object_unref);
    access->migration = reply;
    if (status && !g_strv_contains(over, status)) {
        pba_error_set(error, PBA_ERROR_STATE,
                      "a migration of the guest is in progress (state '%s') and would fail - wait "
                      "until it ends, or cancel it (migrate_cancel), then try again",
                      status);
        return false;
    }
    return reply != NULL;
}

/* After a migration, the disks belong to another QEMU, which changes them. */
static bool check_status(PbaAccess *access, bool *is_prelaunch, GError **error)
{
    g_autoptr(JsonObject) reply = pba_qmp_query_object(access->qmp, "query-status", NULL, error);
    const char *status = reply ? pba_json_string(reply, "status", error) : NULL;

    *is_prelaunch = g_strcmp0(status, "prelaunch") == 0;
    if (g_strcmp0(status, "postmigrate") == 0) {
        pba_error_set(error, PBA_ERROR_STATE,
                      "the guest was migrated to another machine or saved to a file (state "
                      "'postmigrate') - back it up where it runs, or resume it here first (cont)");
        return false;
    }
    if (status && strstr(status, "migrate")) {
        pba_error_set(error, PBA_ERROR_STATE,
                      "the guest is being migrated to or from another machine (state '%s') - back "
                      "it up where it runs",
                      status);
        return false;
    }
    return status != NULL;
}

/* A reset after a migration hides it in QEMU's state, and Proxmox' QEMU (10.2) shows the disks as
 * active if it was migrated during an access. A snapshot leaves the same reply as a migration, but
 * QEMU refuses one during an access, so only the reply before it can come from a snapshot. */
static bool check_not_sent(PbaAccess *access, GError **error)
{
    g_autoptr(JsonObject) reply = pba_qmp_query_object(access->qmp, "query-migrate", NULL, error);
    const char *status = reply ? pba_json_find_string(reply, "status") : NULL;
    bool is_sent =
        g_strcmp0(status, "completed") == 0 && !json_object_equal(reply, access->migration);

    if (is_sent) {
        pba_error_set(error, PBA_ERROR_STATE,
                      "the guest was migrated to another machine or saved to a file since setup, "
                      "and then reset - back it up where it runs, or resume it here first (cont)");
    }
    return reply && !is_sent;
}

bool pba_company_check_still_here(PbaAccess *access, GError **error)
{
    bool is_prelaunch;

    return check_status(access, &is_prelaunch, error) &&
           (!is_prelaunch || access->was_prelaunch || check_not_sent(access, error));
}

bool pba_company_check_here(PbaAccess *access, GError **error)
{
    return check_status(access, &access->was_prelaunch, error) && check_outgoing(access, error);
}

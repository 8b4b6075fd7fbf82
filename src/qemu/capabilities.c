/* Which backend a QEMU allows, asked of the QEMU itself. */
#include "src/base/base.h"
#include "src/qmp/qmp.h"

/* Sets backend and form if the version tells them. QEMU takes some 25 ms for its schema and does
 * nothing else meanwhile, Perl code up to 300 ms to decode it, and Proxmox' packages have had the
 * commands in one form since 10.0. */
static bool query_version(PbaQmp *qmp, PbaCapabilities *capabilities, GError **error)
{
    g_autoptr(JsonObject) reply = pba_qmp_query_object(qmp, "query-version", NULL, error);
    JsonObject *qemu = reply ? pba_json_object(reply, "qemu", error) : NULL;
    uint64_t major, minor, micro;

    if (!qemu || !pba_json_size(qemu, "major", &major, error) ||
        !pba_json_size(qemu, "minor", &minor, error) ||
        !pba_json_size(qemu, "micro", &micro, error)) {
        return false;
    }
    capabilities->major = (unsigned)major;
    capabilities->minor = (unsigned)minor;
    capabilities->micro = (unsigned)micro;

    const char *package = pba_json_find_string(reply, "package");
    if (major >= 10 && package && g_str_has_prefix(package, "pve-qemu-kvm_")) {
        capabilities->backend = "pve";
        capabilities->form = "devices";
    }
    return true;
}

static JsonObject *find_by_name(JsonArray *entries, const char *meta_type, const char *name)
{
    for (guint i = 0; i < json_array_get_length(entries); i++) {
        JsonObject *entry = pba_json_element(entries, i);
        if (entry && g_strcmp0(pba_json_find_string(entry, "name"), name) == 0 &&
            (!meta_type || g_strcmp0(pba_json_find_string(entry, "meta-type"), meta_type) == 0)) {
            return entry;
        }
    }
    return NULL;
}

/* Proxmox' QEMU: which arguments backup-access-setup takes (QAPI introspection). */
static bool query_form(PbaQmp *qmp, PbaCapabilities *capabilities, GError **error)
{
    g_autoptr(JsonArray) schema = pba_qmp_query_array(qmp, "query-qmp-schema", NULL, error);
    if (!schema) {
        return false;
    }
    JsonObject *command = find_by_name(schema, "command", "backup-access-setup");
    const char *arguments = command ? pba_json_find_string(command, "arg-type") : NULL;
    JsonObject *type = arguments ? find_by_name(schema, "object", arguments) : NULL;
    JsonArray *members = type ? pba_json_find_array(type, "members") : NULL;
    if (members && find_by_name(members, NULL, "devices")) {
        capabilities->form = "devices";
    } else if (members && find_by_name(members, NULL, "devlist") &&
               find_by_name(members, NULL, "bitmap-name")) {
        capabilities->form = "devlist";
    } else {
        pba_error_set(error, PBA_ERROR_UNSUPPORTED,
                      "this QEMU's backup-access-setup takes arguments of a form that is not known "
                      "- pve-qemu-kvm 9.2 or later is needed");
        return false;
    }
    return true;
}

static bool require_version(const PbaCapabilities *capabilities, GError **error)
{
    if (capabilities->major > 7 || (capabilities->major == 7 && capabilities->minor >= 2)) {
        return true;
    }
    pba_error_set(error, PBA_ERROR_UNSUPPORTED,
                  "QEMU %u.%u.%u is too old - it has no backup-access-setup, and without that "
                  "QEMU 7.2 or later is needed",
                  capabilities->major, capabilities->minor, capabilities->micro);
    return false;
}

static bool require_commands(JsonArray *commands, GError **error)
{
    static const char *const needed[] = {"blockdev-reopen", "blockdev-backup", "block-export-add",
                                         "block-dirty-bitmap-merge", "x-debug-query-block-graph"};
    for (size_t i = 0; i < G_N_ELEMENTS(needed); i++) {
        if (!find_by_name(commands, NULL, needed[i])) {
            pba_error_set(error, PBA_ERROR_UNSUPPORTED,
                          "this QEMU lacks the command %s - QEMU 7.2 or later has it", needed[i]);
            return false;
        }
    }
    return true;
}

bool pba_capabilities(PbaQmp *qmp, PbaCapabilities *capabilities, GError **error)
{
    *capabilities = (PbaCapabilities){0};
    if (!query_version(qmp, capabilities, error)) {
        return false;
    }
    if (capabilities->backend) {
        return true;
    }
    g_autoptr(JsonArray) commands = pba_qmp_query_array(qmp, "query-commands", NULL, error);
    if (!commands) {
        return false;
    }
    if (find_by_name(commands, NULL, "backup-access-setup")) {
        capabilities->backend = "pve";
        return query_form(qmp, capabilities, error);
    }
    capabilities->backend = "upstream";
    return require_version(capabilities, error) && require_commands(commands, error);
}

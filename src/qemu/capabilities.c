/* A QEMU's version, commands and arguments, as it reports them. */
#include "qemu.h"
#include "src/qmp/qmp.h"

bool pba_qemu_query(PbaQmp *qmp, PbaQemu *qemu, GError **error)
{
    g_autoptr(JsonObject) reply = pba_qmp_query_object(qmp, "query-version", NULL, error);
    JsonObject *version = reply ? pba_json_object(reply, "qemu", error) : NULL;
    uint64_t major, minor, micro;

    if (!version || !pba_json_size(version, "major", &major, error) ||
        !pba_json_size(version, "minor", &minor, error) ||
        !pba_json_size(version, "micro", &micro, error)) {
        return false;
    }
    *qemu = (PbaQemu){
        .major = (unsigned)MIN(major, UINT_MAX),
        .minor = (unsigned)MIN(minor, UINT_MAX),
        .micro = (unsigned)MIN(micro, UINT_MAX),
        .package = g_strdup(pba_json_find_string(reply, "package")),
    };
    return true;
}

void pba_qemu_clear(PbaQemu *qemu)
{
    g_clear_pointer(&qemu->package, g_free);
    g_clear_pointer(&qemu->commands, json_array_unref);
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

bool pba_qemu_has_command(PbaQmp *qmp, PbaQemu *qemu, const char *command, bool *has,
                          GError **error)
{
    if (!qemu->commands) {
        qemu->commands = pba_qmp_query_array(qmp, "query-commands", NULL, error);
    }
    *has = qemu->commands && find_by_name(qemu->commands, NULL, command);
    return qemu->commands != NULL;
}

JsonArray *pba_qemu_schema(PbaQmp *qmp, GError **error)
{
    return pba_qmp_query_array(qmp, "query-qmp-schema", NULL, error);
}

bool pba_schema_has_argument(JsonArray *schema, const char *command, const char *argument)
{
    JsonObject *entry = find_by_name(schema, "command", command);
    const char *arguments = entry ? pba_json_find_string(entry, "arg-type") : NULL;
    JsonObject *type = arguments ? find_by_name(schema, "object", arguments) : NULL;
    JsonArray *members = type ? pba_json_find_array(type, "members") : NULL;

    return members && find_by_name(members, NULL, argument);
}

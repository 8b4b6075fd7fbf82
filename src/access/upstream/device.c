/* Queries QOM about guest devices. */
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include "upstream.h"
#include <string.h>

/* If QEMU refuses, the property does not exist; any other error is passed on. */
static void keep_fatal(GError *step, GError **error)
{
    if (pba_error_is_fatal(step)) {
        g_propagate_error(error, step);
    } else {
        g_clear_error(&step);
    }
}

/* qom-get of a property that the object may lack: NULL then, and also on an error. */
static JsonNode *find_property(PbaQmp *qmp, const char *path, const char *property, GError **error)
{
    GError *local = NULL;
    JsonNode *value = pba_qmp_execute(
        qmp, "qom-get", pba_json("{'path': <%s>, 'property': <%s>}", path, property), &local);

    keep_fatal(local, error);
    return value;
}

static bool is_set(JsonNode *value)
{
    if (!value || JSON_NODE_HOLDS_NULL(value)) {
        return false;
    }
    return !JSON_NODE_HOLDS_VALUE(value) || json_node_get_value_type(value) != G_TYPE_STRING ||
           *json_node_get_string(value);
}

/* The device itself, the device behind a virtio backend, or the controller of its bus. */
static bool find_iothread(PbaQmp *qmp, const char *qdev, bool *found, GError **error)
{
    static const char *const properties[] = {"iothread", "iothread-vq-mapping"};
    GError *local = NULL;
    g_autofree char *path = pba_block_qom_path(qdev);
    g_autoptr(JsonNode) bus = find_property(qmp, path, "parent_bus", &local);
    const char *bus_path = bus && JSON_NODE_HOLDS_VALUE(bus) ? json_node_get_string(bus) : NULL;
    g_autofree char *parent = g_path_get_dirname(path);
    g_autofree char *controller = g_path_get_dirname(bus_path ? bus_path : "");
    g_autofree char *owner = g_path_get_dirname(controller);
    const char *const paths[] = {path, parent, controller, owner};

    *found = false;
    for (size_t i = 0; !local && i < G_N_ELEMENTS(paths) * G_N_ELEMENTS(properties); i++) {
        g_autoptr(JsonNode) value = find_property(qmp, paths[i / 2], properties[i % 2], &local);
        *found |= is_set(value);
    }
    if (local) {
        g_propagate_error(error, local);
        return false;
    }
    return true;
}

bool pba_upstream_check_iothreads(PbaAccess *access, GError **error)
{
    if (pba_upstream_allows_iothreads(access)) {
        return true;
    }
    g_autoptr(JsonArray) threads = pba_qmp_query_array(access->qmp, "query-iothreads", NULL, error);
    if (!threads) {
        return false;
    }
    for (guint i = 0; json_array_get_length(threads) > 0 && i < access->disks->len; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        bool found;
        if (!find_iothread(access->qmp, disk->qdev, &found, error)) {
            return false;
        }
        if (found) {
            pba_error_set(
                error, PBA_ERROR_UNSUPPORTED,
                "is in an iothread, and this QEMU may abort when an NBD client of such a disk "
                "disconnects (7.2 does) - use QEMU 10.0 or later, or take the disk out of the "
                "iothread");
            pba_error_add_device(error, disk->device);
            return false;
        }
    }
    return true;
}

static bool is_text(JsonNode *value, const char *text)
{
    return is_set(value) && JSON_NODE_HOLDS_VALUE(value) &&
           json_node_get_value_type(value) == G_TYPE_STRING &&
           (!text || strcmp(json_node_get_string(value), text) == 0);
}

/* The device's link on its bus, "child[3]"; NULL if QEMU does not say, and also on an error. */
static char *find_link(PbaQmp *qmp, const char *bus, const char *device, GError **error)
{
    GError *local = NULL;
    g_autoptr(JsonArray) entries =
        pba_qmp_query_array(qmp, "qom-list", pba_json("{'path': <%s>}", bus), &local);

    for (guint i = 0; entries && !local && i < json_array_get_length(entries); i++) {
        JsonObject *entry = pba_json_element(entries, i);
        const char *name = entry ? pba_json_find_string(entry, "name") : NULL;
        if (!name || !g_str_has_prefix(name, "child[")) {
            continue;
        }
        g_autoptr(JsonNode) child = find_property(qmp, bus, name, &local);
        if (is_text(child, device)) {
            return g_strdup(name);
        }
    }
    keep_fatal(local, error);
    return NULL;
}

/* The part of a path that was plugged in, "/machine/peripheral/ID". */
static char *plugged_part(const char *path)
{
    const char *end = path;

    for (int i = 0; i < 3 && end; i++) {
        end = strchr(end + 1, '/');
    }
    return end ? g_strndup(path, end - path) : g_strdup(path);
}

/* If a device is unplugged and plugged in again with the same ID, it has the same QOM path and may
 * already use the node; qom-set of that node then makes QEMU (10.0) abort: "old_bs != new_bs". A
 * bus never reuses the number of a child, so the number identifies the device. */
bool pba_upstream_find_guest_device(PbaAccess *access, const PbaDisk *disk, const char *qdev,
                                    GError **error)
{
    PbaUpstreamDisk *own = pba_upstream_disk(disk);
    GError *local = NULL;
    g_autofree char *path = pba_block_qom_path(qdev);
    g_autofree char *device = plugged_part(path);
    g_autoptr(JsonNode) bus = find_property(access->qmp, device, "parent_bus", &local);
    g_autofree char *link = is_text(bus, NULL)
                                ? find_link(access->qmp, json_node_get_string(bus), device, &local)
                                : NULL;

    if (local) {
        g_propagate_error(error, local);
        return false;
    }
    g_free(own->guest_device);
    own->guest_device =
        link ? g_strconcat(json_node_get_string(bus), "/", link, path + strlen(device), NULL)
             : g_steal_pointer(&path);
    return true;
}

/* An access: its options and its state. */
#include "access.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include <string.h>
#include <unistd.h>

/* BDRV_BITMAP_MAX_NAME_SIZE; the target-id is (part of) a bitmap's name. */
#define MAX_BITMAP_NAME 1023

static const char reserved[] = "is reserved: it is the name of a bitmap of something else";

/* The target-id becomes a part of names in QEMU. With 'Proxmox', a teardown crashes QEMU
 * (pve-qemu-kvm to 11.0.0) during a native backup; an access of 'Proxmox VE' can never be torn
 * down. */
static bool check_target_id(const char *id, GError **error)
{
    static const char longest_nonce[PBA_NONCE_LENGTH + 1] = "0123456789abcdef";
    const char *problem = NULL;

    if (!id || !*id) {
        problem = "must not be empty";
    } else if (strcmp(id, "Proxmox") == 0 || strcmp(id, "Proxmox VE") == 0) {
        problem = "is reserved: QEMU's own backup uses it";
    } else if (pba_is_reserved_bitmap(id)) {
        problem = reserved;
    } else if (!g_utf8_validate(id, -1, NULL)) {
        problem = "must be valid UTF-8";
    } else {
        g_autofree char *background = pba_background_bitmap(id, longest_nonce, true);
        if (strlen(background) > MAX_BITMAP_NAME) {
            pba_error_set(error, PBA_ERROR_ARGUMENT,
                          "target-id is too long - %zu bytes, at most %zu can be part of the name "
                          "of a bitmap",
                          strlen(id), MAX_BITMAP_NAME - (strlen(background) - strlen(id)));
            return false;
        }
        return true;
    }
    pba_error_set(error, PBA_ERROR_ARGUMENT, "target-id '%s' %s", id ? id : "", problem);
    return false;
}

/* NULL is allowed for an option that may be left out. */
bool pba_check_utf8(const char *name, const char *value, GError **error)
{
    if (!value || (*value && g_utf8_validate(value, -1, NULL))) {
        return true;
    }
    pba_error_set(error, PBA_ERROR_ARGUMENT, "%s must be valid UTF-8 and not empty", name);
    return false;
}

static bool check_bitmap_name(const char *name, GError **error)
{
    if (!pba_check_utf8("bitmap-name", name, error)) {
        return false;
    }
    if (name && pba_is_reserved_bitmap(name)) {
        pba_error_set(error, PBA_ERROR_ARGUMENT, "bitmap-name '%s' %s", name, reserved);
        return false;
    }
    return true;
}

static bool check_dir(const char *name, const char *value, GError **error)
{
    if (!pba_check_utf8(name, value, error)) {
        return false;
    }
    if (value && !g_path_is_absolute(value)) {
        pba_error_set(error, PBA_ERROR_ARGUMENT, "%s '%s' must be an absolute path", name, value);
        return false;
    }
    return true;
}

static bool check_fleecing(GHashTable *fleecing, GError **error)
{
    GHashTableIter iter;
    gpointer device, node;

    if (!fleecing) {
        return true;
    }
    g_hash_table_iter_init(&iter, fleecing);
    while (g_hash_table_iter_next(&iter, &device, &node)) {
        if (!pba_check_utf8("a device of fleecing", device, error) ||
            !pba_check_utf8("a node of fleecing", node, error)) {
            return false;
        }
    }
    return true;
}

PbaAccess *pba_access_new(PbaQmp *qmp, const PbaAccessOptions *options, const PbaHooks *hooks,
                          GError **error)
{
    if (!check_target_id(options->target_id, error)) {
        return NULL;
    }
    PbaAccess *access = pba_access_new_observer(qmp, options, hooks, error);
    if (access) {
        access->target_id = access->options.target_id;
    }
    return access;
}

static void keep_options(PbaAccess *access, const PbaAccessOptions *options)
{
    PbaAccessOptions *kept = &access->options;
    const char **texts[] = {&kept->target_id,        &kept->run_dir,     &kept->identity,
                            &kept->fleecing_dir,     &kept->bitmap_name, &kept->qemu_run_dir,
                            &kept->qemu_fleecing_dir};

    *kept = *options;
    access->texts = g_string_chunk_new(256);
    for (size_t i = 0; i < G_N_ELEMENTS(texts); i++) {
        *texts[i] = *texts[i] ? g_string_chunk_insert(access->texts, *texts[i]) : NULL;
    }
    kept->fleecing = kept->fleecing ? g_hash_table_ref(kept->fleecing) : NULL;
}

PbaAccess *pba_access_new_observer(PbaQmp *qmp, const PbaAccessOptions *options,
                                   const PbaHooks *hooks, GError **error)
{
    if (!check_dir("run-dir", options->run_dir, error) ||
        !check_dir("fleecing-dir", options->fleecing_dir, error) ||
        !check_dir("qemu-run-dir", options->qemu_run_dir, error) ||
        !check_dir("qemu-fleecing-dir", options->qemu_fleecing_dir, error) ||
        !check_bitmap_name(options->bitmap_name, error) ||
        !check_fleecing(options->fleecing, error)) {
        return NULL;
    }
    PbaAccess *access = g_new0(PbaAccess, 1);
    access->owner = getpid();
    access->qmp = qmp;
    access->hooks = hooks ? *hooks : (PbaHooks){0};
    keep_options(access, options);
    access->identity = g_strdup(options->identity);
    access->disks = g_ptr_array_new_with_free_func(pba_disk_free);
    access->warnings = g_ptr_array_new_with_free_func(g_free);
    return access;
}

bool pba_access_is_up(const PbaAccess *access)
{
    return access->phase != PBA_PHASE_NEW;
}

const char *pba_access_socket(const PbaAccess *access)
{
    return access->socket;
}

const char *pba_access_guest(const PbaAccess *access)
{
    return access->guest;
}

const GPtrArray *pba_access_warnings(const PbaAccess *access)
{
    return access->warnings;
}

size_t pba_access_device_count(const PbaAccess *access)
{
    return access->disks->len;
}

void pba_access_device_info(const PbaAccess *access, size_t index, PbaDeviceInfo *info)
{
    const PbaDisk *disk = access->disks->pdata[index];

    *info = (PbaDeviceInfo){
        .device = disk->device,
        .node_name = disk->snapshot_node,
        .size = disk->size,
        .bitmap_node_name = disk->bitmap_name ? disk->bitmap_node : NULL,
        .bitmap_name = disk->bitmap_name,
        .action = disk->action,
        .identity = access->tied == PBA_TIED_YES ? disk->identity : NULL,
        .base = disk->action == PBA_BITMAP_ACTION_USED ? disk->base : NULL,
        .reason = disk->reason,
        .audit_bitmap = disk->audit_bitmap,
        .dirty = disk->dirty,
        .is_counted = disk->is_counted,
    };
}

void pba_access_log_lines(const PbaAccess *access, const GPtrArray *lines)
{
    for (guint i = 0; i < lines->len; i++) {
        pba_log(&access->hooks, PBA_LOG_INFO, "%s", (const char *)lines->pdata[i]);
    }
}

bool pba_access_require_up(const PbaAccess *access, GError **error)
{
    if (!pba_access_is_up(access)) {
        pba_error_set(error, PBA_ERROR_STATE, "no access is set up - call setup first");
        return false;
    }
    return true;
}

bool pba_access_require_down(const PbaAccess *access, GError **error)
{
    if (pba_access_is_up(access)) {
        pba_error_set(error, PBA_ERROR_STATE,
                      "previous backup for target '%s' not finished - tear it down first",
                      access->target_id);
        return false;
    }
    return true;
}

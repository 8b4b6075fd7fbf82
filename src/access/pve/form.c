/* Whether a QEMU has Proxmox' commands, and in which form. */
#include "pve.h"
#include "src/base/base.h"
#include <string.h>

/* The command's arguments: "devices" in packages (since pve-qemu's cb662eb of April 2025, to
 * 11.0.0-2), "devlist" in patches that were published before. */
static bool find_form(PbaQmp *qmp, const char **form, GError **error)
{
    static const char setup[] = "backup-access-setup";
    g_autoptr(JsonArray) schema = pba_qemu_schema(qmp, error);

    if (!schema) {
        return false;
    }
    if (pba_schema_has_argument(schema, setup, "devices")) {
        *form = "devices";
    } else if (pba_schema_has_argument(schema, setup, "devlist") &&
               pba_schema_has_argument(schema, setup, "bitmap-name")) {
        *form = PBA_PVE_EARLY_FORM;
    } else {
        pba_error_set(error, PBA_ERROR_UNSUPPORTED,
                      "this QEMU's backup-access-setup takes arguments of a form that is not known "
                      "- pve-qemu-kvm 9.2 or later is needed");
        return false;
    }
    return true;
}

/* The version identifies Proxmox' packages, which have had the commands in one form since 10.0. */
bool pba_pve_suits(PbaQmp *qmp, PbaQemu *qemu, const char **form, bool *suits, GError **error)
{
    if (qemu->major >= 10 && qemu->package && g_str_has_prefix(qemu->package, "pve-qemu-kvm_")) {
        *form = "devices";
        *suits = true;
        return true;
    }
    return pba_qemu_has_command(qmp, qemu, "backup-access-setup", suits, error) &&
           (!*suits || find_form(qmp, form, error));
}

bool pba_pve_has_early_form(const PbaAccess *access)
{
    return strcmp(access->qemu.form, PBA_PVE_EARLY_FORM) == 0;
}

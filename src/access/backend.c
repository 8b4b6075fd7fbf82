/* The choice of a backend, and what QEMU is asked for before all else. */
#include "backend.h"
#include "pve/pve.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include "upstream/upstream.h"
#include <string.h>

static const PbaBackend *const backends[] = {&pba_pve_backend, &pba_upstream_backend};

bool pba_access_choose_backend(PbaAccess *access, GError **error)
{
    PbaCapabilities capabilities;

    if (access->backend) {
        return true;
    }
    if (!pba_capabilities(access->qmp, &capabilities, error)) {
        return false;
    }
    for (size_t i = 0; i < G_N_ELEMENTS(backends); i++) {
        if (strcmp(capabilities.backend, backends[i]->name) == 0) {
            access->backend = backends[i];
        }
    }
    g_assert(access->backend); /* pba_capabilities tells no other name */
    access->form =
        g_strcmp0(capabilities.form, "devlist") == 0 ? PBA_FORM_DEVLIST : PBA_FORM_DEVICES;
    access->qemu_version = capabilities.major * 100 + capabilities.minor;
    return true;
}

void pba_access_know(PbaAccess *access, const PbaAccess *known)
{
    access->backend = known->backend;
    access->form = known->form;
    access->qemu_version = known->qemu_version;
    if (!access->identity) {
        access->identity = g_strdup(known->identity);
    }
}

/* Where the caller's transport hides the socket, QEMU must tell who it is. */
static bool ensure_identity(PbaAccess *access, GError **error)
{
    if (access->identity) {
        return true;
    }
    g_autoptr(JsonObject) name = pba_qmp_query_object(access->qmp, "query-name", NULL, error);
    g_autoptr(JsonObject) uuid =
        name ? pba_qmp_query_object(access->qmp, "query-uuid", NULL, error) : NULL;
    if (!uuid) {
        return false;
    }
    const char *vm_name = pba_json_find_string(name, "name");
    const char *vm_uuid = pba_json_find_string(uuid, "UUID");
    access->identity = g_strdup_printf("%s:%s", vm_name ? vm_name : "", vm_uuid ? vm_uuid : "");
    access->guest = access->guest ? access->guest : g_strdup(vm_uuid);
    return true;
}

bool pba_access_begin(PbaAccess *access, GError **error)
{
    if (!pba_access_choose_backend(access, error)) {
        return false;
    }
    pba_user_note(access);
    return ensure_identity(access, error);
}

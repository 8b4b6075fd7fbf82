/* The choice of a backend, and the first queries to QEMU. */
#include "backend.h"
#include "pve/pve.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include "upstream/upstream.h"

/* Tried in this order; the last one accepts every other QEMU. */
static const PbaBackend *const backends[] = {&pba_pve_backend, &pba_upstream_backend};

static bool choose(PbaQmp *qmp, PbaCapabilities *capabilities, const PbaBackend **backend,
                   GError **error)
{
    g_auto(PbaQemu) qemu = {0};
    bool suits = false;

    *capabilities = (PbaCapabilities){0};
    if (!pba_qemu_query(qmp, &qemu, error)) {
        return false;
    }
    capabilities->major = qemu.major;
    capabilities->minor = qemu.minor;
    capabilities->micro = qemu.micro;
    for (size_t i = 0; !suits && i < G_N_ELEMENTS(backends); i++) {
        *backend = backends[i];
        capabilities->backend = backends[i]->name;
        if (!backends[i]->suits(qmp, &qemu, &capabilities->form, &suits, error)) {
            return false;
        }
    }
    return true;
}

bool pba_capabilities(PbaQmp *qmp, PbaCapabilities *capabilities, GError **error)
{
    const PbaBackend *backend;

    return choose(qmp, capabilities, &backend, error);
}

void pba_access_know(PbaAccess *access, const PbaAccess *known)
{
    access->backend = known->backend;
    access->qemu = known->qemu;
    if (!access->identity) {
        access->identity = g_strdup(known->identity);
    }
}

/* If the caller's transport hides the socket, only QEMU itself can identify the guest. */
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
    if (!access->backend && !choose(access->qmp, &access->qemu, &access->backend, error)) {
        access->backend = NULL;
        return false;
    }
    pba_user_note(access);
    return ensure_identity(access, error);
}

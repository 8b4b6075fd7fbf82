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

static const char no_uuid[] = "00000000-0000-0000-0000-000000000000";

/* If the caller's transport hides the socket, only QEMU itself can identify the guest: by its UUID
 * or, if it was started without one, by its name. */
static bool ensure_identity(PbaAccess *access, GError **error)
{
    if (access->identity) {
        return true;
    }
    g_autoptr(JsonObject) reply = pba_qmp_query_object(access->qmp, "query-uuid", NULL, error);
    const char *uuid = reply ? pba_json_string(reply, "UUID", error) : NULL;
    if (!uuid) {
        return false;
    }
    access->guest = access->guest ? access->guest : g_strdup(uuid);
    if (strcmp(uuid, no_uuid) != 0) {
        access->identity = g_strdup(uuid);
        return true;
    }
    g_autoptr(JsonObject) named = pba_qmp_query_object(access->qmp, "query-name", NULL, error);
    const char *name = named ? pba_json_find_string(named, "name") : NULL;
    access->identity = named ? g_strdup_printf("name %s", name ? name : "") : NULL;
    return named != NULL;
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

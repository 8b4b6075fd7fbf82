/* Who has an access to this guest: nodes that do nothing but carry a name.
 *
 * pba-owner-PID-STARTTIME names a process. It is the first thing that an access adds, and the last
 * that it deletes. The start time (proc(5), /proc/PID/stat, field 22) tells a process from a later
 * one with its number. Where a process has several accesses at once, to whatever guests, a number
 * follows in the markers of all but one. On Proxmox, pba-dev-... names a device, since QEMU does
 * not tell which ones an access has. */
#include "access.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define OWNER_PREFIX "pba-owner-"

/* Accesses of this process that have marked a guest: a marker of a living process says nothing if
 * the access is that of an object which is gone. */
static GMutex marked_lock;
static GPtrArray *marked;

typedef struct {
    pid_t pid;
    uint64_t start;
    unsigned number; /* of the access; not written if 0 */
} Owner;

/* State (field 3) and start time (field 22) are counted from the command's name in parentheses,
 * which may have anything in it. */
static bool read_stat(pid_t pid, char *state, uint64_t *start)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/stat", (int)pid);
    g_autofree char *text = NULL;

    if (!g_file_get_contents(path, &text, NULL, NULL)) {
        return false;
    }
    const char *rest = strrchr(text, ')');
    g_auto(GStrv) fields = rest && rest[1] ? g_strsplit(rest + 2, " ", 22) : NULL;
    if (!fields || g_strv_length(fields) < 20) {
        return false;
    }
    *state = fields[0][0];
    return g_ascii_string_to_unsigned(fields[19], 10, 0, UINT64_MAX, start, NULL);
}

static bool parse_owner(const char *node, Owner *owner)
{
    int pid;
    int length;
    char more;

    *owner = (Owner){0};
    if (!g_str_has_prefix(node, OWNER_PREFIX) ||
        sscanf(node + strlen(OWNER_PREFIX), "%d-%" SCNu64 "%n", &pid, &owner->start, &length) !=
            2 ||
        pid <= 0) {
        return false;
    }
    const char *rest = node + strlen(OWNER_PREFIX) + length;
    owner->pid = pid;
    return !*rest || (sscanf(rest, "-%u%c", &owner->number, &more) == 1 && owner->number > 0);
}

bool pba_is_owner_mark(const char *node)
{
    Owner owner;
    return parse_owner(node, &owner);
}

char *pba_owner_mark_name(const PbaAccess *access, GError **error)
{
    char state;
    uint64_t start;

    if (!read_stat(getpid(), &state, &start)) {
        pba_error_set(error, PBA_ERROR_SYSTEM, "cannot read /proc/%d/stat", (int)getpid());
        return NULL;
    }
    g_autofree char *process = g_strdup_printf(OWNER_PREFIX "%d-%" PRIu64, (int)getpid(), start);
    return access->mark_number ? g_strdup_printf("%s-%u", process, access->mark_number)
                               : g_steal_pointer(&process);
}

/* Whether another access of this process has that number. The caller has the lock. */
static bool is_taken(const PbaAccess *access, unsigned number)
{
    for (guint i = 0; marked && i < marked->len; i++) {
        const PbaAccess *other = marked->pdata[i];
        if (other != access && other->owner == getpid() && other->mark_number == number) {
            return true;
        }
    }
    return false;
}

/* Which guest it is of does not matter: two ways to the same monitor cannot be told from two
 * guests. */
static bool is_of_another(const PbaAccess *access, unsigned number)
{
    g_mutex_lock(&marked_lock);
    bool taken = is_taken(access, number);
    g_mutex_unlock(&marked_lock);
    return taken;
}

/* A process that has ended and was not waited for yet is still in /proc. One that is hidden from us
 * (proc(5), hidepid) counts as alive. */
static bool is_alive(const PbaAccess *access, const Owner *owner)
{
    char state;
    uint64_t now;

    if (!read_stat(owner->pid, &state, &now)) {
        return kill(owner->pid, 0) == 0 || errno == EPERM;
    }
    if (now != owner->start || state == 'Z' || state == 'X') {
        return false;
    }
    return owner->pid != getpid() || is_of_another(access, owner->number);
}

bool pba_owner_read(const PbaAccess *access, const char *node, pid_t *pid, bool *alive)
{
    Owner owner;

    if (!parse_owner(node, &owner)) {
        return false;
    }
    *pid = owner.pid;
    *alive = is_alive(access, &owner);
    return true;
}

bool pba_owner_check(const PbaAccess *access, JsonArray *nodes, GError **error)
{
    for (guint i = 0; i < json_array_get_length(nodes); i++) {
        const char *name = pba_block_node_name(nodes, i);
        Owner owner;
        if (name && parse_owner(name, &owner) && is_alive(access, &owner)) {
            pba_error_set(error, PBA_ERROR_STATE,
                          "previous backup of this guest not finished: process %d is at it",
                          (int)owner.pid);
            return false;
        }
    }
    return true;
}

static JsonArray *query_nodes(PbaAccess *access, GError **error)
{
    return pba_qmp_query_array(access->qmp, "query-named-block-nodes", pba_json("{'flat': <true>}"),
                               error);
}

/* Read-only, or else QEMU would want it in a snapshot of the VM (savevm), and refuse that. */
static bool add_mark(PbaAccess *access, const char *name, GError **error)
{
    return pba_qmp_run(access->qmp, "blockdev-add",
                       pba_json("{'driver': <'null-co'>, 'node-name': <%s>, 'size': <0>, "
                                "'read-only': <true>}",
                                name),
                       error);
}

static bool has_node(JsonArray *nodes, const char *name)
{
    for (guint i = 0; i < json_array_get_length(nodes); i++) {
        if (g_strcmp0(pba_block_node_name(nodes, i), name) == 0) {
            return true;
        }
    }
    return false;
}

static void note_marked(PbaAccess *access)
{
    g_mutex_lock(&marked_lock);
    marked = marked ? marked : g_ptr_array_new();
    for (access->mark_number = 0; is_taken(access, access->mark_number);) {
        access->mark_number++;
    }
    g_ptr_array_add(marked, access);
    g_mutex_unlock(&marked_lock);
    access->marked = true;
}

void pba_owner_forget(PbaAccess *access)
{
    if (access->marked) {
        g_mutex_lock(&marked_lock);
        g_ptr_array_remove(marked, access);
        g_mutex_unlock(&marked_lock);
        access->marked = false;
    }
}

/* Of two that mark at once at least one sees the other: who marks looks again afterwards. */
static bool mark_and_look(PbaAccess *access, GError **error)
{
    g_autoptr(GError) refused = NULL;

    note_marked(access);
    g_autofree char *name = pba_owner_mark_name(access, error);
    if (!name) {
        return false;
    }
    if (!add_mark(access, name, &refused) && pba_error_is_fatal(refused)) {
        g_propagate_error(error, g_steal_pointer(&refused));
        return false;
    }
    g_autoptr(JsonArray) nodes = query_nodes(access, error);
    if (!nodes) {
        return false;
    }
    /* It may be there from an access of this process whose end failed. */
    if (refused && !has_node(nodes, name)) {
        g_propagate_error(error, g_steal_pointer(&refused));
        return false;
    }
    return pba_owner_check(access, nodes, error);
}

bool pba_owner_mark(PbaAccess *access, GError **error)
{
    if (mark_and_look(access, error)) {
        return true;
    }
    /* Ours only: the devices may be marked by the other one. */
    pba_owner_unmark(access, false);
    return false;
}

bool pba_device_marks_add(PbaAccess *access, GError **error)
{
    for (guint i = 0; i < access->disks->len; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        g_autofree char *name = pba_disk_name(access, PBA_DEVICE_ROLE, disk);
        if (!add_mark(access, name, error)) {
            pba_error_add_device(error, disk->device);
            return false;
        }
    }
    return true;
}

/* Ours, and if all is done what marks this target's devices and processes that are gone. */
static bool is_to_go(const PbaAccess *access, const char *node, const char *own, bool all)
{
    g_autofree char *devices = pba_target_prefix(access->target_id, PBA_DEVICE_ROLE);
    Owner owner;

    if (strcmp(node, own) == 0) {
        return true;
    }
    return all && (g_str_has_prefix(node, devices) ||
                   (parse_owner(node, &owner) && !is_alive(access, &owner)));
}

static bool delete_marks(PbaAccess *access, bool all, GError **error)
{
    g_autofree char *own = pba_owner_mark_name(access, error);
    g_autoptr(JsonArray) nodes = own ? query_nodes(access, error) : NULL;
    const char *last = NULL;
    bool done = nodes != NULL;

    for (guint i = 0; done && i < json_array_get_length(nodes); i++) {
        const char *name = pba_block_node_name(nodes, i);
        if (!name || !is_to_go(access, name, own, all)) {
            continue;
        }
        if (strcmp(name, own) == 0) {
            last = name;
            continue;
        }
        done =
            pba_qmp_run(access->qmp, "blockdev-del", pba_json("{'node-name': <%s>}", name), error);
    }
    return done && (!last || pba_qmp_run(access->qmp, "blockdev-del",
                                         pba_json("{'node-name': <%s>}", last), error));
}

/* What went wrong may go well over a new connection, but for what took its time. A signal handler
 * that died interrupts one command, not the next one too. */
static bool is_worth_a_retry(const GError *error)
{
    return !g_error_matches(error, PBA_ERROR, PBA_ERROR_TIMEOUT);
}

void pba_owner_unmark(PbaAccess *access, bool all)
{
    g_autoptr(GError) error = NULL;

    if (!access->marked) {
        return;
    }
    bool done = delete_marks(access, all, &error);
    if (!done && is_worth_a_retry(error)) {
        g_clear_error(&error);
        pba_qmp_release(access->qmp);
        done = delete_marks(access, all, &error);
    }
    if (!done) {
        pba_log(
            &access->hooks, PBA_LOG_WARN,
            "the marker of this process stays in QEMU, so that other processes cannot set up an "
            "access until it ends: %s",
            error->message); // NOLINT(clang-analyzer-core.NullDereference): set, as done is false
    }
    pba_owner_forget(access);
}

/* Which process has an access to this guest: nodes that only carry a name and a number.
 *
 * The name pba-owner-PID-STARTTIME identifies a process. Its node is the first thing that an access
 * adds, and the last that it deletes. The start time (proc(5), /proc/PID/stat, field 22)
 * distinguishes a process from a later one with the same PID. If a process has several accesses at
 * once, to any guests, the markers of all but one end in a number.
 *
 * The size of the node is a number that depends on the process' place (machine, boot, PID and time
 * namespace) and on the access' target: elsewhere, PIDs and start times mean nothing. One command
 * adds the name and the number, so a marker is always complete. Version 0.1.0 knows the name, and
 * its own markers have no size. A dirty bitmap on the node could carry text, but then a migration
 * that transfers dirty bitmaps loses all bitmaps of the guest, because the target lacks the node
 * (QEMU 7.2 and 10.0).
 *
 * On Proxmox, pba-ending-... says that a success is being committed; it is deleted once QEMU's
 * reply has been handled. */
#include "access.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

#define OWNER_PREFIX "pba-owner-"

/* Accesses of this process that have marked a guest. A marker of this live process is stale if the
 * object of its access has been freed. */
static GMutex marked_lock;
static GPtrArray *marked;

/* QEMU (7.2 to 11.0) rounds sizes up to whole sectors, and cannot represent 2^63 bytes or more. */
#define SECTOR 512u
#define TARGET_BITS 24
#define PLACE_BITS 29

static bool set_place_error(GError **error, const char *what)
{
    pba_error_set(error, PBA_ERROR_SYSTEM,
                  "cannot identify the machine, boot and PID namespace of this process: %s", what);
    return false;
}

/* Another kernel has another boot ID. Start times depend on the time namespace
 * (time_namespaces(7)), which kernels before 5.6 do not have. */
static bool read_place(uint64_t *place, GError **error)
{
    g_autofree char *boot = NULL;
    g_autofree char *self = g_file_read_link("/proc/self", NULL);
    g_autofree char *pids = g_file_read_link("/proc/self/ns/pid", NULL);
    g_autofree char *times = g_file_read_link("/proc/self/ns/time", NULL);
    g_autofree char *pid = g_strdup_printf("%d", (int)getpid());

    if (!g_file_get_contents("/proc/sys/kernel/random/boot_id", &boot, NULL, NULL) || !pids) {
        return set_place_error(error, "/proc has no boot ID or no PID namespace");
    }
    if (g_strcmp0(self, pid) != 0) {
        return set_place_error(error, "the /proc that is mounted is of another PID namespace");
    }
    g_autofree char *text = g_strconcat(boot, pids, times ? times : "", NULL);
    g_autofree char *hash = pba_short_hash(text);
    /* Never 0, which marks version 0.1.0. */
    *place = MAX(g_ascii_strtoull(hash, NULL, 16) >> (32 - PLACE_BITS), 1u);
    return true;
}

static uint64_t place_of(uint64_t size)
{
    return size / SECTOR >> TARGET_BITS;
}

static uint64_t target_bits(const PbaAccess *access)
{
    g_autofree char *hash = pba_short_hash(access->target_id);
    return g_ascii_strtoull(hash, NULL, 16) >> (32 - TARGET_BITS);
}

char *pba_owner_target_key(uint64_t size)
{
    uint64_t mask = ((uint64_t)1 << TARGET_BITS) - 1;

    return size ? g_strdup_printf("%0*" PRIx64, TARGET_BITS / 4, size / SECTOR & mask) : NULL;
}

bool pba_owner_mark_size(const PbaAccess *access, uint64_t *size, GError **error)
{
    uint64_t place;

    if (!read_place(&place, error)) {
        return false;
    }
    *size = ((place << TARGET_BITS) | target_bits(access)) * SECTOR;
    return true;
}

uint64_t pba_owner_node_size(JsonObject *node)
{
    uint64_t size;
    return pba_block_node_size(node, &size, NULL) ? size : 0;
}

bool pba_is_owner_mark(const char *node)
{
    return g_str_has_prefix(node, OWNER_PREFIX);
}

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

/* A marker without a process is of a later version, or damaged. */
static bool parse_mark(PbaOwner *owner)
{
    uint64_t pid;
    uint64_t start;
    uint64_t number = 0;

    if (!pba_is_owner_mark(owner->mark)) {
        return false;
    }
    g_auto(GStrv) words = g_strsplit(owner->mark + strlen(OWNER_PREFIX), "-", 3);
    if (words[0] && g_ascii_string_to_unsigned(words[0], 10, 1, INT_MAX, &pid, NULL) && words[1] &&
        g_ascii_string_to_unsigned(words[1], 10, 0, UINT64_MAX, &start, NULL) &&
        (!words[2] || g_ascii_string_to_unsigned(words[2], 10, 1, UINT_MAX, &number, NULL))) {
        owner->pid = (pid_t)pid;
        owner->start = start;
        owner->number = (unsigned)number;
    }
    return true;
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

/* Whether another access of this process has that number. The caller holds the lock. */
static bool has_number(const PbaAccess *access, unsigned number)
{
    for (guint i = 0; marked && i < marked->len; i++) {
        const PbaAccess *other = marked->pdata[i];
        if (other != access && other->owner == getpid() && other->mark_number == number) {
            return true;
        }
    }
    return false;
}

/* Considers the markers in all guests, because two connections to one monitor cannot be
 * distinguished from connections to two guests. */
static bool is_number_in_use(const PbaAccess *access, unsigned number)
{
    g_mutex_lock(&marked_lock);
    bool taken = has_number(access, number);
    g_mutex_unlock(&marked_lock);
    return taken;
}

/* Whether PIDs and start times of that place mean something here. Those of version 0.1.0 are
 * assumed to be of this place, as it does itself. */
static bool is_this_place(uint64_t size)
{
    uint64_t place;
    return size == 0 || (read_place(&place, NULL) && place_of(size) == place);
}

/* A process that has ended but was not waited for is still in /proc. */
static PbaOwnerState judge(const PbaAccess *access, const PbaOwner *owner)
{
    char state;
    uint64_t now;

    if (owner->pid == 0 || !is_this_place(owner->size)) {
        return PBA_OWNER_UNKNOWN;
    }
    if (!read_stat(owner->pid, &state, &now)) {
        /* A process that /proc hides from us (proc(5), hidepid) may be a later one with that
         * PID. */
        return kill(owner->pid, 0) != 0 && errno != EPERM ? PBA_OWNER_DEAD : PBA_OWNER_UNKNOWN;
    }
    if (now != owner->start || state == 'Z' || state == 'X') {
        return PBA_OWNER_DEAD;
    }
    return owner->pid != getpid() || is_number_in_use(access, owner->number) ? PBA_OWNER_ALIVE
                                                                             : PBA_OWNER_DEAD;
}

bool pba_owner_read(const PbaAccess *access, const char *mark, uint64_t size, PbaOwner *owner)
{
    *owner = (PbaOwner){.mark = mark, .size = size};
    if (!parse_mark(owner)) {
        return false;
    }
    owner->state = judge(access, owner);
    return true;
}

bool pba_owner_at(const PbaAccess *access, JsonArray *nodes, guint index, PbaOwner *owner)
{
    const char *name = pba_block_node_name(nodes, index);

    return name &&
           pba_owner_read(access, name, pba_owner_node_size(pba_json_element(nodes, index)), owner);
}

/* The caller's word decides what cannot be known, but only for the caller's own target. */
static bool counts_as_dead(const PbaAccess *access, const PbaOwner *owner)
{
    uint64_t mask = ((uint64_t)1 << TARGET_BITS) - 1;
    bool forced = owner->state == PBA_OWNER_UNKNOWN && access->options.force &&
                  (owner->size == 0 || (owner->size / SECTOR & mask) == target_bits(access));
    return owner->state == PBA_OWNER_DEAD || forced;
}

bool pba_owner_is_dead(const PbaAccess *access, const char *node, uint64_t size)
{
    PbaOwner owner;

    return pba_owner_read(access, node, size, &owner) && counts_as_dead(access, &owner);
}

char *pba_owner_describe(pid_t pid)
{
    return pid ? g_strdup_printf(
                     "process %d (on another machine, of another boot or PID namespace, or hidden)",
                     (int)pid)
               : g_strdup("the process whose marker is damaged or of a later version");
}

static bool refuse_owner(const PbaAccess *access, const PbaOwner *owner, GError **error)
{
    if (owner->state == PBA_OWNER_ALIVE) {
        pba_error_set(error, PBA_ERROR_STATE,
                      "previous backup of this guest not finished: process %d is already backing "
                      "it up",
                      (int)owner->pid);
        return false;
    }
    g_autofree char *process = pba_owner_describe(owner->pid);
    pba_error_set(error, PBA_ERROR_STATE,
                  "previous backup of this guest not finished: this host cannot tell whether %s "
                  "still runs - if it has ended, call recover with force for its target-id",
                  process);
    if (access->options.force) {
        pba_error_add_hint(error, "it belongs to another target-id than the one given");
    }
    return false;
}

/* If there are several markers, one of a live process decides, or else one of a process that cannot
 * be judged. */
bool pba_owner_check(const PbaAccess *access, JsonArray *nodes, GError **error)
{
    PbaOwner worst = {.state = PBA_OWNER_DEAD};
    PbaOwner owner;

    for (guint i = 0; i < json_array_get_length(nodes); i++) {
        if (pba_owner_at(access, nodes, i, &owner) && !counts_as_dead(access, &owner) &&
            owner.state > worst.state) {
            worst = owner;
        }
    }
    return worst.state == PBA_OWNER_DEAD || refuse_owner(access, &worst, error);
}

bool pba_owner_find(const PbaAccess *access, JsonArray *nodes, bool *found, GError **error)
{
    uint64_t place;
    g_autofree char *name = pba_owner_mark_name(access, error);
    *found = false;
    if (!name || !read_place(&place, error)) {
        return false;
    }
    for (guint i = 0; i < json_array_get_length(nodes); i++) {
        *found |= g_strcmp0(pba_block_node_name(nodes, i), name) == 0 &&
                  place_of(pba_owner_node_size(pba_json_element(nodes, i))) == place;
    }
    return true;
}

void pba_owner_set_gone_error(const PbaAccess *access, GError **error)
{
    pba_error_set(error, PBA_ERROR_STATE,
                  "the access for target '%s' no longer exists in QEMU - the VM was restarted, or "
                  "another process has undone the access",
                  access->target_id);
}

bool pba_owner_require(PbaAccess *access, JsonArray *nodes, GError **error)
{
    bool found;

    if (!pba_owner_find(access, nodes, &found, error) || found) {
        return found;
    }
    if (access->phase != PBA_PHASE_GONE) {
        pba_access_enter(access, PBA_PHASE_GONE);
    }
    pba_owner_set_gone_error(access, error);
    return false;
}

bool pba_owner_require_now(PbaAccess *access, GError **error)
{
    g_autoptr(JsonArray) nodes = pba_block_query_nodes(access->qmp, error);
    return nodes && pba_owner_require(access, nodes, error);
}

bool pba_owner_holds(PbaAccess *access)
{
    g_autoptr(JsonArray) nodes = pba_block_query_nodes(access->qmp, NULL);
    bool found;

    return nodes && pba_owner_find(access, nodes, &found, NULL) && found;
}

void pba_owner_note(PbaAccess *access)
{
    g_mutex_lock(&marked_lock);
    marked = marked ? marked : g_ptr_array_new();
    for (access->mark_number = 0; has_number(access, access->mark_number);) {
        access->mark_number++;
    }
    g_ptr_array_add(marked, access);
    g_mutex_unlock(&marked_lock);
    pba_access_enter(access, PBA_PHASE_CLAIMED);
}

void pba_owner_forget(PbaAccess *access)
{
    g_mutex_lock(&marked_lock);
    if (marked) {
        g_ptr_array_remove(marked, access);
    }
    g_mutex_unlock(&marked_lock);
}

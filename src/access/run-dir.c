/* The private directory of an access. */
#include "access.h"
#include "src/base/base.h"
#include "vfile.h"
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define SOCKET_NAME "nbd.sock"
#define HIDDEN_NAME "nbd.end"
/* Contains the target-id, because names only contain a hash of it. */
#define TARGET_NAME "target"
/* Identify the owner, by the name and the number of its process' marker. */
#define OWNER_NAME "owner"
#define PLACE_NAME "place"

static char *default_run_dir(void)
{
    if (geteuid() == 0) {
        return g_strdup("/run/pve-backup-access");
    }
    const char *runtime_dir = g_getenv("XDG_RUNTIME_DIR");
    if (runtime_dir && g_path_is_absolute(runtime_dir)) {
        return g_build_filename(runtime_dir, "pve-backup-access", NULL);
    }
    return g_strdup_printf("/tmp/pve-backup-access-%u", (unsigned)geteuid());
}

static bool set_system_error(GError **error, const char *what, const char *path)
{
    pba_error_set(error, PBA_ERROR_SYSTEM, "cannot %s run directory '%s' - %s", what, path,
                  g_strerror(errno));
    return false;
}

static bool is_private_dir(const char *path)
{
    struct stat status;
    return lstat(path, &status) == 0 && S_ISDIR(status.st_mode) && status.st_uid == geteuid() &&
           !(status.st_mode & 022);
}

/* Creates or reuses the directory. An existing one must be the caller's own, and no other user may
 * write to it, because otherwise its content could be swapped. */
static bool ensure_private_dir(const char *path, GError **error)
{
    if (mkdir(path, 0700) != 0 && errno != EEXIST) {
        return set_system_error(error, "make", path);
    }
    if (!is_private_dir(path)) {
        pba_error_set(
            error, PBA_ERROR_SYSTEM,
            "run directory '%s' does not belong to this user, or others may write to it - "
            "change that, or give another run-dir",
            path);
        return false;
    }
    return true;
}

/* The parent of all socket directories: a real path. */
static char *find_run_dir(const PbaAccess *access, GError **error)
{
    g_autofree char *given =
        access->options.run_dir ? g_strdup(access->options.run_dir) : default_run_dir();

    for (size_t length = strlen(given); length > 1 && given[length - 1] == '/'; length--) {
        given[length - 1] = '\0';
    }
    g_autofree char *above = g_path_get_dirname(given);
    g_autofree char *name = g_path_get_basename(given);
    g_autofree char *real = pba_trusted_dir("the directory of the run directory", above, error);
    return real ? g_build_filename(real, name, NULL) : NULL;
}

static bool socket_path_fits(const char *path, GError **error)
{
    struct sockaddr_un address;
    if (strlen(path) < sizeof(address.sun_path)) {
        return true;
    }
    pba_error_set(error, PBA_ERROR_ARGUMENT,
                  "NBD socket path '%s' is longer than %zu bytes - give a shorter 'run-dir'", path,
                  sizeof(address.sun_path) - 1);
    return false;
}

/* A failure does not matter: without this note, the directory counts as that of a dead process. */
static void note(const char *dir, const char *name, const char *text)
{
    g_autofree char *path = g_build_filename(dir, name, NULL);
    g_file_set_contents_full(path, text, -1, G_FILE_SET_CONTENTS_NONE, 0600, NULL);
}

bool pba_run_dir_make(PbaAccess *access, GError **error)
{
    g_autofree char *parent = find_run_dir(access, error);
    if (!parent) {
        return false;
    }
    g_autofree char *name = pba_own_name(access->target_id, "run", access->identity);
    g_autofree char *path = g_strdup_printf("%s/%s-XXXXXX", parent, name);
    g_autofree char *longest = g_build_filename(path, SOCKET_NAME, NULL);

    if (!socket_path_fits(longest, error) || !ensure_private_dir(parent, error)) {
        return false;
    }
    /* Each access gets a new directory, so that a socket is never reused. */
    if (!g_mkdtemp_full(path, 0700)) {
        return set_system_error(error, "make", path);
    }
    g_autofree char *mark = pba_owner_mark_name(access, NULL);
    uint64_t size = 0;
    pba_owner_mark_size(access, &size, NULL);
    g_autofree char *place = g_strdup_printf("%" PRIu64, size);
    note(path, PLACE_NAME, place);
    note(path, OWNER_NAME, mark ? mark : "");
    note(path, TARGET_NAME, access->target_id);
    if (!pba_user_open_dir(access, path)) {
        return set_system_error(error, "open to QEMU's user", path);
    }
    access->socket = g_build_filename(path, SOCKET_NAME, NULL);
    access->socket_dir = g_steal_pointer(&path);
    return true;
}

static void rename_in(const char *dir, const char *from, const char *to)
{
    g_autofree char *old = g_build_filename(dir, from, NULL);
    g_autofree char *new = g_build_filename(dir, to, NULL);

    /* If this fails, the name stays as it is, and clients can connect. */
    rename(old, new);
}

void pba_run_dir_hide_socket(const char *path)
{
    rename_in(path, SOCKET_NAME, HIDDEN_NAME);
}

void pba_run_dir_show_socket(const char *path)
{
    rename_in(path, HIDDEN_NAME, SOCKET_NAME);
}

static bool remove_dir(const char *path)
{
    g_autofree char *socket = g_build_filename(path, SOCKET_NAME, NULL);
    g_autofree char *hidden = g_build_filename(path, HIDDEN_NAME, NULL);
    g_autofree char *target = g_build_filename(path, TARGET_NAME, NULL);
    g_autofree char *owner = g_build_filename(path, OWNER_NAME, NULL);
    g_autofree char *place = g_build_filename(path, PLACE_NAME, NULL);
    g_autofree char *guard = g_build_filename(path, PBA_GUARD_NAME, NULL);

    unlink(guard);
    unlink(target);
    unlink(owner);
    unlink(place);
    unlink(socket);
    unlink(hidden);
    return rmdir(path) == 0;
}

void pba_run_dir_remove(PbaAccess *access)
{
    if (access->socket_dir) {
        remove_dir(access->socket_dir);
    }
    g_clear_pointer(&access->socket_dir, g_free);
    g_clear_pointer(&access->socket, g_free);
}

void pba_run_dir_disown(PbaAccess *access)
{
    g_autofree char *owner = g_build_filename(access->socket_dir, OWNER_NAME, NULL);

    unlink(owner);
    g_clear_pointer(&access->socket_dir, g_free);
    g_clear_pointer(&access->socket, g_free);
}

/* Whether it is pba-ROLE-TARGET-GUEST-XXXXXX, of any target and guest. */
static bool has_role_name(const char *name, const char *role)
{
    g_autofree char *prefix = g_strdup_printf("pba-%s-", role);
    size_t to_guest = strlen(prefix) + PBA_HASH_LENGTH + 1;
    size_t to_end = to_guest + PBA_HASH_LENGTH;

    return strlen(name) == to_end + strlen("-XXXXXX") && g_str_has_prefix(name, prefix) &&
           name[to_guest - 1] == '-' && name[to_end] == '-';
}

/* A client by socket and one by code ref name their directories differently. The marker that is
 * noted there tells whose it is. */
static bool is_of_guest(const PbaAccess *access, const PbaBlock *block, const char *path)
{
    g_autofree char *guest = pba_short_hash(access->identity);
    const char *key = pba_run_dir_key(path);

    if (g_str_has_prefix(key + PBA_HASH_LENGTH + 1, guest)) {
        return true;
    }
    g_autofree char *mark = block ? pba_run_dir_mark(path) : NULL;
    return mark && pba_block_find_node(block, mark);
}

/* Owned by this user, or handed over to QEMU's user by pba_user_give_file or pba_user_open_dir. */
static bool is_own(const PbaAccess *access, const struct stat *status)
{
    bool is_file = S_ISREG(status->st_mode);
    mode_t mode = status->st_mode & 01077;

    return (status->st_uid == geteuid() && (!(mode & 077) || (mode == 01030 && !is_file))) ||
           (access->has_qemu_user && is_file && status->st_uid == access->qemu_uid &&
            !(mode & 077));
}

/* Appends the directory's entries with such a name that belong to this user. */
static void find_stale_in(const PbaAccess *access, const PbaBlock *block, GPtrArray *paths,
                          const char *parent, const char *role, mode_t type)
{
    GDir *dir = g_dir_open(parent, 0, NULL);
    const char *name;

    while (dir && (name = g_dir_read_name(dir))) {
        g_autofree char *path = g_build_filename(parent, name, NULL);
        struct stat status;
        if (has_role_name(name, role) && lstat(path, &status) == 0 &&
            (status.st_mode & S_IFMT) == type && is_own(access, &status) &&
            is_of_guest(access, block, path)) {
            g_ptr_array_add(paths, g_steal_pointer(&path));
        }
    }
    g_clear_pointer(&dir, g_dir_close);
}

GPtrArray *pba_run_dir_find_stale(const PbaAccess *access, const PbaBlock *block)
{
    GPtrArray *paths = g_ptr_array_new_with_free_func(g_free);
    g_autofree char *parent = find_run_dir(access, NULL);
    g_autofree char *fleecing =
        access->options.fleecing_dir
            ? pba_trusted_dir("fleecing-dir", access->options.fleecing_dir, NULL)
            : NULL;

    if (parent && is_private_dir(parent)) {
        find_stale_in(access, block, paths, parent, "run", S_IFDIR);
    }
    if (fleecing) {
        find_stale_in(access, block, paths, fleecing, "fleece", S_IFREG);
    }
    return paths;
}

const char *pba_run_dir_key(const char *path)
{
    const char *name = strrchr(path, '/') + 1;
    return strchr(name + strlen("pba-"), '-') + 1;
}

char *pba_run_dir_target(const char *path)
{
    g_autofree char *file = g_build_filename(path, TARGET_NAME, NULL);
    char *target = NULL;

    if (g_file_get_contents(file, &target, NULL, NULL) && !g_utf8_validate(target, -1, NULL)) {
        g_clear_pointer(&target, g_free);
    }
    return target;
}

char *pba_run_dir_mark(const char *path)
{
    g_autofree char *owner = g_build_filename(path, OWNER_NAME, NULL);
    char *mark = NULL;

    g_file_get_contents(owner, &mark, NULL, NULL);
    return mark;
}

/* The PID of the process that made the directory; 0: it is dead, or the directory does not say. */
static pid_t live_owner(const PbaAccess *access, const char *path)
{
    g_autofree char *place = g_build_filename(path, PLACE_NAME, NULL);
    g_autofree char *mark = pba_run_dir_mark(path);
    g_autofree char *number = NULL;
    PbaOwner found;

    if (!mark) {
        return 0;
    }
    g_file_get_contents(place, &number, NULL, NULL);
    uint64_t size = number ? g_ascii_strtoull(number, NULL, 10) : 0;
    return pba_owner_read(access, mark, size, &found) && !pba_owner_is_dead(access, mark, size)
               ? found.pid
               : 0;
}

bool pba_run_dir_is_live(const PbaAccess *access, const char *path)
{
    return live_owner(access, path) != 0;
}

/* The socket in such a directory, owned by the caller; NULL if it is not such a directory. */
static char *find_socket(const char *path)
{
    g_autofree char *socket = g_build_filename(path, SOCKET_NAME, NULL);
    struct sockaddr_un address;

    return g_file_test(path, G_FILE_TEST_IS_DIR) && strlen(socket) < sizeof(address.sun_path)
               ? g_steal_pointer(&socket)
               : NULL;
}

pid_t pba_run_dir_live_server(const PbaAccess *access)
{
    g_autoptr(GPtrArray) paths = pba_run_dir_find_stale(access, NULL);

    for (guint i = 0; i < paths->len; i++) {
        const char *path = paths->pdata[i];
        g_autofree char *socket = find_socket(path);
        bool is_others = socket && g_strcmp0(path, access->socket_dir) != 0;
        pid_t pid = is_others ? live_owner(access, path) : 0;
        if (pid && pba_socket_answers(socket)) {
            return pid;
        }
    }
    return 0;
}

char *pba_run_dir_stale_server(const char *path)
{
    g_autofree char *socket = find_socket(path);

    /* A process may have died while the socket was hidden. */
    pba_run_dir_show_socket(path);
    return socket && pba_socket_answers(socket) ? g_steal_pointer(&socket) : NULL;
}

bool pba_run_dir_remove_stale(const char *path)
{
    g_autofree char *socket = find_socket(path);

    if (!socket) {
        return unlink(path) == 0;
    }
    pba_vfiles_remove_stale(path);
    return remove_dir(path);
}

/* What the parts of an access share. */
#ifndef PBA_SRC_ACCESS_H
#define PBA_SRC_ACCESS_H

#include "src/pba.h"
#include "src/qemu/qemu.h"
#include <sys/types.h>

/* Bytes that one bit of our bitmaps stands for; also the cluster size of copy-before-write. */
#define PBA_GRANULARITY 65536u

/* One disk of an access: the request, what QEMU has, and what we have made. */
typedef struct {
    char *device;
    char *key; /* hash of the device: the names of our objects contain it */
    PbaBitmapMode mode;
    char *base;      /* ID of the backup that its bitmap must be relative to; NULL: none */
    char *base_disk; /* the identity by which base was found; NULL: base was found by name */
    char *identity;  /* see PbaBackend */
    char *reason;    /* why its bitmap is not used; NULL: it is used, or there is none */

    char *qdev;        /* ID or QOM path of the guest device; NULL: none */
    char *root_node;   /* what the guest device used before setup */
    char *bitmap_node; /* the node with the bitmaps: below filters */
    uint64_t size;
    bool read_only;
    bool audit; /* everything is read, and the old bitmap is exported beside it */

    char *snapshot_node; /* NULL until setup is done */
    char *bitmap_name;   /* NULL without a bitmap */
    PbaBitmapAction action;
    char *audit_bitmap; /* the audit's copy of the old bitmap; NULL: no audit */
    uint64_t dirty;     /* bytes that the bitmap marks as dirty, if is_counted */
    bool is_counted;    /* QEMU has told that exactly */

    char *hold_node;  /* above root_node */
    char *guard_node; /* above another one: see guard.c */
    char *fleecing_node;
    uint64_t cluster; /* the unit in which the fleecing image frees space; 0: unknown */

    bool device_gone; /* in recovery: no device or node in QEMU has this key any more */

    void *backend_data; /* the backend's own data; NULL: none yet */
    GDestroyNotify free_backend_data;
} PbaDisk;

typedef struct PbaBackend PbaBackend;

/* How far an access is. The state of QEMU itself is always queried. */
typedef enum {
    PBA_PHASE_NEW,       /* nothing of the access exists */
    PBA_PHASE_CLAIMED,   /* its marker may be in QEMU, and nothing else of it */
    PBA_PHASE_CHANGING,  /* setup, or the recovery of a dead process' access, has begun */
    PBA_PHASE_PREPARED,  /* everything that can be done before the instant is done */
    PBA_PHASE_CUT,       /* the instant has passed, and setup is not complete yet */
    PBA_PHASE_UP,        /* setup is done */
    PBA_PHASE_EXPORTING, /* some of the exports may exist */
    PBA_PHASE_EXPORTED,  /* all of the exports exist */
    PBA_PHASE_ENDING,    /* it is being torn down */
    PBA_PHASE_STUCK,     /* a step failed: teardown can be tried again, as after a failure */
    PBA_PHASE_COMMITTED, /* the bitmaps are as after a success, whatever else happens */
    PBA_PHASE_ENDED,     /* the bitmaps are as after a failure, and everything else is undone */
    PBA_PHASE_GONE,      /* its marker is not in QEMU any more: what is there belongs to others */
    PBA_PHASE_COUNT,
} PbaPhase;

/* Which phase may follow which. Pure. */
bool pba_phase_may_follow(PbaPhase from, PbaPhase to);
const char *pba_phase_name(PbaPhase phase);

/* Whether its bitmaps have companions, which identify the backup that they are relative to. */
typedef enum {
    PBA_TIED_NO,
    PBA_TIED_YES,     /* all of them */
    PBA_TIED_UNKNOWN, /* the access of a dead process: some may, or none */
} PbaTied;

struct PbaAccess {
    pid_t owner;
    PbaPhase phase; /* set by pba_access_enter only */
    PbaQmp *qmp;    /* borrowed */
    PbaHooks hooks;

    const char *target_id;    /* an option; NULL: the access can only observe */
    char *identity;           /* of the guest: from the options, or from QEMU */
    PbaAccessOptions options; /* as the caller gave them */
    GStringChunk *texts;      /* of the options */

    const PbaBackend *backend; /* NULL: not chosen yet */
    PbaCapabilities qemu;      /* what QEMU reported when the backend was chosen */
    char *guest;               /* the guest's UUID; NULL: not queried */
    uid_t qemu_uid;            /* if has_qemu_user */
    gid_t qemu_gid;
    bool has_qemu_user; /* root serves a QEMU that runs as another user */

    bool is_recovery; /* represents a dead process' access: only names show its target */
    PbaTied tied;
    bool has_exported;    /* its exports may exist, under the names of this access */
    unsigned mark_number; /* distinguishes its marker from those of the process' other accesses */
    char *backup_id;      /* ID that its bitmaps get after a success; NULL: none */
    PbaBlock seen; /* QEMU before setup, if nothing had to be undone; in setup, before the cut */
    JsonObject *migration; /* the reply to query-migrate before setup */
    bool was_prelaunch;    /* then the guest had not run since QEMU's start or a reset */
    GPtrArray *warnings;   /* lines of the last check of its fleecing images */
    GPtrArray *disks;      /* PbaDisk */
    char *nonce;           /* of this setup; NULL: none yet, or the access is a dead process' */
    char *end_mark;        /* the node that says that a success is being committed; NULL: none */
    char *socket_dir;      /* NULL: not created */
    char *socket; /* the path of the NBD server's socket in that directory, whether the server runs
                     or not */
    GPtrArray *vfiles;  /* PbaVfile, one for each disk; NULL: none was requested */
    bool serves_files;  /* all of them can be opened */
    void *backend_data; /* the backend's own data, freed by g_free; NULL: none */
};

/* Changes the phase. Every change goes through this function, which checks it. */
void pba_access_enter(PbaAccess *access, PbaPhase phase);
/* Logs the lines that say what recovery has undone. */
void pba_access_log_lines(const PbaAccess *access, const GPtrArray *lines);

/* Frees a PbaDisk; can be passed to g_ptr_array_new_with_free_func. */
void pba_disk_free(gpointer disk);
/* Sets the error that no device or node has the requested name of the disk, with the names that
 * there are. Returns false. */
bool pba_disk_set_unknown_error(const PbaBlock *block, GError **error);
/* The name of one of our objects for the access' target and this disk: pba-ROLE-TARGET-KEY. */
char *pba_disk_name(const PbaAccess *access, const char *role, const PbaDisk *disk);
bool pba_node_delete(PbaAccess *access, const char *node, GError **error);
/* Deletes a node of the disk, as a step of undoing that has failed with *first so far, if block has
 * it. The node may be NULL. Does nothing if QEMU cannot be reached any more. */
void pba_disk_drop_node(PbaAccess *access, GError **first, const PbaBlock *block,
                        const PbaDisk *disk, const char *node);
bool pba_check_utf8(const char *name, const char *value, GError **error);
bool pba_access_require_up(const PbaAccess *access, GError **error);
bool pba_access_require_down(const PbaAccess *access, GError **error);
/* Creates an access without a target, which can only observe. */
PbaAccess *pba_access_new_observer(PbaQmp *qmp, const PbaAccessOptions *options,
                                   const PbaHooks *hooks, GError **error);

/* Copies what another access has found out about the same QEMU. */
void pba_access_know(PbaAccess *access, const PbaAccess *known);

/* Fleecing images, by their nodes in the reply to query-named-block-nodes */

/* Whether the file system that holds the image is known, and how much of it is free. */
bool pba_fleecing_space(JsonObject *node, const char *path, uint64_t *free_bytes,
                        bool *is_nearly_full);
/* A line with the warning; the caller frees it. */
char *pba_fleecing_warning(const char *device, const char *path, uint64_t free_bytes);
/* Checks the space of the fleecing images and notes the warnings. */
void pba_fleecing_check(PbaAccess *access, JsonArray *nodes);

/* Markers in QEMU: which process has an access */

/* What is known about the process of a marker. */
typedef enum {
    PBA_OWNER_DEAD,
    PBA_OWNER_UNKNOWN, /* of another machine, boot or PID namespace, or hidden: see owner.c */
    PBA_OWNER_ALIVE,
} PbaOwnerState;

/* What a marker says. */
typedef struct {
    const char *mark; /* the name of the node, borrowed */
    uint64_t size;
    pid_t pid;       /* 0: the name does not contain one */
    uint64_t start;  /* of the process */
    unsigned number; /* of the access; not written if 0 */
    PbaOwnerState state;
} PbaOwner;

bool pba_is_owner_mark(const char *node);
/* The name of this access' marker node; the caller frees it. */
char *pba_owner_mark_name(const PbaAccess *access, GError **error);
/* The marker's number: it depends on the process' place and on the target. */
bool pba_owner_mark_size(const PbaAccess *access, uint64_t *size, GError **error);
/* The number of a marker in the reply to query-named-block-nodes. */
uint64_t pba_owner_node_size(JsonObject *node);
/* Refuses if another process, or another access of this one, has marked the guest and is not known
 * to be dead. nodes is the reply to query-named-block-nodes. */
bool pba_owner_check(const PbaAccess *access, JsonArray *nodes, GError **error);
/* Refuses, and enters the phase gone, if the marker of this access is not among the nodes. */
bool pba_owner_require(PbaAccess *access, JsonArray *nodes, GError **error);
void pba_owner_set_gone_error(const PbaAccess *access, GError **error);
/* The same with the nodes that QEMU has now. */
bool pba_owner_require_now(PbaAccess *access, GError **error);
/* Whether the marker of this access is among the nodes. Does not change the phase. */
bool pba_owner_find(const PbaAccess *access, JsonArray *nodes, bool *found, GError **error);
/* Whether QEMU can be queried, and has the marker of this access. Does not change the phase. */
bool pba_owner_holds(PbaAccess *access);
/* Claims the guest for this access, unless another one was faster. nodes, if not NULL, is replaced
 * by a new reference to what QEMU has with the marker. */
bool pba_owner_mark(PbaAccess *access, JsonArray **nodes, GError **error);
/* Adds a node that does nothing: its name is the marker. */
bool pba_mark_add(PbaAccess *access, const char *name, uint64_t size, GError **error);
/* Removes our marker; in recovery, with all, also the markers of dead processes and those of this
 * target's devices and of its end. Does nothing if our marker has been removed already. A failure
 * is only logged, because only a later access depends on it. */
void pba_owner_unmark(PbaAccess *access, bool all);
/* Notes in this process that the access is about to mark a guest, and enters the phase claimed; or
 * removes the note. */
void pba_owner_note(PbaAccess *access);
void pba_owner_forget(PbaAccess *access);
/* False if it is not a marker. */
bool pba_owner_read(const PbaAccess *access, const char *mark, uint64_t size, PbaOwner *owner);
/* The same for a node of the reply to query-named-block-nodes. */
bool pba_owner_at(const PbaAccess *access, JsonArray *nodes, guint index, PbaOwner *owner);
/* Describes a process that cannot be judged, for a message; the caller frees it. */
char *pba_owner_describe(pid_t pid);
/* The beginning of the key of the marker's target, as far as its number contains it; the caller
 * frees it. NULL: nothing. */
char *pba_owner_target_key(uint64_t size);
/* Whether recovery undoes it. */
bool pba_owner_is_dead(const PbaAccess *access, const char *node, uint64_t size);

/* Refuses if one of the guest's devices has changed since setup looked: one query. */
bool pba_access_look_again(PbaAccess *access, GError **error);

/* Looks for leftovers of a dead process' access to this target; *is_stale says whether there are
 * any. Refuses if they must not be undone, or if a process is active. */
bool pba_recover_look(PbaAccess *access, PbaBlock *block, bool *is_stale, GError **error);
/* Undoes them. block gets QEMU's state afterwards. Appends lines that say what was done. */
bool pba_recover_undo(PbaAccess *access, PbaBlock *block, GPtrArray *lines, GError **error);
/* Notes that setup or recovery changes, or has changed, something other than markers in QEMU. */
void pba_access_begin_changes(PbaAccess *access);
/* No access is active any more: clears its state. */
void pba_access_end(PbaAccess *access);
/* The common end of every access: undoes everything that can be undone. */
bool pba_tear_down_and_end(PbaAccess *access, bool success, GError **error);

/* Checks for effects of other programs; these functions change nothing. The first one checks that
 * the guest is on this host and stays here, and that its disks are fit for an access. */
bool pba_company_check_here(PbaAccess *access, GError **error);
/* Whether its disks still belong to this QEMU, after setup. */
bool pba_company_check_still_here(PbaAccess *access, GError **error);
bool pba_company_check_disks(PbaAccess *access, const PbaBlock *block, GError **error);
/* Checks again with QEMU's current state: others may have begun something since the disks were
 * seen. */
bool pba_company_check_again(PbaAccess *access, GError **error);
/* The same, but only if a job has begun. Its query is small, for a guest that is frozen. */
bool pba_company_check_jobs(PbaAccess *access, GError **error);

/* Nodes that keep the disks, and protect them from other programs: see guard.c */

/* Fills in the names of the disk's guards. */
void pba_guards_name(const PbaAccess *access, PbaDisk *disk);
/* Adds a node above each disk's root node, and one above another node of the disk, which may be the
 * same. */
typedef const char *(*PbaGuarded)(const PbaDisk *disk);
bool pba_guards_add(PbaAccess *access, PbaGuarded guarded, GError **error);
/* QEMU's path of the guards' image; the caller frees it. */
char *pba_guards_image(const PbaAccess *access);
/* Deletes the guards that are in block, as the last step of a teardown, whose first error so far is
 * *first. */
void pba_guards_drop(PbaAccess *access, GError **first, const PbaBlock *block);
/* Whether the disk's nodes cannot be deleted. */
bool pba_guard_holds(const PbaDisk *disk, const PbaBlock *block);

/* Notes the user that QEMU runs as, if this process is root and QEMU is not. */
void pba_user_note(PbaAccess *access);
/* Lets QEMU open a file that this process has made, and create a socket in such a directory. */
bool pba_user_give_file(const PbaAccess *access, int fd);
bool pba_user_open_dir(const PbaAccess *access, const char *dir);
/* QEMU's path of a file in the access' private directory, or of a fleecing image; the caller frees
 * it. */
char *pba_user_run_path(const PbaAccess *access, const char *path);
char *pba_user_fleecing_path(const PbaAccess *access, const char *path);
/* Adds QEMU's user to an error that is due to missing permissions. */
void pba_user_add_hint(const PbaAccess *access, GError **error);

/* Which backup the bitmaps are relative to */

/* The name of the target's bitmap; the caller frees it. */
char *pba_access_bitmap(const PbaAccess *access);
/* Whether bitmaps of the access may have companions (tied), or may have none. For a dead process'
 * access, both. */
bool pba_tie_may_be(const PbaAccess *access, bool tied);
/* Queries QEMU's guest if bitmaps are tied to it. */
bool pba_tie_ask_guest(PbaAccess *access, GError **error);
/* The companion that the disk's bitmap has if it is relative to that backup; borrows all
 * arguments. */
PbaCompanion pba_disk_companion(const PbaAccess *access, const PbaDisk *disk, const char *id);
/* Whether the target's bitmap is relative to the disk's base; if not, sets the disk's reason. */
bool pba_tie_fits(const PbaAccess *access, PbaDisk *disk, const PbaBlock *block);
/* Says why an existing bitmap is not used. */
void pba_tie_log_reason(const PbaAccess *access, const PbaDisk *disk);

/* Audits */

/* Copies the bitmaps to be audited, which are then started anew; before the backend prepares. */
bool pba_audit_begin(PbaAccess *access, const PbaBlock *block, GError **error);
/* Freezes the copies after the instant, because a reader must not see them change. */
bool pba_audit_freeze(PbaAccess *access, GError **error);
/* Removes the copies, if there are any in block, also those of a dead process, after the exports.
 */
bool pba_audit_end(PbaAccess *access, const PbaBlock *block, GError **error);

/* In the directory of the NBD socket, see guard.c. */
#define PBA_GUARD_NAME "guard"
/* The directory of the NBD socket: private, and made without following another user's links. */
bool pba_run_dir_make(PbaAccess *access, GError **error);
void pba_run_dir_remove(PbaAccess *access);
/* Leaves the directory to recovery, as if its process were dead. */
void pba_run_dir_disown(PbaAccess *access);
/* The PID of another live process, not the given one, with an access to this guest whose NBD server
 * listens; 0: there is none. */
pid_t pba_run_dir_live_server(const PbaAccess *access);
/* The socket directories and fleecing images of accesses to this guest, of all targets; paths,
 * which the caller frees. block: also directories whose owner's marker is a node there; or NULL. */
GPtrArray *pba_run_dir_find_stale(const PbaAccess *access, const PbaBlock *block);
/* The hash of the target in such a path, and the target's name that is stored in the directory
 * (owned by the caller, NULL if there is none). */
const char *pba_run_dir_key(const char *path);
char *pba_run_dir_target(const char *path);
/* The name of the owner's marker, which the caller frees; NULL: the directory does not say. */
char *pba_run_dir_mark(const char *path);
/* Whether the access may belong to a live process: to one that backs up another guest with the same
 * identity, or one whose QEMU has ended. */
bool pba_run_dir_is_live(const PbaAccess *access, const char *path);
/* The socket at which QEMU still listens in the directory of a dead process; the caller frees it;
 * NULL: there is none. */
char *pba_run_dir_stale_server(const char *path);
bool pba_run_dir_remove_stale(const char *path);
/* Renames the socket in the directory, so that no client finds it; or gives it back its name. */
void pba_run_dir_hide_socket(const char *path);
void pba_run_dir_show_socket(const char *path);

/* Unmounts the virtual files and ends their servers. A later call retries the steps that failed. */
bool pba_vfiles_end(PbaAccess *access, GError **error);
/* Frees the local data of the virtual files. */
void pba_vfiles_free(PbaAccess *access);

bool pba_nbd_server_start(PbaAccess *access, GError **error);
/* Whether there is an export of any access, of this or of another process. */
bool pba_exports_find_any(PbaAccess *access, bool *found, GError **error);
/* Removes our exports, and waits until they are gone. is_shared: whether another program has
 * exports on our NBD server. */
bool pba_exports_remove(PbaAccess *access, bool *is_shared, GError **error);
/* Whether our NBD server runs. Connects to it: see undo_rest in teardown.c. */
bool pba_nbd_server_is_up(const PbaAccess *access);
/* Stops our NBD server, unless it is shared. The caller has just seen our marker. */
bool pba_nbd_server_stop(PbaAccess *access, bool is_shared, GError **error);

#endif

/* What the parts of an access share. */
#ifndef PBA_SRC_ACCESS_H
#define PBA_SRC_ACCESS_H

#include "src/pba.h"
#include "src/qemu/qemu.h"
#include <sys/types.h>

/* Bytes a bit of our bitmaps stands for: copy-before-write's cluster, too. */
#define PBA_GRANULARITY 65536u

/* One disk of an access: what was asked for, what QEMU has, what we made of it. */
typedef struct {
    char *device;
    char *key; /* hash of the device: what names of ours are made from */
    PbaBitmapMode mode;
    char *base;      /* id of the backup that its bitmap has to be relative to; NULL: none */
    char *base_disk; /* the identity by which it was found; NULL: by its name */
    char *identity;  /* see PbaBackend */
    char *reason;    /* why its bitmap is not used; NULL: it is, or there is none */

    char *qdev;        /* id or QOM path of the guest device; NULL: none */
    char *root_node;   /* what the guest device used before setup */
    char *bitmap_node; /* where the bitmaps are: below filters */
    uint64_t size;
    bool read_only;
    bool audit; /* all is to be read, and what its bitmap had told beside it */

    char *snapshot_node; /* NULL until setup is done */
    char *bitmap_name;   /* NULL without a bitmap */
    PbaBitmapAction action;
    char *audit_bitmap; /* what the one before it had; NULL: no audit */

    char *hold_node;  /* above root_node */
    char *guard_node; /* above another one: see guard.c */
    char *fleecing_node;
    uint64_t cluster; /* that the fleecing image frees as a whole; 0: not known */

    bool device_gone; /* recovering: QEMU has nothing any more that the key is a hash of */

    void *backend_data; /* what the backend alone knows of it; NULL: nothing yet */
    GDestroyNotify free_backend_data;
} PbaDisk;

typedef struct PbaBackend PbaBackend;

/* How far an access is. What there is in QEMU is read off QEMU. */
typedef enum {
    PBA_PHASE_NEW,       /* none is up; nothing of it is anywhere */
    PBA_PHASE_CLAIMED,   /* QEMU may have its marker, and nothing else of it */
    PBA_PHASE_CHANGING,  /* setup, or the recovery of a dead process' access, has begun */
    PBA_PHASE_PREPARED,  /* all that may come before the instant is there */
    PBA_PHASE_CUT,       /* the instant was, and setup is not done yet */
    PBA_PHASE_UP,        /* setup is done */
    PBA_PHASE_EXPORTING, /* some of the exports may be there */
    PBA_PHASE_EXPORTED,  /* all of them are */
    PBA_PHASE_ENDING,    /* it is being torn down */
    PBA_PHASE_STUCK,     /* that went wrong: it can be tried again, as after a failure */
    PBA_PHASE_COMMITTED, /* the bitmaps are as after a success, whatever else happens */
    PBA_PHASE_ENDED,     /* the bitmaps are as after a failure, and all else is undone */
    PBA_PHASE_GONE,      /* its marker is no more in QEMU: what is there is of others */
    PBA_PHASE_COUNT,
} PbaPhase;

/* Which phase may follow which. Pure. */
bool pba_phase_may_follow(PbaPhase from, PbaPhase to);
const char *pba_phase_name(PbaPhase phase);

/* Whether its bitmaps have companions, which tell the backup that they are relative to. */
typedef enum {
    PBA_TIED_NO,
    PBA_TIED_YES,     /* all of them */
    PBA_TIED_UNKNOWN, /* of a dead process' access: either may be there */
} PbaTied;

struct PbaAccess {
    pid_t owner;
    PbaPhase phase; /* set by pba_access_enter only */
    PbaQmp *qmp;    /* borrowed */
    PbaHooks hooks;

    const char *target_id;    /* one of the options; NULL: it is an observer's */
    char *identity;           /* that of the options, or what QEMU has told */
    PbaAccessOptions options; /* as the caller gave them */
    GStringChunk *texts;      /* of the options */

    const PbaBackend *backend; /* NULL: QEMU was not asked yet */
    PbaCapabilities qemu;      /* what it said */
    char *guest;               /* the guest's UUID; NULL: not asked for */
    uid_t qemu_uid;            /* if has_qemu_user */
    gid_t qemu_gid;
    bool has_qemu_user; /* root serves a QEMU of another user */

    bool is_recovery; /* it stands for a dead process' access: names tell its target alone */
    PbaTied tied;
    bool has_exported;    /* its exports may be there, under the names of this access */
    unsigned mark_number; /* tells its marker from those of the process' other accesses */
    char *backup_id;      /* what its bitmaps are relative to after a success; NULL: nothing */
    PbaBlock seen;        /* before setup, if nothing was to be undone; in setup, before the cut */
    GPtrArray *warnings;  /* lines, of the last look at its fleecing images */
    GPtrArray *disks;     /* PbaDisk */
    char *nonce;          /* of this setup; NULL: none was made, or that of a dead one's */
    char *end_mark;       /* says in QEMU that a success is being committed; NULL: none does */
    char *socket_dir;     /* NULL: not made */
    char *socket;         /* the NBD server's, in that, whether it is up or not */
    GPtrArray *vfiles;    /* PbaVfile, one for each disk; NULL: none was asked for */
    void *backend_data;   /* what the backend alone knows of it; g_free frees it; NULL: nothing */
};

/* Every change of the phase comes through here, and is checked. */
void pba_access_enter(PbaAccess *access, PbaPhase phase);

/* Of PbaDisk, as arrays want it. */
void pba_disk_free(gpointer disk);
/* No device or node has the name that the disk was asked for by. Returns false. */
bool pba_disk_set_unknown_error(GError **error);
/* Name of something of ours for the access' target and this disk: pba-ROLE-TARGET-KEY. */
char *pba_disk_name(const PbaAccess *access, const char *role, const PbaDisk *disk);
bool pba_check_utf8(const char *name, const char *value, GError **error);
bool pba_access_require_up(const PbaAccess *access, GError **error);
bool pba_access_require_down(const PbaAccess *access, GError **error);
/* An access of no target, which can only look. */
PbaAccess *pba_access_new_observer(PbaQmp *qmp, const PbaAccessOptions *options,
                                   const PbaHooks *hooks, GError **error);

/* Has an access know of its QEMU what another one has asked. */
void pba_access_know(PbaAccess *access, const PbaAccess *known);

/* Fleecing images, by their nodes in query-named-block-nodes' reply */

/* Whether the file system that holds the image can be told, and what is free in it. */
bool pba_fleecing_space(JsonObject *node, const char *path, uint64_t *free_bytes,
                        bool *is_nearly_full);
/* A line that says so; the caller's to free. */
char *pba_fleecing_warning(const char *device, const char *path, uint64_t free_bytes);
/* Notes what there is to be warned of. */
void pba_fleecing_check(PbaAccess *access, JsonArray *nodes);

/* Markers in QEMU: which process has an access */

/* What is known of the process of a marker. */
typedef enum {
    PBA_OWNER_DEAD,
    PBA_OWNER_UNKNOWN, /* of another machine, boot or PID namespace, or hidden: see owner.c */
    PBA_OWNER_ALIVE,
} PbaOwnerState;

bool pba_is_owner_mark(const char *node);
/* The node name of this access'; the caller's to free. */
char *pba_owner_mark_name(const PbaAccess *access, GError **error);
/* The number that it has: from where it is, and for which target. */
bool pba_owner_mark_size(const PbaAccess *access, uint64_t *size, GError **error);
/* The number of a marker in query-named-block-nodes' reply. */
uint64_t pba_owner_node_size(JsonObject *node);
/* Refuses if another process, or another access of this one, has marked the guest and is not known
 * to be dead. nodes is query-named-block-nodes' reply. */
bool pba_owner_check(const PbaAccess *access, JsonArray *nodes, GError **error);
/* Refuses, and enters the phase gone, if the marker of this access is not among the nodes. */
bool pba_owner_require(PbaAccess *access, JsonArray *nodes, GError **error);
void pba_owner_set_gone_error(const PbaAccess *access, GError **error);
/* The same of what QEMU has now. */
bool pba_owner_require_now(PbaAccess *access, GError **error);
/* Whether the marker of this access is among the nodes. Enters no phase. */
bool pba_owner_find(const PbaAccess *access, JsonArray *nodes, bool *found, GError **error);
/* Whether QEMU can be asked, and has the marker of this access. Enters no phase. */
bool pba_owner_holds(PbaAccess *access);
/* Claims the guest for this access, unless another one was faster. nodes, if not NULL, becomes what
 * QEMU has with the marker: a new reference in place of the old one. */
bool pba_owner_mark(PbaAccess *access, JsonArray **nodes, GError **error);
/* A node that does nothing: its name is the mark. */
bool pba_mark_add(PbaAccess *access, const char *name, uint64_t size, GError **error);
bool pba_mark_delete(PbaAccess *access, const char *name, GError **error);
/* Removes our marker; in recovery, with all, also the markers of dead processes and those of this
 * target's devices and of its end. Does nothing if our marker has been removed already. A failure
 * is only logged, because only a later access depends on it. */
void pba_owner_unmark(PbaAccess *access, bool all);
/* Notes, in this process, that the access is about to mark a guest, and enters the phase claimed;
 * or forgets it. */
void pba_owner_note(PbaAccess *access);
void pba_owner_forget(PbaAccess *access);
/* Whose marker it is, if it is one; the PID is 0 where it tells none. */
bool pba_owner_read(const PbaAccess *access, const char *node, uint64_t size, pid_t *pid,
                    PbaOwnerState *state);
/* A process that cannot be judged, for a message; the caller's to free. */
char *pba_owner_describe(pid_t pid);
/* What the number of a marker tells of the key of its target, the caller's to free: the beginning.
 * NULL: nothing. */
char *pba_owner_target_key(uint64_t size);
/* Whether recovery undoes it. */
bool pba_owner_is_dead(const PbaAccess *access, const char *node, uint64_t size);

/* Refuses if a guest's device has not what it had when setup looked: one query. */
bool pba_access_look_again(PbaAccess *access, GError **error);

/* Looks for what a dead process left of this target, which is_stale tells, and refuses if it must
 * not be undone, or if a process is at work. */
bool pba_recover_look(PbaAccess *access, PbaBlock *block, bool *is_stale, GError **error);
/* Undoes it. block is what QEMU has afterwards. What was done is appended to lines. */
bool pba_recover_undo(PbaAccess *access, PbaBlock *block, GPtrArray *lines, GError **error);
/* Setup, or recovery, is about to change something else than markers in QEMU, or has. */
void pba_access_begin_changes(PbaAccess *access);
/* No access is up any more: forgets what it knew of it. */
void pba_access_end(PbaAccess *access);
/* What every end of an access is: all that is possible is undone. */
bool pba_tear_down_and_end(PbaAccess *access, bool success, GError **error);

/* What others do; changes nothing. Whether the guest is here and stays here, and whether its disks
 * are as an access needs them. */
bool pba_company_check_here(PbaAccess *access, GError **error);
/* Whether its disks are this QEMU's now. */
bool pba_company_check_handed_over(PbaAccess *access, GError **error);
bool pba_company_check_disks(PbaAccess *access, const PbaBlock *block, GError **error);
/* The same of what QEMU has now: others may have begun something since the disks were seen. */
bool pba_company_check_again(PbaAccess *access, GError **error);

/* Nodes that keep the disks, and keep others from them: see guard.c */

/* Fills in what they are called. */
void pba_guards_name(const PbaAccess *access, PbaDisk *disk);
/* Above each disk's root node, and above another one of it, which may be the same. */
typedef const char *(*PbaGuarded)(const PbaDisk *disk);
bool pba_guards_add(PbaAccess *access, PbaGuarded guarded, GError **error);
/* Their image, as QEMU calls it; the caller's to free. */
char *pba_guards_image(const PbaAccess *access);
/* Those of block, the last thing in a teardown, whose first error so far *first is. */
void pba_guards_drop(PbaAccess *access, GError **first, const PbaBlock *block);
/* Whether the disk's nodes cannot go. */
bool pba_guard_holds(const PbaDisk *disk, const PbaBlock *block);

/* Notes whose process QEMU is, where this one is root's and that is not. */
void pba_user_note(PbaAccess *access);
/* Lets QEMU open a file that this process has made, and make a socket in such a directory. */
bool pba_user_give_file(const PbaAccess *access, int fd);
bool pba_user_open_dir(const PbaAccess *access, const char *dir);
/* What QEMU is to call a file in the access' private directory, or a fleecing image; the caller's
 * to free. */
char *pba_user_run_path(const PbaAccess *access, const char *path);
char *pba_user_fleecing_path(const PbaAccess *access, const char *path);
/* Says whose process QEMU is, of an error that is for want of permission. */
void pba_user_add_hint(const PbaAccess *access, GError **error);

/* Which backup the bitmaps are relative to */

/* The name of the target's bitmap; the caller's to free. */
char *pba_access_bitmap(const PbaAccess *access);
/* Whether bitmaps of the access may have companions (tied), or may have none. Of a dead process'
 * access both may be. */
bool pba_tie_may_be(const PbaAccess *access, bool tied);
/* Asks QEMU which guest it is, where that is needed. */
bool pba_tie_ask_guest(PbaAccess *access, GError **error);
/* The companion that the disk's bitmap has when it is relative to that backup; borrows all. */
PbaCompanion pba_disk_companion(const PbaAccess *access, const PbaDisk *disk, const char *id);
/* Whether the target's bitmap is relative to the disk's base; if not, sets the disk's reason. */
bool pba_tie_fits(const PbaAccess *access, PbaDisk *disk, const PbaBlock *block);
/* Says why the bitmap, which is there, is not used. */
void pba_tie_log_reason(const PbaAccess *access, const PbaDisk *disk);
/* Action of a transaction: the companion that a new bitmap has, without an id. */
void pba_tie_add_open(JsonArray *actions, const PbaAccess *access, const PbaDisk *disk,
                      const char *from, uint64_t granularity, bool persistent);

/* Audits */

/* Copies the bitmaps that are to be audited, which begin anew then; before the backend prepares. */
bool pba_audit_begin(PbaAccess *access, const PbaBlock *block, GError **error);
/* After the instant: a reader of the copies must not see them change. */
bool pba_audit_freeze(PbaAccess *access, GError **error);
/* Removes those that block has, also of a dead process; the exports are gone. */
bool pba_audit_end(PbaAccess *access, const PbaBlock *block, GError **error);

/* In the directory of the NBD socket, see guard.c. */
#define PBA_GUARD_NAME "guard"
/* The directory of the NBD socket: private, made without following anybody's links. */
bool pba_run_dir_make(PbaAccess *access, GError **error);
void pba_run_dir_remove(PbaAccess *access);
/* Leaves it to recovery, as if its process were dead. */
void pba_run_dir_disown(PbaAccess *access);
/* The PID of a live process with an access to this guest, other than the given one, whose NBD
 * server listens; 0: there is none. */
pid_t pba_run_dir_live_server(const PbaAccess *access);
/* What accesses to this guest have on disk, of all targets: socket directories and fleecing
 * images; paths, the caller's to free. */
GPtrArray *pba_run_dir_find_stale(const PbaAccess *access);
/* The hash of the target in such a path, and the target's name that is stored in the directory
 * (owned by the caller, NULL if there is none). */
const char *pba_run_dir_key(const char *path);
char *pba_run_dir_target(const char *path);
/* Whether the access may belong to a live process: to one that backs up another guest with the same
 * identity, or one whose QEMU has ended. */
bool pba_run_dir_is_live(const PbaAccess *access, const char *path);
/* The socket at which QEMU still listens in the directory of a dead process, the caller's to free;
 * NULL: it does not. */
char *pba_run_dir_stale_server(const char *path);
bool pba_run_dir_remove_stale(const char *path);
/* Gives the socket in the directory a name that no client knows, or its own again. */
void pba_run_dir_hide_socket(const char *path);
void pba_run_dir_show_socket(const char *path);

/* Unmounts the virtual files and ends their servers. What could not be ended stays for a later
 * call. */
bool pba_vfiles_end(PbaAccess *access, GError **error);
/* Frees what is local of them. */
void pba_vfiles_free(PbaAccess *access);

bool pba_nbd_server_start(PbaAccess *access, GError **error);
/* Whether there is an export of any access, of this or of another process. */
bool pba_exports_find_any(PbaAccess *access, bool *found, GError **error);
/* Removes our exports, and waits until they are gone. is_shared tells whether another program has
 * put some on our NBD server. */
bool pba_exports_remove(PbaAccess *access, bool *is_shared, GError **error);
/* Whether our NBD server is there. Connects to it: see undo_rest in teardown.c. */
bool pba_nbd_server_is_up(const PbaAccess *access);
/* Stops our NBD server, but one that is shared. Our marker was seen just before. */
bool pba_nbd_server_stop(PbaAccess *access, bool is_shared, GError **error);

#endif

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

    char *qdev;        /* id or QOM path of the guest device; NULL: none */
    char *root_node;   /* what the guest device used before setup */
    char *bitmap_node; /* where the bitmaps are: below filters */
    uint64_t size;
    bool read_only;

    char *snapshot_node; /* NULL until setup is done */
    char *bitmap_name;   /* NULL without a bitmap */
    PbaBitmapAction action;

    /* upstream backend: names of the nodes that we add */
    char *raw_node;
    char *filter_node;
    char *fleecing_node; /* or the caller's */
    bool bitmap_persistent;

    bool device_gone; /* recovering: QEMU has nothing any more that the key is a hash of */
} PbaDisk;

typedef enum { PBA_FORM_DEVICES, PBA_FORM_DEVLIST } PbaForm;
/* Tried: some of them may be there. */
typedef enum { PBA_EXPORTS_NONE, PBA_EXPORTS_TRIED, PBA_EXPORTS_ALL } PbaExports;

struct PbaAccess {
    pid_t owner;
    PbaQmp *qmp; /* borrowed */
    PbaHooks hooks;

    char *target_id;
    char *run_dir;
    char *identity;
    char *fleecing_dir;
    GHashTable *fleecing;
    char *early_bitmap_name;
    bool persistent;
    bool no_recover;

    PbaBackend backend;
    PbaForm form;
    unsigned qemu_version; /* 702 is 7.2 */

    GPtrArray *disks;     /* PbaDisk; empty: no access is up */
    char *socket_dir;     /* NULL: not made */
    char *socket;         /* the NBD server's */
    GPtrArray *vfiles;    /* PbaVfile, one for each disk; NULL: none was asked for */
    bool marked;          /* QEMU may have the marker of this process; see owner.c */
    unsigned mark_number; /* tells it from markers of the process' other accesses */
    bool recovering; /* this is what a dead process left: its nodes and devices are not known */
    bool begun;      /* something else may have been changed in QEMU */
    bool server_up;  /* we started the NBD server, or tried to */
    PbaExports exports;
    bool teardown_failed;
    bool success_unknown; /* a successful end was asked for, and no reply came */
};

/* Of PbaDisk, as arrays want it. */
void pba_disk_free(gpointer disk);
/* Name of something of ours for the access' target and this disk: pba-ROLE-TARGET-KEY. */
char *pba_disk_name(const PbaAccess *access, const char *role, const PbaDisk *disk);
bool pba_check_utf8(const char *name, const char *value, GError **error);
bool pba_access_require_up(const PbaAccess *access, GError **error);
/* Asks QEMU what it can do. */
bool pba_access_choose_backend(PbaAccess *access, GError **error);
/* The same, and where need be who it is. */
bool pba_access_begin(PbaAccess *access, GError **error);
/* An access of no target, which can only look. */
PbaAccess *pba_access_new_observer(PbaQmp *qmp, const PbaAccessOptions *options,
                                   const PbaHooks *hooks, GError **error);

/* Markers in QEMU of who has an access, and on Proxmox to which devices. */
#define PBA_DEVICE_ROLE "dev"
bool pba_is_owner_mark(const char *node);
/* The node name of this access'; the caller's to free. */
char *pba_owner_mark_name(const PbaAccess *access, GError **error);
/* Refuses if a living process, but for this access, has marked the guest. nodes is
 * query-named-block-nodes' reply. */
bool pba_owner_check(const PbaAccess *access, JsonArray *nodes, GError **error);
/* Marks the guest as this process's, unless another one was faster. */
bool pba_owner_mark(PbaAccess *access, GError **error);
bool pba_device_marks_add(PbaAccess *access, GError **error);
/* Takes our marker away, and with all also those of dead processes and of this target's devices. A
 * failure is logged only: nothing but a later access depends on it. */
void pba_owner_unmark(PbaAccess *access, bool all);
void pba_owner_forget(PbaAccess *access);
/* Whose marker it is, if it is one. */
bool pba_owner_read(const PbaAccess *access, const char *node, pid_t *pid, bool *alive);

/* Undoes what a dead process left of this target; done, refused or nothing there. block is what
 * QEMU has afterwards. What was done is appended to lines. */
bool pba_recover_left(PbaAccess *access, PbaBlock *block, GPtrArray *lines, GError **error);
/* No access is up any more: forgets what it knew of it. */
void pba_access_end(PbaAccess *access);
/* What every end of an access is: all that is possible is undone. */
bool pba_tear_down_and_end(PbaAccess *access, bool success, GError **error);

/* The directory of the NBD socket: private, made without following anybody's links. */
bool pba_run_dir_make(PbaAccess *access, GError **error);
void pba_run_dir_remove(PbaAccess *access);
/* What accesses to this guest have on disk, of all targets: socket directories and fleecing
 * images; paths, the caller's to free. */
GPtrArray *pba_run_dir_find_left(const PbaAccess *access);
/* The hash of the target in such a path, and its name as the directory tells it: the caller's to
 * free, NULL if it does not. */
const char *pba_run_dir_key(const char *path);
char *pba_run_dir_target(const char *path);
/* Whether its access is a living one: that of another guest that has the same identity, or of one
 * whose QEMU has gone. */
bool pba_run_dir_is_live(const PbaAccess *access, const char *path);
/* The socket in such a directory, the caller's to free; NULL: it is none. */
char *pba_run_dir_left_socket(const char *path);
bool pba_run_dir_remove_left(const char *path);

/* Unmounts the virtual files and ends their servers. What could not be ended stays for a later
 * call. */
bool pba_vfiles_end(PbaAccess *access, GError **error);
/* Frees what is local of them. */
void pba_vfiles_free(PbaAccess *access);

bool pba_nbd_server_start(PbaAccess *access, GError **error);
bool pba_exports_add(PbaAccess *access, GError **error);
/* Whether there is an export whose id begins so. */
#define PBA_EXPORT_PREFIX "pba-exp-"
bool pba_exports_find(PbaAccess *access, const char *id_prefix, bool *found, GError **error);
/* Removes our exports, waits until they are gone, and stops our NBD server. */
bool pba_exports_remove(PbaAccess *access, GError **error);

#endif

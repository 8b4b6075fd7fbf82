/* The C core of PVE::BackupAccess: access to the disks of a running QEMU guest as of one instant.
 *
 * Plain C on GLib, json-glib, libnbd and libcrypto; it does not use Perl. All offsets, lengths and
 * sizes are bytes. Functions that can fail return false or NULL and set a GError of the domain
 * PBA_ERROR (see the PbaErrorCode values). Nothing here is thread safe: use a handle in one thread
 * only. */
#ifndef PBA_H
#define PBA_H

#include <glib.h>
#include <json-glib/json-glib.h>
#include <stdbool.h>
#include <stdint.h>

/* Errors */

#define PBA_ERROR pba_error_quark()

typedef enum {
    PBA_ERROR_ARGUMENT,    /* the caller's request is wrong; nothing was sent */
    PBA_ERROR_STATE,       /* not possible now: an access is already active, or none is */
    PBA_ERROR_UNSUPPORTED, /* this QEMU or this machine lacks something that is needed */
    PBA_ERROR_QMP,         /* QEMU answered a command with an error */
    PBA_ERROR_CONNECTION,  /* the QMP or NBD connection could not be made or was lost */
    PBA_ERROR_TIMEOUT,     /* no answer within the time limit */
    PBA_ERROR_PROTOCOL,    /* the peer violates the protocol */
    PBA_ERROR_INTERRUPTED, /* the caller's interrupted() hook ended the call */
    PBA_ERROR_NBD,         /* an NBD request failed */
    PBA_ERROR_INCOMPLETE,  /* the answer is incomplete, so it was not used */
    PBA_ERROR_SYSTEM,      /* a system call failed */
    PBA_ERROR_CONTENT,     /* stored data is not what was stored */
} PbaErrorCode;

GQuark pba_error_quark(void);

/* The class of an error: QEMU's own (QAPI: QapiErrorClass) for PBA_ERROR_QMP, else one of ours
 * ("ArgumentError", "TimeoutError", ...). Never NULL; owned by the error. */
const char *pba_error_class(GError *error);
/* The QMP command that failed, or NULL; owned by the error. */
const char *pba_error_command(GError *error);
/* The device that the error is about, or NULL; owned by the error. */
const char *pba_error_device(GError *error);

/* Hooks into the caller */

typedef enum { PBA_LOG_DEBUG, PBA_LOG_INFO, PBA_LOG_WARN } PbaLogLevel;

typedef struct {
    /* Called several times a second while waiting; true ends the call with PBA_ERROR_INTERRUPTED.
     * May be NULL. */
    bool (*interrupted)(void *opaque);
    /* Whether interrupted would have something to do. Called where a call must not be ended any
     * more; if true, the call completes within a second. May be NULL. */
    bool (*pending)(void *opaque);
    /* One line without a newline; the message is valid during the call only. May be NULL. */
    void (*log)(void *opaque, PbaLogLevel level, const char *message);
    void *opaque;
} PbaHooks;

/* QMP */

typedef struct PbaQmp PbaQmp;

/* Limits for a reply, over a socket or a transport. A parsed value takes up to some 200 bytes, and
 * at least two on the wire; QEMU's own parser stops at depth 1024. */
#define PBA_QMP_MAX_VALUES (1u << 20)
#define PBA_QMP_MAX_DEPTH 128

/* Carries one command by the caller's own means. Returns the content of QMP's "return" (a new node,
 * which the core frees), or NULL with error set to any text. arguments is a borrowed object. */
typedef JsonNode *(*PbaQmpTransport)(void *opaque, const char *command, JsonNode *arguments,
                                     GError **error);

/* A client of the QMP server at a Unix socket. The connection is opened by the first command.
 * timeout_s limits every single command, including the connecting. path and hooks are copied. */
PbaQmp *pba_qmp_new(const char *path, unsigned timeout_s, const PbaHooks *hooks);
/* The same over the caller's own transport. */
PbaQmp *pba_qmp_new_transport(PbaQmpTransport transport, void *opaque, const PbaHooks *hooks);
void pba_qmp_free(PbaQmp *qmp);

/* Runs one command, and connects first if needed. arguments (an object, or NULL for none) is
 * consumed. Returns the "return" value (caller frees with json_node_unref). */
JsonNode *pba_qmp_execute(PbaQmp *qmp, const char *command, JsonNode *arguments, GError **error);
/* Whether the QMP socket has no listener any more; false if this is not known. */
bool pba_qmp_is_gone(PbaQmp *qmp);
/* Closes the connection, so that other clients can use the monitor. The next command opens a new
 * one. */
void pba_qmp_release(PbaQmp *qmp);

/* Bitmap modes, actions, statuses (QAPI: BackupAccessBitmapMode, PBSBitmapAction) */

typedef enum { PBA_BITMAP_MODE_NONE, PBA_BITMAP_MODE_NEW, PBA_BITMAP_MODE_USE } PbaBitmapMode;

typedef enum {
    PBA_BITMAP_ACTION_ABSENT, /* the reply has no bitmap-action key */
    PBA_BITMAP_ACTION_NOT_USED,
    PBA_BITMAP_ACTION_NOT_USED_REMOVED,
    PBA_BITMAP_ACTION_NEW,
    PBA_BITMAP_ACTION_USED,
    PBA_BITMAP_ACTION_INVALID,
    PBA_BITMAP_ACTION_MISSING_RECREATED,
} PbaBitmapAction;

typedef enum {
    PBA_BITMAP_STATUS_NONE,
    PBA_BITMAP_STATUS_NEW,
    PBA_BITMAP_STATUS_REUSE
} PbaBitmapStatus;

/* Decode the words of the provider API and of QEMU. Anything unknown is PBA_ERROR_ARGUMENT (mode)
 * or PBA_ERROR_PROTOCOL (action), never a guess. */
bool pba_bitmap_mode_parse(const char *word, PbaBitmapMode *mode, GError **error);
bool pba_bitmap_action_parse(const char *word, PbaBitmapAction *action, GError **error);
const char *pba_bitmap_mode_name(PbaBitmapMode mode);
const char *pba_bitmap_action_name(PbaBitmapAction action); /* NULL for ABSENT */
const char *pba_bitmap_status_name(PbaBitmapStatus status);
/* The bitmap mode for a provider: none for not-used*, reuse for used, new for all others. */
PbaBitmapStatus pba_bitmap_status(PbaBitmapAction action);

/* The access to one guest */

typedef struct PbaAccess PbaAccess;

typedef struct {
    const char *target_id;    /* the target of the backup; required */
    const char *run_dir;      /* parent of the socket directory; NULL: a default by user */
    const char *identity;     /* identifies this VM on the machine, e.g. its QMP socket */
    const char *fleecing_dir; /* upstream: where fleecing images are created; may be NULL */
    GHashTable *fleecing;     /* upstream: device => the caller's fleecing node; may be NULL */
    bool has_qemu_user;       /* QEMU's user and group, for transports that do not reveal them: */
    uint32_t qemu_uid;
    uint32_t qemu_gid;
    const char *qemu_run_dir;      /* run_dir and fleecing_dir as QEMU sees them, if QEMU has */
    const char *qemu_fleecing_dir; /* another root or other mounts; NULL: as this process does */
    const char *bitmap_name;       /* pve, early form of the command only; NULL: the target-id */
    bool allow_shared;             /* disks that others may also write to (share-rw) */
    bool persistent;               /* upstream: bitmaps of qcow2 disks survive a VM restart */
    bool no_recover;               /* setup refuses if a dead process left something to undo */
    bool force;                    /* recover treats a process that it cannot see as dead */
} PbaAccessOptions;

typedef struct {
    const char *device; /* as in query-block: device, qdev id or node name */
    PbaBitmapMode mode;
    bool tied; /* the bitmap has a companion that identifies its backup; all devices or none */
    const char *base; /* mode use: the bitmap must be relative to this one; NULL: there is none */
    /* The base was found by this identity of its disk, under any name; NULL: by the disk's name. */
    const char *identity;
    bool audit; /* mode use of a tied bitmap: as mode new, and the old bitmap is exported too */
} PbaDeviceRequest;

/* One device of an active access; everything is owned by the access. */
typedef struct {
    const char *device;
    const char *node_name; /* the snapshot-access node */
    uint64_t size;
    const char *bitmap_node_name; /* NULL without a bitmap */
    const char *bitmap_name;      /* NULL without a bitmap */
    PbaBitmapAction action;
    const char *identity; /* identifies the disk under any name; NULL: not tied */
    const char *base;     /* ID of the backup that a used bitmap is relative to; NULL: not known */
    const char *reason;   /* why an existing bitmap is not used; NULL: it is, or there was none */
    const char *audit_bitmap; /* the copy of the old bitmap, of the same export; NULL: no audit */
    uint64_t dirty;           /* bytes that the bitmap marks as dirty, if is_counted */
    bool is_counted;          /* known from the export on, unless only the map shows it */
} PbaDeviceInfo;

/* What a QEMU can do, according to the QEMU itself. */
typedef struct {
    const char *backend; /* "pve" or "upstream"; static */
    const char *form;    /* pve: "devices" or "devlist"; else NULL; static */
    unsigned major, minor, micro;
} PbaCapabilities;

/* Sends query-version. Unless QEMU is Proxmox' own package of 10.0 or later, also sends
 * query-commands and, if there are Proxmox' commands, query-qmp-schema. PBA_ERROR_UNSUPPORTED if
 * neither backend is possible. */
bool pba_capabilities(PbaQmp *qmp, PbaCapabilities *capabilities, GError **error);

/* Checks the options; sends nothing. qmp is borrowed and must outlive the access. Options are
 * copied. */
PbaAccess *pba_access_new(PbaQmp *qmp, const PbaAccessOptions *options, const PbaHooks *hooks,
                          GError **error);
/* Frees local memory only. The access in QEMU stays active (see pba_access_teardown). */
void pba_access_free(PbaAccess *access);

/* The sizes of the requests' devices, before setup; modes are ignored. sizes has room for count. */
bool pba_access_sizes(PbaAccess *access, const PbaDeviceRequest *requests, size_t count,
                      uint64_t *sizes, GError **error);
typedef struct {
    uint64_t size;
    char *identity;
    char *node;    /* the current name of the disk's node; NULL: one that QEMU made up */
    char *id;      /* NULL: the bitmap does not exist or must not be used */
    bool is_alias; /* the backup used another name for the disk: find its base by the identity */
    char *reason;  /* why the bitmap must not be used, or why is_alias is set; else NULL */
} PbaBase;

/* The sizes, and the IDs of the backups that the bitmaps of the requests' devices are relative to.
 * Called before setup; first undoes what a dead process left. bases has room for count; the caller
 * frees the texts. */
bool pba_access_bases(PbaAccess *access, const PbaDeviceRequest *requests, size_t count,
                      PbaBase *bases, GError **error);
/* Freezes the state of all devices at one instant (QAPI: backup-access-setup), in three steps:
 * prepare does everything that can be done before; cut makes the instant, with one query before it,
 * and a guest may be frozen for it; finish does the rest. Between the steps, the caller may release
 * qmp, so that others can use the monitor. If prepare fails, nothing is left behind, and every
 * bitmap keeps at least the bits it had. If cut or finish fails, the caller must thaw the guest and
 * then call pba_access_undo_setup. */
bool pba_access_prepare(PbaAccess *access, const PbaDeviceRequest *requests, size_t count,
                        GError **error);
bool pba_access_cut(PbaAccess *access, GError **error);
bool pba_access_finish(PbaAccess *access, GError **error);
/* Undoes an incomplete setup, as after a failure. What cannot be undone is logged. */
void pba_access_undo_setup(PbaAccess *access);
/* Undoes what a dead process left of an access for this target, as after a failed backup. An access
 * of a live process, or of one that cannot be judged from here, is PBA_ERROR_STATE. Appends text
 * lines that say what was done (each to be freed), or none. */
bool pba_access_recover(PbaAccess *access, GPtrArray *lines, GError **error);
/* Removes the target's bitmaps of all disks, because an earlier state of the guest cannot be loaded
 * while they exist (HMP: loadvm). PBA_ERROR_STATE while an access of any target is active. Appends
 * text lines that say what was done. */
bool pba_access_forget(PbaAccess *access, GPtrArray *lines, GError **error);
/* Returns the accesses, bitmaps and remains of all targets in this QEMU and on disk, and changes
 * nothing. Uses the options run_dir, identity and fleecing_dir. known, if not NULL, is an access to
 * the same QEMU, whose capabilities are then not queried again. The result is an object with the
 * keys that the POD of PVE::BackupAccess names (status); truth values are 1 and 0. The caller frees
 * it. */
JsonNode *pba_status(PbaQmp *qmp, const PbaAccessOptions *options, const PbaAccess *known,
                     const PbaHooks *hooks, GError **error);
/* Exports every device over NBD under its own name (QAPI: block-export-add), once. */
bool pba_access_export(PbaAccess *access, GError **error);
/* Exports the devices, then serves each one as a file by a process of its own, once. After an
 * error, none is served (FUSE; PBA_ERROR_UNSUPPORTED if the machine lacks it). */
bool pba_access_serve_files(PbaAccess *access, GError **error);
/* A new descriptor of that device's file, for reading and punching holes (open(2): O_RDWR,
 * O_DIRECT, O_CLOEXEC). The caller closes it; -1 on error. After the teardown it only returns
 * errors. */
int pba_access_open_file(PbaAccess *access, size_t index, GError **error);
/* Undoes everything; success decides what the bitmaps hold afterwards (QAPI:
 * backup-access-teardown). Every step is tried even if an earlier one failed; the first error is
 * reported. A later call retries the failed steps, always as a failure. With success, the result
 * true means that the bitmaps hold exactly what was written since the instant, or that a later
 * setup finds no bitmap; errors after that moment are only logged. The result false means that the
 * bitmaps also hold what they held before, or that they cannot be trusted and the next backup is a
 * full one. id, which may be NULL, is the ID of this backup: afterwards the bitmaps are relative to
 * it. That is right after a failure, too, because they have at least what was written since the
 * instant; without an id they then stay relative to the earlier backup. */
bool pba_access_teardown(PbaAccess *access, bool success, const char *id, GError **error);
bool pba_access_is_up(const PbaAccess *access);

size_t pba_access_device_count(const PbaAccess *access);
void pba_access_device_info(const PbaAccess *access, size_t index, PbaDeviceInfo *info);
/* The guest's UUID, borrowed; NULL: not queried yet. */
const char *pba_access_guest(const PbaAccess *access);
/* Warnings from when the devices were exported: lines, borrowed. */
const GPtrArray *pba_access_warnings(const PbaAccess *access);
/* The NBD server's Unix socket; NULL before setup. Owned by the access. */
const char *pba_access_socket(const PbaAccess *access);

/* One device's data over NBD */

/* The description of an NBD export that must be read by single clusters of 64 KiB, because its QEMU
 * may return wrong data across clusters. No request may overlap a read or a block status that is in
 * flight, even for a client that has disconnected, because QEMU may abort (see versions.c). */
#define PBA_BY_CLUSTER "pba: read by clusters of 65536 bytes"
/* The beginning of the description of an export whose fleecing image has clusters of more than 64
 * KiB; their size in bytes follows, decimal. */
#define PBA_DISCARDS_BY "pba: discard by clusters of "

typedef struct PbaVolume PbaVolume;

typedef struct {
    const char *device; /* for messages, and the export name where path is a socket */
    const char *path;   /* a Unix socket, or an NBD URI */
    const char *bitmap; /* name of the dirty bitmap, NULL for none */
    uint64_t size;      /* must match the server; UINT64_MAX: not known */
} PbaVolumeOptions;

/* Connects and checks size and, with a bitmap, the meta context qemu:dirty-bitmap:NAME (NBD spec:
 * metadata querying; QEMU: docs/interop/nbd). */
PbaVolume *pba_volume_open(const PbaVolumeOptions *options, const PbaHooks *hooks, GError **error);
void pba_volume_free(PbaVolume *volume);
uint64_t pba_volume_size(const PbaVolume *volume);

/* Gives the next dirty region, with *length 0 after the last one. */
typedef bool (*PbaNextRegion)(void *opaque, uint64_t *offset, uint64_t *length, GError **error);
/* The same over an open file (mechanism file-handle): fd is dup'ed, regions come from next_region,
 * in ascending order. */
PbaVolume *pba_volume_open_handle(const char *device, int fd, uint64_t size,
                                  PbaNextRegion next_region, void *opaque, const PbaHooks *hooks,
                                  GError **error);

/* The next dirty region, ascending, neighbours joined; *length is 0 after the last one. Without a
 * bitmap the whole volume is one region. An answer that stops early is PBA_ERROR_INCOMPLETE. */
bool pba_volume_next_dirty_region(PbaVolume *volume, uint64_t *offset, uint64_t *length,
                                  GError **error);
/* Reads exactly length bytes (at least 1, at most 32 MiB, inside the volume) into buffer. */
bool pba_volume_pread(PbaVolume *volume, void *buffer, uint64_t offset, uint64_t length,
                      GError **error);
/* Frees the fleecing space of a range that was read; it cannot be read again. Shrunk to whole
 * clusters of 64 KiB: a QEMU without commit 507175197b aborts on parts of one (NBD_CMD_TRIM). */
bool pba_volume_discard(PbaVolume *volume, uint64_t offset, uint64_t length, GError **error);

/* Copying */

/* Takes the data for an offset of the volume, which is valid during the call only. False ends the
 * copy. */
typedef bool (*PbaCopyWrite)(void *opaque, uint64_t offset, const void *data, size_t length);

/* SHA-256 of blocks of a volume, by libcrypto; its last block may be short. */
#define PBA_DIGEST_SIZE 32u
#define PBA_DIGEST_BLOCK 65536u

/* A block size is a power of 2 from 4 KiB to 8 MiB. */
static inline bool pba_digest_block_is_good(uint32_t block)
{
    return block >= 4096 && block <= (8u << 20) && (block & (block - 1)) == 0;
}

/* Takes the digests of count consecutive blocks, the first of which begins at offset. They are
 * valid during the call only. False ends the copy. */
typedef bool (*PbaCopyDigests)(void *opaque, uint64_t offset, const uint8_t *digests, size_t count);
/* Called for each damaged range, which is copied as it was read. False ends the copy. */
typedef bool (*PbaCopyDamaged)(void *opaque, uint64_t offset, uint64_t length);

/* The target: one of uri, path, fd and write, or none of them (fd -1) to read only. */
typedef struct {
    const char *uri;  /* of an NBD export at least as large as the volume */
    const char *path; /* of a file, which is created (0600) if necessary and gets the volume's size,
                         or of a device */
    int fd;           /* the same, open for writing; the caller keeps it */
    PbaCopyWrite write; /* gets all data, including zeroes, by ascending offsets */
    /* Called with the bytes copied and all dirty bytes, several times a second and at the end.
     * False ends the copy. May be NULL. */
    bool (*progress)(void *opaque, uint64_t done, uint64_t total);
    void *opaque;
    uint64_t bandwidth_limit; /* bytes read per second; 0: none */
    int limit_fd; /* a file of 8 bytes, initially zeroes: copies that share it share the limit; -1:
                     none */
    unsigned
        connections; /* to a server that is safe with several, 1 to 16; 0: choose automatically */
    uint32_t request_size; /* bytes, 4 KiB to 8 MiB in whole 4 KiB; 0: choose automatically */
    uint32_t cluster_size; /* of an NBD target's image, a power of 2 from 64 KiB; 0: 64 KiB */
    bool discard;          /* from the volume, when the target has the data */
    bool is_increment; /* the target already has what is not copied: a file must exist and have the
                          volume's size */
    /* Digests of all copied blocks go to one of these, or to none. A function is called by
     * ascending offsets before write is, or without write in any order. */
    PbaCopyDigests digests;
    const char *digest_file; /* see FILES OF DIGESTS in Volume.pm; created (0600) if necessary */
    bool digests_increment;  /* an existing file has the digests of what is not copied */
    bool check;              /* read back what was written to uri, and compare the digests */
    uint32_t digest_block;   /* bytes; regions must consist of whole blocks. 0: that of the files of
                                expected, or 64 KiB */
    /* Files of digests that the data must match; the first one that has a block's digest counts;
     * ends with NULL. A block without any digest is not checked. */
    const char *const *expected;
    bool skip_expected; /* do not write blocks that match their expected digest, because the target
                           already has them; write all other blocks, without reporting damage. The
                           file of digests then needs digests_increment, and omits blocks that are
                           not written */
    bool only_known;    /* copy the blocks that the first of these files has digests for, instead of
                           the dirty ones */
    /* NULL: damage is PBA_ERROR_CONTENT. Unreadable data counts as damaged, too, unless the second
     * function takes it, and is copied as zeroes. */
    PbaCopyDamaged damaged;
    PbaCopyDamaged unreadable;
} PbaCopyOptions;

typedef struct {
    uint64_t bytes_read; /* the sum of the next three */
    uint64_t bytes_written;
    uint64_t bytes_zero;      /* made zero in the target without writing data */
    uint64_t bytes_unchanged; /* was not written, because it matches its expected digest */
    uint64_t bytes_discarded;
    uint64_t bytes_checked; /* that were read back */
    uint64_t regions;
    uint64_t bytes_damaged; /* by expected */
    uint64_t bytes_unknown; /* of which expected says nothing */
    double seconds;
} PbaCopyStatistics;

/* Copies all dirty regions, independently of pba_volume_next_dirty_region. A read, write or discard
 * that fails is an error that names the offset. A range is discarded when the target has taken it;
 * the target is flushed before this returns true. After an error, the target holds what was copied
 * before; the volume can still be used unless the connection is lost. */
bool pba_volume_copy(PbaVolume *volume, const PbaCopyOptions *options,
                     PbaCopyStatistics *statistics, GError **error);

G_DEFINE_AUTOPTR_CLEANUP_FUNC(PbaQmp, pba_qmp_free)
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PbaAccess, pba_access_free)
G_DEFINE_AUTOPTR_CLEANUP_FUNC(PbaVolume, pba_volume_free)

#endif

/* The contents of a QEMU, and the names of what we add to it. */
#ifndef PBA_QEMU_H
#define PBA_QEMU_H

#include "src/pba.h"

/* What a QEMU reports about itself */

typedef struct {
    unsigned major, minor, micro;
    char *package;       /* the distribution's name of its package; NULL: none */
    JsonArray *commands; /* NULL: not queried yet */
} PbaQemu;

/* Queries the version. */
bool pba_qemu_query(PbaQmp *qmp, PbaQemu *qemu, GError **error);
void pba_qemu_clear(PbaQemu *qemu);
/* Queries the commands, unless that was already done. */
bool pba_qemu_has_command(PbaQmp *qmp, PbaQemu *qemu, const char *command, bool *has,
                          GError **error);
/* The QAPI schema. QEMU needs some 25 ms for it and does nothing else in that time; Perl code needs
 * up to 300 ms to decode it. */
JsonArray *pba_qemu_schema(PbaQmp *qmp, GError **error);
bool pba_schema_has_argument(JsonArray *schema, const char *command, const char *argument);

G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(PbaQemu, pba_qemu_clear)

/* Names */

/* Whether the name is that of one of our nodes, of any target. */
#define PBA_OWN_PREFIX "pba-"
bool pba_is_own_node(const char *node);
/* The hash in our names, with that many hexadecimal digits. */
#define PBA_HASH_LENGTH 8
char *pba_short_hash(const char *text);
/* The name of one of our objects for this target and this subject: a device, or the guest by its
 * identity. At most 31 bytes, QEMU's limit for node names and IDs. */
char *pba_own_name(const char *target_id, const char *role, const char *of);
/* The same for a disk, by its key: the hash of its device. */
char *pba_key_name(const char *target_id, const char *role, const char *key);
/* The common beginning of such names of this role and target. */
char *pba_target_prefix(const char *target_id, const char *role);
/* Every disk of an access has a node with the first name; with version 0.1.0 on Proxmox, one with
 * the second. See src/access/guard.c. */
#define PBA_HOLD_ROLE "hold"
#define PBA_DEVICE_ROLE "dev"
/* On a stock QEMU, the node below the guest device, and the one that guards it. */
#define PBA_RAW_ROLE "raw"
#define PBA_GUARD_ROLE "guard"
/* A nonce that identifies an access in the names of its exports and background bitmaps, so that a
 * late command of an ended access cannot affect a later one. This many random hexadecimal digits,
 * owned by the caller. */
#define PBA_NONCE_LENGTH 16
char *pba_nonce_new(GError **error);
/* Prefix of the IDs of exports. QEMU does not limit these to 31 bytes (7.2, 10.0). */
#define PBA_EXPORT_PREFIX "pba-exp-"
char *pba_export_id(const char *target_id, const char *nonce, const char *key);
/* On Proxmox, a node with this name says that the access with this nonce is committing a success
 * for this target. The caller frees the name. Version 0.1.0 has no such name. */
#define PBA_ENDING_PREFIX "pba-ending-"
char *pba_ending_mark(const char *target_id, const char *nonce);
/* The common beginning of all such names of this target. */
char *pba_ending_prefix(const char *target_id);
/* Names of the bitmaps that we add for a target; the caller frees them. Without a nonce, the
 * background bitmap's name is that of version 0.1.0. */
char *pba_target_bitmap(const char *target_id);
char *pba_background_bitmap(const char *target_id, const char *nonce, bool tied);
/* The name of the target's bitmap if it has a companion, see below; on both backends. */
char *pba_tied_bitmap(const char *target_id);
bool pba_is_tied_bitmap(const char *name);
/* The target in the name of a background bitmap of any form and with any nonce; NULL if the name is
 * not one. Points into the name. */
const char *pba_background_target(const char *name);
const char *pba_bitmap_target(const char *name);
/* The bitmap in which a Proxmox QEMU records the guest's writes while an access with bitmaps is
 * active. */
#define PBA_PVE_BACKGROUND "backup-access-background-bitmap"
/* The name of an audit's copy of the target's bitmap; the caller frees it. */
char *pba_audit_bitmap(const char *target_id, const char *nonce);
/* The rest of such a name, which begins with the target's hash; NULL if the name is not one. */
const char *pba_audit_key(const char *name);
bool pba_is_audit_of(const char *name, const char *target_id);
/* Whether a background bitmap belongs to the bitmap with a companion. */
bool pba_is_tied_background(const char *name);

/* Block devices, nodes and bitmaps at one moment, as the query commands return them */

typedef struct {
    JsonArray *devices; /* query-block */
    JsonArray *nodes;   /* query-named-block-nodes, flat */
    JsonObject *graph;  /* x-debug-query-block-graph, if requested */
} PbaBlock;

JsonArray *pba_block_query_nodes(PbaQmp *qmp, GError **error);
bool pba_block_query(PbaQmp *qmp, bool with_graph, PbaBlock *block, GError **error);
void pba_block_clear(PbaBlock *block);

/* All of these search the results of the queries. What they return is borrowed, and NULL if nothing
 * is found, or if the node is NULL. */

/* The guest's block device with that name: one of the names below, or a node name. With the graph,
 * it is also found while our nodes are above its disk. */
JsonObject *pba_block_find_device(const PbaBlock *block, const char *name);
/* The names of a device except that of its node, as texts: of its block backend, its ID, its QOM
 * path, and that of the device that contains it. The caller frees them. */
GPtrArray *pba_block_device_names(JsonObject *device);
/* If several disks have the name: another name of each. The caller frees it; NULL: at most one
 * has it. */
char *pba_block_rivals(const PbaBlock *block, const char *name);
/* The device whose root is that node. */
JsonObject *pba_block_find_user(const PbaBlock *block, const char *node);
JsonObject *pba_block_find_node(const PbaBlock *block, const char *node);
/* Whether there are nodes whose names begin with the prefix. */
bool pba_block_has_nodes(const PbaBlock *block, const char *prefix);
JsonObject *pba_block_find_bitmap(const PbaBlock *block, const char *node, const char *bitmap);
/* Whether QEMU refuses to change or remove the bitmap: it is stored in an image that QEMU has
 * opened read-only, such as one below an overlay. Such a bitmap does not record; it does not
 * prevent the loading of a state of the overlay, and is as before when the image is the top one
 * again. */
bool pba_block_is_sealed(const PbaBlock *block, const char *node, JsonObject *bitmap);
/* The first background bitmap of the node: of the target's bitmap with a companion, or of the one
 * without. */
JsonObject *pba_block_find_background(const PbaBlock *block, const char *node,
                                      const char *target_id, bool tied);
/* The node's child of that name ("file", "target"); needs the graph. */
const char *pba_block_find_child(const PbaBlock *block, const char *node, const char *child);
/* The name in backups of the guest device whose disk the node is: the name of its block backend or
 * its node, or if there is none, the device's ID; needs the graph. The caller frees it. */
char *pba_block_device_above(const PbaBlock *block, const char *node);
/* The names of all disks, for a message; needs the graph. The caller frees the text. */
char *pba_block_disk_names(const PbaBlock *block);
/* Whether a device or another node uses the node; needs the graph. */
bool pba_block_has_parent(const PbaBlock *block, const char *node);
/* The same, but ignores users that are nodes with that driver. */
bool pba_block_has_parent_but(const PbaBlock *block, const char *node, const char *driver);
/* The first node from node downwards that is not a filter: a disk's bitmaps belong there. */
const char *pba_block_skip_filters(const PbaBlock *block, const char *node);

/* Whether any node has a bitmap of that name. */
bool pba_block_has_bitmap(const PbaBlock *block, const char *bitmap);

/* Iterates over the named bitmaps, of one node or of all named nodes. */
typedef struct {
    const char *node;
    const char *name;
    JsonObject *info;
    JsonArray *bitmaps; /* of the current node */
    guint next;         /* index in bitmaps */
    JsonArray *nodes;   /* NULL: bitmaps of one node only */
    guint next_node;
} PbaBitmapWalk;

PbaBitmapWalk pba_bitmaps_of(const PbaBlock *block, const char *node);
PbaBitmapWalk pba_bitmaps_everywhere(const PbaBlock *block);
/* False after the last one. */
bool pba_bitmaps_next(PbaBitmapWalk *at);

/* The name of one of the nodes, borrowed; NULL if it has none. */
const char *pba_block_node_name(JsonArray *nodes, guint index);
/* The ID in query-block's qdev; the caller frees it; NULL if there is none. */
char *pba_block_qdev_id(const char *qdev);
/* The guest device's QOM path; the caller frees it. An ID alone may also be that of another object
 * (QEMU: "Path '...' is ambiguous"). */
char *pba_block_qom_path(const char *qdev);
/* Members of the entries that were found above. */
const char *pba_block_device_node(JsonObject *device);
bool pba_block_device_size(JsonObject *device, uint64_t *size, GError **error);
bool pba_block_node_size(JsonObject *node, uint64_t *size, GError **error);

G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(PbaBlock, pba_block_clear)

/* Other programs that work on a disk; all of these need the graph. The disk is what the device uses
 * according to query-block's entry, or, without a device (NULL), the node. */

/* The ID of a job that works on the disk or on a node below it; the caller frees it; NULL: none. */
char *pba_company_job(const PbaBlock *block, JsonObject *device, const char *node);
/* Anything else of other programs that an access would harm, or that would harm an access; the
 * caller frees it; NULL: nothing. node is the one that query-block shows. */
char *pba_company_problem(const PbaBlock *block, JsonObject *device, const char *node);
/* Another program's user of the node, except guest devices: "node 'x'"; the caller frees it; NULL:
 * none. */
char *pba_company_user(const PbaBlock *block, const char *node);
/* Whether the disk is a SCSI device of the host, which the guest may send commands to. */
bool pba_company_is_host_device(const PbaBlock *block, const char *node);
/* Whether the device lets others write to its disk (share-rw). */
bool pba_company_shares_writes(const PbaBlock *block, JsonObject *device);
/* Whether another QEMU may have the disk, after a migration from here or before one to here. */
bool pba_company_is_inactive(const PbaBlock *block, JsonObject *device, const char *node);

/* Transactions on bitmaps */

/* {node, name}: the arguments of commands and actions, a source of a merge. */
JsonNode *pba_bitmap_ref(const char *node, const char *bitmap);
/* Adds an action; data is consumed. The second function is for actions that only need the
 * bitmap. */
void pba_actions_add(JsonArray *actions, const char *type, JsonNode *data);
void pba_actions_add_ref(JsonArray *actions, const char *type, const char *node,
                         const char *bitmap);
/* Removes the bitmap, if it exists. */
void pba_actions_add_removal(JsonArray *actions, const PbaBlock *block, const char *node,
                             const char *bitmap);
/* Merges the bits of another bitmap of the same node into the bitmap. */
void pba_actions_add_merge(JsonArray *actions, const char *node, const char *bitmap,
                           const char *from);
/* QEMU does all actions or none. Sends nothing if there are none. */
bool pba_actions_run(PbaQmp *qmp, JsonArray *actions, GError **error);

/* Companions: which backup a target's bitmap is relative to
 *
 * A bitmap says what has changed since one backup, but not since which one. So each of the target's
 * bitmaps has a companion: a second bitmap that never records and has every bit set. The
 * companion's name identifies the target, the guest and the disk, and contains the disk's name at
 * the backup, its size, and the backup's ID. It is stored, migrated and rolled back together with
 * the bitmap. A bit that it lacks belongs to a part of the disk that was cut off since. */

/* The beginning of the name of a bitmap with a companion. A program that does not know companions
 * never uses such a name, so it cannot clear the bitmap and leave its companion. */
#define PBA_TIED_PREFIX "pba-tied:"

typedef struct {
    const char *target_id;
    const char *guest; /* its UUID */
    const char *disk;  /* identifies the disk in the guest, under any name */
    const char *name;  /* its name in the backup; NULL, in a search: any */
    uint64_t size;
    const char *id; /* an access' nonce instead, or NULL: no backup has succeeded yet */
} PbaCompanion;

/* An ID is 32 hexadecimal digits, in lower case. */
bool pba_companion_check_id(const char *id, GError **error);

/* The name of the companion; the caller frees it. */
char *pba_companion_name(const PbaCompanion *companion);
/* Whether a bitmap with that name is a companion, of any target. */
bool pba_is_companion(const char *bitmap);
/* Whether it is a companion for that target. */
bool pba_is_companion_of(const char *bitmap, const char *target_id);
/* Whether a bitmap with that name is one of ours, or of a Proxmox QEMU. Proxmox' commands use the
 * target's name for its bitmap, so such a target would clear that bitmap. */
bool pba_is_reserved_bitmap(const char *name);

/* The name of the target's companion on that node, borrowed; NULL: there is none, or more than
 * one. */
const char *pba_companion_find(const PbaBlock *block, const char *node, const char *target_id);
/* The ID in such a name, borrowed; NULL: it has none. */
const char *pba_companion_id(const char *bitmap);
/* Whether the disk had that name in the backup. */
bool pba_companion_is_named(const char *bitmap, const char *name);
/* Why the node's bitmap must not be used on top of the backup that wanted describes; the caller
 * frees it; NULL: it may. */
char *pba_companion_problem(const PbaBlock *block, const char *node, const char *bitmap,
                            const PbaCompanion *wanted);

/* Actions of a transaction. Removes all of the target's companions on the node. */
void pba_companion_remove(JsonArray *actions, const PbaBlock *block, const char *node,
                          const char *target_id);
/* Adds one with that name and the bits of another bitmap of the node. */
void pba_companion_add(JsonArray *actions, const char *node, const char *name, const char *from,
                       uint64_t granularity, bool persistent);

#endif

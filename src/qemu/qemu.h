/* What a QEMU has, and how things of ours in it are called. */
#ifndef PBA_QEMU_H
#define PBA_QEMU_H

#include "src/pba.h"

/* What a QEMU says of itself */

typedef struct {
    unsigned major, minor, micro;
    char *package;       /* how its distribution calls it; NULL: not at all */
    JsonArray *commands; /* NULL: not asked for yet */
} PbaQemu;

/* Asks for the version. */
bool pba_qemu_query(PbaQmp *qmp, PbaQemu *qemu, GError **error);
void pba_qemu_clear(PbaQemu *qemu);
/* Asks for the commands if that was not done yet. */
bool pba_qemu_has_command(PbaQmp *qmp, PbaQemu *qemu, const char *command, bool *has,
                          GError **error);
/* The QAPI schema. QEMU takes some 25 ms for it and does nothing else meanwhile, Perl code up to
 * 300 ms to decode it. */
JsonArray *pba_qemu_schema(PbaQmp *qmp, GError **error);
bool pba_schema_has_argument(JsonArray *schema, const char *command, const char *argument);

G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(PbaQemu, pba_qemu_clear)

/* Names */

/* Whether the name is of a node of ours, of whatever target. */
#define PBA_OWN_PREFIX "pba-"
bool pba_is_own_node(const char *node);
/* The hash in names of ours, of so many hexadecimal digits. */
#define PBA_HASH_LENGTH 8
char *pba_short_hash(const char *text);
/* Name of something of ours for this target and what it is of: a device, or the guest by its
 * identity. At most 31 bytes, as QEMU wants node names and ids. */
char *pba_own_name(const char *target_id, const char *role, const char *of);
/* The same of a disk, by its key: the hash of its device. */
char *pba_key_name(const char *target_id, const char *role, const char *key);
/* What such names of this role and target begin with. */
char *pba_target_prefix(const char *target_id, const char *role);
/* Of every disk of an access there is one with this; version 0.1.0 has one of the other for each,
 * on Proxmox. See src/access/guard.c. */
#define PBA_HOLD_ROLE "hold"
#define PBA_DEVICE_ROLE "dev"
/* A nonce that identifies an access in the names of its exports and background bitmaps, so that a
 * late command of an ended access cannot affect a later one. This many random hexadecimal digits,
 * owned by the caller. */
#define PBA_NONCE_LENGTH 16
char *pba_nonce_new(GError **error);
/* The id of an export begins with this. QEMU does not limit it to 31 bytes (7.2, 10.0). */
#define PBA_EXPORT_PREFIX "pba-exp-"
char *pba_export_id(const char *target_id, const char *nonce, const char *key);
/* On Proxmox: says that a success is being committed for this target, by the access of this nonce;
 * the caller's to free. Nothing of version 0.1.0 has a name like this. */
#define PBA_ENDING_PREFIX "pba-ending-"
char *pba_ending_mark(const char *target_id, const char *nonce);
/* What all such names of this target begin with. */
char *pba_ending_prefix(const char *target_id);
/* Names of the bitmaps that we add for a target; the caller's to free. Without a nonce the
 * background bitmap is one of version 0.1.0. */
char *pba_target_bitmap(const char *target_id);
char *pba_background_bitmap(const char *target_id, const char *nonce, bool tied);
/* The target's bitmap that has a companion, see below; on both backends. */
char *pba_tied_bitmap(const char *target_id);
bool pba_is_tied_bitmap(const char *name);
/* The target in the name of a background bitmap of any form, whatever its nonce; NULL if the name
 * is not one. Points into the name. */
const char *pba_background_target(const char *name);
const char *pba_bitmap_target(const char *name);
/* In this a Proxmox QEMU records what the guest writes while an access with bitmaps is up. */
#define PBA_PVE_BACKGROUND "backup-access-background-bitmap"
/* The copy of the target's bitmap that an audit has; the caller's to free. */
char *pba_audit_bitmap(const char *target_id, const char *nonce);
/* The rest of such a name, which begins with the hash of the target; NULL if the name is not one.
 */
const char *pba_audit_key(const char *name);
bool pba_is_audit_of(const char *name, const char *target_id);
/* Whether a background bitmap belongs to the bitmap with a companion. */
bool pba_is_tied_background(const char *name);

/* Block devices, nodes and bitmaps at one moment, as the query commands tell them */

typedef struct {
    JsonArray *devices; /* query-block */
    JsonArray *nodes;   /* query-named-block-nodes, flat */
    JsonObject *graph;  /* x-debug-query-block-graph, where asked for */
} PbaBlock;

JsonArray *pba_block_query_nodes(PbaQmp *qmp, GError **error);
bool pba_block_query(PbaQmp *qmp, bool with_graph, PbaBlock *block, GError **error);
void pba_block_clear(PbaBlock *block);

/* All of these look things up in what was queried; the results are borrowed, NULL if not there. No
 * node (NULL) is found nowhere. */

/* The guest's block device of that name: block backend name, qdev id or node name, with the graph
 * also while an access has nodes of its own above that. */
JsonObject *pba_block_find_device(const PbaBlock *block, const char *name);
/* The device whose root is that node. */
JsonObject *pba_block_find_user(const PbaBlock *block, const char *node);
JsonObject *pba_block_find_node(const PbaBlock *block, const char *node);
/* Whether there are any whose names begin so. */
bool pba_block_has_nodes(const PbaBlock *block, const char *prefix);
JsonObject *pba_block_find_bitmap(const PbaBlock *block, const char *node, const char *bitmap);
/* The first background bitmap that the node has, of the target's bitmap with a companion or of the
 * one without. */
JsonObject *pba_block_find_background(const PbaBlock *block, const char *node,
                                      const char *target_id, bool tied);
/* The node's child of that name ("file", "target"); needs the graph. */
const char *pba_block_find_child(const PbaBlock *block, const char *node, const char *child);
/* The name of the guest's device that the node is a disk of, as a backup calls it: its block
 * backend's, its node's, or where that has none its id; needs the graph. The caller's to free. */
char *pba_block_device_above(const PbaBlock *block, const char *node);
/* Whether a device or another node uses the node; needs the graph. */
bool pba_block_has_parent(const PbaBlock *block, const char *node);
/* The same, but ignores users that are nodes of that driver. */
bool pba_block_has_parent_but(const PbaBlock *block, const char *node, const char *driver);
/* The first node from node downwards that is no filter: where a disk's bitmaps belong. */
const char *pba_block_skip_filters(const PbaBlock *block, const char *node);

/* Whether any node has a bitmap of that name. */
bool pba_block_has_bitmap(const PbaBlock *block, const char *bitmap);

/* Goes through the bitmaps that have a name, of one node or of all that have one. */
typedef struct {
    const char *node;
    const char *name;
    JsonObject *info;
    JsonArray *bitmaps; /* of the node */
    guint next;         /* of them */
    JsonArray *nodes;   /* NULL: of one node */
    guint next_node;
} PbaBitmapWalk;

PbaBitmapWalk pba_bitmaps_of(const PbaBlock *block, const char *node);
PbaBitmapWalk pba_bitmaps_everywhere(const PbaBlock *block);
/* False after the last one. */
bool pba_bitmaps_next(PbaBitmapWalk *at);

/* The name of one of the nodes, borrowed; NULL if it has none. */
const char *pba_block_node_name(JsonArray *nodes, guint index);
/* The id in what query-block calls qdev, the caller's to free; NULL if it has none. */
char *pba_block_qdev_id(const char *qdev);
/* The QOM path of the guest device, the caller's to free: a bare id may be that of other objects,
 * too (QEMU: "Path '...' is ambiguous"). */
char *pba_block_qom_path(const char *qdev);
/* Members of the entries found above. */
const char *pba_block_device_node(JsonObject *device);
bool pba_block_device_size(JsonObject *device, uint64_t *size, GError **error);
bool pba_block_node_size(JsonObject *node, uint64_t *size, GError **error);

G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(PbaBlock, pba_block_clear)

/* What others have at a disk; all of these need the graph. The disk is what the device uses,
 * query-block's entry, or without one (NULL) the node.
 */

/* The id of a job that works on the disk or on what it consists of, the caller's to free; NULL:
 * none. */
char *pba_company_job(const PbaBlock *block, JsonObject *device, const char *node);
/* What else there is of others that an access would harm, or that would harm it: the caller's to
 * free; NULL: nothing. node is what query-block shows. */
char *pba_company_problem(const PbaBlock *block, JsonObject *device, const char *node);
/* What of others uses the node, but for guest devices: "node 'x'", the caller's to free; NULL:
 * nothing. */
char *pba_company_user(const PbaBlock *block, const char *node);
/* Whether the host has a SCSI device there, whose commands may be handed to the guest. */
bool pba_company_is_host_device(const PbaBlock *block, const char *node);
/* Whether the device lets others write to its disk (share-rw). */
bool pba_company_shares_writes(const PbaBlock *block, JsonObject *device);

/* Transactions on bitmaps */

/* {node, name}: the arguments of commands and actions, a source of a merge. */
JsonNode *pba_bitmap_ref(const char *node, const char *bitmap);
/* Adds an action; data is consumed. The second is for those that need no more than which bitmap. */
void pba_actions_add(JsonArray *actions, const char *type, JsonNode *data);
void pba_actions_add_ref(JsonArray *actions, const char *type, const char *node,
                         const char *bitmap);
/* Removes the bitmap, if it is there. */
void pba_actions_add_removal(JsonArray *actions, const PbaBlock *block, const char *node,
                             const char *bitmap);
/* Gives a bitmap the bits of another one of the same node. */
void pba_actions_add_merge(JsonArray *actions, const char *node, const char *bitmap,
                           const char *from);
/* All of them or none. Sends nothing if there are none. */
bool pba_actions_run(PbaQmp *qmp, JsonArray *actions, GError **error);

/* Companions: which backup a target's bitmap is relative to
 *
 * A bitmap says what has changed since one backup, and nothing in it says which one that is. So
 * beside a target's bitmap stands a second one that never records and has every bit set. Its name
 * says of which target, guest and disk it is, what the disk was called and how large it was, and
 * the id of the backup. It is stored, migrated and rolled back together with its partner. A bit
 * that it lacks is a part of the disk that was cut off since. */

/* What the name of a bitmap with a companion begins with. A program that knows of no companions
 * never uses such a name, so it cannot clear the bitmap while its companion stays. */
#define PBA_TIED_PREFIX "pba-tied:"

typedef struct {
    const char *target_id;
    const char *guest; /* its UUID */
    const char *disk;  /* what tells it from others of the guest, whatever its name */
    const char *name;  /* what the backup called it; NULL, of one that is looked for: any */
    uint64_t size;
    const char *id; /* an access' nonce instead, or NULL: of no backup that has ended well */
} PbaCompanion;

/* An id is 32 hexadecimal digits, in lower case. */
bool pba_companion_check_id(const char *id, GError **error);

/* The caller's to free. */
char *pba_companion_name(const PbaCompanion *companion);
/* Whether a bitmap of that name is one, of whatever target. */
bool pba_is_companion(const char *bitmap);
/* Whether it is one of that target. */
bool pba_is_companion_of(const char *bitmap, const char *target_id);
/* Whether a bitmap of that name is one of ours, or of a Proxmox QEMU's own. Proxmox' commands give
 * a target's bitmap the target's name: as a target's it would be taken for that bitmap, and begun
 * anew. */
bool pba_is_reserved_bitmap(const char *name);

/* The name of the target's companion on that node, borrowed; NULL: there is none, or several. */
const char *pba_companion_find(const PbaBlock *block, const char *node, const char *target_id);
/* The id in such a name, borrowed; NULL: it has none. */
const char *pba_companion_id(const char *bitmap);
/* Whether the backup called the disk that. */
bool pba_companion_is_named(const char *bitmap, const char *name);
/* Why the node's bitmap must not be used as relative to the backup that wanted tells, the caller's
 * to free; NULL: it may. */
char *pba_companion_problem(const PbaBlock *block, const char *node, const char *bitmap,
                            const PbaCompanion *wanted);

/* Actions of a transaction. Removes all of the target's companions on the node. */
void pba_companion_remove(JsonArray *actions, const PbaBlock *block, const char *node,
                          const char *target_id);
/* Adds one of that name with the bits of another bitmap of the node. */
void pba_companion_add(JsonArray *actions, const char *node, const char *name, const char *from,
                       uint64_t granularity, bool persistent);

#endif

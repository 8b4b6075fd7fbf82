/* What accesses have in QEMU and on disk, whoever made them: told by names, since a dead process
 * can tell nothing. */
#ifndef PBA_SRC_LEFT_H
#define PBA_SRC_LEFT_H

#include "access.h"

/* What there is at one moment; the block graph is the caller's. */
typedef struct {
    const PbaAccess *access; /* which looks; borrowed */
    PbaBlock *block;
    JsonArray *exports;
    GPtrArray *paths; /* on disk */
    bool is_live;     /* a living process has an access: its NBD server is left in peace */
} PbaLeft;

/* One thing of them. */
typedef struct {
    const char *name;   /* of the node or export, or the path; borrowed */
    char *key;          /* of the target, as in names; NULL: of none */
    char *device;       /* NULL: of none */
    char *what;         /* "block node 'pba-raw-...'" */
    const char *undone; /* what recover says it did to it; static */
    bool harmless;      /* it costs nothing and is in nobody's way */
} PbaLeftThing;

bool pba_left_look(PbaAccess *access, bool with_graph, PbaBlock *block, PbaLeft *left,
                   GError **error);
void pba_left_clear(PbaLeft *left);

/* Everything there is, as PbaLeftThing, but for the directories of living processes, which may be
 * of another guest; the caller's to free. */
GPtrArray *pba_left_things(const PbaLeft *left);

/* Takes pba-ROLE-TARGET-DISK apart, the name of a node or export of an access; the results point
 * into it. */
bool pba_left_parse(const char *name, const char **target, const char **disk);
/* Names of the nodes and ids of the exports, borrowed; NULL where there is none. */
guint pba_left_name_count(const PbaLeft *left);
const char *pba_left_name(const PbaLeft *left, guint index);
/* The name of the target with that key, or whose key begins so, the caller's to free; NULL where
 * nothing tells it. */
char *pba_left_target(const PbaLeft *left, const char *key);
/* The name that a device was given to setup by, the caller's to free; NULL where it has gone. */
char *pba_left_device(const PbaLeft *left, const char *disk);
/* upstream: whether the node has a background bitmap of the target, or one of the target that does
 * not record. */
bool pba_left_is_split(const PbaBlock *block, const char *node, const char *target_id);

G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(PbaLeft, pba_left_clear)

#endif

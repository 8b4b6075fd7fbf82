/* What accesses of all processes have in QEMU and on disk. It is found by names, because a dead
 * process cannot be asked. */
#ifndef PBA_SRC_LEFTOVERS_H
#define PBA_SRC_LEFTOVERS_H

#include "access.h"

/* What there is at one moment; the block graph is the caller's. */
typedef struct {
    const PbaAccess *access; /* which looks; borrowed */
    PbaBlock *block;
    JsonArray *exports;
    GPtrArray *paths; /* on disk */
    bool is_live;     /* a living process has an access: its NBD server is left in peace */
} PbaLeftovers;

/* One thing of them. */
typedef struct {
    const char *name;   /* of the node or export, or the path; borrowed */
    char *key;          /* of the target, as in names; NULL: of none */
    char *device;       /* NULL: of none */
    char *what;         /* "block node 'pba-raw-...'" */
    const char *undone; /* what recover says it did to it; static */
    bool harmless;      /* it costs nothing and blocks nothing */
} PbaLeftover;

bool pba_leftovers_look(PbaAccess *access, PbaBlock *block, PbaLeftovers *leftovers,
                        GError **error);
void pba_leftovers_clear(PbaLeftovers *leftovers);

/* Every PbaLeftover; the caller's to free. The directories of living processes are left out: they
 * may belong to another guest. */
GPtrArray *pba_leftovers_list(const PbaLeftovers *leftovers);

/* Takes pba-ROLE-TARGET-DISK apart, the name of a node or export of an access; the results point
 * into it. */
bool pba_leftovers_parse_name(const char *name, const char **target, const char **disk);
/* Names of the nodes and ids of the exports, borrowed; NULL where there is none. */
guint pba_leftovers_name_count(const PbaLeftovers *leftovers);
const char *pba_leftovers_name(const PbaLeftovers *leftovers, guint index);
/* The name of the target with that key, or whose key begins so, the caller's to free; NULL where
 * nothing tells it. */
char *pba_leftovers_target(const PbaLeftovers *leftovers, const char *key);
/* The name that a device was given to setup by, the caller's to free; NULL where it has gone. */
char *pba_leftovers_device(const PbaLeftovers *leftovers, const char *disk);
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(PbaLeftovers, pba_leftovers_clear)

#endif

/* What accesses of all processes have in QEMU and on disk. It is found by names, because a dead
 * process cannot be asked. */
#ifndef PBA_SRC_LEFTOVERS_H
#define PBA_SRC_LEFTOVERS_H

#include "access.h"

/* The state at one moment; the block graph belongs to the caller. */
typedef struct {
    const PbaAccess *access; /* the observing one; borrowed */
    PbaBlock *block;
    JsonArray *exports;
    GPtrArray *paths; /* on disk */
    bool is_live;     /* a live process has an access: its NBD server is left alone */
} PbaLeftovers;

/* One leftover. */
typedef struct {
    const char *name;   /* of the node or export, or the path; borrowed */
    char *key;          /* of the target, as in names; NULL: it has no target */
    char *device;       /* NULL: of none */
    char *what;         /* "block node 'pba-raw-...'" */
    const char *undone; /* what recover reports to have done to it; static */
    bool harmless;      /* it costs nothing and blocks nothing */
} PbaLeftover;

bool pba_leftovers_look(PbaAccess *access, PbaBlock *block, PbaLeftovers *leftovers,
                        GError **error);
void pba_leftovers_clear(PbaLeftovers *leftovers);

/* Every PbaLeftover; the caller frees the result. The directories of live processes are left out:
 * they may belong to another guest. */
GPtrArray *pba_leftovers_list(const PbaLeftovers *leftovers);

/* Splits pba-ROLE-TARGET-DISK, the name of a node or export of an access; the results point into
 * it. */
bool pba_leftovers_parse_name(const char *name, const char **target, const char **disk);
/* Names of the nodes and IDs of the exports, borrowed; NULL if there is none. */
guint pba_leftovers_name_count(const PbaLeftovers *leftovers);
const char *pba_leftovers_name(const PbaLeftovers *leftovers, guint index);
/* The name of the target with that key, or whose key begins with it; the caller frees it; NULL if
 * it is not known. */
char *pba_leftovers_target(const PbaLeftovers *leftovers, const char *key);
/* The device's name in the request to setup; the caller frees it; NULL if the device is gone. */
char *pba_leftovers_device(const PbaLeftovers *leftovers, const char *disk);
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(PbaLeftovers, pba_leftovers_clear)

#endif

/* Where regions are zeroes: shared by the ways to find out. */
#ifndef PBA_SRC_HOLES_H
#define PBA_SRC_HOLES_H

#include "copy.h"

typedef enum {
    PBA_HOLE_FOUND,
    PBA_HOLE_LATER, /* the answer is under way */
    PBA_HOLE_NONE,  /* or unknown: a read will report the error */
} PbaHoleAnswer;

typedef struct {
    /* Starts with the region. Returns false while an answer for another region is outstanding. */
    bool (*begin)(PbaHoles *holes);
    /* The next run of zeroes of the region. */
    PbaHoleAnswer (*find)(PbaHoles *holes, uint64_t *offset, uint64_t *length);
    void (*free)(PbaHoles *holes);
} PbaHolesKind;

/* For one region. */
typedef enum {
    PBA_HOLES_WANTED, /* kind has to begin */
    PBA_HOLES_SOUGHT,
    PBA_HOLES_FOUND, /* hole is the next one */
    PBA_HOLES_OVER,  /* there are no more, or none that are asked about */
} PbaHolesState;

struct PbaHoles {
    const PbaHolesKind *kind;
    uint32_t align;
    uint64_t begin; /* of the region */
    uint64_t end;
    PbaHolesState state;
    PbaRange hole;
};

#endif

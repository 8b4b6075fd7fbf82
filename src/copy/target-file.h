/* The calls that write to a file or block device, each of which may hang: separate processes make
 * them, see sink-file.c. They take no locks and allocate no memory. */
#ifndef PBA_SRC_TARGET_FILE_H
#define PBA_SRC_TARGET_FILE_H

#include "copy.h"

/* The ways to write zeroes. If the target does not support one, the next is tried. */
typedef enum { PBA_ZERO_BY_HOLE, PBA_ZERO_BY_RANGE, PBA_ZERO_BY_WRITING } PbaZeroWay;

typedef struct {
    const char *path; /* borrowed; NULL: fd is open already */
    int fd;
    uint64_t size;       /* of the volume */
    uint64_t found_size; /* of an opened target that does not fit */
    bool is_increment;   /* a file must exist and have the volume's size */
    unsigned writers;    /* how many at a time are fastest */
    bool flushes;
    uint64_t zero_from; /* from here on, the target has only zeroes so far */
    PbaZeroWay zero_way;
} PbaTargetFile;

/* Opens the target, and gives a file the volume's size. Returns an errno, 0 on success. With
 * found_size: ENOSPC if a device is too small, ENODATA if an increment does not fit the file. */
int pba_target_file_open(PbaTargetFile *target);
/* Writes the piece, and sets its error. */
void pba_target_file_write(PbaTargetFile *target, PbaPiece *piece);
int pba_target_file_finish(PbaTargetFile *target);

#endif

/* The calls that write to a file or block device, each of which may hang: made in a process of
 * their own, see sink-file.c. They take no locks and no memory. */
#ifndef PBA_SRC_TARGET_FILE_H
#define PBA_SRC_TARGET_FILE_H

#include "copy.h"

/* How zeroes come into the target, the next way if one is not possible there. */
typedef enum { PBA_ZERO_BY_HOLE, PBA_ZERO_BY_RANGE, PBA_ZERO_BY_WRITING } PbaZeroWay;

typedef struct {
    const char *path; /* borrowed; NULL: fd is open already */
    int fd;
    uint64_t size;       /* of the volume */
    uint64_t found_size; /* of what was opened and does not do */
    bool is_increment;   /* a file has to be there, of the volume's size */
    unsigned writers;    /* as many as are good for it at a time */
    bool flushes;
    uint64_t zero_from; /* from here on the target holds nothing but zeroes yet */
    PbaZeroWay zero_way;
} PbaTargetFile;

/* Opens the target and gives a file the volume's size. Returns errno, 0 if good; with found_size
 * ENOSPC for a device that is too small, ENODATA for a file that an increment does not fit. */
int pba_target_file_open(PbaTargetFile *target);
/* Writes the piece; its error says how that went. */
void pba_target_file_write(PbaTargetFile *target, PbaPiece *piece);
int pba_target_file_finish(PbaTargetFile *target);

#endif

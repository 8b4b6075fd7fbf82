/* What nbd.c and dirty-iter.c need of a volume that is behind a file handle. */
#ifndef PBA_SRC_HANDLE_H
#define PBA_SRC_HANDLE_H

#include "src/pba.h"

typedef struct PbaHandle PbaHandle;

/* In nbd.c: takes over handle. */
PbaVolume *pba_volume_new_handle(PbaHandle *handle, const char *device, uint64_t size,
                                 const PbaHooks *hooks);

/* The range is inside the volume. */
bool pba_handle_pread(PbaVolume *volume, char *buffer, uint64_t offset, uint64_t length,
                      GError **error);
/* Whole clusters (fallocate: FALLOC_FL_PUNCH_HOLE). */
bool pba_handle_discard(PbaVolume *volume, uint64_t offset, uint64_t length, GError **error);
/* As pba_volume_next_dirty_region. */
bool pba_handle_next_region(PbaVolume *volume, uint64_t *offset, uint64_t *length, GError **error);
void pba_handle_free(PbaHandle *handle);
/* The descriptor; the handle keeps it. */
int pba_handle_fd(const PbaHandle *handle);

#endif

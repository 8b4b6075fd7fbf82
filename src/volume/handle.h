/* A volume that is behind a file handle. */
#ifndef PBA_SRC_HANDLE_H
#define PBA_SRC_HANDLE_H

#include "src/pba.h"

typedef struct PbaHandle PbaHandle;

/* In volume.c: takes over handle. */
PbaVolume *pba_volume_new_handle(PbaHandle *handle, const char *device, uint64_t size,
                                 const PbaHooks *hooks);

/* The descriptor; the handle keeps it. */
int pba_handle_fd(const PbaHandle *handle);

#endif

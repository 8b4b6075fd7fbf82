/* A volume that is behind a file handle. */
#ifndef PBA_SRC_HANDLE_H
#define PBA_SRC_HANDLE_H

#include "src/pba.h"

typedef struct PbaHandle PbaHandle;

/* With a descriptor of its own for what fd is; see pba_volume_open_handle. */
PbaHandle *pba_handle_new(int fd, uint64_t size, PbaNextRegion next_region, void *opaque,
                          GError **error);

/* The descriptor; the handle keeps it. */
int pba_handle_fd(const PbaHandle *handle);

#endif

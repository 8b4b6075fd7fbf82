/* The virtual file of one device, from the point of view of the process that starts its server. */
#ifndef PBA_SRC_VFILE_H
#define PBA_SRC_VFILE_H

#include "src/pba.h"

/* How names of virtual files begin. */
#define PBA_VFILE_PREFIX "vfile-"

typedef struct PbaVfile PbaVfile;

/* Starts a server process for the export in options, which need not exist yet. The file of a whole
 * volume reports zeroes as holes; the file of an increment does not. Fails with
 * PBA_ERROR_UNSUPPORTED without FUSE. */
PbaVfile *pba_vfile_start(const char *path, const PbaVolumeOptions *options, bool is_whole,
                          GError **error);
/* Tells the server to create the file at path: the export in the options exists. */
void pba_vfile_serve(PbaVfile *vfile);
/* Waits until the file can be opened, or returns the server's error. */
bool pba_vfile_wait_ready(PbaVfile *vfile, const PbaHooks *hooks, GError **error);
/* A new descriptor of the file, which the caller closes; -1 on error. */
int pba_vfile_open(PbaVfile *vfile, GError **error);
/* Tells the server to unmount and end, without waiting for it. */
void pba_vfile_tell_end(PbaVfile *vfile);
/* Unmounts the file and ends its server, even while programs have the file open. Can be called
 * again after an error. */
bool pba_vfile_end(PbaVfile *vfile, const PbaHooks *hooks, GError **error);
/* Frees local memory only: also for a forked child, which must not do anything else. */
void pba_vfile_free(PbaVfile *vfile);

/* Unmounts and removes what killed servers of a dead process left in its directory. */
void pba_vfiles_remove_stale(const char *dir);

#endif

/* One device's virtual file, as the process sees it that has it served. */
#ifndef PBA_SRC_VFILE_H
#define PBA_SRC_VFILE_H

#include "src/pba.h"

/* How names of virtual files begin. */
#define PBA_VFILE_PREFIX "vfile-"

typedef struct PbaVfile PbaVfile;

/* Starts a server process for what options name, which need not be there yet. The file of a whole
 * volume tells where zeroes are; one of which a part is to be read, what is dirty, does not.
 * PBA_ERROR_UNSUPPORTED where there is no FUSE. */
PbaVfile *pba_vfile_start(const char *path, const PbaVolumeOptions *options, bool is_whole,
                          GError **error);
/* Has the file made at path: what the options name is there. */
void pba_vfile_serve(PbaVfile *vfile);
/* Waits until the file can be opened, or gives the server's reason why not. */
bool pba_vfile_wait_ready(PbaVfile *vfile, const PbaHooks *hooks, GError **error);
/* A new descriptor of the file, the caller's to close; -1 on error. */
int pba_vfile_open(PbaVfile *vfile, GError **error);
/* Tells the server to unmount and end, without waiting for it. */
void pba_vfile_tell_end(PbaVfile *vfile);
/* Has it unmounted and ended, whoever still has it open. Can be called again after an error. */
bool pba_vfile_end(PbaVfile *vfile, const PbaHooks *hooks, GError **error);
/* Frees what is local: also in a forked child, where nothing else may be done. */
void pba_vfile_free(PbaVfile *vfile);

/* Unmounts and removes what killed servers of a dead process left in its directory. */
void pba_vfiles_remove_stale(const char *dir);

#endif

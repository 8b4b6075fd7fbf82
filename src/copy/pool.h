/* Blocking calls on files, made by threads so that the caller's thread can go on. */
#ifndef PBA_SRC_POOL_H
#define PBA_SRC_POOL_H

#include "src/pba.h"

typedef struct PbaPool PbaPool;
typedef struct PbaJob PbaJob;

/* One call; part of a struct with all that it needs. */
struct PbaJob {
    void (*run)(PbaJob *job);  /* in a thread of the pool */
    void (*done)(PbaJob *job); /* in the thread that reaps */
    /* Called instead of done, in any thread, when the pool is freed before the job was reaped;
     * frees what belongs to the job. */
    void (*leave)(PbaJob *job);
    PbaJob *next;
};

/* Without a thread yet. */
PbaPool *pba_pool_new(GError **error);
/* Starts so many threads more. They take no signals: those are for the caller's
 * thread. */
bool pba_pool_grow(PbaPool *pool, unsigned threads, GError **error);
/* Drops the jobs that do not run yet, and waits for no other: a call may hang. In a forked child,
 * where the threads are not, only the child's descriptor is closed. */
void pba_pool_free(PbaPool *pool);
void pba_pool_submit(PbaPool *pool, PbaJob *job);
/* Readable when a job is finished (poll(2)). */
int pba_pool_fd(const PbaPool *pool);
/* Calls done of every finished job. */
void pba_pool_reap(PbaPool *pool);

/* A descriptor that jobs use: open for as long as one does, since a call that hangs is not waited
 * for. */
typedef struct {
    int fd;
} PbaJobFile;

/* fd is taken over. */
PbaJobFile *pba_job_file_new(int fd);
PbaJobFile *pba_job_file_ref(PbaJobFile *file);
void pba_job_file_unref(PbaJobFile *file);

G_DEFINE_AUTOPTR_CLEANUP_FUNC(PbaPool, pba_pool_free)

#endif

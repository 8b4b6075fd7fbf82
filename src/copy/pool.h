/* Threads make blocking calls on files, while the caller's thread continues. */
#ifndef PBA_SRC_POOL_H
#define PBA_SRC_POOL_H

#include "src/pba.h"

typedef struct PbaPool PbaPool;
typedef struct PbaJob PbaJob;

/* One call; a part of a struct with all its data. */
struct PbaJob {
    void (*run)(PbaJob *job);  /* in a thread of the pool */
    void (*done)(PbaJob *job); /* in the thread that reaps */
    /* Called instead of done, in any thread, if the pool is freed before the job was reaped. Frees
     * the job. */
    void (*leave)(PbaJob *job);
    PbaJob *next;
};

/* A new pool has no threads. */
PbaPool *pba_pool_new(GError **error);
/* Starts this many more threads. They block all signals, which are for the caller's thread. */
bool pba_pool_grow(PbaPool *pool, unsigned threads, GError **error);
/* Drops jobs that have not started, and does not wait for others, because a call may hang. In a
 * forked child, which has no threads, only closes the child's descriptor. */
void pba_pool_free(PbaPool *pool);
void pba_pool_submit(PbaPool *pool, PbaJob *job);
/* Readable when a job is finished (poll(2)). */
int pba_pool_fd(const PbaPool *pool);
/* Calls done for every finished job. */
void pba_pool_reap(PbaPool *pool);

/* A descriptor that jobs use. It stays open while a job uses it, because nothing waits for a call
 * that hangs. */
typedef struct {
    int fd;
} PbaJobFile;

/* Takes ownership of fd. */
PbaJobFile *pba_job_file_new(int fd);
PbaJobFile *pba_job_file_ref(PbaJobFile *file);
void pba_job_file_unref(PbaJobFile *file);

G_DEFINE_AUTOPTR_CLEANUP_FUNC(PbaPool, pba_pool_free)

#endif

/* Blocking calls on files, made by threads so that the caller's thread can go on. */
#ifndef PBA_SRC_POOL_H
#define PBA_SRC_POOL_H

#include "src/pba.h"

typedef struct PbaPool PbaPool;
typedef struct PbaJob PbaJob;

/* One call; part of the struct it is about. That struct's owner keeps it alive until done was
 * called, or else pba_pool_free. */
struct PbaJob {
    void (*run)(PbaJob *job);  /* in a thread of the pool */
    void (*done)(PbaJob *job); /* in the thread that reaps */
    /* Of a job that nobody needs to wait for: called instead of done, in any thread, when the pool
     * is freed before it was reaped; frees what belongs to the job. NULL: it is waited for. */
    void (*leave)(PbaJob *job);
    PbaJob *next;
};

/* Without a thread yet. */
PbaPool *pba_pool_new(GError **error);
/* Starts threads until there are so many. They take no signals: those are for the caller's
 * thread. */
bool pba_pool_grow(PbaPool *pool, unsigned threads, GError **error);
/* Waits for the jobs that run and have to be waited for, and drops those that do not run yet. In a
 * forked child, where the threads are not, only the child's descriptor is closed. */
void pba_pool_free(PbaPool *pool);
void pba_pool_submit(PbaPool *pool, PbaJob *job);
/* Readable when a job is finished (poll(2)). */
int pba_pool_fd(const PbaPool *pool);
/* Calls done of every finished job. */
void pba_pool_reap(PbaPool *pool);

G_DEFINE_AUTOPTR_CLEANUP_FUNC(PbaPool, pba_pool_free)

#endif

#include "pool.h"
#include "src/base/base.h"
#include <unistd.h>

struct PbaPool {
    gatomicrefcount references; /* the owner's and one for each thread */
    GMutex mutex;
    GCond has_work;
    PbaJob *first; /* to be run */
    PbaJob *last;
    PbaJob *finished; /* to be reaped, in any order */
    bool stop;
    int fd;
    pid_t owner;
};

static void pool_unref(PbaPool *pool)
{
    if (!g_atomic_ref_count_dec(&pool->references)) {
        return;
    }
    g_mutex_clear(&pool->mutex);
    g_cond_clear(&pool->has_work);
    if (pool->fd != -1) {
        close(pool->fd);
    }
    g_free(pool);
}

/* Locked. */
static PbaJob *next_job(PbaPool *pool)
{
    while (!pool->first && !pool->stop) {
        g_cond_wait(&pool->has_work, &pool->mutex);
    }
    PbaJob *job = pool->stop ? NULL : pool->first;
    if (job) {
        pool->first = job->next;
    }
    return job;
}

/* Locked. */
static void put_finished(PbaPool *pool, PbaJob *job)
{
    if (pool->stop) {
        job->leave(job);
        return;
    }
    if (!pool->finished) {
        pba_wake(pool->fd);
    }
    job->next = pool->finished;
    pool->finished = job;
}

static void *work(void *opaque)
{
    PbaPool *pool = opaque;
    PbaJob *job;

    g_mutex_lock(&pool->mutex);
    while ((job = next_job(pool))) {
        g_mutex_unlock(&pool->mutex);
        job->run(job);
        g_mutex_lock(&pool->mutex);
        put_finished(pool, job);
    }
    g_mutex_unlock(&pool->mutex);
    pool_unref(pool);
    return NULL;
}

static bool start_thread(PbaPool *pool, GError **error)
{
    g_atomic_ref_count_inc(&pool->references);
    if (!pba_thread_start(work, pool, error)) {
        pool_unref(pool);
        return false;
    }
    return true;
}

PbaPool *pba_pool_new(GError **error)
{
    g_autoptr(PbaPool) pool = g_new0(PbaPool, 1);

    g_atomic_ref_count_init(&pool->references);
    g_mutex_init(&pool->mutex);
    g_cond_init(&pool->has_work);
    pool->owner = getpid();
    pool->fd = pba_wake_new(error);
    return pool->fd == -1 ? NULL : g_steal_pointer(&pool);
}

bool pba_pool_grow(PbaPool *pool, unsigned threads, GError **error)
{
    while (threads > 0 && start_thread(pool, error)) {
        threads--;
    }
    return threads == 0;
}

static void leave_all(PbaJob *job)
{
    while (job) {
        PbaJob *next = job->next;
        job->leave(job);
        job = next;
    }
}

void pba_pool_free(PbaPool *pool)
{
    if (!pool) {
        return;
    }
    if (pool->owner != getpid()) {
        close(pool->fd); /* the mutex may be locked for ever here */
        return;
    }
    g_mutex_lock(&pool->mutex);
    pool->stop = true;
    g_cond_broadcast(&pool->has_work);
    leave_all(g_steal_pointer(&pool->first));
    leave_all(g_steal_pointer(&pool->finished));
    g_mutex_unlock(&pool->mutex);
    pool_unref(pool);
}

void pba_pool_submit(PbaPool *pool, PbaJob *job)
{
    job->next = NULL;
    g_mutex_lock(&pool->mutex);
    if (pool->first) {
        pool->last->next = job;
    } else {
        pool->first = job;
    }
    pool->last = job;
    g_cond_signal(&pool->has_work);
    g_mutex_unlock(&pool->mutex);
}

int pba_pool_fd(const PbaPool *pool)
{
    return pool->fd;
}

void pba_pool_reap(PbaPool *pool)
{
    if (!pba_wake_clear(pool->fd)) {
        return; /* nothing is finished */
    }
    g_mutex_lock(&pool->mutex);
    PbaJob *job = g_steal_pointer(&pool->finished);
    g_mutex_unlock(&pool->mutex);
    while (job) {
        PbaJob *next = job->next; /* done may submit it again */
        job->done(job);
        job = next;
    }
}

PbaJobFile *pba_job_file_new(int fd)
{
    PbaJobFile *file = g_atomic_rc_box_new(PbaJobFile);

    file->fd = fd;
    return file;
}

PbaJobFile *pba_job_file_ref(PbaJobFile *file)
{
    return g_atomic_rc_box_acquire(file);
}

static void close_file(gpointer file)
{
    close(((PbaJobFile *)file)->fd);
}

void pba_job_file_unref(PbaJobFile *file)
{
    g_atomic_rc_box_release_full(file, close_file);
}

/* Opens files of digests in a thread, because a file system may hang. */
#include "copy.h"
#include "digest.h"
#include "src/base/base.h"

/* The interval at which the wait checks whether this is a forked child. */
#define TURN (G_TIME_SPAN_SECOND / 4)

typedef struct {
    PbaDigests *digests; /* whatever there is of them, also on error */
    GError *error;
    bool done;
} Opened;

typedef struct {
    PbaJob job;
    PbaCopyOptions options; /* of strings it has only those below */
    char **expected;
    char *digest_file;
    uint64_t size;
    PbaDigests *digests;
    GError *error;
    Opened *opened; /* the caller's; for done alone */
} OpenJob;

static void run_open(PbaJob *job)
{
    OpenJob *self = (OpenJob *)job;

    pba_digests_new(&self->options, self->size, &self->digests, &self->error);
}

static void leave_open(PbaJob *job)
{
    OpenJob *self = (OpenJob *)job;

    pba_digests_unref(self->digests);
    g_clear_error(&self->error);
    g_strfreev(self->expected);
    g_free(self->digest_file);
    g_free(self);
}

static void open_done(PbaJob *job)
{
    OpenJob *self = (OpenJob *)job;

    self->opened->digests = g_steal_pointer(&self->digests);
    self->opened->error = g_steal_pointer(&self->error);
    self->opened->done = true;
    leave_open(job);
}

/* A thread that hangs may continue after the caller's memory is freed, so it has its own copy. */
static PbaJob *new_job(const PbaCopyOptions *options, uint64_t size, Opened *opened)
{
    OpenJob *self = g_new0(OpenJob, 1);

    self->job = (PbaJob){.run = run_open, .done = open_done, .leave = leave_open};
    self->expected = g_strdupv((char **)options->expected);
    self->digest_file = g_strdup(options->digest_file);
    self->options = (PbaCopyOptions){
        .digests = options->digests,
        .digest_file = self->digest_file,
        .digests_increment = options->digests_increment,
        .digest_block = options->digest_block,
        .expected = (const char *const *)self->expected,
        .skip_expected = options->skip_expected,
    };
    self->size = size;
    self->opened = opened;
    return &self->job;
}

static bool wait_opened(const Opened *opened, PbaLoop *loop, GError **error)
{
    while (!opened->done) {
        if (!pba_loop_turn(loop, g_get_monotonic_time() + TURN, G_MAXINT64, error)) {
            return false;
        }
    }
    return true;
}

bool pba_digests_open(const PbaCopyOptions *options, uint64_t size, PbaLoop *loop,
                      PbaDigests **digests, GError **error)
{
    Opened opened = {0};

    if (!options->digests && !options->digest_file && !options->expected) {
        return true;
    }
    /* All computing threads may be needed in addition to the reading ones. */
    PbaPool *pool = pba_loop_pool(loop, CLAMP(g_get_num_processors(), 1, 4), error);
    if (!pool) {
        return false;
    }
    pba_pool_submit(pool, new_job(options, size, &opened));
    if (!wait_opened(&opened, loop, error)) {
        g_clear_pointer(&loop->pool, pba_pool_free); /* the job must not be reaped any more */
        return false;
    }
    *digests = opened.digests;
    if (opened.error) {
        g_propagate_error(error, opened.error);
        return false;
    }
    return true;
}

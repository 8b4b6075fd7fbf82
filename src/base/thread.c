/* Threads for calls that block. */
#include "base.h"

#include <pthread.h>
#include <signal.h>

/* Perl's signal handlers must not run in a thread that Perl does not know. */
bool pba_thread_start(GThreadFunc run, void *opaque, GError **error)
{
    sigset_t all;
    sigset_t before;
    g_autoptr(GError) local = NULL;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    GThread *thread = g_thread_try_new("pba", run, opaque, &local);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!thread) {
        pba_error_set(error, PBA_ERROR_SYSTEM, "cannot start a thread - %s", local->message);
        return false;
    }
    g_thread_unref(thread);
    return true;
}

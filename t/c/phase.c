/* The phases of an access: every pair of them, compared with rules about what may follow what. */
#include "src/access/access.h"
#include "tap.h"
#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

/* In the order of the enum: "x" where the column's phase may follow the row's. */
static const char *const may_follow[PBA_PHASE_COUNT] = {
    /*                      new claimed changing prepared cut up exporting exported ending stuck
                            committed ended gone */
    [PBA_PHASE_NEW] = ".x...........",       [PBA_PHASE_CLAIMED] = "x.x..........",
    [PBA_PHASE_CHANGING] = "...x....x....",  [PBA_PHASE_PREPARED] = "....x...x....",
    [PBA_PHASE_CUT] = ".....x..x....",       [PBA_PHASE_UP] = "......x.x...x",
    [PBA_PHASE_EXPORTING] = ".......xx...x", [PBA_PHASE_EXPORTED] = "........x....",
    [PBA_PHASE_ENDING] = ".........xxxx",    [PBA_PHASE_STUCK] = "........x....",
    [PBA_PHASE_COMMITTED] = "x............", [PBA_PHASE_ENDED] = "x............",
    [PBA_PHASE_GONE] = "x............",
};

static void test_pairs(void)
{
    for (int from = 0; from < PBA_PHASE_COUNT; from++) {
        for (int to = 0; to < PBA_PHASE_COUNT; to++) {
            bool expected = may_follow[from][to] == 'x';
            ok(pba_phase_may_follow((PbaPhase)from, (PbaPhase)to) == expected, "%s after %s: %s",
               pba_phase_name((PbaPhase)to), pba_phase_name((PbaPhase)from),
               expected ? "yes" : "never");
        }
    }
}

/* Whether a process survives when its access enters the phase. If not, it aborts in the phase that
 * it was in. */
static bool survives_entering(PbaPhase from, PbaPhase to)
{
    int status;
    pid_t pid = fork();

    if (pid == 0) {
        PbaAccess access = {.phase = from};
        setrlimit(RLIMIT_CORE, &(struct rlimit){0});
        close(STDERR_FILENO);
        pba_access_enter(&access, to);
        _exit(access.phase == to ? EXIT_SUCCESS : EXIT_FAILURE);
    }
    g_assert(pid > 0 && waitpid(pid, &status, 0) == pid);
    g_assert(WIFSIGNALED(status) || (WIFEXITED(status) && WEXITSTATUS(status) == EXIT_SUCCESS));
    return WIFEXITED(status);
}

static void test_entering(void)
{
    for (int from = 0; from < PBA_PHASE_COUNT; from++) {
        for (int to = 0; to < PBA_PHASE_COUNT; to++) {
            bool expected = may_follow[from][to] == 'x';
            ok(survives_entering((PbaPhase)from, (PbaPhase)to) == expected, "%s %s %s",
               pba_phase_name((PbaPhase)from), expected ? "enters" : "cannot enter",
               pba_phase_name((PbaPhase)to));
        }
    }
}

/* Rules that the table must obey. */
static void test_rules(void)
{
    for (int phase = 0; phase < PBA_PHASE_COUNT; phase++) {
        PbaPhase from = (PbaPhase)phase;
        const char *name = pba_phase_name(from);
        ok(from == PBA_PHASE_ENDING || !pba_phase_may_follow(from, PBA_PHASE_COMMITTED),
           "%s: only an end commits", name);
        ok(from == PBA_PHASE_CLAIMED || !pba_phase_may_follow(from, PBA_PHASE_CHANGING),
           "%s: nothing is changed without a claim", name);
        ok(from == PBA_PHASE_PREPARED || !pba_phase_may_follow(from, PBA_PHASE_CUT),
           "%s: no instant before all is prepared", name);
        ok(from == PBA_PHASE_CUT || !pba_phase_may_follow(from, PBA_PHASE_UP),
           "%s: up only by setup", name);
        ok((from != PBA_PHASE_COMMITTED && from != PBA_PHASE_ENDED) ||
               !pba_phase_may_follow(from, PBA_PHASE_ENDING),
           "%s: no bitmap is ended twice", name);
        ok(from != PBA_PHASE_GONE || !pba_phase_may_follow(from, PBA_PHASE_ENDING),
           "%s: what is gone is not torn down", name);
    }
}

#define REFUSED(is_refused, call)                                                                  \
    do {                                                                                           \
        g_autoptr(GError) error = NULL;                                                            \
        PbaPhase before = access->phase;                                                           \
        if (is_refused) {                                                                          \
            ok(!(call) && g_error_matches(error, PBA_ERROR, PBA_ERROR_STATE), "%s: not %s",        \
               pba_phase_name(before), #call);                                                     \
            ok(access->phase == before, "%s: as it was", pba_phase_name(before));                  \
        }                                                                                          \
    } while (0)

/* Calls in a phase in which they are not allowed are refused before anything is sent. */
static void check_calls(PbaAccess *access, PbaPhase phase)
{
    PbaDeviceRequest request = {.device = "disk"};
    g_autoptr(GPtrArray) lines = g_ptr_array_new_with_free_func(g_free);
    uint64_t size;
    PbaBase base;

    access->phase = phase;
    REFUSED(phase != PBA_PHASE_NEW, pba_access_sizes(access, &request, 1, &size, &error));
    REFUSED(phase != PBA_PHASE_NEW, pba_access_bases(access, &request, 1, &base, &error));
    REFUSED(phase != PBA_PHASE_NEW, pba_access_prepare(access, &request, 1, &error));
    REFUSED(phase != PBA_PHASE_NEW, pba_access_recover(access, lines, &error));
    REFUSED(phase != PBA_PHASE_NEW, pba_access_forget(access, lines, &error));
    REFUSED(phase != PBA_PHASE_PREPARED, pba_access_cut(access, &error));
    REFUSED(phase != PBA_PHASE_CUT, pba_access_finish(access, &error));
    REFUSED(phase < PBA_PHASE_UP || phase > PBA_PHASE_EXPORTED, pba_access_export(access, &error));
    REFUSED(phase == PBA_PHASE_NEW, pba_access_teardown(access, true, NULL, &error));
}

static void test_calls(void)
{
    PbaAccessOptions options = {.target_id = "target"};

    for (int phase = 0; phase < PBA_PHASE_COUNT; phase++) {
        PbaQmp *qmp = pba_qmp_new("/nowhere/qmp", 1, NULL);
        PbaAccess *access = pba_access_new(qmp, &options, NULL, NULL);
        check_calls(access, (PbaPhase)phase);
        pba_access_free(access);
        pba_qmp_free(qmp);
    }
}

int main(void)
{
    test_pairs();
    test_entering();
    test_rules();
    test_calls();
    return done_testing();
}

/* The phases of an access, and the only table of which may follow which.
 *
 *   new -> claimed -> changing -> prepared -> cut -> up -> exporting -> exported
 *            |           |           |         |     |         |            |
 *            |           +-----------+---------+-----+----+----+------------+
 *            |                                            v
 *            |                      ending -> committed           a success
 *            |                        |    -> ended               as after a failure
 *            |                        |    -> stuck -> ending     tried again, as after a failure
 *            v                        v
 *           new <- committed, ended, gone                         the access is forgotten
 *
 * Gone: its marker is no longer in QEMU, which is noticed while it is up, exporting or ending. */
#include "access.h"
#include "src/base/base.h"

#define TO(phase) (1u << PBA_PHASE_##phase)

static const unsigned followers[PBA_PHASE_COUNT] = {
    [PBA_PHASE_NEW] = TO(CLAIMED),
    [PBA_PHASE_CLAIMED] = TO(NEW) | TO(CHANGING),
    [PBA_PHASE_CHANGING] = TO(PREPARED) | TO(ENDING),
    [PBA_PHASE_PREPARED] = TO(CUT) | TO(ENDING),
    [PBA_PHASE_CUT] = TO(UP) | TO(ENDING),
    [PBA_PHASE_UP] = TO(EXPORTING) | TO(ENDING) | TO(GONE),
    [PBA_PHASE_EXPORTING] = TO(EXPORTED) | TO(ENDING) | TO(GONE),
    [PBA_PHASE_EXPORTED] = TO(ENDING),
    [PBA_PHASE_ENDING] = TO(COMMITTED) | TO(ENDED) | TO(STUCK) | TO(GONE),
    [PBA_PHASE_STUCK] = TO(ENDING),
    [PBA_PHASE_COMMITTED] = TO(NEW),
    [PBA_PHASE_ENDED] = TO(NEW),
    [PBA_PHASE_GONE] = TO(NEW),
};

static const char *const names[PBA_PHASE_COUNT] = {
    [PBA_PHASE_NEW] = "new",
    [PBA_PHASE_CLAIMED] = "claimed",
    [PBA_PHASE_CHANGING] = "changing",
    [PBA_PHASE_PREPARED] = "prepared",
    [PBA_PHASE_CUT] = "cut",
    [PBA_PHASE_UP] = "up",
    [PBA_PHASE_EXPORTING] = "exporting",
    [PBA_PHASE_EXPORTED] = "exported",
    [PBA_PHASE_ENDING] = "ending",
    [PBA_PHASE_STUCK] = "stuck",
    [PBA_PHASE_COMMITTED] = "committed",
    [PBA_PHASE_ENDED] = "ended",
    [PBA_PHASE_GONE] = "gone",
};

bool pba_phase_may_follow(PbaPhase from, PbaPhase to)
{
    return (followers[from] & (1u << to)) != 0;
}

const char *pba_phase_name(PbaPhase phase)
{
    return names[phase];
}

void pba_access_begin_changes(PbaAccess *access)
{
    if (access->phase == PBA_PHASE_CLAIMED) {
        pba_access_enter(access, PBA_PHASE_CHANGING);
    }
}

void pba_access_enter(PbaAccess *access, PbaPhase phase)
{
    if (!pba_phase_may_follow(access->phase, phase)) {
        g_error("an access in the phase '%s' cannot enter '%s'", names[access->phase],
                names[phase]);
    }
    access->phase = phase;
}

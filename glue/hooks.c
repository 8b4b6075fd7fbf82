/* Perl code that runs during a call of the core. */
#include "glue.h"

/* An exception object may evaluate to false, or die when it is evaluated. */
bool glue_has_died(pTHX)
{
    SV *exception = ERRSV;
    return SvROK(exception) || SvTRUE(exception);
}

void glue_keep_exception(pTHX_ Caller *caller, SV *exception)
{
    if (!caller->exception) {
        caller->exception = newSVsv(exception);
    }
}

void glue_note_death(pTHX_ Caller *caller)
{
    caller->died = true;
    glue_keep_exception(aTHX_ caller, ERRSV);
}

void glue_enter_hook(pTHX_ Caller *caller)
{
    dSP;

    if (caller->object && !caller->is_held) {
        caller->is_held = true;
        sv_2mortal(SvREFCNT_inc(caller->object));
    }
    ENTER;
    SAVETMPS;
    save_scalar(PL_errgv);
    SAVEBOOL(caller->in_hook);
    caller->in_hook = true;
    PUSHSTACKi(PERLSI_MAGIC);
}

void glue_run_signal_handlers(pTHX_ Caller *caller)
{
    if (PL_sig_pending) {
        glue_enter_hook(aTHX_ caller);
        dSP;
        PUSHMARK(SP);
        call_pv("PVE::BackupAccess::_dispatch_signals", G_VOID | G_DISCARD | G_EVAL);
        if (glue_has_died(aTHX)) {
            glue_note_death(aTHX_ caller);
        }
        GLUE_LEAVE_HOOK;
    }
}

static bool hook_interrupted(void *opaque)
{
    dTHX;
    Caller *caller = opaque;

    glue_run_signal_handlers(aTHX_ caller);
    bool died = caller->died;
    caller->died = false;
    return died;
}

static void hook_log(void *opaque, PbaLogLevel level, const char *message)
{
    static const char *const names[] = {"debug", "info", "warn"};
    dTHX;
    Caller *caller = opaque;

    if (!caller->log && level < PBA_LOG_WARN) {
        return;
    }
    glue_enter_hook(aTHX_ caller);
    SV *text = sv_2mortal(glue_sv_from_text(aTHX_ message));
    dSP;
    PUSHMARK(SP);
    if (caller->log) {
        mXPUSHp(names[level], strlen(names[level]));
        XPUSHs(text);
        PUTBACK;
        call_sv(caller->log, G_VOID | G_DISCARD | G_EVAL);
    } else {
        sv_catpvs(text, "\n");
        XPUSHs(text);
        PUTBACK;
        call_pv("PVE::BackupAccess::_warn", G_VOID | G_DISCARD | G_EVAL);
    }
    if (glue_has_died(aTHX)) {
        glue_note_death(aTHX_ caller);
    }
    GLUE_LEAVE_HOOK;
}

static bool hook_pending(G_GNUC_UNUSED void *opaque)
{
    dTHX;
    return PL_sig_pending != 0;
}

PbaHooks glue_caller_hooks(Caller *caller)
{
    return (PbaHooks){.interrupted = hook_interrupted,
                      .pending = hook_pending,
                      .log = hook_log,
                      .opaque = caller};
}

void glue_caller_clear(pTHX_ Caller *caller)
{
    SvREFCNT_dec(caller->log);
    SvREFCNT_dec(caller->transport);
    SvREFCNT_dec(caller->regions);
    SvREFCNT_dec(caller->exception);
    *caller = (Caller){0};
}

/* Detects that a signal handler died during a call.
 *
 * Perl code that we call may die with an error of its own, or because a signal handler of the
 * caller died while it ran. The two must not be confused: the first is QEMU's refusal or a module's
 * error, the second ends the work. The exception does not show the difference, because both are
 * often plain text, and the code may have added its own words to the handler's. So the handlers
 * themselves are watched: while the code runs, each installed handler is replaced by a watcher,
 * which calls the handler and stores its exception. A handler that the code itself installs, such
 * as that of a time limit by alarm(), is part of the code and is not watched.
 *
 * Only Perl's table of handlers is changed, not the process' dispositions, so no signal can arrive
 * in between. */
#include "glue.h"

typedef struct {
    SV **thrown;
    CV *watchers[SIG_SIZE]; /* NULL: nothing to be watched */
    SV *handlers[SIG_SIZE]; /* copies of what %SIG has */
} Watch;

/* A new thread gets its own copies of the watchers; the exceptions that they store belong to the
 * first thread. */
static int forget_watch(pTHX_ MAGIC *magic, CLONE_PARAMS *params)
{
    PERL_UNUSED_CONTEXT;
    PERL_UNUSED_VAR(params);
    magic->mg_ptr = NULL;
    return 0;
}

static const MGVTBL watcher_magic = {.svt_dup = forget_watch};

/* Replaces a handler, and is called with its arguments. */
static void run_handler(pTHX_ CV *cv)
{
    dXSARGS;
    MAGIC *magic = mg_findext((SV *)cv, PERL_MAGIC_ext, &watcher_magic);
    PERL_UNUSED_VAR(items);

    PUSHMARK(MARK);
    call_sv(magic->mg_obj, G_VOID | G_DISCARD | G_EVAL);
    if (glue_has_died(aTHX)) {
        const Watch *watch = (const Watch *)magic->mg_ptr;
        SV *exception = sv_mortalcopy(ERRSV);
        if (watch && !*watch->thrown) {
            *watch->thrown = newSVsv(exception);
        }
        SAVESPTR(PL_diehook); /* it has been called already */
        PL_diehook = NULL;
        croak_sv(exception);
    }
    XSRETURN_EMPTY;
}

static bool is_handler(pTHX_ SV *sv)
{
    return sv && (SvROK(sv) || isGV(sv) || (SvPOK(sv) && get_cvn_flags(SvPVX(sv), SvCUR(sv), 0)));
}

static CV *new_watcher(pTHX_ Watch *watch, SV *handler)
{
    CV *watcher = newXS(NULL, run_handler, __FILE__);
    MAGIC *magic =
        sv_magicext((SV *)watcher, handler, PERL_MAGIC_ext, &watcher_magic, (const char *)watch, 0);
    magic->mg_flags |= MGf_DUP;
    return watcher;
}

static void set_handler(pTHX_ int number, SV *handler)
{
    SV *old = PL_psig_ptr[number];
    PL_psig_ptr[number] = handler;
    SvREFCNT_dec(old);
}

/* A handler that the code has permanently installed in place of a watcher stays there. If the code
 * keeps a watcher, it still calls its handler. */
static void end_watch(pTHX_ void *pointer)
{
    Watch *watch = pointer;

    for (int i = 1; i < SIG_SIZE; i++) {
        CV *watcher = watch->watchers[i];
        SV *now = PL_psig_ptr[i];
        if (!watcher) {
            continue;
        }
        mg_findext((SV *)watcher, PERL_MAGIC_ext, &watcher_magic)->mg_ptr = NULL;
        if (now && SvROK(now) && SvRV(now) == (SV *)watcher) {
            set_handler(aTHX_ i, SvREFCNT_inc(watch->handlers[i]));
        }
        SvREFCNT_dec(watch->handlers[i]);
        SvREFCNT_dec((SV *)watcher);
    }
    g_free(watch);
}

void glue_watch_handlers(pTHX_ SV **thrown)
{
    Watch *watch = g_new0(Watch, 1);

    watch->thrown = thrown;
    for (int i = 1; i < SIG_SIZE; i++) {
        if (is_handler(aTHX_ PL_psig_ptr[i])) {
            watch->handlers[i] = newSVsv(PL_psig_ptr[i]);
            watch->watchers[i] = new_watcher(aTHX_ watch, watch->handlers[i]);
            set_handler(aTHX_ i, newRV_inc((SV *)watch->watchers[i]));
        }
    }
    SAVEDESTRUCTOR_X(end_watch, watch);
}

/* Calls the code and passes it whether an earlier code died. Returns a new scalar with its
 * exception, or NULL; by_signal tells whether a signal handler threw it. */
static SV *run_code(pTHX_ SV *code, bool has_failed, bool *by_signal)
{
    Caller none = {0};
    SV *thrown = NULL;
    SV *exception = NULL;

    glue_enter_hook(aTHX_ & none);
    glue_watch_handlers(aTHX_ & thrown);
    dSP;
    PUSHMARK(SP);
    XPUSHs(boolSV(has_failed));
    PUTBACK;
    call_sv(code, G_VOID | G_DISCARD | G_EVAL);
    if (glue_has_died(aTHX)) {
        exception = newSVsv(thrown ? thrown : ERRSV);
    }
    GLUE_LEAVE_HOOK;
    *by_signal = thrown != NULL;
    SvREFCNT_dec(thrown);
    return exception;
}

static void add_death(pTHX_ AV *deaths, SV *exception, bool by_signal)
{
    AV *death = newAV();
    av_push(death, exception);
    av_push(death, newSVsv(boolSV(by_signal)));
    av_push(deaths, newRV_noinc((SV *)death));
}

AV *glue_run_all(pTHX_ AV *codes, bool again)
{
    AV *deaths = (AV *)sv_2mortal((SV *)newAV());
    SV **code = AvARRAY(codes);
    SV **end = code + av_count(codes);
    bool may_repeat = false;

    while (code < end) {
        bool by_signal = false;
        SV *exception = run_code(aTHX_ * code, av_count(deaths) > 0, &by_signal);
        if (exception) {
            add_death(aTHX_ deaths, exception, by_signal);
        }
        if (by_signal && may_repeat) {
            may_repeat = false;
        } else {
            may_repeat = again;
            code++;
        }
    }
    return deaths;
}

/* Errors of the core as Perl exceptions. */
#include "glue.h"

static SV *new_error(pTHX_ const char *message, const char *klass, const char *command,
                     const char *device)
{
    HV *hash = newHV();
    SV *text = glue_sv_from_text(aTHX_ message);
    sv_catpvs(text, "\n");
    (void)hv_stores(hash, "message", text);
    glue_store_text(aTHX_ hash, "class", klass);
    glue_store_text(aTHX_ hash, "command", command);
    glue_store_text(aTHX_ hash, "device", device);
    SV *ref = sv_2mortal(newRV_noinc((SV *)hash));
    return sv_bless(ref, gv_stashpvs("PVE::BackupAccess::Error", GV_ADD));
}

/* The exception of the caller's Perl code, unchanged: its __DIE__ handler has already seen it. */
static _Noreturn void throw_again(pTHX_ SV *exception)
{
    SAVESPTR(PL_diehook);
    PL_diehook = NULL;
    croak_sv(sv_2mortal(exception));
}

void glue_throw_error(pTHX_ Caller *caller, GError *error)
{
    SV *exception = caller ? caller->exception : NULL;
    if (exception) {
        caller->exception = NULL;
        caller->died = false;
        g_error_free(error);
        throw_again(aTHX_ exception);
    }
    SV *object = new_error(aTHX_ error->message, pba_error_class(error), pba_error_command(error),
                           pba_error_device(error));
    g_error_free(error);
    croak_sv(object);
}

void glue_throw_text(pTHX_ const char *klass, const char *message)
{
    croak_sv(new_error(aTHX_ message, klass, NULL, NULL));
}

void glue_throw_pending(pTHX_ Caller *caller)
{
    if (caller->exception) {
        SV *exception = caller->exception;
        caller->exception = NULL;
        caller->died = false;
        throw_again(aTHX_ exception);
    }
}

void glue_warn(Caller *caller, const char *format, ...)
{
    PbaHooks hooks = glue_caller_hooks(caller);
    va_list arguments;

    va_start(arguments, format);
    g_autofree char *message = g_strdup_vprintf(format, arguments);
    va_end(arguments);
    hooks.log(hooks.opaque, PBA_LOG_WARN, message);
}

/* ---- after the call ---- */

#define LATER "PVE::BackupAccess::_later"

static despatch_signals_proc_t signals_hook;
static unsigned checks_to_skip;

/* If this dies, there is only a warning. */
static bool is_in_destructor(pTHX)
{
    for (const PERL_SI *info = PL_curstackinfo; info; info = info->si_prev) {
        if (info->si_type == PERLSI_DESTROY) {
            return true;
        }
    }
    return false;
}

/* Replaces Perl's own function, which Perl calls wherever it checks for signals. */
static void throw_later(pTHX)
{
    if (is_in_destructor(aTHX)) {
        return;
    }
    if (checks_to_skip > 0) {
        checks_to_skip--;
        return;
    }
    throw_again(
        aTHX_ glue_take_later(aTHX)); /* signals that have arrived since then are still pending */
}

void glue_throw_later(pTHX_ SV *exception)
{
    if (PL_signalhook !=
        throw_later) { /* otherwise an earlier exception waits, and that one counts */
        sv_setsv(get_sv(LATER, GV_ADD), exception);
        signals_hook = PL_signalhook;
        PL_signalhook = throw_later;
    }
    /* Perl checks for signals at the beginning of a statement and at the end of an eval: in eval {
     * $access->teardown(1); 1 } once each, and an exception there ends that eval. */
    checks_to_skip = 2;
    PL_sig_pending = 1;
}

SV *glue_take_later(pTHX)
{
    if (PL_signalhook != throw_later) {
        return NULL;
    }
    SV *held = get_sv(LATER, GV_ADD);
    SV *exception = newSVsv(held);
    PL_signalhook = signals_hook;
    sv_setsv(held, &PL_sv_undef);
    return exception;
}

void glue_throw_pending_later(pTHX_ Caller *caller)
{
    glue_run_signal_handlers(aTHX_ caller);
    if (!caller->exception) {
        return;
    }
    glue_throw_later(aTHX_ caller->exception);
    SvREFCNT_dec(caller->exception);
    caller->exception = NULL;
    caller->died = false;
}

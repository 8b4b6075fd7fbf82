/* QMP over the caller's own code ref, or a socket. */
#include "glue.h"

/* The exception of the code ref. mon_cmd reports QEMU's errors, timeouts and lost connections as
 * text: these are errors of the command. An object, or the exception of a signal handler that ran
 * inside the code ref, does not come from QEMU: it ends the work and is passed on unchanged. It is
 * then unknown whether QEMU executed the command, so the core must not take the exception for a
 * refusal. */
static void set_death(pTHX_ Caller *caller, SV *thrown, GError **error)
{
    if (thrown || SvROK(ERRSV)) {
        glue_keep_exception(aTHX_ caller, thrown ? thrown : ERRSV);
        g_set_error_literal(error, PBA_ERROR, PBA_ERROR_INTERRUPTED,
                            "interrupted while the 'qmp' code ref ran");
    } else {
        g_set_error_literal(error, PBA_ERROR, PBA_ERROR_QMP, SvPVutf8_nolen(ERRSV));
    }
}

static JsonNode *carry_command(void *opaque, const char *command, JsonNode *arguments,
                               GError **error)
{
    dTHX;
    Caller *caller = opaque;
    JsonNode *reply = NULL;
    SV *thrown = NULL;

    glue_enter_hook(aTHX_ caller);
    glue_watch_handlers(aTHX_ & thrown);
    dSP;
    PUSHMARK(SP);
    mXPUSHp(command, strlen(command));
    XPUSHs(sv_2mortal(glue_sv_from_json(aTHX_ arguments)));
    PUTBACK;
    call_sv(caller->transport, G_SCALAR | G_EVAL);
    SPAGAIN;
    SV *value = POPs;
    PUTBACK;
    if (glue_has_died(aTHX)) {
        set_death(aTHX_ caller, thrown, error);
    } else {
        reply = glue_json_from_sv(aTHX_ value, error);
    }
    GLUE_LEAVE_HOOK;
    SvREFCNT_dec(thrown);
    return reply;
}

PbaQmp *glue_new_qmp(pTHX_ SV *qmp, unsigned timeout, Caller *caller)
{
    PbaHooks hooks = glue_caller_hooks(caller);
    if (SvROK(qmp)) {
        caller->transport = newSVsv(qmp);
        return pba_qmp_new_transport(carry_command, caller, &hooks);
    }
    return pba_qmp_new(SvPVutf8_nolen(qmp), timeout, &hooks);
}

void glue_free_qmp(pTHX_ PbaQmp *qmp, Caller *caller)
{
    pba_qmp_free(qmp);
    SvREFCNT_dec(caller->transport);
    SvREFCNT_dec(caller->log);
}

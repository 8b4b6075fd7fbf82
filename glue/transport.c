/* QMP over the caller's own code ref, or a socket. */
#include "glue.h"

/* What the code ref died with. QEMU's refusals, time limits and lost connections come as text
 * (mon_cmd): they are errors of the command. What a signal handler of the caller's died with below
 * it, or an object, is nothing that QEMU said: it ends the work and goes on as it is. Whether the
 * command was carried out is unknown then, so it is no refusal for the core either. */
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

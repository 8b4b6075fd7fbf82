/* QMP over the caller's own code ref, or a socket. */
#include "glue.h"

static JsonNode *carry_command(void *opaque, const char *command, JsonNode *arguments,
                               GError **error)
{
    dTHX;
    Caller *caller = opaque;
    JsonNode *reply = NULL;

    glue_enter_hook(aTHX_ caller);
    dSP;
    PUSHMARK(SP);
    mXPUSHp(command, strlen(command));
    XPUSHs(sv_2mortal(glue_sv_from_json(aTHX_ arguments)));
    PUTBACK;
    call_sv(caller->transport, G_SCALAR | G_EVAL);
    SPAGAIN;
    SV *value = POPs;
    PUTBACK;
    if (SvROK(ERRSV)) {
        glue_keep_exception(aTHX_ caller); /* not mon_cmd's: a handler's, or another object */
        g_set_error_literal(error, PBA_ERROR, PBA_ERROR_QMP, "the 'qmp' code ref died");
    } else if (SvTRUE(ERRSV)) {
        g_set_error_literal(error, PBA_ERROR, PBA_ERROR_QMP, SvPVutf8_nolen(ERRSV));
    } else {
        reply = glue_json_from_sv(aTHX_ value, 0);
    }
    GLUE_LEAVE_HOOK;
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

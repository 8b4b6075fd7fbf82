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

void glue_throw_error(pTHX_ Caller *caller, GError *error)
{
    SV *exception = caller ? caller->exception : NULL;
    if (exception) {
        caller->exception = NULL;
        caller->died = false;
        g_error_free(error);
        croak_sv(sv_2mortal(exception));
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
        croak_sv(sv_2mortal(exception));
    }
}

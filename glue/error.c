/* Errors of the core as Perl exceptions. */
#include "glue.h"

static SV *new_error(pTHX_ const char *message, const char *klass, const char *command,
                     const char *device)
{
    HV *hash = newHV();
    SV *text = newSVpvf("%s\n", message);
    SvUTF8_on(text);
    (void)hv_stores(hash, "message", text);
    (void)hv_stores(hash, "class", newSVpvn_flags(klass, strlen(klass), SVf_UTF8));
    if (command) {
        (void)hv_stores(hash, "command", newSVpvn_flags(command, strlen(command), SVf_UTF8));
    }
    if (device) {
        (void)hv_stores(hash, "device", newSVpvn_flags(device, strlen(device), SVf_UTF8));
    }
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

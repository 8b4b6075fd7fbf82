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

void glue_warn(Caller *caller, const char *format, ...)
{
    PbaHooks hooks = glue_caller_hooks(caller);
    va_list arguments;

    va_start(arguments, format);
    g_autofree char *message = g_strdup_vprintf(format, arguments);
    va_end(arguments);
    hooks.log(hooks.opaque, PBA_LOG_WARN, message);
}

/* Only text is shown: to show an object its own code would have to be run. */
void glue_warn_pending(pTHX_ Caller *caller)
{
    SV *exception = caller->exception;

    if (!exception) {
        return;
    }
    caller->exception = NULL;
    caller->died = false;
    g_autofree char *text =
        g_strdup(SvROK(exception) ? sv_reftype(SvRV(exception), true) : SvPVutf8_nolen(exception));
    SvREFCNT_dec(exception);
    glue_warn(caller, "the backup was a success, but then: %s", g_strdelimit(text, "\n", ' '));
    SvREFCNT_dec(caller->exception); /* a log that died of that */
    caller->exception = NULL;
    caller->died = false;
}

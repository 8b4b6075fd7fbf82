/* The C half of a Perl object. */
#include "glue.h"

#include <sys/mman.h>
#include <sys/pidfd.h>
#include <sys/prctl.h>

pid_t glue_current_pid;

void glue_note_fork(void)
{
    glue_current_pid = getpid();
}

bool glue_end_with_parent(int signal)
{
    return prctl(PR_SET_PDEATHSIG, signal) == 0;
}

int glue_open_process(pid_t pid)
{
    return pidfd_open(pid, 0);
}

int glue_open_memory(void)
{
    return memfd_create("pba", MFD_CLOEXEC);
}

/* The C object is attached to its Perl object by magic, which Perl code can neither forge nor copy,
 * and is freed with it. */

static int free_access(pTHX_ SV *sv, MAGIC *magic)
{
    PbaAccessObject *object = (PbaAccessObject *)magic->mg_ptr;
    PERL_UNUSED_VAR(sv);
    pba_access_free(object->access);
    pba_qmp_free(object->qmp);
    glue_caller_clear(aTHX_ & object->caller);
    g_free(object);
    return 0;
}

static int free_volume(pTHX_ SV *sv, MAGIC *magic)
{
    PbaVolumeObject *object = (PbaVolumeObject *)magic->mg_ptr;
    PERL_UNUSED_VAR(sv);
    pba_volume_free(object->volume);
    glue_caller_clear(aTHX_ & object->caller);
    g_free(object);
    return 0;
}

static const MGVTBL access_magic = {.svt_free = free_access};
static const MGVTBL volume_magic = {.svt_free = free_volume};

static SV *new_object(pTHX_ void *pointer, Caller *caller, SV *klass, const MGVTBL *type)
{
    SV *object = newSV(0);
    sv_magicext(object, NULL, PERL_MAGIC_ext, type, pointer, 0);
    caller->object = object;
    return sv_bless(newRV_noinc(object), gv_stashsv(klass, GV_ADD));
}

SV *glue_new_access(pTHX_ PbaAccessObject *object, SV *klass)
{
    return new_object(aTHX_ object, &object->caller, klass, &access_magic);
}

SV *glue_new_volume(pTHX_ PbaVolumeObject *object, SV *klass)
{
    return new_object(aTHX_ object, &object->caller, klass, &volume_magic);
}

static void *pointer_from_sv(pTHX_ SV *sv, const MGVTBL *type, const char *klass)
{
    bool has_magic = SvROK(sv) && SvTYPE(SvRV(sv)) >= SVt_PVMG;
    MAGIC *magic = has_magic ? mg_findext(SvRV(sv), PERL_MAGIC_ext, type) : NULL;
    if (!magic) {
        glue_throw_text(aTHX_ "ArgumentError", Perl_form(aTHX_ "not an object of class %s", klass));
    }
    return magic->mg_ptr;
}

void glue_require_idle(pTHX_ Caller *caller, pid_t owner)
{
    if (owner != glue_current_pid) {
        glue_throw_text(aTHX_ "StateError", "the object belongs to another process");
    }
    if (caller->in_hook) {
        glue_throw_text(aTHX_ "StateError", "the object is in use by a call that is under way");
    }
    caller->is_held = false;
}

void glue_require_open(pTHX_ PbaVolumeObject *self)
{
    if (!self->volume) {
        glue_throw_text(aTHX_ "StateError", "the volume was closed already");
    }
    glue_require_idle(aTHX_ & self->caller, self->owner);
}

PbaAccessObject *glue_access_from_sv(pTHX_ SV *sv)
{
    return pointer_from_sv(aTHX_ sv, &access_magic, "PVE::BackupAccess");
}

PbaVolumeObject *glue_volume_from_sv(pTHX_ SV *sv)
{
    return pointer_from_sv(aTHX_ sv, &volume_magic, "PVE::BackupAccess::Volume");
}

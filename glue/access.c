/* Calls of an access that have the same form. */
#include "glue.h"

void glue_run_step(pTHX_ PbaAccessObject *self, bool (*step)(PbaAccess *access, GError **error))
{
    GError *error = NULL;

    glue_require_idle(aTHX_ & self->caller, self->owner);
    if (!step(self->access, &error)) {
        glue_throw_error(aTHX_ & self->caller, error);
    }
    glue_throw_pending(aTHX_ & self->caller);
}

SV *glue_take_steps(pTHX_ PbaAccessObject *self,
                    bool (*steps)(PbaAccess *access, GPtrArray *lines, GError **error))
{
    GError *error = NULL;

    glue_require_idle(aTHX_ & self->caller, self->owner);
    GPtrArray *lines = g_ptr_array_new_with_free_func(g_free);
    bool done = steps(self->access, lines, &error);
    AV *list = glue_take_lines(aTHX_ lines);
    if (!done) {
        glue_throw_error(aTHX_ & self->caller, error);
    }
    glue_throw_pending(aTHX_ & self->caller);
    return newRV_inc((SV *)list);
}

static SV *sv_from_base(pTHX_ uint64_t size, char *base)
{
    HV *hash = newHV();

    (void)hv_stores(hash, "size", newSVuv(size));
    (void)hv_stores(hash, "base", base ? glue_sv_from_text(aTHX_ base) : newSV(0));
    g_free(base);
    return newRV_noinc((SV *)hash);
}

SV *glue_ask_bases(pTHX_ PbaAccessObject *self, AV *devices)
{
    GError *error = NULL;
    size_t count;

    glue_require_idle(aTHX_ & self->caller, self->owner);
    PbaDeviceRequest *requests = glue_requests_by_name(aTHX_ devices, &count);
    uint64_t *sizes = (uint64_t *)SvPVX(sv_2mortal(newSV(count * sizeof(uint64_t) + 1)));
    char **bases = (char **)SvPVX(sv_2mortal(newSV(count * sizeof(char *) + 1)));
    if (!pba_access_bases(self->access, requests, count, sizes, bases, &error)) {
        glue_throw_error(aTHX_ & self->caller, error);
    }
    HV *hash = (HV *)sv_2mortal((SV *)newHV());
    for (size_t i = 0; i < count; i++) {
        SV *device = *av_fetch(devices, (SSize_t)i, 0);
        (void)hv_store_ent(hash, device, sv_from_base(aTHX_ sizes[i], bases[i]), 0);
    }
    glue_throw_pending(aTHX_ & self->caller);
    return newRV_inc((SV *)hash);
}

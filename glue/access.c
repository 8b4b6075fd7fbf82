/* Calls of several methods of an access that have the same form. */
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

static SV *take_text(pTHX_ char *text)
{
    SV *sv = text ? glue_sv_from_text(aTHX_ text) : newSV(0);

    g_free(text);
    return sv;
}

static SV *take_base(pTHX_ const PbaBase *base)
{
    HV *hash = newHV();

    (void)hv_stores(hash, "size", newSVuv(base->size));
    (void)hv_stores(hash, "identity", take_text(aTHX_ base->identity));
    (void)hv_stores(hash, "node", take_text(aTHX_ base->node));
    (void)hv_stores(hash, "base", take_text(aTHX_ base->is_alias ? NULL : base->id));
    (void)hv_stores(hash, "alias-base", take_text(aTHX_ base->is_alias ? base->id : NULL));
    (void)hv_stores(hash, "reason", take_text(aTHX_ base->reason));
    return newRV_noinc((SV *)hash);
}

SV *glue_ask_bases(pTHX_ PbaAccessObject *self, AV *devices)
{
    GError *error = NULL;
    size_t count;

    glue_require_idle(aTHX_ & self->caller, self->owner);
    PbaDeviceRequest *requests = glue_requests_by_name(aTHX_ devices, &count);
    PbaBase *bases = (PbaBase *)SvPVX(sv_2mortal(newSV(count * sizeof(PbaBase) + 1)));
    if (!pba_access_bases(self->access, requests, count, bases, &error)) {
        glue_throw_error(aTHX_ & self->caller, error);
    }
    HV *hash = (HV *)sv_2mortal((SV *)newHV());
    for (size_t i = 0; i < count; i++) {
        SV *device = *av_fetch(devices, (SSize_t)i, 0);
        (void)hv_store_ent(hash, device, take_base(aTHX_ & bases[i]), 0);
    }
    glue_throw_pending(aTHX_ & self->caller);
    return newRV_inc((SV *)hash);
}

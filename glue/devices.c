/* An access's requests and results for each device. */
#include "glue.h"

static PbaDeviceRequest *new_requests(pTHX_ AV *devices, size_t *count)
{
    *count = (size_t)(av_len(devices) + 1);
    /* A Perl scalar, so that it is freed even if something below throws. */
    return (PbaDeviceRequest *)SvPVX(sv_2mortal(newSV(*count * sizeof(PbaDeviceRequest) + 1)));
}

PbaDeviceRequest *glue_requests_by_name(pTHX_ AV *devices, size_t *count)
{
    PbaDeviceRequest *requests = new_requests(aTHX_ devices, count);

    for (size_t i = 0; i < *count; i++) {
        requests[i] = (PbaDeviceRequest){
            .device = SvPVutf8_nolen(*av_fetch(devices, (SSize_t)i, 0)),
        };
    }
    return requests;
}

PbaDeviceRequest *glue_requests_from_hashes(pTHX_ AV *devices, size_t *count)
{
    PbaDeviceRequest *requests = new_requests(aTHX_ devices, count);
    GError *error = NULL;

    for (size_t i = 0; i < *count; i++) {
        HV *device = (HV *)SvRV(*av_fetch(devices, (SSize_t)i, 0));
        const char *mode = glue_fetch_text(aTHX_ device, "bitmap-mode");
        requests[i] = (PbaDeviceRequest){
            .device = glue_fetch_text(aTHX_ device, "device"),
            .base = glue_fetch_text(aTHX_ device, "base"),
            .identity = glue_fetch_text(aTHX_ device, "identity"),
            .tied = hv_exists(device, "base", 4),
            .audit = SvTRUE(glue_fetch(aTHX_ device, "audit")),
        };
        if (!pba_bitmap_mode_parse(mode ? mode : "none", &requests[i].mode, &error)) {
            glue_throw_error(aTHX_ NULL, error);
        }
    }
    return requests;
}

static SV *sv_from_info(pTHX_ const PbaDeviceInfo *info)
{
    HV *hash = newHV();

    glue_store_text(aTHX_ hash, "device", info->device);
    glue_store_text(aTHX_ hash, "node-name", info->node_name);
    glue_store_text(aTHX_ hash, "bitmap-node-name", info->bitmap_node_name);
    glue_store_text(aTHX_ hash, "bitmap-name", info->bitmap_name);
    glue_store_text(aTHX_ hash, "bitmap-action", pba_bitmap_action_name(info->action));
    glue_store_text(aTHX_ hash, "identity", info->identity);
    glue_store_text(aTHX_ hash, "base", info->base);
    glue_store_text(aTHX_ hash, "reason", info->reason);
    glue_store_text(aTHX_ hash, "audit-bitmap", info->audit_bitmap);
    (void)hv_stores(hash, "size", newSVuv(info->size));
    if (info->is_counted) {
        (void)hv_stores(hash, "dirty", newSVuv(info->dirty));
    }
    return newRV_noinc((SV *)hash);
}

SV *glue_sv_from_infos(pTHX_ PbaAccess *access)
{
    AV *list = newAV();

    for (size_t i = 0; i < pba_access_device_count(access); i++) {
        PbaDeviceInfo info;
        pba_access_device_info(access, i, &info);
        av_push(list, sv_from_info(aTHX_ & info));
    }
    return newRV_noinc((SV *)list);
}

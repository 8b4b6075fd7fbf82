/* Texts, lists of texts, members of Perl hashes, and other plain scalars. */
#include "glue.h"

#include <sys/statvfs.h>

SV *glue_sv_from_text(pTHX_ const char *text)
{
    SV *sv = newSVpv(text, 0);
    sv_utf8_decode(sv);
    return sv;
}

const char *glue_text_or_null(pTHX_ SV *sv)
{
    return SvOK(sv) ? SvPVutf8_nolen(sv) : NULL;
}

SV *glue_fetch(pTHX_ HV *hash, const char *key)
{
    SV **value = hv_fetch(hash, key, (I32)strlen(key), 0);
    return value ? *value : &PL_sv_undef;
}

const char *glue_fetch_text(pTHX_ HV *hash, const char *key)
{
    return glue_text_or_null(aTHX_ glue_fetch(aTHX_ hash, key));
}

void glue_fetch_places(pTHX_ HV *options, PbaAccessOptions *access_options)
{
    SV *uid = glue_fetch(aTHX_ options, "qemu-uid");

    access_options->run_dir = glue_fetch_text(aTHX_ options, "run-dir");
    access_options->identity = glue_fetch_text(aTHX_ options, "identity");
    access_options->fleecing_dir = glue_fetch_text(aTHX_ options, "fleecing-dir");
    access_options->has_qemu_user = SvOK(uid);
    access_options->qemu_uid = SvOK(uid) ? (uint32_t)SvUV(uid) : 0;
    access_options->qemu_gid =
        SvOK(uid) ? (uint32_t)SvUV(glue_fetch(aTHX_ options, "qemu-gid")) : 0;
    access_options->qemu_run_dir = glue_fetch_text(aTHX_ options, "qemu-run-dir");
    access_options->qemu_fleecing_dir = glue_fetch_text(aTHX_ options, "qemu-fleecing-dir");
}

SV *glue_copy_code(pTHX_ SV *code)
{
    return SvROK(code) ? newSVsv(code) : NULL;
}

GHashTable *glue_table_from_hash(pTHX_ SV *sv)
{
    if (!SvROK(sv)) {
        return NULL;
    }
    HV *hash = (HV *)SvRV(sv);
    GHashTable *table = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, g_free);
    HE *entry;

    hv_iterinit(hash);
    while ((entry = hv_iternext(hash))) {
        g_hash_table_insert(table, g_strdup(SvPVutf8_nolen(hv_iterkeysv(entry))),
                            g_strdup(SvPVutf8_nolen(hv_iterval(hash, entry))));
    }
    return table;
}

void glue_store_text(pTHX_ HV *hash, const char *key, const char *text)
{
    if (text) {
        (void)hv_store(hash, key, (I32)strlen(key), glue_sv_from_text(aTHX_ text), 0);
    }
}

AV *glue_take_lines(pTHX_ GPtrArray *lines)
{
    AV *list = (AV *)sv_2mortal((SV *)newAV());

    for (guint i = 0; i < lines->len; i++) {
        av_push(list, glue_sv_from_text(aTHX_ lines->pdata[i]));
    }
    g_ptr_array_unref(lines);
    return list;
}

SV *glue_free_bytes(SV *path)
{
    dTHX;
    struct statvfs about;

    return statvfs(SvPVbyte_nolen(path), &about) == 0
               ? newSVuv((UV)about.f_bavail * (UV)about.f_frsize)
               : newSV(0);
}

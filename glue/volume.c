/* Calls a volume's code refs: its next-dirty-region and those of copy. */
#include "glue.h"

/* A fraction is not a position in a volume. */
static bool is_whole(pTHX_ SV *sv)
{
    return looks_like_number(sv) && SvNV(sv) == (NV)SvUV(sv);
}

bool glue_next_region(void *opaque, uint64_t *offset, uint64_t *length, GError **error)
{
    dTHX;
    Caller *caller = opaque;

    *length = 0;
    glue_enter_hook(aTHX_ caller);
    dSP;
    PUSHMARK(SP);
    SSize_t count = call_sv(caller->regions, G_LIST | G_EVAL);
    SPAGAIN;
    SP -= count;
    if (glue_has_died(aTHX)) {
        glue_note_death(aTHX_ caller);
        g_set_error_literal(error, PBA_ERROR, PBA_ERROR_INCOMPLETE, "next-dirty-region died");
    } else if (count == 2 && is_whole(aTHX_ SP[1]) && is_whole(aTHX_ SP[2]) && SvUV(SP[2]) > 0) {
        *offset = SvUV(SP[1]);
        *length = SvUV(SP[2]);
    } else if (count > 1 ||
               (count == 1 && SvOK(SP[1]))) { /* undef is the API's value for the end */
        g_set_error_literal(error, PBA_ERROR, PBA_ERROR_INCOMPLETE,
                            "next-dirty-region returned something that is not a region");
    }
    PUTBACK;
    GLUE_LEAVE_HOOK;
    return !*error;
}

/* Calls code with two arguments; false if it died. */
static bool call_code(pTHX_ Caller *caller, SV *code, uint64_t first, SV *second)
{
    glue_enter_hook(aTHX_ caller);
    dSP;
    PUSHMARK(SP);
    mXPUSHu(first);
    XPUSHs(second);
    PUTBACK;
    call_sv(code, G_VOID | G_DISCARD | G_EVAL);
    bool died = glue_has_died(aTHX);
    if (died) {
        glue_note_death(aTHX_ caller);
    }
    GLUE_LEAVE_HOOK;
    return !died;
}

/* The same, but takes ownership of the second argument. */
static bool call_and_free(pTHX_ Caller *caller, SV *code, uint64_t first, SV *second)
{
    bool good = call_code(aTHX_ caller, code, first, second);
    SvREFCNT_dec(second);
    return good;
}

/* Lends the data to Perl without copying it, and gives it its own copy if it keeps the scalar. */
static bool copy_write(void *opaque, uint64_t offset, const void *data, size_t length)
{
    dTHX;
    CopyCalls *calls = opaque;
    SV *lent = newSV_type(SVt_PV);

    SvPV_set(lent, (char *)data);
    SvCUR_set(lent, length);
    SvLEN_set(lent, 0);
    SvPOK_only(lent);
    SvREADONLY_on(lent);
    bool good = call_code(aTHX_ calls->caller, calls->write, offset, lent);
    /* After utf8::upgrade, which cannot be refused, the data belongs to the scalar. */
    if (SvREFCNT(lent) > 1 && SvPVX(lent) == data) {
        SvREADONLY_off(lent);
        SvPV_set(lent, NULL);
        SvCUR_set(lent, 0);
        SvPOK_off(lent);
        sv_setpvn(lent, data, length);
    }
    SvREFCNT_dec(lent);
    return good;
}

static bool copy_progress(void *opaque, uint64_t done, uint64_t total)
{
    dTHX;
    CopyCalls *calls = opaque;

    return call_and_free(aTHX_ calls->caller, calls->progress, done, newSVuv(total));
}

static bool copy_digests(void *opaque, uint64_t offset, const uint8_t *digests, size_t count)
{
    dTHX;
    CopyCalls *calls = opaque;

    return call_and_free(aTHX_ calls->caller, calls->digests, offset,
                         newSVpvn((const char *)digests, count * PBA_DIGEST_SIZE));
}

static bool copy_damaged(void *opaque, uint64_t offset, uint64_t length)
{
    dTHX;
    CopyCalls *calls = opaque;

    return call_and_free(aTHX_ calls->caller, calls->damaged, offset, newSVuv(length));
}

static bool copy_unreadable(void *opaque, uint64_t offset, uint64_t length)
{
    dTHX;
    CopyCalls *calls = opaque;

    return call_and_free(aTHX_ calls->caller, calls->unreadable, offset, newSVuv(length));
}

/* A file's name as bytes, undef if it was not given. */
static const char *fetch_path(pTHX_ HV *hash, const char *key)
{
    SV *path = glue_fetch(aTHX_ hash, key);
    return SvOK(path) ? SvPVbyte_nolen(path) : NULL;
}

/* Lives as long as Perl's mortals, like the texts that it refers to. */
static const char *const *fetch_paths(pTHX_ HV *hash, const char *key)
{
    SV *list = glue_fetch(aTHX_ hash, key);
    if (!SvROK(list)) {
        return NULL;
    }
    AV *paths = (AV *)SvRV(list);
    SSize_t count = av_len(paths) + 1;
    SV *room = sv_2mortal(newSV((STRLEN)(count + 1) * sizeof(char *)));
    const char **result = (const char **)SvPVX(room);
    for (SSize_t i = 0; i < count; i++) {
        result[i] = SvPVbyte_nolen(*av_fetch(paths, i, 0));
    }
    result[count] = NULL;
    return result;
}

static void add_digest_options(pTHX_ PbaCopyOptions *options, HV *hash, CopyCalls *calls)
{
    SV *block = glue_fetch(aTHX_ hash, "digest-block");

    calls->digests = glue_fetch(aTHX_ hash, "digests");
    calls->damaged = glue_fetch(aTHX_ hash, "damaged");
    calls->unreadable = glue_fetch(aTHX_ hash, "unreadable");
    options->digests = SvOK(calls->digests) ? copy_digests : NULL;
    options->digest_file = fetch_path(aTHX_ hash, "digest-file");
    options->digests_increment = SvTRUE(glue_fetch(aTHX_ hash, "digests-increment"));
    options->check = SvTRUE(glue_fetch(aTHX_ hash, "check"));
    options->digest_block = SvOK(block) ? (uint32_t)SvUV(block) : 0;
    options->expected = fetch_paths(aTHX_ hash, "expected");
    options->skip_expected = SvTRUE(glue_fetch(aTHX_ hash, "skip-expected"));
    options->only_known = SvTRUE(glue_fetch(aTHX_ hash, "only-known"));
    options->damaged = SvOK(calls->damaged) ? copy_damaged : NULL;
    options->unreadable = SvOK(calls->unreadable) ? copy_unreadable : NULL;
}

PbaCopyOptions glue_copy_options(pTHX_ HV *hash, CopyCalls *calls)
{
    SV *fd = glue_fetch(aTHX_ hash, "fd");
    SV *limit = glue_fetch(aTHX_ hash, "bandwidth-limit");
    SV *limit_fd = glue_fetch(aTHX_ hash, "limit-fd");
    SV *connections = glue_fetch(aTHX_ hash, "connections");
    SV *request_size = glue_fetch(aTHX_ hash, "request-size");
    SV *cluster_size = glue_fetch(aTHX_ hash, "cluster-size");

    calls->write = glue_fetch(aTHX_ hash, "write");
    calls->progress = glue_fetch(aTHX_ hash, "progress");
    PbaCopyOptions options = {
        .uri = glue_fetch_text(aTHX_ hash, "uri"),
        .path = fetch_path(aTHX_ hash, "path"),
        .fd = SvOK(fd) ? (int)SvIV(fd) : -1,
        .write = SvOK(calls->write) ? copy_write : NULL,
        .progress = SvOK(calls->progress) ? copy_progress : NULL,
        .opaque = calls,
        .bandwidth_limit = SvOK(limit) ? (uint64_t)SvUV(limit) : 0,
        .limit_fd = SvOK(limit_fd) ? (int)SvIV(limit_fd) : -1,
        .connections = SvOK(connections) ? (unsigned)SvUV(connections) : 0,
        .request_size = SvOK(request_size) ? (uint32_t)SvUV(request_size) : 0,
        .cluster_size = SvOK(cluster_size) ? (uint32_t)SvUV(cluster_size) : 0,
        .discard = SvTRUE(glue_fetch(aTHX_ hash, "discard")),
        .is_increment = SvTRUE(glue_fetch(aTHX_ hash, "increment")),
    };
    add_digest_options(aTHX_ & options, hash, calls);
    return options;
}

SV *glue_sv_from_statistics(pTHX_ const PbaCopyStatistics *statistics)
{
    HV *hash = newHV();
    (void)hv_stores(hash, "bytes-read", newSVuv(statistics->bytes_read));
    (void)hv_stores(hash, "bytes-written", newSVuv(statistics->bytes_written));
    (void)hv_stores(hash, "bytes-zero", newSVuv(statistics->bytes_zero));
    (void)hv_stores(hash, "bytes-unchanged", newSVuv(statistics->bytes_unchanged));
    (void)hv_stores(hash, "bytes-discarded", newSVuv(statistics->bytes_discarded));
    (void)hv_stores(hash, "bytes-checked", newSVuv(statistics->bytes_checked));
    (void)hv_stores(hash, "bytes-damaged", newSVuv(statistics->bytes_damaged));
    (void)hv_stores(hash, "bytes-unknown", newSVuv(statistics->bytes_unknown));
    (void)hv_stores(hash, "regions", newSVuv(statistics->regions));
    (void)hv_stores(hash, "seconds", newSVnv(statistics->seconds));
    return newRV_noinc((SV *)hash);
}

/* Glue between Perl and the C core: check, convert, call, throw. */
#define PERL_NO_GET_CONTEXT
#include "EXTERN.h"
#include "perl.h"
#include "XSUB.h"
#include "ppport.h"

#include "src/pba.h"
#include <pthread.h>
#include <unistd.h>

/* What the C core's hooks need of the Perl caller. */
typedef struct {
    SV *log;       /* code ref or NULL */
    SV *transport; /* code ref or NULL: the core uses its own socket */
    SV *regions;   /* code ref or NULL: a volume's next-dirty-region */
    SV *exception; /* what a signal handler or the log callback died with; NULL: nothing */
    SV *object;    /* the Perl object whose call this is, borrowed; NULL: none */
    bool died;     /* since the core was last told */
    bool in_hook;  /* Perl code runs below a call of the core */
} Caller;

typedef struct {
    PbaAccess *access;
    PbaQmp *qmp;
    Caller caller;
    pid_t owner;
} PbaAccessObject;

typedef struct {
    PbaVolume *volume; /* NULL: closed */
    Caller caller;
    pid_t owner;
} PbaVolumeObject;

/* getpid() is a system call; this is asked for every region. */
static pid_t current_pid;

static void note_fork(void)
{
    current_pid = getpid();
}

/* Throwing */

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

/* Ends a call that failed. A handler's own exception goes on as it is. Frees error. */
static void throw_error(pTHX_ Caller *caller, GError *error)
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

static void throw_text(pTHX_ const char *klass, const char *message)
{
    croak_sv(new_error(aTHX_ message, klass, NULL, NULL));
}

/* A handler died, but the call came to a good end all the same. */
static void throw_pending(pTHX_ Caller *caller)
{
    if (caller->exception) {
        SV *exception = caller->exception;
        caller->exception = NULL;
        caller->died = false;
        croak_sv(sv_2mortal(exception));
    }
}

/* Hooks */

/* An exception object may be false, or die when asked. */
static bool has_died(pTHX)
{
    SV *exception = ERRSV;
    return SvROK(exception) || SvTRUE(exception);
}

static void keep_exception(pTHX_ Caller *caller)
{
    caller->died = true;
    if (!caller->exception) {
        caller->exception = newSVsv(ERRSV);
    }
}

/* Before Perl code is run from inside the core, with LEAVE_HOOK after it. Its $@ is its own, and the
 * object stays alive until the statement that called us ends, whatever that code lets go of. */
static void enter_hook(pTHX_ Caller *caller)
{
    if (caller->object) {
        sv_2mortal(SvREFCNT_inc(caller->object));
    }
    ENTER;
    SAVETMPS;
    save_scalar(PL_errgv);
    SAVEBOOL(caller->in_hook);
    caller->in_hook = true;
}

#define LEAVE_HOOK                                                                                 \
    FREETMPS;                                                                                      \
    LEAVE

static bool hook_interrupted(void *opaque)
{
    dTHX;
    Caller *caller = opaque;

    if (PL_sig_pending) {
        enter_hook(aTHX_ caller);
        dSP;
        PUSHMARK(SP);
        call_pv("PVE::BackupAccess::_dispatch_signals", G_VOID | G_DISCARD | G_EVAL);
        if (has_died(aTHX)) {
            keep_exception(aTHX_ caller);
        }
        LEAVE_HOOK;
    }
    bool died = caller->died;
    caller->died = false;
    return died;
}

static void hook_log(void *opaque, PbaLogLevel level, const char *message)
{
    static const char *const names[] = {"debug", "info", "warn"};
    dTHX;
    Caller *caller = opaque;

    if (!caller->log && level < PBA_LOG_WARN) {
        return;
    }
    enter_hook(aTHX_ caller);
    SV *text = newSVpvn_flags(message, strlen(message), SVs_TEMP | SVf_UTF8);
    dSP;
    PUSHMARK(SP);
    if (caller->log) {
        mXPUSHp(names[level], strlen(names[level]));
        XPUSHs(text);
        PUTBACK;
        call_sv(caller->log, G_VOID | G_DISCARD | G_EVAL);
    } else {
        sv_catpvs(text, "\n");
        XPUSHs(text);
        PUTBACK;
        call_pv("PVE::BackupAccess::_warn", G_VOID | G_DISCARD | G_EVAL);
    }
    if (has_died(aTHX)) {
        keep_exception(aTHX_ caller);
    }
    LEAVE_HOOK;
}

/* Plain Perl data for the caller's transport, and back */

#define MAX_DEPTH 64

static SV *sv_from_json(pTHX_ JsonNode *node);

static SV *sv_from_array(pTHX_ JsonArray *array)
{
    AV *list = newAV();
    for (guint i = 0; i < json_array_get_length(array); i++) {
        av_push(list, sv_from_json(aTHX_ json_array_get_element(array, i)));
    }
    return newRV_noinc((SV *)list);
}

static SV *sv_from_object(pTHX_ JsonObject *object)
{
    HV *hash = newHV();
    JsonObjectIter iter;
    const char *key;
    JsonNode *value;

    json_object_iter_init(&iter, object);
    while (json_object_iter_next(&iter, &key, &value)) {
        SV *name = newSVpvn_flags(key, strlen(key), SVs_TEMP | SVf_UTF8);
        (void)hv_store_ent(hash, name, sv_from_json(aTHX_ value), 0);
    }
    return newRV_noinc((SV *)hash);
}

/* JSON::PP's booleans are those of core Perl, and every JSON encoder takes them. */
static SV *sv_from_bool(pTHX_ bool value)
{
    SV *boolean = get_sv(value ? "JSON::PP::true" : "JSON::PP::false", 0);
    return boolean ? newSVsv(boolean) : newSViv(value);
}

static SV *sv_from_value(pTHX_ JsonNode *node)
{
    GType type = json_node_get_value_type(node);

    if (type == G_TYPE_BOOLEAN) {
        return sv_from_bool(aTHX_ json_node_get_boolean(node));
    }
    if (type == G_TYPE_INT64) {
        return newSViv((IV)json_node_get_int(node));
    }
    if (type == G_TYPE_STRING) {
        const char *text = json_node_get_string(node);
        return newSVpvn_flags(text, strlen(text), SVf_UTF8);
    }
    return newSVnv(json_node_get_double(node));
}

static SV *sv_from_json(pTHX_ JsonNode *node)
{
    switch (json_node_get_node_type(node)) {
    case JSON_NODE_OBJECT:
        return sv_from_object(aTHX_ json_node_get_object(node));
    case JSON_NODE_ARRAY:
        return sv_from_array(aTHX_ json_node_get_array(node));
    case JSON_NODE_VALUE:
        return sv_from_value(aTHX_ node);
    default:
        return newSV(0);
    }
}

static JsonNode *json_from_sv(pTHX_ SV *sv, unsigned depth);

static JsonNode *json_from_array(pTHX_ AV *list, unsigned depth)
{
    JsonArray *array = json_array_new();
    for (SSize_t i = 0; i <= av_len(list); i++) {
        SV **element = av_fetch(list, i, 0);
        json_array_add_element(array, json_from_sv(aTHX_ element ? *element : &PL_sv_undef, depth));
    }
    JsonNode *node = json_node_alloc();
    json_node_init_array(node, array);
    json_array_unref(array);
    return node;
}

static JsonNode *json_from_hash(pTHX_ HV *hash, unsigned depth)
{
    JsonObject *object = json_object_new();
    HE *entry;

    hv_iterinit(hash);
    while ((entry = hv_iternext(hash))) {
        SV *key = hv_iterkeysv(entry);
        json_object_set_member(object, SvPVutf8_nolen(key),
                               json_from_sv(aTHX_ hv_iterval(hash, entry), depth));
    }
    JsonNode *node = json_node_alloc();
    json_node_init_object(node, object);
    json_object_unref(object);
    return node;
}

static JsonNode *json_from_scalar(pTHX_ SV *sv)
{
    JsonNode *node = json_node_alloc();

    if (!SvOK(sv)) {
        return json_node_init_null(node);
    }
#ifdef SvIsBOOL
    if (SvIsBOOL(sv)) {
        return json_node_init_boolean(node, SvTRUE(sv));
    }
#endif
    if (SvPOK(sv) && !SvIOK(sv)) {
        STRLEN length;
        const char *text = SvPVutf8(sv, length);
        g_autofree char *valid = g_utf8_make_valid(text, (gssize)length);
        return json_node_init_string(node, valid);
    }
    if (SvNOK(sv) && !SvIOK(sv)) {
        return json_node_init_double(node, SvNV(sv));
    }
    return json_node_init_int(node, SvIV(sv));
}

static JsonNode *json_from_sv(pTHX_ SV *sv, unsigned depth)
{
    if (!SvROK(sv) || depth >= MAX_DEPTH) {
        return json_from_scalar(aTHX_ SvROK(sv) ? &PL_sv_undef : sv);
    }
    SV *referent = SvRV(sv);
    if (SvTYPE(referent) == SVt_PVAV) {
        return json_from_array(aTHX_ (AV *)referent, depth + 1);
    }
    if (SvTYPE(referent) == SVt_PVHV) {
        return json_from_hash(aTHX_ (HV *)referent, depth + 1);
    }
    /* \1, \0 and the boolean objects of all JSON decoders are references to a number. */
    return json_node_init_boolean(json_node_alloc(), SvTRUE(referent));
}

/* mon_cmd's own words, on one line. */
static void set_transport_error(pTHX_ GError **error)
{
    g_autofree char *text = g_utf8_make_valid(SvPVutf8_nolen(ERRSV), -1);
    for (char *c = text; *c; c++) {
        *c = g_ascii_iscntrl(*c) ? ' ' : *c;
    }
    g_set_error_literal(error, PBA_ERROR, PBA_ERROR_QMP, g_strchomp(text));
}

static JsonNode *carry_command(void *opaque, const char *command, JsonNode *arguments,
                               GError **error)
{
    dTHX;
    Caller *caller = opaque;
    JsonNode *reply = NULL;

    enter_hook(aTHX_ caller);
    dSP;
    PUSHMARK(SP);
    mXPUSHp(command, strlen(command));
    XPUSHs(sv_2mortal(sv_from_json(aTHX_ arguments)));
    PUTBACK;
    call_sv(caller->transport, G_SCALAR | G_EVAL);
    SPAGAIN;
    SV *value = POPs;
    PUTBACK;
    if (SvROK(ERRSV)) {
        keep_exception(aTHX_ caller); /* not mon_cmd's: a handler's, or another object */
        g_set_error_literal(error, PBA_ERROR, PBA_ERROR_QMP, "the 'qmp' code ref died");
    } else if (SvTRUE(ERRSV)) {
        set_transport_error(aTHX_ error);
    } else {
        reply = json_from_sv(aTHX_ value, 0);
    }
    LEAVE_HOOK;
    return reply;
}

/* A provider's code ref: offset and length, or nothing at the end. */
static bool call_next_region(void *opaque, uint64_t *offset, uint64_t *length, GError **error)
{
    dTHX;
    Caller *caller = opaque;

    *length = 0;
    enter_hook(aTHX_ caller);
    dSP;
    PUSHMARK(SP);
    SSize_t count = call_sv(caller->regions, G_LIST | G_EVAL);
    SPAGAIN;
    SP -= count;
    if (has_died(aTHX)) {
        keep_exception(aTHX_ caller);
        g_set_error_literal(error, PBA_ERROR, PBA_ERROR_INCOMPLETE, "next-dirty-region died");
    } else if (count == 2 && looks_like_number(SP[1]) && looks_like_number(SP[2]) &&
               SvUV(SP[2]) > 0) {
        *offset = SvUV(SP[1]);
        *length = SvUV(SP[2]);
    } else if (count != 0) {
        g_set_error_literal(error, PBA_ERROR, PBA_ERROR_INCOMPLETE,
                            "next-dirty-region returned something that is not a region");
    }
    PUTBACK;
    LEAVE_HOOK;
    return !*error;
}

/* Objects */

/* The C object hangs on its Perl object by magic, which Perl code can neither forge nor copy, and
 * goes with it. */

static void caller_clear(pTHX_ Caller *caller)
{
    SvREFCNT_dec(caller->log);
    SvREFCNT_dec(caller->transport);
    SvREFCNT_dec(caller->regions);
    SvREFCNT_dec(caller->exception);
    *caller = (Caller){0};
}

static int free_access(pTHX_ SV *sv, MAGIC *magic)
{
    PbaAccessObject *object = (PbaAccessObject *)magic->mg_ptr;
    PERL_UNUSED_VAR(sv);
    pba_access_free(object->access);
    pba_qmp_free(object->qmp);
    caller_clear(aTHX_ &object->caller);
    g_free(object);
    return 0;
}

static int free_volume(pTHX_ SV *sv, MAGIC *magic)
{
    PbaVolumeObject *object = (PbaVolumeObject *)magic->mg_ptr;
    PERL_UNUSED_VAR(sv);
    pba_volume_free(object->volume);
    caller_clear(aTHX_ &object->caller);
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

static void *pointer_from_sv(pTHX_ SV *sv, const MGVTBL *type, const char *klass)
{
    bool has_magic = SvROK(sv) && SvTYPE(SvRV(sv)) >= SVt_PVMG;
    MAGIC *magic = has_magic ? mg_findext(SvRV(sv), PERL_MAGIC_ext, type) : NULL;
    if (!magic) {
        throw_text(aTHX_ "ArgumentError", Perl_form(aTHX_ "not an object of class %s", klass));
    }
    return magic->mg_ptr;
}

static void require_idle(pTHX_ const Caller *caller, pid_t owner)
{
    if (owner != current_pid) {
        throw_text(aTHX_ "StateError", "the object belongs to another process");
    }
    if (caller->in_hook) {
        throw_text(aTHX_ "StateError", "the object is in use by a call that is under way");
    }
}

static void require_open(pTHX_ const PbaVolumeObject *self)
{
    if (!self->volume) {
        throw_text(aTHX_ "StateError", "the volume was closed already");
    }
    require_idle(aTHX_ &self->caller, self->owner);
}

static PbaAccessObject *access_from_sv(pTHX_ SV *sv)
{
    return pointer_from_sv(aTHX_ sv, &access_magic, "PVE::BackupAccess");
}

static PbaVolumeObject *volume_from_sv(pTHX_ SV *sv)
{
    return pointer_from_sv(aTHX_ sv, &volume_magic, "PVE::BackupAccess::Volume");
}

static PbaHooks caller_hooks(Caller *caller)
{
    return (PbaHooks){.interrupted = hook_interrupted, .log = hook_log, .opaque = caller};
}

static const char *text_or_null(pTHX_ SV *sv)
{
    return SvOK(sv) ? SvPVutf8_nolen(sv) : NULL;
}

static SV *fetch(pTHX_ HV *hash, const char *key)
{
    SV **value = hv_fetch(hash, key, (I32)strlen(key), 0);
    return value ? *value : &PL_sv_undef;
}

/* The text of a hash's value, NULL if it has none. */
static const char *fetch_text(pTHX_ HV *hash, const char *key)
{
    return text_or_null(aTHX_ fetch(aTHX_ hash, key));
}

static SV *copy_code(pTHX_ SV *code)
{
    return SvROK(code) ? newSVsv(code) : NULL;
}

static GHashTable *table_from_hash(pTHX_ SV *sv)
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

/* qmp is a path or a code ref; the hooks live in the caller. */
static PbaQmp *new_qmp(pTHX_ SV *qmp, unsigned timeout, Caller *caller)
{
    PbaHooks hooks = caller_hooks(caller);
    if (SvROK(qmp)) {
        caller->transport = newSVsv(qmp);
        return pba_qmp_new_transport(carry_command, caller, &hooks);
    }
    return pba_qmp_new(SvPVutf8_nolen(qmp), timeout, &hooks);
}

static void store_text(pTHX_ HV *hash, const char *key, const char *text)
{
    if (text) {
        (void)hv_store(hash, key, (I32)strlen(key), newSVpvn_flags(text, strlen(text), SVf_UTF8),
                       0);
    }
}

static SV *sv_from_info(pTHX_ const PbaDeviceInfo *info)
{
    HV *hash = newHV();
    store_text(aTHX_ hash, "device", info->device);
    store_text(aTHX_ hash, "node-name", info->node_name);
    store_text(aTHX_ hash, "bitmap-node-name", info->bitmap_node_name);
    store_text(aTHX_ hash, "bitmap-name", info->bitmap_name);
    store_text(aTHX_ hash, "bitmap-action", pba_bitmap_action_name(info->action));
    (void)hv_stores(hash, "size", newSVuv(info->size));
    return newRV_noinc((SV *)hash);
}

static void push_infos(pTHX_ PbaAccess *access, AV *list)
{
    for (size_t i = 0; i < pba_access_device_count(access); i++) {
        PbaDeviceInfo info;
        pba_access_device_info(access, i, &info);
        av_push(list, sv_from_info(aTHX_ &info));
    }
}

/* Copying */

/* The code refs of one call of copy; borrowed. */
typedef struct {
    Caller *caller;
    SV *write;
    SV *progress;
} CopyCalls;

/* Calls code with two arguments; false if it died. */
static bool call_code(pTHX_ Caller *caller, SV *code, uint64_t first, SV *second)
{
    enter_hook(aTHX_ caller);
    dSP;
    PUSHMARK(SP);
    mXPUSHu(first);
    XPUSHs(second);
    PUTBACK;
    call_sv(code, G_VOID | G_DISCARD | G_EVAL);
    bool died = has_died(aTHX);
    if (died) {
        keep_exception(aTHX_ caller);
    }
    LEAVE_HOOK;
    return !died;
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
    if (SvREFCNT(lent) > 1) {
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
    SV *second = newSVuv(total);

    bool good = call_code(aTHX_ calls->caller, calls->progress, done, second);
    SvREFCNT_dec(second);
    return good;
}

static PbaCopyOptions copy_options(pTHX_ HV *hash, CopyCalls *calls)
{
    SV *fd = fetch(aTHX_ hash, "fd");
    SV *limit = fetch(aTHX_ hash, "bandwidth-limit");
    SV *connections = fetch(aTHX_ hash, "connections");
    SV *request_size = fetch(aTHX_ hash, "request-size");

    calls->write = fetch(aTHX_ hash, "write");
    calls->progress = fetch(aTHX_ hash, "progress");
    return (PbaCopyOptions){
        .uri = fetch_text(aTHX_ hash, "uri"),
        .path = SvOK(fetch(aTHX_ hash, "path")) ? SvPVbyte_nolen(fetch(aTHX_ hash, "path")) : NULL,
        .fd = SvOK(fd) ? (int)SvIV(fd) : -1,
        .write = SvOK(calls->write) ? copy_write : NULL,
        .progress = SvOK(calls->progress) ? copy_progress : NULL,
        .opaque = calls,
        .bandwidth_limit = SvOK(limit) ? (uint64_t)SvUV(limit) : 0,
        .connections = SvOK(connections) ? (unsigned)SvUV(connections) : 0,
        .request_size = SvOK(request_size) ? (uint32_t)SvUV(request_size) : 0,
        .discard = SvTRUE(fetch(aTHX_ hash, "discard")),
    };
}

static SV *sv_from_statistics(pTHX_ const PbaCopyStatistics *statistics)
{
    HV *hash = newHV();
    (void)hv_stores(hash, "bytes-read", newSVuv(statistics->bytes_read));
    (void)hv_stores(hash, "bytes-written", newSVuv(statistics->bytes_written));
    (void)hv_stores(hash, "bytes-zero", newSVuv(statistics->bytes_zero));
    (void)hv_stores(hash, "bytes-discarded", newSVuv(statistics->bytes_discarded));
    (void)hv_stores(hash, "regions", newSVuv(statistics->regions));
    (void)hv_stores(hash, "seconds", newSVnv(statistics->seconds));
    return newRV_noinc((SV *)hash);
}

MODULE = PVE::BackupAccess  PACKAGE = PVE::BackupAccess

PROTOTYPES: DISABLE

BOOT:
{
    note_fork();
    pthread_atfork(NULL, NULL, note_fork);
}

void
_dispatch_signals()
    CODE:
        PERL_ASYNC_CHECK();

const char *
_bitmap_status(SV *action)
    PREINIT:
        PbaBitmapAction value = PBA_BITMAP_ACTION_ABSENT;
        GError *error = NULL;
    CODE:
        if (SvOK(action) && !pba_bitmap_action_parse(SvPVutf8_nolen(action), &value, &error)) {
            throw_error(aTHX_ NULL, error);
        }
        RETVAL = pba_bitmap_status_name(pba_bitmap_status(value));
    OUTPUT:
        RETVAL

SV *
_capabilities(SV *qmp, unsigned timeout)
    PREINIT:
        Caller caller = {0};
        GError *error = NULL;
        PbaCapabilities capabilities;
    CODE:
        PbaQmp *client = new_qmp(aTHX_ qmp, timeout, &caller);
        bool done = pba_capabilities(client, &capabilities, &error);
        pba_qmp_free(client);
        SvREFCNT_dec(caller.transport);
        if (!done) {
            throw_error(aTHX_ &caller, error);
        }
        HV *hash = newHV();
        store_text(aTHX_ hash, "backend", capabilities.backend);
        store_text(aTHX_ hash, "form", capabilities.form);
        (void)hv_stores(hash, "qemu-version",
                        newSVpvf("%u.%u.%u", capabilities.major, capabilities.minor,
                                 capabilities.micro));
        RETVAL = newRV_noinc((SV *)hash);
    OUTPUT:
        RETVAL

SV *
_new(SV *klass, SV *options)
    PREINIT:
        GError *error = NULL;
    CODE:
        HV *hash = (HV *)SvRV(options);
        PbaAccessObject *object = g_new0(PbaAccessObject, 1);
        SV *qmp = fetch(aTHX_ hash, "qmp");
        PbaHooks hooks = caller_hooks(&object->caller);
        object->owner = getpid();
        object->caller.log = copy_code(aTHX_ fetch(aTHX_ hash, "log"));
        object->qmp = new_qmp(aTHX_ qmp, (unsigned)SvUV(fetch(aTHX_ hash, "timeout")),
                              &object->caller);
        GHashTable *fleecing = table_from_hash(aTHX_ fetch(aTHX_ hash, "fleecing"));
        PbaAccessOptions access_options = {
            .target_id = fetch_text(aTHX_ hash, "target-id"),
            .run_dir = fetch_text(aTHX_ hash, "run-dir"),
            .identity = fetch_text(aTHX_ hash, "identity"),
            .fleecing_dir = fetch_text(aTHX_ hash, "fleecing-dir"),
            .fleecing = fleecing,
            .bitmap_name = fetch_text(aTHX_ hash, "bitmap-name"),
            .persistent = SvTRUE(fetch(aTHX_ hash, "persistent")),
        };
        object->access = pba_access_new(object->qmp, &access_options, &hooks, &error);
        g_clear_pointer(&fleecing, g_hash_table_unref);
        if (!object->access) {
            pba_qmp_free(object->qmp);
            caller_clear(aTHX_ &object->caller);
            g_free(object);
            throw_error(aTHX_ NULL, error);
        }
        RETVAL = new_object(aTHX_ object, &object->caller, klass, &access_magic);
    OUTPUT:
        RETVAL

SV *
_setup(PbaAccessObject *self, AV *devices)
    PREINIT:
        GError *error = NULL;
    CODE:
        require_idle(aTHX_ &self->caller, self->owner);
        size_t count = (size_t)(av_len(devices) + 1);
        /* On the Perl stack's heap, so that it goes even if something below throws. */
        SV *memory = sv_2mortal(newSV(count * sizeof(PbaDeviceRequest) + 1));
        PbaDeviceRequest *requests = (PbaDeviceRequest *)SvPVX(memory);
        for (size_t i = 0; i < count; i++) {
            HV *device = (HV *)SvRV(*av_fetch(devices, (SSize_t)i, 0));
            const char *mode = fetch_text(aTHX_ device, "bitmap-mode");
            requests[i].device = fetch_text(aTHX_ device, "device");
            if (!pba_bitmap_mode_parse(mode ? mode : "none", &requests[i].mode, &error)) {
                throw_error(aTHX_ NULL, error);
            }
        }
        if (!pba_access_setup(self->access, requests, count, &error)) {
            throw_error(aTHX_ &self->caller, error);
        }
        throw_pending(aTHX_ &self->caller);
        AV *infos = newAV();
        push_infos(aTHX_ self->access, infos);
        RETVAL = newRV_noinc((SV *)infos);
    OUTPUT:
        RETVAL

SV *
_infos(PbaAccessObject *self)
    CODE:
        require_idle(aTHX_ &self->caller, self->owner);
        AV *infos = newAV();
        push_infos(aTHX_ self->access, infos);
        RETVAL = newRV_noinc((SV *)infos);
    OUTPUT:
        RETVAL

SV *
_export(PbaAccessObject *self)
    PREINIT:
        GError *error = NULL;
    CODE:
        require_idle(aTHX_ &self->caller, self->owner);
        if (!pba_access_export(self->access, &error)) {
            throw_error(aTHX_ &self->caller, error);
        }
        throw_pending(aTHX_ &self->caller);
        const char *socket = pba_access_socket(self->access);
        RETVAL = newSVpvn_flags(socket, strlen(socket), SVf_UTF8);
    OUTPUT:
        RETVAL

void
_serve_files(PbaAccessObject *self)
    PREINIT:
        GError *error = NULL;
    CODE:
        require_idle(aTHX_ &self->caller, self->owner);
        if (!pba_access_serve_files(self->access, &error)) {
            throw_error(aTHX_ &self->caller, error);
        }
        throw_pending(aTHX_ &self->caller);

int
_open_file(PbaAccessObject *self, UV index)
    PREINIT:
        GError *error = NULL;
    CODE:
        require_idle(aTHX_ &self->caller, self->owner);
        RETVAL = pba_access_open_file(self->access, index, &error);
        if (RETVAL < 0) {
            throw_error(aTHX_ &self->caller, error);
        }
    OUTPUT:
        RETVAL

void
_teardown(PbaAccessObject *self, bool success)
    PREINIT:
        GError *error = NULL;
    CODE:
        require_idle(aTHX_ &self->caller, self->owner);
        if (!pba_access_teardown(self->access, success, &error)) {
            throw_error(aTHX_ &self->caller, error);
        }
        throw_pending(aTHX_ &self->caller);

SV *
_recover(PbaAccessObject *self)
    PREINIT:
        GError *error = NULL;
    CODE:
        require_idle(aTHX_ &self->caller, self->owner);
        GPtrArray *lines = g_ptr_array_new_with_free_func(g_free);
        bool done = pba_access_recover(self->access, lines, &error);
        AV *list = (AV *)sv_2mortal((SV *)newAV());
        for (guint i = 0; i < lines->len; i++) {
            const char *line = lines->pdata[i];
            av_push(list, newSVpvn_flags(line, strlen(line), SVf_UTF8));
        }
        g_ptr_array_unref(lines);
        if (!done) {
            throw_error(aTHX_ &self->caller, error);
        }
        throw_pending(aTHX_ &self->caller);
        RETVAL = newRV_inc((SV *)list);
    OUTPUT:
        RETVAL

bool
_is_up(PbaAccessObject *self)
    CODE:
        /* In a forked child it is not: only the process that set it up tears it down. */
        RETVAL = self->owner == getpid() && pba_access_is_up(self->access);
    OUTPUT:
        RETVAL

MODULE = PVE::BackupAccess  PACKAGE = PVE::BackupAccess::Volume

SV *
_open(SV *klass, SV *device, SV *path, SV *bitmap, SV *size)
    PREINIT:
        GError *error = NULL;
    CODE:
        PbaVolumeObject *object = g_new0(PbaVolumeObject, 1);
        PbaHooks hooks = caller_hooks(&object->caller);
        PbaVolumeOptions options = {
            .device = SvPVutf8_nolen(device),
            .path = SvPVutf8_nolen(path),
            .bitmap = text_or_null(aTHX_ bitmap),
            .size = SvOK(size) ? (uint64_t)SvUV(size) : UINT64_MAX,
        };
        object->owner = getpid();
        object->volume = pba_volume_open(&options, &hooks, &error);
        if (!object->volume) {
            Caller caller = object->caller;
            g_free(object);
            throw_error(aTHX_ &caller, error);
        }
        RETVAL = new_object(aTHX_ object, &object->caller, klass, &volume_magic);
    OUTPUT:
        RETVAL

SV *
_open_handle(SV *klass, SV *device, int fd, uint64_t size, SV *regions)
    PREINIT:
        GError *error = NULL;
    CODE:
        PbaVolumeObject *object = g_new0(PbaVolumeObject, 1);
        PbaHooks hooks = caller_hooks(&object->caller);
        object->owner = getpid();
        object->caller.regions = newSVsv(regions);
        object->volume = pba_volume_open_handle(SvPVutf8_nolen(device), fd, size, call_next_region,
                                                &object->caller, &hooks, &error);
        if (!object->volume) {
            caller_clear(aTHX_ &object->caller);
            g_free(object);
            throw_error(aTHX_ NULL, error);
        }
        RETVAL = new_object(aTHX_ object, &object->caller, klass, &volume_magic);
    OUTPUT:
        RETVAL

uint64_t
size(PbaVolumeObject *self)
    CODE:
        require_open(aTHX_ self);
        RETVAL = pba_volume_size(self->volume);
    OUTPUT:
        RETVAL

void
next_dirty_region(PbaVolumeObject *self)
    PREINIT:
        GError *error = NULL;
        uint64_t offset;
        uint64_t length;
    PPCODE:
        require_open(aTHX_ self);
        PUTBACK;
        bool done = pba_volume_next_dirty_region(self->volume, &offset, &length, &error);
        SPAGAIN;
        if (!done) {
            throw_error(aTHX_ &self->caller, error);
        }
        if (length > 0) {
            EXTEND(SP, 2);
            mPUSHu(offset);
            mPUSHu(length);
        }

void
_dirty_regions(PbaVolumeObject *self, UV max)
    PREINIT:
        GError *error = NULL;
        uint64_t offset;
        uint64_t length;
    PPCODE:
        require_open(aTHX_ self);
        for (UV i = 0; i < max; i++) {
            PUTBACK;
            bool done = pba_volume_next_dirty_region(self->volume, &offset, &length, &error);
            SPAGAIN;
            if (!done) {
                throw_error(aTHX_ &self->caller, error);
            }
            if (length == 0) {
                break;
            }
            EXTEND(SP, 2);
            mPUSHu(offset);
            mPUSHu(length);
        }

SV *
_pread(PbaVolumeObject *self, uint64_t offset, uint64_t length)
    PREINIT:
        GError *error = NULL;
    CODE:
        require_open(aTHX_ self);
        /* Not more than a read can have; the core refuses what is longer. */
        SV *data = newSV(MIN(length, 64 << 20) + 1);
        SvPOK_only(data);
        if (!pba_volume_pread(self->volume, SvPVX(data), offset, length, &error)) {
            SvREFCNT_dec(data);
            throw_error(aTHX_ &self->caller, error);
        }
        SvCUR_set(data, length);
        *SvEND(data) = '\0';
        RETVAL = data;
    OUTPUT:
        RETVAL

SV *
_copy(PbaVolumeObject *self, HV *options)
    PREINIT:
        GError *error = NULL;
        PbaCopyStatistics statistics;
    CODE:
        require_open(aTHX_ self);
        CopyCalls calls = {.caller = &self->caller};
        PbaCopyOptions copy = copy_options(aTHX_ options, &calls);
        if (!pba_volume_copy(self->volume, &copy, &statistics, &error)) {
            throw_error(aTHX_ &self->caller, error);
        }
        throw_pending(aTHX_ &self->caller);
        RETVAL = sv_from_statistics(aTHX_ &statistics);
    OUTPUT:
        RETVAL

void
_discard(PbaVolumeObject *self, uint64_t offset, uint64_t length)
    PREINIT:
        GError *error = NULL;
    CODE:
        require_open(aTHX_ self);
        if (!pba_volume_discard(self->volume, offset, length, &error)) {
            throw_error(aTHX_ &self->caller, error);
        }

void
close(PbaVolumeObject *self)
    CODE:
        if (self->volume && self->owner == current_pid) {
            require_open(aTHX_ self);
        }
        g_clear_pointer(&self->volume, pba_volume_free);

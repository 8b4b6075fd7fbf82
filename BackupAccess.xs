/* Glue between Perl and the C core: check, convert, call, throw. */
#include "glue/glue.h"

#include <pthread.h>

MODULE = PVE::BackupAccess  PACKAGE = PVE::BackupAccess  PREFIX = glue

PROTOTYPES: DISABLE

BOOT:
    glue_note_fork();
    pthread_atfork(NULL, NULL, glue_note_fork);

void
_dispatch_signals()
    CODE:
        PERL_ASYNC_CHECK();

bool
glue_end_with_parent(int signal)

int
glue_open_process(int pid)

int
glue_open_memory()

int
glue_start_program(SV *pid, const char *path, AV *fds, int signal, AV *environment, AV *command)

SV *
glue_free_bytes(SV *path)

SV *
_take_later()
    CODE:
        SV *exception = glue_take_later(aTHX);
        RETVAL = exception ? exception : newSV(0);
    OUTPUT:
        RETVAL

SV *
_return_with_later(SV *result, SV *exception)
    CODE:
        glue_throw_later(aTHX_ exception);
        RETVAL = SvREFCNT_inc(result);
    OUTPUT:
        RETVAL

SV *
_run_all(bool again, ...)
    CODE:
        /* The Perl stack may move while the code runs. */
        AV *codes = (AV *)sv_2mortal((SV *)av_make(items - 1, &ST(1)));
        RETVAL = newRV_inc((SV *)glue_run_all(aTHX_ codes, again));
    OUTPUT:
        RETVAL

const char *
_bitmap_status(SV *action)
    PREINIT:
        PbaBitmapAction value = PBA_BITMAP_ACTION_ABSENT;
        GError *error = NULL;
    CODE:
        if (SvOK(action) && !pba_bitmap_action_parse(SvPVutf8_nolen(action), &value, &error)) {
            glue_throw_error(aTHX_ NULL, error);
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
        PbaQmp *client = glue_new_qmp(aTHX_ qmp, timeout, &caller);
        bool done = pba_capabilities(client, &capabilities, &error);
        glue_free_qmp(aTHX_ client, &caller);
        if (!done) {
            glue_throw_error(aTHX_ &caller, error);
        }
        HV *hash = newHV();
        glue_store_text(aTHX_ hash, "backend", capabilities.backend);
        glue_store_text(aTHX_ hash, "form", capabilities.form);
        (void)hv_stores(hash, "qemu-version",
                        newSVpvf("%u.%u.%u", capabilities.major, capabilities.minor,
                                 capabilities.micro));
        RETVAL = newRV_noinc((SV *)hash);
    OUTPUT:
        RETVAL

SV *
_ask(SV *qmp, unsigned timeout, const char *command, SV *arguments, SV *log)
    PREINIT:
        Caller caller = {0};
        GError *error = NULL;
    CODE:
        caller.log = glue_copy_code(aTHX_ log);
        PbaQmp *client = glue_new_qmp(aTHX_ qmp, timeout, &caller);
        JsonNode *json = glue_json_from_sv(aTHX_ arguments, &error);
        JsonNode *value = json ? pba_qmp_execute(client, command, json, &error) : NULL;
        glue_free_qmp(aTHX_ client, &caller);
        if (!value) {
            glue_throw_error(aTHX_ &caller, error);
        }
        RETVAL = sv_2mortal(glue_sv_from_json(aTHX_ value));
        json_node_unref(value);
        glue_throw_pending(aTHX_ &caller);
        SvREFCNT_inc(RETVAL);
    OUTPUT:
        RETVAL

SV *
_status(HV *options)
    PREINIT:
        Caller caller = {0};
        GError *error = NULL;
    CODE:
        PbaHooks hooks = glue_caller_hooks(&caller);
        caller.log = glue_copy_code(aTHX_ glue_fetch(aTHX_ options, "log"));
        PbaQmp *client = glue_new_qmp(aTHX_ glue_fetch(aTHX_ options, "qmp"),
                                      (unsigned)SvUV(glue_fetch(aTHX_ options, "timeout")),
                                      &caller);
        PbaAccessOptions access_options = {0};
        glue_fetch_places(aTHX_ options, &access_options);
        SV *known = glue_fetch(aTHX_ options, "access");
        JsonNode *status =
            pba_status(client, &access_options,
                       SvOK(known) ? glue_access_from_sv(aTHX_ known)->access : NULL, &hooks, &error);
        glue_free_qmp(aTHX_ client, &caller);
        if (!status) {
            glue_throw_error(aTHX_ &caller, error);
        }
        RETVAL = sv_2mortal(glue_sv_from_json(aTHX_ status));
        json_node_unref(status);
        glue_throw_pending(aTHX_ &caller);
        SvREFCNT_inc(RETVAL);
    OUTPUT:
        RETVAL

SV *
_new(SV *klass, HV *options)
    PREINIT:
        GError *error = NULL;
    CODE:
        PbaAccessObject *object = g_new0(PbaAccessObject, 1);
        SV *qmp = glue_fetch(aTHX_ options, "qmp");
        PbaHooks hooks = glue_caller_hooks(&object->caller);
        object->owner = getpid();
        object->caller.log = glue_copy_code(aTHX_ glue_fetch(aTHX_ options, "log"));
        object->qmp = glue_new_qmp(aTHX_ qmp, (unsigned)SvUV(glue_fetch(aTHX_ options, "timeout")),
                              &object->caller);
        GHashTable *fleecing = glue_table_from_hash(aTHX_ glue_fetch(aTHX_ options, "fleecing"));
        PbaAccessOptions access_options = {
            .target_id = glue_fetch_text(aTHX_ options, "target-id"),
            .fleecing = fleecing,
            .bitmap_name = glue_fetch_text(aTHX_ options, "bitmap-name"),
            .allow_shared = SvTRUE(glue_fetch(aTHX_ options, "allow-shared")),
            .persistent = SvTRUE(glue_fetch(aTHX_ options, "persistent")),
            .no_recover = !SvTRUE(glue_fetch(aTHX_ options, "recover")),
            .force = SvTRUE(glue_fetch(aTHX_ options, "force")),
        };
        glue_fetch_places(aTHX_ options, &access_options);
        object->access = pba_access_new(object->qmp, &access_options, &hooks, &error);
        g_clear_pointer(&fleecing, g_hash_table_unref);
        if (!object->access) {
            pba_qmp_free(object->qmp);
            glue_caller_clear(aTHX_ &object->caller);
            g_free(object);
            glue_throw_error(aTHX_ NULL, error);
        }
        RETVAL = glue_new_access(aTHX_ object, klass);
    OUTPUT:
        RETVAL

SV *
_sizes(PbaAccessObject *self, AV *devices)
    PREINIT:
        GError *error = NULL;
    CODE:
        glue_require_idle(aTHX_ &self->caller, self->owner);
        size_t count;
        PbaDeviceRequest *requests = glue_requests_by_name(aTHX_ devices, &count);
        uint64_t *sizes = (uint64_t *)SvPVX(sv_2mortal(newSV(count * sizeof(uint64_t) + 1)));
        if (!pba_access_sizes(self->access, requests, count, sizes, &error)) {
            glue_throw_error(aTHX_ &self->caller, error);
        }
        glue_throw_pending(aTHX_ &self->caller);
        HV *hash = newHV();
        for (size_t i = 0; i < count; i++) {
            SV *device = *av_fetch(devices, (SSize_t)i, 0);
            (void)hv_store_ent(hash, device, newSVuv(sizes[i]), 0);
        }
        RETVAL = newRV_noinc((SV *)hash);
    OUTPUT:
        RETVAL

SV *
_bases(PbaAccessObject *self, AV *devices)
    CODE:
        RETVAL = glue_ask_bases(aTHX_ self, devices);
    OUTPUT:
        RETVAL

SV *
_guest(PbaAccessObject *self)
    CODE:
        const char *guest = pba_access_guest(self->access);
        RETVAL = guest ? glue_sv_from_text(aTHX_ guest) : newSV(0);
    OUTPUT:
        RETVAL

void
_warnings(PbaAccessObject *self)
    PPCODE:
        const GPtrArray *lines = pba_access_warnings(self->access);
        for (guint i = 0; i < lines->len; i++) {
            mXPUSHs(glue_sv_from_text(aTHX_ (const char *)lines->pdata[i]));
        }

void
_prepare(PbaAccessObject *self, AV *devices)
    PREINIT:
        GError *error = NULL;
    CODE:
        glue_require_idle(aTHX_ &self->caller, self->owner);
        size_t count;
        PbaDeviceRequest *requests = glue_requests_from_hashes(aTHX_ devices, &count);
        if (!pba_access_prepare(self->access, requests, count, &error)) {
            glue_throw_error(aTHX_ &self->caller, error);
        }
        glue_throw_pending(aTHX_ &self->caller);

void
_cut(PbaAccessObject *self)
    CODE:
        glue_run_step(aTHX_ self, pba_access_cut);

void
_finish(PbaAccessObject *self)
    CODE:
        glue_run_step(aTHX_ self, pba_access_finish);

void
_release(PbaAccessObject *self)
    CODE:
        glue_require_idle(aTHX_ &self->caller, self->owner);
        pba_qmp_release(self->qmp);

void
_undo_setup(PbaAccessObject *self)
    CODE:
        glue_require_idle(aTHX_ &self->caller, self->owner);
        pba_access_undo_setup(self->access);
        glue_throw_pending(aTHX_ &self->caller);

void
_log_warning(PbaAccessObject *self, const char *text)
    CODE:
        glue_warn(&self->caller, "%s", text);
        glue_throw_pending(aTHX_ &self->caller);

SV *
_infos(PbaAccessObject *self)
    CODE:
        glue_require_idle(aTHX_ &self->caller, self->owner);
        RETVAL = glue_sv_from_infos(aTHX_ self->access);
    OUTPUT:
        RETVAL

SV *
_export(PbaAccessObject *self)
    PREINIT:
        GError *error = NULL;
    CODE:
        glue_require_idle(aTHX_ &self->caller, self->owner);
        if (!pba_access_export(self->access, &error)) {
            glue_throw_error(aTHX_ &self->caller, error);
        }
        glue_throw_pending(aTHX_ &self->caller);
        RETVAL = glue_sv_from_text(aTHX_ pba_access_socket(self->access));
    OUTPUT:
        RETVAL

void
_serve_files(PbaAccessObject *self)
    CODE:
        glue_run_step(aTHX_ self, pba_access_serve_files);

int
_open_file(PbaAccessObject *self, UV index)
    PREINIT:
        GError *error = NULL;
    CODE:
        glue_require_idle(aTHX_ &self->caller, self->owner);
        RETVAL = pba_access_open_file(self->access, index, &error);
        if (RETVAL < 0) {
            glue_throw_error(aTHX_ &self->caller, error);
        }
    OUTPUT:
        RETVAL

bool
_teardown(PbaAccessObject *self, bool success, SV *id)
    PREINIT:
        GError *error = NULL;
    CODE:
        glue_require_idle(aTHX_ &self->caller, self->owner);
        if (!pba_access_teardown(self->access, success, glue_text_or_null(aTHX_ id), &error)) {
            glue_run_signal_handlers(aTHX_ &self->caller); /* deferred during the commit */
            glue_throw_error(aTHX_ &self->caller, error);
        }
        if (success) {
            glue_throw_pending_later(aTHX_ &self->caller); /* the success is committed */
        } else {
            glue_throw_pending(aTHX_ &self->caller);
        }
        RETVAL = true;
    OUTPUT:
        RETVAL

SV *
_recover(PbaAccessObject *self)
    CODE:
        RETVAL = glue_take_steps(aTHX_ self, pba_access_recover);
    OUTPUT:
        RETVAL

SV *
_forget(PbaAccessObject *self)
    CODE:
        RETVAL = glue_take_steps(aTHX_ self, pba_access_forget);
    OUTPUT:
        RETVAL

bool
_is_up(PbaAccessObject *self)
    CODE:
        /* In a forked child, this does nothing: only the process that set the access up tears it
         * down. */
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
        PbaHooks hooks = glue_caller_hooks(&object->caller);
        PbaVolumeOptions options = {
            .device = SvPVutf8_nolen(device),
            .path = SvPVutf8_nolen(path),
            .bitmap = glue_text_or_null(aTHX_ bitmap),
            .size = SvOK(size) ? (uint64_t)SvUV(size) : UINT64_MAX,
        };
        object->owner = getpid();
        object->volume = pba_volume_open(&options, &hooks, &error);
        if (!object->volume) {
            Caller caller = object->caller;
            g_free(object);
            glue_throw_error(aTHX_ &caller, error);
        }
        RETVAL = glue_new_volume(aTHX_ object, klass);
    OUTPUT:
        RETVAL

SV *
_open_handle(SV *klass, SV *device, int fd, uint64_t size, SV *regions)
    PREINIT:
        GError *error = NULL;
    CODE:
        PbaVolumeObject *object = g_new0(PbaVolumeObject, 1);
        PbaHooks hooks = glue_caller_hooks(&object->caller);
        object->owner = getpid();
        object->caller.regions = newSVsv(regions);
        object->volume = pba_volume_open_handle(SvPVutf8_nolen(device), fd, size, glue_next_region,
                                                &object->caller, &hooks, &error);
        if (!object->volume) {
            glue_caller_clear(aTHX_ &object->caller);
            g_free(object);
            glue_throw_error(aTHX_ NULL, error);
        }
        RETVAL = glue_new_volume(aTHX_ object, klass);
    OUTPUT:
        RETVAL

uint64_t
size(PbaVolumeObject *self)
    CODE:
        glue_require_open(aTHX_ self);
        RETVAL = pba_volume_size(self->volume);
    OUTPUT:
        RETVAL

void
next_dirty_region(PbaVolumeObject *self)
    PREINIT:
        dXSTARG; /* avoids the creation of one scalar per region */
        GError *error = NULL;
        uint64_t offset;
        uint64_t length;
    PPCODE:
        glue_require_open(aTHX_ self);
        PUTBACK;
        bool done = pba_volume_next_dirty_region(self->volume, &offset, &length, &error);
        SPAGAIN;
        if (!done) {
            glue_throw_error(aTHX_ &self->caller, error);
        }
        if (length > 0) {
            EXTEND(SP, 2);
            PUSHu(offset);
            PUSHs(sv_2mortal(newSVuv(length)));
        }

void
_dirty_regions(PbaVolumeObject *self, UV max)
    PREINIT:
        GError *error = NULL;
        uint64_t offset;
        uint64_t length;
    PPCODE:
        glue_require_open(aTHX_ self);
        for (UV i = 0; i < max; i++) {
            PUTBACK;
            bool done = pba_volume_next_dirty_region(self->volume, &offset, &length, &error);
            SPAGAIN;
            if (!done) {
                glue_throw_error(aTHX_ &self->caller, error);
            }
            if (length == 0) {
                break;
            }
            EXTEND(SP, 2);
            PUSHs(sv_2mortal(newSVuv(offset)));
            PUSHs(sv_2mortal(newSVuv(length)));
        }

SV *
_pread(PbaVolumeObject *self, uint64_t offset, uint64_t length)
    PREINIT:
        GError *error = NULL;
    CODE:
        glue_require_open(aTHX_ self);
        /* At most the maximum length of a read; the core refuses a longer one. */
        SV *data = newSV(MIN(length, 64 << 20) + 1);
        SvPOK_only(data);
        if (!pba_volume_pread(self->volume, SvPVX(data), offset, length, &error)) {
            SvREFCNT_dec(data);
            glue_throw_error(aTHX_ &self->caller, error);
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
        glue_require_open(aTHX_ self);
        CopyCalls calls = {.caller = &self->caller};
        PbaCopyOptions copy = glue_copy_options(aTHX_ options, &calls);
        if (!pba_volume_copy(self->volume, &copy, &statistics, &error)) {
            glue_throw_error(aTHX_ &self->caller, error);
        }
        glue_throw_pending(aTHX_ &self->caller);
        RETVAL = glue_sv_from_statistics(aTHX_ &statistics);
    OUTPUT:
        RETVAL

void
_discard(PbaVolumeObject *self, uint64_t offset, uint64_t length)
    PREINIT:
        GError *error = NULL;
    CODE:
        glue_require_open(aTHX_ self);
        if (!pba_volume_discard(self->volume, offset, length, &error)) {
            glue_throw_error(aTHX_ &self->caller, error);
        }

void
close(PbaVolumeObject *self)
    CODE:
        if (self->volume && self->owner == glue_current_pid) {
            glue_require_open(aTHX_ self);
        }
        g_clear_pointer(&self->volume, pba_volume_free);

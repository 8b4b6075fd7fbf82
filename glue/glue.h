/* Between Perl and the C core: the parts of BackupAccess.xs. Functions that take pTHX only need a
 * Perl interpreter. Functions named throw end the call with a Perl exception, so their callers must
 * not own anything. */
#ifndef GLUE_H
#define GLUE_H

/* Perl's headers must be included in this order. */
/* clang-format off */
#define PERL_NO_GET_CONTEXT
#include "EXTERN.h"
#include "perl.h"
#include "XSUB.h"
#include "ppport.h"
/* clang-format on */

#include "src/pba.h"

/* The Perl caller's data for the C core's hooks. */
typedef struct {
    SV *log;       /* code ref or NULL */
    SV *transport; /* code ref or NULL: the core uses its own socket */
    SV *regions;   /* code ref or NULL: a volume's next-dirty-region */
    SV *exception; /* the exception of a signal handler or a callback; NULL: none */
    SV *object;    /* the Perl object whose call this is, borrowed; NULL: none */
    bool is_held;  /* the object, kept until the calling statement ends */
    bool died;     /* a callback died after the core last checked */
    bool in_hook;  /* Perl code is running during a call of the core */
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

/* Errors */

/* Ends a failed call. The exception of a signal handler is passed on unchanged. Frees error. */
void glue_throw_error(pTHX_ Caller *caller, GError *error);
__attribute__((noreturn)) void glue_throw_text(pTHX_ const char *klass, const char *message);
/* Throws if a handler died, although the call succeeded. */
void glue_throw_pending(pTHX_ Caller *caller);
/* Runs the handlers of signals that have arrived. Their exceptions, and those of callbacks, are
 * thrown a statement or two after the call: for a call that must not look as if it had failed. */
void glue_throw_pending_later(pTHX_ Caller *caller);
/* Throws an exception in this way. */
void glue_throw_later(pTHX_ SV *exception);
/* Returns the exception that was to be thrown in this way, which is then not thrown: a new scalar;
 * NULL if there is none. */
SV *glue_take_later(pTHX);
/* Makes Perl run the handlers of signals now. */
void glue_run_signal_handlers(pTHX_ Caller *caller);

/* Logs a warning for that caller. */
void glue_warn(Caller *caller, const char *format, ...) G_GNUC_PRINTF(2, 3);

/* Hooks */

/* The core's hooks for that caller, which must outlive them. */
PbaHooks glue_caller_hooks(Caller *caller);
void glue_caller_clear(pTHX_ Caller *caller);
/* Used before Perl code is run from inside the core, and GLUE_LEAVE_HOOK after it. The code has its
 * own $@, its "last" or "next" cannot jump to a loop of the caller, and the object stays alive
 * until the calling statement ends, even if the code drops all references to it. Everything that
 * the code creates is freed, because a call of the core may run such code millions of times. */
void glue_enter_hook(pTHX_ Caller *caller);
#define GLUE_LEAVE_HOOK                                                                            \
    POPSTACK;                                                                                      \
    FREETMPS;                                                                                      \
    LEAVE
/* Whether the Perl code just called has died. */
bool glue_has_died(pTHX);
/* Keeps the exception for glue_throw_error, unless there is one already. */
void glue_keep_exception(pTHX_ Caller *caller, SV *exception);
/* The same with the exception of the Perl code just called; the core is told later. */
void glue_note_death(pTHX_ Caller *caller);

/* Signal handlers */

/* Until the scope of Perl's savestack ends: stores the exception of the first handler that dies in
 * *thrown, which the caller frees. Handlers that are installed in the meantime do not count. */
void glue_watch_handlers(pTHX_ SV **thrown);
/* Runs one code ref after the other, even if an earlier one dies. None of Perl's code runs in
 * between, where a handler could die. Each code ref gets the information whether an earlier one
 * died. With again, all but the first are run once more if a signal handler ended them, so that a
 * signal cannot prevent the cleanup. Returns a mortal list of [exception, whether it is a signal
 * handler's]. */
AV *glue_run_all(pTHX_ AV *codes, bool again);

/* Values */

/* The core's text, which is UTF-8. Perl's flag for it is off if the text is ASCII: joined to the
 * bytes of a file name, a name of QEMU's must not change them. */
SV *glue_sv_from_text(pTHX_ const char *text);
SV *glue_sv_from_json(pTHX_ JsonNode *node);
/* A command's arguments or reply. NULL and PBA_ERROR_PROTOCOL if it is too large, for example data
 * that contains itself. */
JsonNode *glue_json_from_sv(pTHX_ SV *sv, GError **error);
/* The free bytes of a file system for users other than root; undef if they are not known. */
SV *glue_free_bytes(SV *path);
/* undef if there is no such member. */
SV *glue_fetch(pTHX_ HV *hash, const char *key);
const char *glue_text_or_null(pTHX_ SV *sv);
const char *glue_fetch_text(pTHX_ HV *hash, const char *key);
/* Does nothing with NULL. */
void glue_store_text(pTHX_ HV *hash, const char *key, const char *text);
/* A mortal list of these texts. Frees the lines. */
AV *glue_take_lines(pTHX_ GPtrArray *lines);
/* A copy of a reference; NULL for anything else. */
SV *glue_copy_code(pTHX_ SV *code);
/* Directories and QEMU's user, from the options. Valid as long as the options are. */
void glue_fetch_places(pTHX_ HV *options, PbaAccessOptions *access_options);
/* A new table of texts; NULL if it is not a reference. */
GHashTable *glue_table_from_hash(pTHX_ SV *sv);

/* Devices */

/* Mortal requests, which borrow the texts. The second function throws on an unknown mode. */
PbaDeviceRequest *glue_requests_by_name(pTHX_ AV *devices, size_t *count);
PbaDeviceRequest *glue_requests_from_hashes(pTHX_ AV *devices, size_t *count);
/* A list with a hash for each device of the access. */
SV *glue_sv_from_infos(pTHX_ PbaAccess *access);

/* Objects */

/* Stored, because it is checked for every region, and getpid() is a system call. */
extern pid_t glue_current_pid;
void glue_note_fork(void);
/* For a child that is about to run a program: the kernel ends it together with its parent
 * (prctl(2)). */
bool glue_end_with_parent(int signal);
/* A descriptor that becomes readable when the process has ended (pidfd_open(2)); -1 if there is
 * none. */
int glue_open_process(pid_t pid);
/* A file in memory (memfd_create(2)); -1 if there is none. */
int glue_open_memory(void);
/* Starts the program at this path with these descriptors as its standard input, output and error,
 * and a fourth one as a listener, and sets pid before any handler of a signal can run. The kernel
 * sends the program the signal when this process ends; 0: none. Returns an errno, or 0. A child
 * that cannot become the program says so on its standard error, and its status is 127. */
int glue_start_program(SV *pid, const char *path, AV *fds, int signal, AV *environment,
                       AV *command);

/* Creates the Perl object, which owns the C half from now on. */
SV *glue_new_access(pTHX_ PbaAccessObject *object, SV *klass);
SV *glue_new_volume(pTHX_ PbaVolumeObject *object, SV *klass);
/* Throw unless it is such an object. */
PbaAccessObject *glue_access_from_sv(pTHX_ SV *sv);
PbaVolumeObject *glue_volume_from_sv(pTHX_ SV *sv);
/* Begin a call. They throw if the object belongs to another process or is in use by an outer
 * call. */
void glue_require_idle(pTHX_ Caller *caller, pid_t owner);
void glue_require_open(pTHX_ PbaVolumeObject *self);

/* Runs a step of the access, and throws its error. */
void glue_run_step(pTHX_ PbaAccessObject *self, bool (*step)(PbaAccess *access, GError **error));
/* The same for a step that reports what it has done: returns a list of lines. */
SV *glue_take_steps(pTHX_ PbaAccessObject *self,
                    bool (*steps)(PbaAccess *access, GPtrArray *lines, GError **error));
/* A hash with size and base for each of these devices. */
SV *glue_ask_bases(pTHX_ PbaAccessObject *self, AV *devices);

/* QMP by a path or a code ref. The hooks and the code ref live as long as the caller. */
PbaQmp *glue_new_qmp(pTHX_ SV *qmp, unsigned timeout, Caller *caller);
/* Frees the client, and the caller's code refs for it. */
void glue_free_qmp(pTHX_ PbaQmp *qmp, Caller *caller);

/* Volumes */

/* The code refs of one call of copy; borrowed. */
typedef struct {
    Caller *caller;
    SV *write;
    SV *progress;
    SV *digests;
    SV *damaged;
    SV *unreadable;
} CopyCalls;

/* PbaNextRegion by a caller's code ref, which returns offset and length, or nothing at the end. */
bool glue_next_region(void *opaque, uint64_t *offset, uint64_t *length, GError **error);
PbaCopyOptions glue_copy_options(pTHX_ HV *hash, CopyCalls *calls);
SV *glue_sv_from_statistics(pTHX_ const PbaCopyStatistics *statistics);

#endif

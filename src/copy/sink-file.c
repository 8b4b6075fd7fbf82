/* Copies to a file or block device.
 *
 * A call on the target may hang forever, in a state in which the kernel does not let the process
 * end; with FUSE, this includes a process that only has the file open. So separate processes, the
 * writers, make these calls, and only they have the target open. A writer that hangs is left
 * behind. The pieces are in shared memory; orders and answers go over a socket. */
#define _GNU_SOURCE /* close_range() */
#include "src/base/base.h"
#include "target-file.h"
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define MAX_WRITERS 4
/* The descriptors of a writer. */
#define SOCKET_FD 3
#define TARGET_FD 4
/* How long to wait for killed writers. */
#define END_LIMIT_MS 500

typedef struct {
    PbaPiece *piece; /* NULL: flush */
    PbaPiece work;   /* a copy of it */
} Order;

typedef enum { ANSWER_SIBLING, ANSWER_OPENED, ANSWER_WRITTEN, ANSWER_FLUSHED } AnswerKind;

typedef struct {
    AnswerKind kind;
    pid_t pid; /* of a sibling */
    PbaPiece *piece;
    int error;
    uint64_t number; /* of a piece, where the error is; of opening, the device's size */
    uint32_t zero;
} Answer;

typedef struct {
    PbaSink sink;
    PbaLoop *loop;
    PbaTargetFile target;       /* a writer changes its own copy */
    int socket;                 /* -1: no writers */
    pid_t writers[MAX_WRITERS]; /* 0: reaped */
    unsigned writer_count;
    pid_t owner;
    bool opened;
    bool ending; /* the writers were told to end */
    int open_error;
    uint64_t found_size;
} FileSink;

/* ---- in a writer: only system calls, because it was cloned from a process with threads ---- */

static void answer(const Answer *answer)
{
    while (send(SOCKET_FD, answer, sizeof(*answer), MSG_NOSIGNAL) == -1 && errno == EINTR) {
    }
}

static void obey(PbaTargetFile *target, Order *order)
{
    Answer reply = {.kind = ANSWER_FLUSHED, .piece = order->piece};

    if (order->piece) {
        pba_target_file_write(target, &order->work);
        reply.kind = ANSWER_WRITTEN;
        reply.error = order->work.error;
        reply.number = order->work.error_offset;
        reply.zero = order->work.zero;
    } else {
        reply.error = pba_target_file_finish(target);
    }
    answer(&reply);
}

/* Like fork(), but invisible to the caller: the child sends no signal when it ends, and a wait for
 * any child does not return it. */
static pid_t clone_process(unsigned long flags)
{
#ifdef __s390x__
    return (pid_t)syscall(SYS_clone, NULL, flags, NULL, NULL, NULL);
#else
    return (pid_t)syscall(SYS_clone, flags, NULL, NULL, NULL, NULL);
#endif
}

/* The others are children of this writer's parent, which can wait for them. If some cannot be
 * started, the copy is slower. */
static void start_siblings(unsigned count)
{
    for (unsigned i = 1; i < count; i++) {
        pid_t pid = clone_process(CLONE_PARENT);
        if (pid == 0) {
            return;
        }
        if (pid > 0) {
            answer(&(Answer){.kind = ANSWER_SIBLING, .pid = pid});
        }
    }
}

/* Other descriptors would stay open as long as a call hangs: the monitor, connections, or a pipe
 * whose reader waits for its end. */
static void keep_descriptors(int socket, int *target)
{
    int safe_socket = fcntl(socket, F_DUPFD_CLOEXEC, TARGET_FD + 1);
    int safe_target = *target == -1 ? -1 : fcntl(*target, F_DUPFD_CLOEXEC, TARGET_FD + 1);

    /* Too few descriptors are available: the ones below still belong to the caller. */
    if (safe_socket == -1 || (*target != -1 && safe_target == -1)) {
        _exit(1);
    }
    /* Not /dev/null: the target's path may mean one of these (/dev/stdout), and a socket cannot be
     * opened by its path. */
    for (int fd = 0; fd < SOCKET_FD; fd++) {
        dup2(safe_socket, fd);
    }
    dup2(safe_socket, SOCKET_FD);
    if (safe_target == -1) {
        close(TARGET_FD);
        *target = -1;
    } else {
        *target = dup2(safe_target, TARGET_FD);
    }
    close_range(TARGET_FD + 1, ~0U, 0);
}

static _Noreturn void run_writer(FileSink *self)
{
    PbaTargetFile *target = &self->target;
    Order order;
    ssize_t got;

    keep_descriptors(self->socket, &target->fd);
    pid_t first = getpid();
    Answer opened = {.kind = ANSWER_OPENED, .error = pba_target_file_open(target)};
    opened.number = target->found_size;
    if (!opened.error) {
        start_siblings(target->writers);
    }
    if (getpid() == first) {
        answer(&opened);
    }
    while ((got = recv(SOCKET_FD, &order, sizeof(order), 0)) == sizeof(order) || errno == EINTR) {
        if (got == sizeof(order)) {
            obey(target, &order);
        }
        errno = 0;
    }
    /* Before the socket is closed, which says that the target is closed. */
    if (target->fd != -1) {
        close(target->fd);
    }
    _exit(0);
}

/* ---- in the caller's process ---- */

static bool reap(FileSink *self)
{
    bool all = true;

    for (unsigned i = 0; i < self->writer_count; i++) {
        if (self->writers[i] && waitpid(self->writers[i], NULL, __WALL | WNOHANG) != 0) {
            self->writers[i] = 0;
        }
        all = all && self->writers[i] == 0;
    }
    return all;
}

static void on_answer(FileSink *self, const Answer *answer)
{
    switch (answer->kind) {
    case ANSWER_SIBLING:
        self->writers[self->writer_count++] = answer->pid;
        break;
    case ANSWER_OPENED:
        self->opened = true;
        self->open_error = answer->error;
        self->found_size = answer->number;
        break;
    case ANSWER_WRITTEN:
        answer->piece->zero = answer->zero;
        if (answer->error) {
            pba_piece_fail(answer->piece, answer->error, answer->number);
        }
        answer->piece->state = PBA_PIECE_WRITTEN;
        break;
    case ANSWER_FLUSHED:
        self->sink.flush_error = answer->error;
        /* Only closing remains. */
        self->ending = true;
        shutdown(self->socket, SHUT_WR);
        break;
    }
}

/* Reads the replies of the writers. A writer that ends before it is told to is an error, because it
 * may have had a piece. */
static bool on_ready(void *opaque, GError **error)
{
    FileSink *self = opaque;
    Answer answer;
    ssize_t got;

    while ((got = recv(self->socket, &answer, sizeof(answer), MSG_DONTWAIT)) == sizeof(answer)) {
        on_answer(self, &answer);
    }
    bool ended = got == 0;
    reap(self);
    for (unsigned i = 0; i < self->writer_count; i++) {
        ended = ended || self->writers[i] == 0;
    }
    if (self->ending && got == 0) {
        self->sink.flushed = true;
        pba_loop_watch(self->loop, -1, NULL, NULL);
    }
    if (self->ending || !ended) {
        return true;
    }
    pba_error_set(error, PBA_ERROR_SYSTEM, "the process that writes to %s was killed",
                  self->sink.name);
    return false;
}

static bool send_order(FileSink *self, const Order *order, GError **error)
{
    if (send(self->socket, order, sizeof(*order), MSG_NOSIGNAL | MSG_DONTWAIT) == sizeof(*order)) {
        return true;
    }
    pba_error_set(error, PBA_ERROR_SYSTEM,
                  "the process that writes to %s does not accept requests - %s", self->sink.name,
                  g_strerror(errno));
    return false;
}

static bool file_write(PbaSink *sink, PbaPiece *piece, GError **error)
{
    Order order = {.piece = piece, .work = *piece};

    return send_order((FileSink *)sink, &order, error);
}

static bool file_flush(PbaSink *sink, GError **error)
{
    Order order = {0};

    return send_order((FileSink *)sink, &order, error);
}

#define INCREMENT                                                                                  \
    "but the volume is an increment, which has only what changed: copy it into the image of the "  \
    "previous backup, or give 'without-base'"

static bool check_opened(const FileSink *self, GError **error)
{
    bool is_increment = self->target.is_increment;

    if (self->open_error == ENOSPC && self->found_size) {
        pba_error_set(error, PBA_ERROR_ARGUMENT,
                      "%s has %" PRIu64 " bytes, too few for the volume's %" PRIu64,
                      self->sink.name, self->found_size, self->target.size);
    } else if (self->open_error == ENOENT && is_increment) {
        pba_error_set(error, PBA_ERROR_ARGUMENT, "there is no %s, " INCREMENT, self->sink.name);
    } else if (self->open_error == ENODATA && is_increment) {
        pba_error_set(error, PBA_ERROR_ARGUMENT,
                      "%s has %" PRIu64 " bytes instead of %" PRIu64 ", " INCREMENT,
                      self->sink.name, self->found_size, self->target.size);
    } else if (self->open_error) {
        pba_error_set(error, PBA_ERROR_SYSTEM, "cannot write to %s - %s", self->sink.name,
                      g_strerror(self->open_error));
    }
    return !self->open_error;
}

/* A writer process blocks signals. They are for the caller, which ends the writer if a signal ends
 * the copy. */
static pid_t clone_writer(FileSink *self, int socket)
{
    sigset_t all;
    sigset_t before;

    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, &before);
    pid_t pid = clone_process(0);
    if (pid == 0) {
        self->socket = socket;
        run_writer(self);
    }
    int problem = errno;
    sigprocmask(SIG_SETMASK, &before, NULL);
    errno = problem;
    return pid;
}

static bool file_start(PbaSink *sink, GError **error)
{
    FileSink *self = (FileSink *)sink;
    int sockets[2] = {-1, -1};
    pid_t pid = -1;

    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sockets) == 0) {
        pid = clone_writer(self, sockets[1]);
    }
    if (pid == -1) {
        pba_error_set(error, PBA_ERROR_SYSTEM, "cannot start a process that writes to %s - %s",
                      sink->name, g_strerror(errno));
    } else {
        self->writers[self->writer_count++] = pid;
    }
    self->socket = sockets[0];
    if (sockets[1] != -1) {
        close(sockets[1]);
    }
    pba_loop_watch(self->loop, self->socket, on_ready, self);
    gint64 deadline = pba_deadline(PBA_NBD_LIMIT_S);
    while (pid != -1 && !self->opened) {
        if (!pba_loop_turn(self->loop, G_MAXINT64, deadline, error)) {
            return false;
        }
    }
    return pid != -1 && check_opened(self, error);
}

/* Waits before any process writes to the target again: a killed writer does nothing more, except
 * for a system call that hangs. */
static void end_writers(FileSink *self)
{
    for (unsigned i = 0; i < self->writer_count; i++) {
        if (self->writers[i]) {
            kill(self->writers[i], SIGKILL);
        }
    }
    for (unsigned waited = 0; !reap(self) && waited < END_LIMIT_MS; waited++) {
        g_usleep(1000);
    }
}

static void file_free(PbaSink *sink)
{
    FileSink *self = (FileSink *)sink;

    if (self->socket != -1 && self->owner == getpid()) {
        shutdown(self->socket, SHUT_RDWR);
        end_writers(self);
    }
    if (self->socket != -1) {
        close(self->socket);
    }
    g_free(sink->name);
    g_free(self);
}

/* The access mode of the caller's descriptor can be queried. */
static bool check_descriptor(const FileSink *self, int fd, GError **error)
{
    int flags = fcntl(fd, F_GETFL);

    if (flags == -1) {
        pba_error_set(error, PBA_ERROR_SYSTEM, "cannot write to %s - %s", self->sink.name,
                      g_strerror(errno));
        return false;
    }
    if ((flags & O_ACCMODE) == O_RDONLY || (flags & O_APPEND)) {
        pba_error_set(error, PBA_ERROR_ARGUMENT, "%s must be open for writing, not for %s",
                      self->sink.name, flags & O_APPEND ? "appending" : "reading only");
        return false;
    }
    return true;
}

PbaSink *pba_sink_file_new(const PbaCopyOptions *options, uint64_t size, PbaLoop *loop,
                           GError **error)
{
    const char *path = options->path;
    int fd = options->fd;
    FileSink *self = g_new0(FileSink, 1);

    self->sink = (PbaSink){
        .start = file_start,
        .write = file_write,
        .flush = file_flush,
        .free = file_free,
        .name = path ? g_strdup(path) : g_strdup_printf("the file descriptor %d", fd),
        .error_code = PBA_ERROR_SYSTEM,
        .align = 1,
        .max_zero = UINT32_MAX,
    };
    self->loop = loop;
    self->socket = -1;
    self->owner = getpid();
    self->target = (PbaTargetFile){
        .path = path,
        .fd = path ? -1 : fd,
        .size = size,
        .is_increment = options->is_increment,
    };
    if (!path && !check_descriptor(self, fd, error)) {
        file_free(&self->sink);
        return NULL;
    }
    return &self->sink;
}

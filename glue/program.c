/* Starts programs by vfork(2). A fork would copy this process' page tables, which takes longer the
 * more memory the caller uses. */
#include "glue.h"

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/uio.h>

enum {
    FIRST_FREE_FD = 10, /* above standard input, output and error, and a passed listener */
    LISTENER_FD =
        3, /* systemd's protocol for a socket that listens already, see sd_listen_fds(3) */
    MOST_FDS = LISTENER_FD + 1,
    NOT_RUN = 127, /* exit status of a child that cannot become the program */
};

typedef struct {
    const char *path;
    char **arguments;
    char **environment;
    int fds[MOST_FDS]; /* become descriptors 0, 1, 2 and so on */
    int fd_count;
    char *listen_pid; /* where the environment has the program's PID */
    int signal;       /* from the kernel at the end of this process */
    pid_t parent;
    sigset_t mask;
} Program;

/* What follows runs in the child, which shares its memory with this process: no Perl, no
 * allocation. */

/* Handlers of the caller would run its code here. Of what it ignores, a terminal's signals are not
 * ignored. */
static void reset_signals(void)
{
    static const int terminal[] = {SIGHUP, SIGINT, SIGPIPE, SIGQUIT, SIGTERM};

    for (int number = 1; number < NSIG; number++) {
        struct sigaction action;
        if (sigaction(number, NULL, &action) == 0 && action.sa_handler != SIG_IGN) {
            signal(number, SIG_DFL);
        }
    }
    for (size_t i = 0; i < G_N_ELEMENTS(terminal); i++) {
        signal(terminal[i], SIG_DFL);
    }
}

/* First copies the descriptors to high numbers: one may itself have one of these numbers. */
static bool place_fds(const Program *program)
{
    int copies[MOST_FDS];

    for (int i = 0; i < program->fd_count; i++) {
        copies[i] = fcntl(program->fds[i], F_DUPFD_CLOEXEC, FIRST_FREE_FD);
        if (copies[i] < 0) {
            return false;
        }
    }
    for (int i = 0; i < program->fd_count; i++) {
        if (dup2(copies[i], i) < 0) {
            return false;
        }
    }
    return true;
}

static void say_problem(const Program *program)
{
    const char *problem = strerrordesc_np(errno);
    const char *texts[] = {"cannot run ", program->arguments[0], " - ", problem ? problem : "error",
                           "\n"};
    struct iovec parts[G_N_ELEMENTS(texts)];

    for (size_t i = 0; i < G_N_ELEMENTS(texts); i++) {
        parts[i].iov_base = (char *)texts[i];
        parts[i].iov_len = strlen(texts[i]);
    }
    if (writev(STDERR_FILENO, parts, G_N_ELEMENTS(parts)) < 0) {
        return; /* the exit status says enough */
    }
}

G_NORETURN static void become(const Program *program)
{
    reset_signals();
    /* The parent may have ended before the first of these calls. */
    if (prctl(PR_SET_PDEATHSIG, program->signal) < 0 || getppid() != program->parent) {
        _exit(NOT_RUN);
    }
    if (place_fds(program)) {
        if (program->listen_pid) {
            sprintf(program->listen_pid, "%d", (int)getpid());
        }
        /* A terminal's signals are for the caller. Late: a new session is a scheduling group of its
         * own, which gets little of a processor beside groups of a higher priority. */
        setsid();
        sigprocmask(SIG_SETMASK, &program->mask, NULL);
        execve(program->path, program->arguments, program->environment);
    }
    say_problem(program);
    _exit(NOT_RUN);
}

/* Mortal, and ends with NULL. The texts are borrowed. */
static char **texts_from_array(pTHX_ AV *array, size_t more)
{
    size_t count = (size_t)(av_len(array) + 1);
    SV *memory = sv_2mortal(newSV((count + more + 1) * sizeof(char *)));
    char **texts = (char **)SvPVX(memory);

    memset(texts, 0, (count + more + 1) * sizeof(char *));
    for (size_t i = 0; i < count; i++) {
        SV *text = *av_fetch(array, (SSize_t)i, 1);
        TAINT_IF(SvTAINTED(text));
        texts[i] = SvPV_nolen(text);
    }
    return texts;
}

int glue_start_program(SV *pid, const char *path, AV *fds, int signal, AV *environment, AV *command)
{
    dTHX;
    char listen_pid[sizeof("LISTEN_PID=") + 20] = "LISTEN_PID=";
    char listen_fds[] = "LISTEN_FDS=1";
    Program program = {.path = path, .signal = signal, .parent = getpid()};

    program.arguments = texts_from_array(aTHX_ command, 0);
    program.environment = texts_from_array(aTHX_ environment, 2);
    TAINT_PROPER("exec"); /* as Perl's own exec does */
    program.fd_count = MIN((int)av_len(fds) + 1, MOST_FDS);
    for (int i = 0; i < program.fd_count; i++) {
        program.fds[i] = (int)SvIV(*av_fetch(fds, i, 1));
    }
    if (program.fd_count > LISTENER_FD) {
        size_t count = (size_t)(av_len(environment) + 1);
        program.environment[count] = listen_pid;
        program.environment[count + 1] = listen_fds;
        program.listen_pid = listen_pid + strlen(listen_pid);
    }

    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &program.mask);
    pid_t child = vfork();
    if (child == 0) {
        become(&program);
    }
    int problem = child < 0 ? errno : 0;
    if (child > 0) {
        sv_setiv_mg(pid, child);
    }
    pthread_sigmask(SIG_SETMASK, &program.mask, NULL);
    return problem;
}

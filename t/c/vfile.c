/* vfile.c: the end of a virtual file's server whose PID belongs to another process by then. The
 * server here is a script in the directory of this program, where the real one would be. */
#include "src/access/vfile.h"
#include "tap.h"
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/pidfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define LAST_PID "/proc/sys/kernel/ns_last_pid"

/* The core calls this function. */
static bool has_descriptors;

int pidfd_open(pid_t pid, unsigned flags)
{
    if (!has_descriptors) {
        errno = ENOSYS;
        return -1;
    }
    return (int)syscall(SYS_pidfd_open, pid, flags);
}

static bool always(G_GNUC_UNUSED void *opaque)
{
    return true;
}

/* The PID that the script has written to the file; 0 if there is none. */
static pid_t read_number(const char *file)
{
    for (int i = 0; i < 1000; i++) {
        g_autofree char *text = NULL;
        if (g_file_get_contents(file, &text, NULL, NULL) && strchr(text, '\n')) {
            return atoi(text);
        }
        g_usleep(10000);
    }
    return 0;
}

/* Starts a process with that PID; 0 if the machine does not allow it. */
static pid_t start_with_number(pid_t number)
{
    g_autofree char *before = g_strdup_printf("%d", (int)number - 1);

    for (int i = 0; i < 200; i++) {
        FILE *last = fopen(LAST_PID, "w");
        if (!last || fputs(before, last) < 0 || fclose(last) != 0) {
            return 0;
        }
        pid_t pid = fork();
        if (pid == 0) {
            pause();
            _exit(0);
        }
        if (pid == number) {
            return pid;
        }
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
    }
    return 0;
}

/* Ends the process. Returns whether it was still running. */
static bool was_running(pid_t child)
{
    int status;

    kill(child, SIGTERM);
    return waitpid(child, &status, 0) == child && WIFSIGNALED(status) &&
           WTERMSIG(status) == SIGTERM;
}

/* Waits for the child, as a SIGCHLD handler of the caller may do with any child. */
static pid_t wait_elsewhere(const char *number_file)
{
    pid_t server = read_number(number_file);

    kill(server, SIGKILL);
    return waitpid(server, NULL, 0) == server ? server : 0;
}

static void check_reused(const char *path, const char *number_file)
{
    PbaVolumeOptions options = {.device = "disk0", .path = "/nowhere", .size = 1 << 20};
    PbaHooks hooks = {.interrupted = always};
    g_autoptr(GError) error = NULL;

    PbaVfile *vfile = pba_vfile_start(path, &options, false, &error);
    if (!vfile) {
        ok(true, "skipped: %s", error->message);
        return;
    }
    pid_t server = wait_elsewhere(number_file);
    ok(server > 0, "the server ended and was waited for");
    pid_t other = start_with_number(server);
    ok(!pba_vfile_end(vfile, &hooks, NULL), "an interrupted end");
    if (other > 0) {
        ok(was_running(other), "another process with its number lives on");
    } else {
        ok(true, "skipped: no process can be given a number here");
    }
    pba_vfile_free(vfile);
}

static void check_killed(const char *path, const char *number_file)
{
    PbaVolumeOptions options = {.device = "disk0", .path = "/nowhere", .size = 1 << 20};
    PbaHooks hooks = {.interrupted = always};

    PbaVfile *vfile = pba_vfile_start(path, &options, false, NULL);
    if (!vfile) {
        return;
    }
    pid_t server = read_number(number_file);
    ok(server > 0 && kill(server, 0) == 0, "a server that does not end by itself");
    pba_vfile_end(vfile, &hooks, NULL);
    ok(kill(server, 0) != 0, "is killed, and waited for");
    pba_vfile_free(vfile);
}

int main(G_GNUC_UNUSED int argc, char **argv)
{
    g_autofree char *dir = g_path_get_dirname(argv[0]);
    g_autofree char *program = g_build_filename(dir, "pba-vfile", NULL);
    g_autofree char *number_file = g_strconcat(program, ".pid", NULL);
    g_autofree char *path = g_build_filename(dir, "mount", NULL);

    g_assert(
        g_file_set_contents(program, "#!/bin/sh\necho $$ >\"$0.pid\"\nexec sleep 60\n", -1, NULL));
    g_assert(chmod(program, 0700) == 0);
    has_descriptors = true;
    check_reused(path, number_file);
    unlink(number_file);
    check_killed(path, number_file);
    has_descriptors = false;
    unlink(number_file);
    check_killed(path, number_file);
    return done_testing();
}

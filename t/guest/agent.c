/*
 * The test guest. This program is the guest's only process, /init. It loads the drivers, prints
 * "ready" to the second serial port, and then answers each command line with one line:
 *
 *     <id> <command> [arguments]    ->    <id> ok [values]    or    <id> error <text>
 *
 * By the ID, the host recognizes a late answer to a command that it no longer waits for. The first
 * serial port is the kernel's console, and the protocol does not use it.
 */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define MAX_WORDS 16
#define CHANNEL "/dev/ttyS1"

static int channel = -1;
char *chunk;

int64_t now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

bool parse_u64(const char *text, uint64_t *value)
{
    char *end;
    errno = 0;
    *value = strtoull(text, &end, 0);
    return *text && *text != '-' && !*end && !errno;
}

/* Reads a small file without its trailing white space. Returns its length or -1. */
ssize_t read_small(const char *path, char *buffer, size_t size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    ssize_t n = read(fd, buffer, size - 1);
    close(fd);
    if (n < 0)
        return -1;
    while (n > 0 && (buffer[n - 1] == '\n' || buffer[n - 1] == ' '))
        n--;
    buffer[n] = 0;
    return n;
}

/* ---- answers ---- */

static const char *current_id = "0";

static void send_all(const char *text, size_t length)
{
    while (length > 0) {
        ssize_t n = write(channel, text, length);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return; /* the host no longer reads */
        text += n;
        length -= n;
    }
}

void answer(const char *what, const char *format, ...)
{
    static char line[2 * MAX_LINE];
    int n = snprintf(line, sizeof line, "%s %s", current_id, what);
    va_list ap;

    if (*format)
        line[n++] = ' ';
    va_start(ap, format);
    n += vsnprintf(line + n, sizeof line - n - 1, format, ap);
    va_end(ap);
    if (n > (int)sizeof line - 2)
        n = sizeof line - 2;
    line[n++] = '\n';
    send_all(line, n);
}

/* ---- a shell command, whose output is part of the answer ---- */

static size_t escape(const char *from, size_t length, char *to, size_t size)
{
    size_t used = 0;
    for (size_t i = 0; i < length && used + 5 < size; i++) {
        unsigned char c = from[i];
        if (c == '\\' || c < 32 || c > 126)
            used += sprintf(to + used, "\\x%02x", c);
        else
            to[used++] = c;
    }
    to[used] = 0;
    return used;
}

static void shell_child(const char *command, int out)
{
    int null = open("/dev/null", O_RDWR);
    dup2(null, 0);
    dup2(out, 1);
    dup2(out, 2);
    setenv("PATH", "/bin", 1);
    execl("/bin/busybox", "sh", "-c", command, (char *)NULL);
    _exit(127);
}

static void cmd_sh(const char *command)
{
    static char output[MAX_LINE / 4], escaped[MAX_LINE];
    int ends[2], status = -1;
    size_t used = 0;
    ssize_t n;
    char rest[512];

    if (pipe2(ends, O_CLOEXEC)) {
        fail("pipe: %s", strerror(errno));
        return;
    }
    pid_t pid = fork();
    if (!pid)
        shell_child(command, ends[1]);
    close(ends[1]);
    while (pid > 0 && used < sizeof output &&
           (n = read(ends[0], output + used, sizeof output - used)) > 0)
        used += n;
    while (pid > 0 && read(ends[0], rest, sizeof rest) > 0)
        ; /* drops what does not fit, so that the command can finish */
    close(ends[0]);
    if (pid < 0 || waitpid(pid, &status, 0) < 0) {
        fail("sh: %s", strerror(errno));
        return;
    }
    escape(output, used, escaped, sizeof escaped);
    ok("%d %s", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), escaped);
}

/* ---- start and command loop ---- */

static const struct {
    const char *name;
    void (*run)(int, char **);
} commands[] = {
    {"hello", cmd_hello},
    {"write", cmd_write},
    {"trim", cmd_discard},
    {"zero", cmd_discard},
    {"read", cmd_read},
    {"read-sum", cmd_read_sum},
    {"churn-start", cmd_churn_start},
    {"churn-status", cmd_churn_status},
    {"churn-stop", cmd_churn_stop},
    {"latency", cmd_latency},
    {"mount", cmd_mount},
    {"umount", cmd_umount},
    {"sync", cmd_sync},
    {"files-start", cmd_files_start},
    {"files-stop", cmd_files_stop},
};

static void run_line(char *line)
{
    static char id[32];
    char *words[MAX_WORDS], *save, *word;
    int n = 0;

    char *space = strchr(line, ' ');
    if (!space)
        return;
    snprintf(id, sizeof id, "%.*s", (int)(space - line), line);
    current_id = id;
    line = space + 1;
    if (!strncmp(line, "sh ", 3)) {
        cmd_sh(line + 3);
        return;
    }
    for (word = strtok_r(line, " ", &save); word && n < MAX_WORDS;
         word = strtok_r(NULL, " ", &save))
        words[n++] = word;
    for (size_t i = 0; n && i < sizeof commands / sizeof *commands; i++) {
        if (!strcmp(commands[i].name, words[0])) {
            commands[i].run(n, words);
            return;
        }
    }
    fail("unknown command '%s'", n ? words[0] : "");
}

static void serve(void)
{
    static char line[MAX_LINE];
    size_t used = 0;
    char *end;

    for (;;) {
        ssize_t n = read(channel, line + used, sizeof line - 1 - used);
        if (n <= 0) {
            if (n < 0 && errno == EINTR)
                continue;
            usleep(10000);
            continue;
        }
        used += n;
        while ((end = memchr(line, '\n', used))) {
            size_t length = end + 1 - line;
            *end = 0;
            run_line(line);
            memmove(line, line + length, used -= length);
        }
        if (used == sizeof line - 1)
            used = 0; /* drops a line that is too long */
    }
}

/* Loads the modules in a list. The host has sorted the list by dependencies. */
static void load_modules(const char *list)
{
    FILE *f = fopen(list, "re");
    char name[128], path[160];

    while (f && fscanf(f, "%127s", name) == 1) {
        snprintf(path, sizeof path, "/modules/%s", name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST))
            fprintf(stderr, "agent: module %s: %s\n", name, strerror(errno));
        if (fd >= 0)
            close(fd);
    }
    if (f)
        fclose(f);
}

/* SCSI disks appear some time after their driver, so the kernel's command line says how many to
 * wait for: pba.disks=N. */
static void wait_for_disks(const char *cmdline)
{
    const char *p = strstr(cmdline, "pba.disks=");
    int wanted = p ? atoi(p + 10) : 0, found = 0;

    for (int i = 0; i < 2000; i++) {
        found = scan_disks();
        if (found >= wanted)
            return;
        usleep(5000);
    }
    fprintf(stderr, "agent: %d of %d disks found\n", found, wanted);
}

static void open_channel(void)
{
    struct termios t;

    channel = open(CHANNEL, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (channel < 0 || tcgetattr(channel, &t)) {
        fprintf(stderr, "agent: %s: %s\n", CHANNEL, strerror(errno));
        return;
    }
    cfmakeraw(&t);
    cfsetspeed(&t, B115200);
    t.c_cflag |= CLOCAL;
    tcsetattr(channel, TCSANOW, &t);
}

int main(void)
{
    static char cmdline[4096];

    mkdir("/proc", 0755), mkdir("/sys", 0755), mkdir("/dev", 0755), mkdir("/mnt", 0755);
    mount("devtmpfs", "/dev", "devtmpfs", 0, "");
    mount("proc", "/proc", "proc", 0, "");
    mount("sysfs", "/sys", "sysfs", 0, "");
    int console = open("/dev/console", O_RDWR | O_NOCTTY);
    for (int fd = 0; console >= 0 && fd < 3; fd++)
        dup2(console, fd);
    if (console > 2)
        close(console);
    read_small("/proc/cmdline", cmdline, sizeof cmdline);

    load_modules("/modules/virtio.list");
    if (strstr(cmdline, "pba.scsi=1"))
        load_modules("/modules/scsi.list");
    wait_for_disks(cmdline);
    if (posix_memalign((void **)&chunk, BLOCK, CHUNK))
        fprintf(stderr, "agent: out of memory\n");
    open_channel();
    send_all("ready\n", 6);
    serve();
}

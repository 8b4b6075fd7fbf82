/* Whether a Unix socket has a listener, and clients. */
#include "base.h"
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

bool pba_socket_answers(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    g_strlcpy(address.sun_path, path, sizeof(address.sun_path));
    bool answers = fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof(address)) == 0 ||
                   (errno != ECONNREFUSED && errno != ENOENT);
    if (fd >= 0) {
        close(fd);
    }
    return answers;
}

/* A line of /proc/net/unix: the address, reference count, protocol, flags, type, state, inode, and
 * the path that the socket, or the one that it was accepted from, is bound to. */
static bool is_connected(const char *line, const char *path)
{
    static const unsigned connected = 3; /* SS_CONNECTED (linux/net.h) */
    unsigned state;
    int begin = 0;

    return sscanf(line, "%*s %*s %*s %*s %*s %x %*s %n", &state, &begin) == 1 && begin > 0 &&
           state == connected && strcmp(line + begin, path) == 0;
}

bool pba_socket_has_clients(const char *path)
{
    g_autofree char *sockets = NULL;

    if (!g_file_get_contents("/proc/net/unix", &sockets, NULL, NULL)) {
        return false;
    }
    g_auto(GStrv) lines = g_strsplit(sockets, "\n", -1);
    for (char **line = lines; *line; line++) {
        if (is_connected(*line, path)) {
            return true;
        }
    }
    return false;
}

/* Whether a Unix socket has a listener. */
#include "base.h"
#include <errno.h>
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

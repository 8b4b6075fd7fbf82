/* All NBD connections of this process, and the exports that it may use no more.
 *
 * If a client does not read its replies, QEMU does not notice that the connection is shut down, and
 * keeps the export until then. So a teardown during a copy, such as by a signal handler, must close
 * the connections itself. */
#define _GNU_SOURCE /* dup3() */
#include "volume.h"
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static GMutex lock;
static GPtrArray *connected; /* PbaNbdVolume, borrowed */
static GHashTable *cut;      /* exports by name; an access has a socket of its own */

void pba_connection_note(PbaNbdVolume *nbd)
{
    g_mutex_lock(&lock);
    connected = connected ? connected : g_ptr_array_new();
    g_ptr_array_add(connected, nbd);
    g_mutex_unlock(&lock);
}

void pba_connection_made(PbaNbdVolume *nbd)
{
    g_mutex_lock(&lock);
    nbd->made = g_get_monotonic_time();
    g_mutex_unlock(&lock);
}

void pba_connection_forget(PbaNbdVolume *nbd)
{
    g_mutex_lock(&lock);
    g_ptr_array_remove_fast(connected, nbd);
    g_mutex_unlock(&lock);
}

static bool leads_to(int fd, const char *socket_path)
{
    struct sockaddr_un peer = {0};
    socklen_t length = sizeof(peer) - 1;

    return getpeername(fd, (struct sockaddr *)&peer, &length) == 0 && peer.sun_family == AF_UNIX &&
           strcmp(peer.sun_path, socket_path) == 0;
}

void pba_connections_cut(const char *socket_path, gint64 since)
{
    int ended[2];

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ended) != 0) {
        return; /* QEMU closes all connections except those that it waits for */
    }
    close(ended[1]);
    g_mutex_lock(&lock);
    for (guint i = 0; connected && i < connected->len; i++) {
        const PbaNbdVolume *nbd = connected->pdata[i];
        int fd = nbd_aio_get_fd(nbd->handle);
        if (fd >= 0 && nbd->made >= since && (!socket_path || leads_to(fd, socket_path))) {
            dup3(ended[0], fd, O_CLOEXEC);
        }
    }
    g_mutex_unlock(&lock);
    close(ended[0]);
}

static char *export_name(const PbaNbdVolume *nbd)
{
    return g_strdup_printf("%s\n%s", nbd->path, nbd->volume.device);
}

void pba_export_note_cut(const PbaNbdVolume *nbd)
{
    g_mutex_lock(&lock);
    cut = cut ? cut : g_hash_table_new_full(g_str_hash, g_str_equal, g_free, NULL);
    g_hash_table_add(cut, export_name(nbd));
    g_mutex_unlock(&lock);
}

bool pba_export_is_cut(const PbaNbdVolume *nbd)
{
    g_autofree char *name = export_name(nbd);

    g_mutex_lock(&lock);
    bool is_cut = cut && g_hash_table_contains(cut, name);
    g_mutex_unlock(&lock);
    return is_cut;
}

/* The lowest floor: errors, waiting, threads, trusted directories, sockets. */
#ifndef PBA_BASE_H
#define PBA_BASE_H

#include "src/pba.h"
#include <poll.h>

/* Making errors; pba.h says what they mean */

void pba_error_set(GError **error, PbaErrorCode code, const char *format, ...) G_GNUC_PRINTF(3, 4);
/* QEMU's error reply to command. klass and description are the peer's text: control characters are
 * removed, and they are never used as a format. */
void pba_error_set_qmp(GError **error, const char *command, const char *klass,
                       const char *description);
/* Notes that *error happened during command, and adds this to the message. */
void pba_error_add_command(GError **error, const char *command);
/* Notes that *error is about device, and adds this to the message. */
void pba_error_add_device(GError **error, const char *device);
/* Adds what to do to the end of the message. */
void pba_error_add_hint(GError **error, const char *hint);
/* Keeps the first error of a sequence of steps: moves *step into *first if that is still NULL, else
 * logs it. */
void pba_error_keep_first(GError **first, GError *step, const PbaHooks *hooks);
/* True if the peer cannot be reached any more, so that further steps must fail as well. */
bool pba_error_is_fatal(const GError *error);

/* Makes a line of valid UTF-8 without control characters from text that may contain a peer's names.
 * The caller frees it. */
__attribute__((format(printf, 1, 2))) char *pba_line(const char *format, ...);
void pba_log(const PbaHooks *hooks, PbaLogLevel level, const char *format, ...) G_GNUC_PRINTF(3, 4);

/* Waiting for a descriptor, with a time limit and the caller's interruption */

/* The deadline that many seconds from now, on g_get_monotonic_time's clock. */
gint64 pba_deadline(unsigned seconds);
/* Waits for one of events (poll(2)) on fd and sets *revents. Fails on timeout, and if
 * hooks->interrupted returns true. what describes the wait in messages. */
bool pba_wait_fd(int fd, short events, short *revents, gint64 deadline, const PbaHooks *hooks,
                 const char *what, GError **error);
/* The same for several descriptors, each with its own revents; those with fd -1 are ignored. Also
 * returns true when the time until is reached, with no revents at all. */
bool pba_wait_fds(struct pollfd *fds, unsigned count, gint64 until, gint64 deadline,
                  const PbaHooks *hooks, const char *what, GError **error);
/* Sleeps for that time, and ends early like the waits above. */
bool pba_wait_ms(unsigned milliseconds, gint64 deadline, const PbaHooks *hooks, const char *what,
                 GError **error);

/* Starts a detached thread, with all signals blocked. */
bool pba_thread_start(GThreadFunc run, void *opaque, GError **error);
/* A descriptor that wakes another thread's poll(2): it is readable from pba_wake until
 * pba_wake_clear, which returns whether it was. -1 on error. */
int pba_wake_new(GError **error);
void pba_wake(int fd);
bool pba_wake_clear(int fd);

/* Directories and sockets */

/* The directory's real path, owned by the caller. Fails if a user other than root and this user can
 * rename entries in it or in a directory above it. what names the directory in the error. */
char *pba_trusted_dir(const char *what, const char *path, GError **error);
/* True unless nothing listens at the socket. */
bool pba_socket_answers(const char *path);
/* Whether a connection that was accepted at the socket, or waits for that, is still open, as far as
 * this process' network namespace shows. */
bool pba_socket_has_clients(const char *path);

#endif

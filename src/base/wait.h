/* Waiting for a descriptor with a time limit and the caller's say. */
#ifndef PBA_SRC_WAIT_H
#define PBA_SRC_WAIT_H

#include "src/pba.h"
#include <poll.h>

/* The deadline that many seconds from now, on g_get_monotonic_time's clock. */
gint64 pba_deadline(unsigned seconds);
/* Waits for one of events (poll(2)) on fd; *revents says which came. False on timeout and when
 * hooks->interrupted says so. what names the wait in the messages. */
bool pba_wait_fd(int fd, short events, short *revents, gint64 deadline, const PbaHooks *hooks,
                 const char *what, GError **error);
/* The same for several descriptors, each with its own revents; those with fd -1 are left out. True
 * as well when the time until is reached, with no revents at all. */
bool pba_wait_fds(struct pollfd *fds, unsigned count, gint64 until, gint64 deadline,
                  const PbaHooks *hooks, const char *what, GError **error);
/* Sleeps so long, under the same rules. */
bool pba_wait_ms(unsigned milliseconds, gint64 deadline, const PbaHooks *hooks, const char *what,
                 GError **error);

#endif

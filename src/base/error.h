/* Making errors. See pba.h for what they mean. */
#ifndef PBA_SRC_ERROR_H
#define PBA_SRC_ERROR_H

#include "src/pba.h"

void pba_error_set(GError **error, PbaErrorCode code, const char *format, ...) G_GNUC_PRINTF(3, 4);
/* QEMU's error reply to command. klass and description are the peer's text: cleaned, never a
 * format. */
void pba_error_set_qmp(GError **error, const char *command, const char *klass,
                       const char *description);
/* Notes that *error happened during command, and says so in the message. */
void pba_error_add_command(GError **error, const char *command);
/* Notes that *error is about device, and says so in the message. */
void pba_error_add_device(GError **error, const char *device);
/* Adds what to do to the end of the message. */
void pba_error_add_hint(GError **error, const char *hint);
/* Keeps the first error of a row of steps: moves *step into *first if that is free, else logs it.
 */
void pba_error_keep_first(GError **first, GError *step, const PbaHooks *hooks);
/* True if the peer can no longer be talked to, so that further steps are in vain. */
bool pba_error_is_fatal(const GError *error);

/* A line of text, whatever a peer's names in it are: valid UTF-8 without control characters. The
 * caller's to free. */
__attribute__((format(printf, 1, 2))) char *pba_line(const char *format, ...);
void pba_log(const PbaHooks *hooks, PbaLogLevel level, const char *format, ...) G_GNUC_PRINTF(3, 4);

#endif

/* What the target of replies shares with its good ones. */
#ifndef PBA_FUZZ_REPLIES_H
#define PBA_FUZZ_REPLIES_H

#include "fuzz.h"
#include <json-glib/json-glib.h>

#define TARGET "snapshot-access:mystore"

/* Once, before all others. */
void replies_prepare(void);
/* The message in a text; NULL if it is none. */
JsonObject *replies_parse(const char *text, size_t length);
/* The message that is a command's good reply, borrowed. */
JsonObject *replies_good(const char *command, bool pve, bool early);

#endif

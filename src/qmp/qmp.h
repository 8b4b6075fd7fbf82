/* The QMP client: commands, their arguments, and their replies. */
#ifndef PBA_QMP_H
#define PBA_QMP_H

#include "src/pba.h"
#include <sys/types.h>

/* A JSON value from a GVariant text with placeholders (g_variant_new_parsed): pba_json(
 * "{'node-name': <%s>, 'size': <%t>, 'writable': <true>}", name, size). Strings must be UTF-8. */
JsonNode *pba_json(const char *format, ...);
/* Adds key: true to an object, or nothing if false: QEMU's default for these options is false, and
 * it reads commands byte by byte, 5 us each. */
void pba_json_set_if(JsonNode *object, const char *key, bool value);
/* {key: array}, consuming array. */
JsonNode *pba_json_wrap_array(const char *key, JsonArray *array);

/* Members of a reply's object. A missing or mistyped one is PBA_ERROR_PROTOCOL that names it.
 * Strings and objects are owned by the object. */
const char *pba_json_string(JsonObject *object, const char *key, GError **error);
bool pba_json_size(JsonObject *object, const char *key, uint64_t *value, GError **error);
JsonObject *pba_json_object(JsonObject *object, const char *key, GError **error);
/* Optional members: NULL or false if they are absent or of another type. */
const char *pba_json_find_string(JsonObject *object, const char *key);
bool pba_json_find_bool(JsonObject *object, const char *key);
JsonArray *pba_json_find_array(JsonObject *object, const char *key);
JsonObject *pba_json_find_object(JsonObject *object, const char *key);
/* Element as an object, or NULL. */
JsonObject *pba_json_element(JsonArray *array, guint index);

/* The first object of the array whose member has this text, borrowed; NULL: there is none. */
JsonObject *pba_json_find_element(JsonArray *array, const char *key, const char *value);

/* Runs a command whose reply is an array (of objects) or an object. The result holds its own
 * reference: json_array_unref, json_object_unref. */
JsonArray *pba_qmp_query_array(PbaQmp *qmp, const char *command, JsonNode *arguments,
                               GError **error);
JsonObject *pba_qmp_query_object(PbaQmp *qmp, const char *command, JsonNode *arguments,
                                 GError **error);
/* Runs a command whose reply is empty. */
bool pba_qmp_run(PbaQmp *qmp, const char *command, JsonNode *arguments, GError **error);
/* The process that listens at the socket, according to the last connection; 0: not known. */
pid_t pba_qmp_peer(const PbaQmp *qmp);
/* From now on, a signal ends a call only after it has been pending for a second. This is for
 * commands that must be completed once they have begun. False restores the normal behaviour. */
void pba_qmp_settle(PbaQmp *qmp, bool settles);
/* Pauses a polling loop: closes the connection, so that other clients can use the monitor, and
 * sleeps for *pause_ms, which it doubles up to a second. The next command opens a new connection,
 * so state that was queried before may have changed. */
bool pba_qmp_pause(PbaQmp *qmp, unsigned *pause_ms, gint64 deadline, const char *what,
                   GError **error);

#endif

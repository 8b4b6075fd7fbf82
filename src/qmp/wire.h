/* QMP's wire format: turns bytes into JSON messages. It uses no sockets. */
#ifndef PBA_SRC_QMP_WIRE_H
#define PBA_SRC_QMP_WIRE_H

#include "src/pba.h"

typedef struct PbaQmpWire PbaQmpWire;

PbaQmpWire *pba_qmp_wire_new(void);
void pba_qmp_wire_free(PbaQmpWire *wire);
/* Takes bytes that came from the socket. False (PBA_ERROR_PROTOCOL) if the peer does not speak QMP:
 * text between messages, control characters, invalid UTF-8, deeper nesting or a longer message than
 * QEMU sends. The wire cannot be used after that. */
bool pba_qmp_wire_feed(PbaQmpWire *wire, const char *bytes, size_t length, GError **error);
/* The next complete message (an object; the caller unrefs it). NULL: more bytes are needed. */
JsonObject *pba_qmp_wire_pop(PbaQmpWire *wire);
/* Serializes a command for sending; arguments (may be NULL) is borrowed. */
char *pba_qmp_wire_command(const char *command, JsonNode *arguments, const char *id);

G_DEFINE_AUTOPTR_CLEANUP_FUNC(PbaQmpWire, pba_qmp_wire_free)

#endif

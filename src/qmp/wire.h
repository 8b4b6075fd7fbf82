/* QMP's wire: bytes in, JSON messages out. No sockets here. */
#ifndef PBA_SRC_QMP_WIRE_H
#define PBA_SRC_QMP_WIRE_H

#include "src/pba.h"

typedef struct PbaQmpWire PbaQmpWire;

PbaQmpWire *pba_qmp_wire_new(void);
void pba_qmp_wire_free(PbaQmpWire *wire);
/* Takes length bytes from the socket. False (PBA_ERROR_PROTOCOL) if the peer cannot be speaking
 * QMP: text between messages, control characters, bad UTF-8, nesting or a message beyond what a
 * QEMU sends. The wire cannot be used after that. */
bool pba_qmp_wire_feed(PbaQmpWire *wire, const char *bytes, size_t length, GError **error);
/* The next whole message (an object; the caller unrefs it), or NULL: feed more. */
JsonObject *pba_qmp_wire_pop(PbaQmpWire *wire);
/* One command as it is sent; arguments (may be NULL) is borrowed. */
char *pba_qmp_wire_command(const char *command, JsonNode *arguments, const char *id);

G_DEFINE_AUTOPTR_CLEANUP_FUNC(PbaQmpWire, pba_qmp_wire_free)

#endif

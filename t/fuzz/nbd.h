/* What the NBD target shares with its server. */
#ifndef PBA_FUZZ_NBD_H
#define PBA_FUZZ_NBD_H

#include "fuzz.h"

/* What is left of an input. */
typedef struct {
    const uint8_t *next; /* record */
    const uint8_t *end;
    uint64_t size; /* of the disk */
    unsigned presents;
    unsigned requests;
} Input;
extern Input input;

/* Listens, for the whole run, at the socket whose path is returned. */
const char *nbd_listen(void);
/* Does what there is to do for the clients; false if that is nothing. */
bool nbd_take_turn(void);
/* Whoever is connected is so no more. */
void nbd_end_clients(void);

#endif

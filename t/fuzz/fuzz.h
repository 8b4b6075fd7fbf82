/* What the fuzz targets share. Each target is one file with libFuzzer's two functions; replay.c
 * runs them on files. */
#ifndef PBA_FUZZ_H
#define PBA_FUZZ_H

#include "src/pba.h"

/* libFuzzer's interface. */
int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* What must hold whatever the input is. */
#define CHECK(condition) check((condition), #condition, __FILE__, __LINE__)
void check(bool holds, const char *what, const char *file, int line);
/* A call has come back: if it failed it has an error that a log can take. Frees the error. */
void check_outcome(bool done, GError **error);

/* Time and other processes, as fake.c has them (linked by --wrap): the clock stands still until
 * somebody waits; there is this process, FAKE_PID, and another one, FAKE_OTHER_PID. */
#define FAKE_PID 4242
#define FAKE_OTHER_PID 1234

/* The other end of a socket that is polled: does what is next for it; false if that is nothing. */
typedef bool (*FakePeer)(void);

/* Begins an input: no descriptors may be open at its end that are not open now. */
void fake_begin(FakePeer peer);
void fake_end(void);

/* A private directory for the whole run, gone at its end. */
const char *fake_dir(void);
/* A listening Unix socket there, not blocking. */
int fake_listen(const char *path);

#endif

/* What the fuzz targets share. Each target is one file with libFuzzer's two functions; replay.c
 * runs them on files. */
#ifndef PBA_FUZZ_H
#define PBA_FUZZ_H

#include "src/pba.h"

/* libFuzzer's interface. */
int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Checks a condition that must hold for every input. */
#define CHECK(condition) check((condition), #condition, __FILE__, __LINE__)
void check(bool holds, const char *what, const char *file, int line);
/* Checks the outcome of a call: a failure must have an error that can be logged. Frees it. */
void check_outcome(bool done, GError **error);

/* Time and processes are those of fake.c (linked with --wrap). The clock only advances when the
 * core waits. There are two processes: this one, FAKE_PID, and FAKE_OTHER_PID. */
#define FAKE_PID 4242
#define FAKE_OTHER_PID 1234

/* The other end of a socket that the core polls: takes its next step; false if there is none. */
typedef bool (*FakePeer)(void);

/* Begins an input: no descriptors may be open at its end that are not open now. */
void fake_begin(FakePeer peer);
void fake_end(void);

/* A private directory for the whole run, gone at its end. */
const char *fake_dir(void);
/* A listening Unix socket there, not blocking. */
int fake_listen(const char *path);

#endif

/* The parts of pba-vfile: the process that serves one volume as a file.
 *
 * One thread (main.c, file.c, ahead.c) has all the state and speaks FUSE; another (connection.c)
 * moves the data of the NBD connection with several requests in flight, so that receiving and
 * answering run in parallel; further ones (scan.c) read the dirty bitmap and the zeroes ahead of
 * the reader. */
#ifndef PBA_VFILE_SERVER_H
#define PBA_VFILE_SERVER_H

#define FUSE_USE_VERSION 35

#include "src/pba.h"
#include "src/volume/volume.h"
#include <fuse_lowlevel.h>
#include <poll.h>

/* The NBD connection, in a thread of its own */

typedef struct PbaConnection PbaConnection;

/* A request. Its memory belongs to the submitter, and must stay valid until the connection has
 * returned it. */
typedef struct PbaRequest {
    PbaConnection *connection;
    struct PbaRequest *next;
    bool is_trim;
    uint64_t offset;
    uint64_t length;
    void *buffer;      /* NULL for a trim */
    uint64_t capacity; /* of the buffer: at least length */
    gint urgent;       /* a reader waits for it; atomic, because it may be set later */
    int error;         /* errno; 0: the request is done completely */
    uint64_t seen;     /* bytes that have arrived */
    unsigned pending;  /* pieces in flight; like link, only used by the connection */
    GList link;
} PbaRequest;

/* Takes over a connected volume. Like its thread, it lasts as long as the process. */
PbaConnection *pba_connection_start(PbaNbdVolume *nbd, GError **error);
const PbaSizes *pba_connection_sizes(const PbaConnection *connection);
void pba_connection_submit(PbaConnection *connection, PbaRequest *request);
/* The finished requests, linked by next, or NULL. The submitter's next poll ends when an urgent
 * request is finished, or, with all, any request. */
PbaRequest *pba_connection_take_done(PbaConnection *connection, bool all);
/* What the submitter must poll for, and for how many milliseconds at most (-1: no limit); then it
 * calls the second function. */
int pba_connection_watch(PbaConnection *connection, struct pollfd fds[2]);
void pba_connection_turn(PbaConnection *connection, const struct pollfd fds[2]);

/* The runs of a map, read by a thread of their own */

typedef struct PbaScan PbaScan;

/* The kind of runs: connects, and returns the map of *volume from that offset on. The volume is
 * NULL if the server has no such map. */
typedef PbaMap *(*PbaScanBegin)(const PbaVolumeOptions *options, uint64_t from, PbaVolume **volume);
/* The dirty regions of the bitmap that the options name. */
PbaMap *pba_scan_dirty(const PbaVolumeOptions *options, uint64_t from, PbaVolume **volume);
/* What the server reports as zeroes (NBD spec: base:allocation, NBD_STATE_ZERO). */
PbaMap *pba_scan_zeroes(const PbaVolumeOptions *options, uint64_t from, PbaVolume **volume);

typedef enum {
    PBA_SCAN_FOUND,
    PBA_SCAN_LATER, /* found_fd becomes readable when there is more */
    PBA_SCAN_ENDED, /* there are no further runs, or they are not known */
} PbaScanState;

/* options are copied. found_fd is borrowed; -1 for a consumer that does not poll for it. Lasts as
 * long as the process. */
PbaScan *pba_scan_start(const PbaVolumeOptions *options, PbaScanBegin begin, uint64_t from,
                        int found_fd);
/* The next run, if it has arrived. Never waits. */
PbaScanState pba_scan_pop(PbaScan *scan, PbaRange *run);
/* Continues with the runs from offset on. */
void pba_scan_seek(PbaScan *scan, uint64_t offset);

/* The positions of zeroes, for readers that use lseek(2) with SEEK_DATA and SEEK_HOLE */

typedef struct PbaSeeks PbaSeeks;

/* options are copied. Lasts as long as the process. */
PbaSeeks *pba_seeks_new(const PbaVolumeOptions *options, GError **error);
void pba_seeks_ask(PbaSeeks *seeks, fuse_req_t request, uint64_t offset, int whence);
/* The first hole that ends after offset, which readers will skip, if it is already known. Never
 * waits. */
bool pba_seeks_find(PbaSeeks *seeks, uint64_t offset, PbaRange *hole);
/* A reader reads there. A reader that reads in a hole does not skip any until it queries again. */
void pba_seeks_note_read(PbaSeeks *seeks, uint64_t offset);
/* What to poll for. The second function must be called then. */
struct pollfd pba_seeks_watch(const PbaSeeks *seeks);
void pba_seeks_turn(PbaSeeks *seeks);

/* What to read ahead */

typedef struct PbaAhead PbaAhead;

/* Follows one sequential reader. seeks is borrowed, or NULL. Lives as long as the process. */
PbaAhead *pba_ahead_new(const PbaVolumeOptions *options, PbaSeeks *seeks);
/* A reader reads a range; known says that it begins in data that was read ahead. False if the rest
 * of that data is not needed any more. */
bool pba_ahead_note_read(PbaAhead *ahead, uint64_t begin, uint64_t end, bool known);
/* The next piece worth reading, of at most max bytes, inside one region and not discarded. */
bool pba_ahead_next(PbaAhead *ahead, uint64_t max, uint64_t *offset, uint64_t *length);
/* A range is discarded: it must not be read any more. */
void pba_ahead_note_discard(PbaAhead *ahead, uint64_t begin, uint64_t end);
/* Read-ahead failed: stops it until a reader reads in order again. */
void pba_ahead_stop(PbaAhead *ahead);

/* The file */

typedef struct PbaFile PbaFile;

/* The smallest efficient read: one cluster of a snapshot. */
#define PBA_FILE_BLOCK (64u << 10)

/* All are borrowed. seeks is NULL for a file of which readers must not skip anything. */
PbaFile *pba_file_new(PbaConnection *connection, PbaAhead *ahead, PbaSeeks *seeks);
const PbaSizes *pba_file_sizes(const PbaFile *file);
PbaSeeks *pba_file_seeks(const PbaFile *file);
/* The operations (operations.c) have it as their session's userdata. */
extern const struct fuse_lowlevel_ops pba_file_operations;
void pba_file_read(fuse_req_t request, fuse_ino_t inode, size_t length, off_t offset,
                   struct fuse_file_info *info);
void pba_file_fallocate(fuse_req_t request, fuse_ino_t inode, int mode, off_t offset, off_t length,
                        struct fuse_file_info *info);
/* Handles the requests that the connection has finished. */
void pba_file_turn(PbaFile *file);

#endif

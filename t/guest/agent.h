/* Declarations that all files of the test guest use. agent.c describes the test guest. */
#ifndef PBA_TEST_AGENT_H
#define PBA_TEST_AGENT_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#define AGENT_VERSION 1
#define BLOCK 4096
#define CHUNK (1024 * 1024)
#define MAX_DISKS 16
#define MAX_LINE 65536

/* agent.c */
extern char *chunk; /* CHUNK bytes, aligned for O_DIRECT; only the command loop uses it */
int64_t now_us(void);
bool parse_u64(const char *text, uint64_t *value);
ssize_t read_small(const char *path, char *buffer, size_t size);
__attribute__((format(printf, 2, 3))) void answer(const char *what, const char *format, ...);

#define ok(...) answer("ok", __VA_ARGS__)
#define ok_nothing() answer("ok", "%s", "")
#define fail(...) answer("error", __VA_ARGS__)

/* disk.c */
struct disk {
    char id[64]; /* the serial number, by which the host names the disk */
    char path[32];
    int fd; /* O_DIRECT, never closed */
};

int scan_disks(void);                   /* returns the number of disks */
struct disk *need_disk(const char *id); /* NULL: an error was sent */
uint64_t disk_size(const struct disk *d);
void cmd_hello(int n, char **w);
void cmd_write(int n, char **w);
void cmd_discard(int n, char **w);
void cmd_read(int n, char **w);
void cmd_read_sum(int n, char **w);

/* churn.c */
uint32_t churn_step(uint32_t x); /* the host has the same generator */
void cmd_churn_start(int n, char **w);
void cmd_churn_status(int n, char **w);
void cmd_churn_stop(int n, char **w);
void cmd_latency(int n, char **w);

/* files.c */
void cmd_mount(int n, char **w);
void cmd_umount(int n, char **w);
void cmd_sync(int n, char **w);
void cmd_files_start(int n, char **w);
void cmd_files_stop(int n, char **w);

#endif

/* What only some versions of QEMU can do, and what is done where they cannot: the one place of this
 * backend that looks at the version. (Which QEMU is too old is capabilities.c's.) */
#include "upstream.h"

/* The guest's write is let through when fleecing takes longer. VirtIO drivers give up at 60 s. */
#define CBW_TIMEOUT_S 45
#define CBW_TIMEOUT_OLD_S 4

/* 7.2 returns the disk as it is now to a read of a snapshot-access node that begins in a cluster
 * that was copied and ends in one that was not. 10.0 is known to be good. */
bool pba_upstream_reads_by_cluster(const PbaAccess *access)
{
    return access->qemu_version < 1000;
}

/* Before 8.2 (06e0f098d612) such a client's messages are not read during nbd-server-stop, which
 * with the fix of CVE-2024-7409 waits for its end. */
bool pba_upstream_stop_waits(const PbaAccess *access)
{
    return access->qemu_version < 802;
}

/* 7.2 aborts when an NBD client leaves an export of a running guest's disk that is in an iothread
 * (nbd_blockdev_client_closed: Assertion qemu_in_main_thread()). 10.0 is known to be good. */
bool pba_upstream_allows_iothreads(const PbaAccess *access)
{
    return access->qemu_version >= 1000;
}

/* Before 9.1 (10b1e09ed3) the limit was kept in 32 bits of nanoseconds. */
unsigned pba_upstream_cbw_timeout_s(const PbaAccess *access)
{
    return access->qemu_version >= 901 ? CBW_TIMEOUT_S : CBW_TIMEOUT_OLD_S;
}

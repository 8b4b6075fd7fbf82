/* What only some versions of QEMU support, and what replaces it in others: the only file of this
 * backend that checks the version. */
#include "src/base/base.h"
#include "upstream.h"

/* If fleecing takes longer, the guest's write proceeds and the snapshot breaks. VirtIO drivers give
 * up after 60 s. */
#define CBW_TIMEOUT_S 45
#define CBW_TIMEOUT_OLD_S 4

static bool is_before(unsigned major, unsigned minor, unsigned than_major, unsigned than_minor)
{
    return major < than_major || (major == than_major && minor < than_minor);
}

static bool access_is_before(const PbaAccess *access, unsigned major, unsigned minor)
{
    return is_before(access->qemu.major, access->qemu.minor, major, minor);
}

/* snapshot-access exists since 7.0, cbw-timeout and on-cbw-error since 7.1; nothing older than 7.2
 * is tested. */
static bool require_version(const PbaQemu *qemu, GError **error)
{
    if (!is_before(qemu->major, qemu->minor, 7, 2)) {
        return true;
    }
    pba_error_set(error, PBA_ERROR_UNSUPPORTED,
                  "QEMU %u.%u.%u is too old - it has no backup-access-setup, and without that "
                  "QEMU 7.2 or later is needed",
                  qemu->major, qemu->minor, qemu->micro);
    return false;
}

bool pba_upstream_suits(PbaQmp *qmp, PbaQemu *qemu, G_GNUC_UNUSED const char **form, bool *suits,
                        GError **error)
{
    static const char *const needed[] = {"blockdev-reopen", "blockdev-backup", "block-export-add",
                                         "block-dirty-bitmap-merge", "x-debug-query-block-graph"};

    *suits = require_version(qemu, error);
    for (size_t i = 0; *suits && i < G_N_ELEMENTS(needed); i++) {
        bool has;
        *suits = pba_qemu_has_command(qmp, qemu, needed[i], &has, error);
        if (*suits && !has) {
            pba_error_set(error, PBA_ERROR_UNSUPPORTED,
                          "this QEMU lacks the command %s - QEMU 7.2 or later has it", needed[i]);
            *suits = false;
        }
    }
    return *suits;
}

/* With a snapshot-access node, QEMU
 * - before 8.0 (a4d5224c2c; 7.2.22 lacks it) takes a range that begins in a copied cluster and ends
 *   in one that was not copied from the current disk: a read returns what the guest has written
 *   since, and a block status returns a hole where it has trimmed;
 * - before 9.2 (6475155d51; also fixed in 7.2.15, 8.2.8, 9.0.4, 9.1.1) aborts on a read or a block
 *   status that needs the current disk and overlaps another one that does.
 * 10.0 is the oldest version known to be good. */
bool pba_upstream_reads_by_cluster(const PbaAccess *access)
{
    return access_is_before(access, 10, 0);
}

/* Before 8.2 (06e0f098d612), such a client's messages are not read during nbd-server-stop, which
 * with the fix of CVE-2024-7409 waits for the client's end. */
bool pba_upstream_stop_waits(const PbaAccess *access)
{
    return access_is_before(access, 8, 2);
}

/* 7.2 aborts when an NBD client leaves an export of a running guest's disk that is in an iothread:
 * nbd_blockdev_client_closed: Assertion qemu_in_main_thread(). The assertion is part of the fix of
 * CVE-2024-7409 (3e7ef738c8), which needs changes that came with 9.0 (f816310d0c, 7075d23511). 10.0
 * is the oldest version known to be good. */
bool pba_upstream_allows_iothreads(const PbaAccess *access)
{
    return !access_is_before(access, 10, 0);
}

/* Before 9.1 (10b1e09ed3), the limit was stored in 32 bits of nanoseconds. */
unsigned pba_upstream_cbw_timeout_s(const PbaAccess *access)
{
    return access_is_before(access, 9, 1) ? CBW_TIMEOUT_OLD_S : CBW_TIMEOUT_S;
}

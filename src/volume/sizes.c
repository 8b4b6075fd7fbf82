#include "sizes.h"

#include "src/base/base.h"
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>

/* With blocks below the size of a sector, a server would get too many pieces at once. */
#define MIN_REQUEST 512u

static bool is_power_of_two(uint64_t number)
{
    return number > 0 && (number & (number - 1)) == 0;
}

static void init(PbaSizes *sizes, uint64_t size)
{
    *sizes = (PbaSizes){
        .size = size,
        .block = 1,
        .request = PBA_MAX_REQUEST,
        .cluster = PBA_CLUSTER,
    };
}

static uint64_t check_cluster(uint64_t cluster)
{
    return is_power_of_two(cluster) ? CLAMP(cluster, PBA_CLUSTER, PBA_MAX_DISCARD) : PBA_CLUSTER;
}

void pba_sizes_read_file(PbaSizes *sizes, int fd, uint64_t size)
{
    struct statvfs status;

    init(sizes, size);
    if (fstatvfs(fd, &status) == 0) {
        sizes->cluster = check_cluster(status.f_frsize);
    }
}

uint64_t pba_whole_blocks(uint64_t bytes, uint32_t block)
{
    return (bytes + block - 1) / block * block;
}

/* Only numbers in exactly the form that we write. */
static uint64_t read_cluster(struct nbd_handle *nbd)
{
    char *description = nbd_get_export_description(nbd);
    uint64_t cluster = PBA_CLUSTER;

    if (description && g_str_has_prefix(description, PBA_DISCARDS_BY)) {
        uint64_t number = g_ascii_strtoull(description + strlen(PBA_DISCARDS_BY), NULL, 10);
        g_autofree char *text = g_strdup_printf(PBA_DISCARDS_BY "%" PRIu64, number);
        if (strcmp(description, text) == 0) {
            cluster = check_cluster(number);
        }
    }
    free(description);
    return cluster;
}

static bool check_blocks(PbaSizes *sizes, int64_t block, int64_t request, GError **error)
{
    if (!is_power_of_two((uint64_t)block) || block > PBA_MAX_BLOCK || request < MIN_REQUEST ||
        request < block) {
        pba_error_set(error, PBA_ERROR_NBD,
                      "the NBD server advertises request sizes from %" PRIi64 " to %" PRIi64
                      " bytes, which is not valid",
                      block, request);
        return false;
    }
    if (sizes->size % (uint64_t)block != 0) {
        pba_error_set(error, PBA_ERROR_NBD,
                      "the NBD export has %" PRIu64
                      " bytes, which is not a multiple of the server's minimum block of %" PRIi64
                      " bytes, so its end can be neither read nor written",
                      sizes->size, block);
        return false;
    }
    sizes->block = (uint32_t)block;
    sizes->request = (uint32_t)MIN(request, PBA_MAX_REQUEST);
    sizes->request -= sizes->request % MAX(sizes->block, MIN_REQUEST);
    return true;
}

bool pba_sizes_read(PbaSizes *sizes, struct nbd_handle *nbd, GError **error)
{
    int64_t size = nbd_get_size(nbd);
    int64_t block = nbd_get_block_size(nbd, LIBNBD_SIZE_MINIMUM);
    int64_t request = nbd_get_block_size(nbd, LIBNBD_SIZE_MAXIMUM);

    if (size < 0 || block < 0 || request < 0) {
        const char *text = nbd_get_error();
        pba_error_set(error, PBA_ERROR_NBD, "cannot get the size of the NBD export - %s",
                      text ? text : "unknown NBD error");
        return false;
    }
    init(sizes, (uint64_t)size);
    sizes->cluster = read_cluster(nbd);
    return check_blocks(sizes, block ? block : 1, request ? request : PBA_MAX_REQUEST, error);
}

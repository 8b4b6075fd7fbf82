/* The data of a disk that only this backend has. */
#include "upstream.h"

PbaUpstreamDisk *pba_upstream_disk(const PbaDisk *disk)
{
    return disk->backend_data;
}

static void free_data(void *data)
{
    PbaUpstreamDisk *nodes = data;

    g_free(nodes->raw);
    g_free(nodes->filter);
    g_free(nodes->guest_device);
    g_free(nodes);
}

void pba_upstream_name_nodes(const PbaAccess *access, PbaDisk *disk)
{
    PbaUpstreamDisk *nodes = g_new0(PbaUpstreamDisk, 1);

    nodes->raw = pba_disk_name(access, PBA_RAW_ROLE, disk);
    nodes->filter = pba_disk_name(access, "cbw", disk);
    disk->backend_data = nodes;
    disk->free_backend_data = free_data;
    pba_guards_name(access, disk);
}

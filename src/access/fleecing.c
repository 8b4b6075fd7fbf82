/* Whether fleecing images have enough space: if one's file system is full, the snapshot breaks, and
 * the backup fails. */
#include "access.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include <sys/stat.h>
#include <sys/statvfs.h>

/* A file system is nearly full if less than this part of it is free. */
#define NEARLY_FULL_PART 10

/* The file system that the image can fill. Our own images have been unlinked, so they have no name.
 * If the image is not a file, or not on this machine, nothing is known. */
static bool find_file_system(const char *path, struct statvfs *file_system)
{
    g_autofree char *dir = g_path_get_dirname(path);
    struct stat status;

    if (!g_path_is_absolute(path)) {
        return false;
    }
    bool exists = stat(path, &status) == 0;
    return (!exists || S_ISREG(status.st_mode)) && statvfs(exists ? path : dir, file_system) == 0;
}

bool pba_fleecing_space(JsonObject *node, const char *path, uint64_t *free_bytes,
                        bool *is_nearly_full)
{
    JsonObject *image = pba_json_find_object(node, "image");
    struct statvfs file_system;
    uint64_t size = 0;
    uint64_t used = 0;

    if (!find_file_system(path, &file_system)) {
        return false;
    }
    pba_json_size(image, "virtual-size", &size, NULL);
    if (json_object_has_member(image, "actual-size")) {
        pba_json_size(image, "actual-size", &used, NULL);
    }
    uint64_t all_bytes = (uint64_t)file_system.f_blocks * file_system.f_frsize;
    *free_bytes = (uint64_t)file_system.f_bavail * file_system.f_frsize;
    *is_nearly_full =
        *free_bytes < all_bytes / NEARLY_FULL_PART && size > used && *free_bytes < size - used;
    return true;
}

char *pba_fleecing_warning(const char *device, const char *path, uint64_t free_bytes)
{
    return pba_line("device %s: the file system of its fleecing image '%s' is nearly full: "
                    "%" G_GUINT64_FORMAT
                    " bytes are free - when it is full, the snapshot breaks and the backup fails",
                    device, path, free_bytes);
}

void pba_fleecing_check(PbaAccess *access, JsonArray *nodes)
{
    g_auto(PbaBlock) block = {.nodes = json_array_ref(nodes)};

    g_ptr_array_set_size(access->warnings, 0);
    for (guint i = 0; i < access->disks->len; i++) {
        const PbaDisk *disk = access->disks->pdata[i];
        JsonObject *node = pba_block_find_node(&block, disk->fleecing_node);
        JsonObject *image = node ? pba_json_find_object(node, "image") : NULL;
        const char *path = image ? pba_json_find_string(image, "filename") : NULL;
        uint64_t free_bytes;
        bool is_nearly_full;
        if (path && pba_fleecing_space(node, path, &free_bytes, &is_nearly_full) &&
            is_nearly_full) {
            g_ptr_array_add(access->warnings, pba_fleecing_warning(disk->device, path, free_bytes));
        }
    }
}

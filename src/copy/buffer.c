/* Memory that a copy's processes share. */
#include "copy.h"
#include "src/base/base.h"
#include <errno.h>
#include <sys/mman.h>

char *pba_buffer_new(size_t size, GError **error)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    if (memory != MAP_FAILED) {
        return memory;
    }
    pba_error_set(error, PBA_ERROR_SYSTEM, "mmap failed - %s", g_strerror(errno));
    return NULL;
}

void pba_buffer_free(char *buffer, size_t size)
{
    if (buffer) {
        munmap(buffer, size);
    }
}

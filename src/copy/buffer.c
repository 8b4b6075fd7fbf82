/* Memory that the processes of a copy share. */
#include "copy.h"
#include "src/base/base.h"
#include <errno.h>
#include <sys/mman.h>

static char *map(size_t size, int protection, int flags, GError **error)
{
    void *memory = mmap(NULL, size, protection, flags | MAP_ANONYMOUS, -1, 0);

    if (memory != MAP_FAILED) {
        return memory;
    }
    pba_error_set(error, PBA_ERROR_SYSTEM, "cannot allocate %zu bytes for a copy - %s", size,
                  g_strerror(errno));
    return NULL;
}

char *pba_buffer_new(size_t size, GError **error)
{
    return map(size, PROT_READ | PROT_WRITE, MAP_SHARED, error);
}

char *pba_zeroes_new(size_t size, GError **error)
{
    return map(size, PROT_READ, MAP_PRIVATE, error);
}

void pba_buffer_free(char *buffer, size_t size)
{
    if (buffer) {
        munmap(buffer, size);
    }
}

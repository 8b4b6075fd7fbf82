/* Runs a target on files, as libFuzzer does it, without libFuzzer. */
#include "fuzz.h"
#include <stdio.h>
#include <string.h>

int main(int argc, char **argv)
{
    LLVMFuzzerInitialize(&argc, &argv);
    for (int i = 1; i < argc; i++) {
        g_autoptr(GError) error = NULL;
        g_autoptr(GMappedFile) file = g_mapped_file_new(argv[i], FALSE, &error);
        if (!file) {
            fprintf(stderr, "%s\n", error->message);
            return 1;
        }
        /* A copy of exactly this size, so that a read beyond its end is detected. */
        gsize size = g_mapped_file_get_length(file);
        g_autofree uint8_t *data = g_malloc(size);
        if (size > 0) {
            memcpy(data, g_mapped_file_get_contents(file), size);
        }
        printf("%s\n", argv[i]);
        fflush(stdout);
        LLVMFuzzerTestOneInput(data, size);
    }
    return 0;
}

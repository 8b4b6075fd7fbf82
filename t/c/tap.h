/* The least that a C program needs to speak TAP. Each program has one file. */
#ifndef PBA_TAP_H
#define PBA_TAP_H

#include <glib.h>
#include <stdbool.h>
#include <stdio.h>

static int tap_count;
static int tap_failures;

/* ok(condition, name as for printf); true if it held. */
#define ok(condition, ...) tap_ok((condition), __FILE__, __LINE__, __VA_ARGS__)
#define is_text(got, expected, ...) tap_is_text((got), (expected), __FILE__, __LINE__, __VA_ARGS__)
#define is_number(got, expected, ...)                                                              \
    tap_is_number((gint64)(got), (gint64)(expected), __FILE__, __LINE__, __VA_ARGS__)

G_GNUC_PRINTF(4, 5)
static inline bool tap_ok(bool condition, const char *file, int line, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    g_autofree char *name = g_strdup_vprintf(format, args);
    va_end(args);
    for (char *c = name; *c; c++) {
        if (g_ascii_iscntrl(*c) || *c == '#') {
            *c = '.';
        }
    }
    printf("%sok %d - %s\n", condition ? "" : "not ", ++tap_count, name);
    if (!condition) {
        tap_failures++;
        printf("# at %s line %d\n", file, line);
    }
    fflush(stdout);
    return condition;
}

G_GNUC_PRINTF(5, 6)
static inline bool tap_is_text(const char *got, const char *expected, const char *file, int line,
                               const char *format, ...)
{
    va_list args;
    va_start(args, format);
    g_autofree char *name = g_strdup_vprintf(format, args);
    va_end(args);
    bool same = tap_ok(g_strcmp0(got, expected) == 0, file, line, "%s", name);
    if (!same) {
        g_autofree char *shown = got ? g_strescape(got, NULL) : NULL;
        printf("#      got: %s\n# expected: %s\n", shown ? shown : "NULL",
               expected ? expected : "NULL");
    }
    return same;
}

G_GNUC_PRINTF(5, 6)
static inline bool tap_is_number(gint64 got, gint64 expected, const char *file, int line,
                                 const char *format, ...)
{
    va_list args;
    va_start(args, format);
    g_autofree char *name = g_strdup_vprintf(format, args);
    va_end(args);
    bool same = tap_ok(got == expected, file, line, "%s", name);
    if (!same) {
        printf("#      got: %" G_GINT64_FORMAT "\n# expected: %" G_GINT64_FORMAT "\n", got,
               expected);
    }
    return same;
}

static inline int done_testing(void)
{
    printf("1..%d\n", tap_count);
    return tap_failures ? 1 : 0;
}

#endif

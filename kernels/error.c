#include "kernels/error.h"

#include <stdarg.h>
#include <stdio.h>

/* Texts may contain parts of files and paths, so control characters, U+0080 to U+009F included, become
 * question marks: what a terminal shows is one plain line. */
static void make_printable(char *text) {
    for (unsigned char *c = (unsigned char *)text; *c; c++) {
        if (*c < ' ' || *c == 0x7f)
            *c = '?';
        else if (*c == 0xc2 && c[1] >= 0x80 && c[1] <= 0x9f)
            c[0] = c[1] = '?';
    }
}

static int set_error(struct error *e, int exit_code, const char *format, va_list args) {
    if (e) {
        e->exit_code = exit_code;
        vsnprintf(e->text, sizeof e->text, format, args);
        make_printable(e->text);
    }
    return -1;
}

int fail_user(struct error *e, const char *format, ...) {
    va_list args;
    va_start(args, format);
    set_error(e, EXIT_USER, format, args);
    va_end(args);
    return -1;
}

int fail_run(struct error *e, const char *format, ...) {
    va_list args;
    va_start(args, format);
    set_error(e, EXIT_RUN, format, args);
    va_end(args);
    return -1;
}

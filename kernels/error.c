#include "kernels/error.h"

#include <stdarg.h>
#include <stdio.h>

static int fill(struct error *e, int exit_code, const char *format, va_list args) {
    if (e) {
        e->exit_code = exit_code;
        vsnprintf(e->text, sizeof e->text, format, args);
    }
    return -1;
}

int fail_user(struct error *e, const char *format, ...) {
    va_list args;
    va_start(args, format);
    fill(e, EXIT_USER, format, args);
    va_end(args);
    return -1;
}

int fail_run(struct error *e, const char *format, ...) {
    va_list args;
    va_start(args, format);
    fill(e, EXIT_RUN, format, args);
    va_end(args);
    return -1;
}

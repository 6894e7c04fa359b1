/* Errors, in every folder: a function that can fail takes a `struct error *` last and returns 0 or -1 (or
 * NULL).
 *
 * The text is one line that says what is wrong, where, and what to do about it. The exit code is EXIT_USER if
 * the user's input is wrong, which is found before the first step, and EXIT_RUN if the run failed while
 * running. */
#ifndef IHA_KERNELS_ERROR_H
#define IHA_KERNELS_ERROR_H

#ifdef __cplusplus
extern "C" {
#endif

enum { EXIT_OK = 0, EXIT_RUN = 1, EXIT_USER = 2 };

struct error {
    int exit_code;
    char text[1024];
};

/* Fill *e (which may be NULL) with a formatted line and return -1. */
int fail_user(struct error *e, const char *format, ...) __attribute__((format(printf, 2, 3)));
int fail_run(struct error *e, const char *format, ...) __attribute__((format(printf, 2, 3)));

#ifdef __cplusplus
}
#endif
#endif

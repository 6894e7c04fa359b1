#define _GNU_SOURCE
#include "kernels/at_start.h"

#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "kernels/limits.h"

/* Some libraries crash when they are loaded with a smaller stack, before main checks it. */
enum { LIBRARY_STACK_BYTES = 64 << 10 };

static uint64_t ignored; /* bit n: signal n */

static void refuse_small_stack(void) {
    static struct error e;
    struct rlimit limit;
    ssize_t written;
    if (getrlimit(RLIMIT_STACK, &limit) != 0 || limit.rlim_cur >= LIBRARY_STACK_BYTES ||
        limits_check_stack(&e) == 0)
        return;
    written = write(STDERR_FILENO, "train_iha: ", 11);
    written = write(STDERR_FILENO, e.text, strlen(e.text));
    written = write(STDERR_FILENO, "\n", 1);
    (void)written;
    _exit(e.exit_code);
}

static void at_start(void) {
    struct sigaction action;
    for (int n = 1; n < 32; n++)
        if (sigaction(n, NULL, &action) == 0 && action.sa_handler == SIG_IGN)
            ignored |= UINT64_C(1) << n;
    refuse_small_stack();
}

/* The program's functions in this section run before the constructors of any library. */
static __attribute__((section(".preinit_array"), used)) void (*const run_at_start)(void) = at_start;

bool at_start_ignored(int number) {
    return ignored >> number & 1;
}

void at_start_keep_ignored(void) {
    static const int numbers[] = {SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (at_start_ignored(numbers[i]))
            signal(numbers[i], SIG_IGN);
}

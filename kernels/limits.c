#define _GNU_SOURCE
#include "kernels/limits.h"

#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>

/* A stack limit above this is taken for a mistake when a thread, which gets a stack of this size, does not start. */
static const rlim_t LARGE_STACK = 1 << 30;

static bool read_limit(int resource, rlim_t *bytes) {
    struct rlimit limit;
    if (getrlimit(resource, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY)
        return false;
    *bytes = limit.rlim_cur;
    return true;
}

int limits_check_stack(struct error *e) {
    rlim_t bytes;
    if (!read_limit(RLIMIT_STACK, &bytes) || bytes >= MIN_STACK_BYTES)
        return 0;
    return fail_user(e, "the stack is limited to %llu KiB, and at least %d KiB are needed; raise ulimit -s",
                     (unsigned long long)bytes >> 10, MIN_STACK_BYTES >> 10);
}

int limits_check_address_space(size_t bytes, const char *library, struct error *e) {
    rlim_t limit;
    if (!read_limit(RLIMIT_AS, &limit))
        return 0;
    void *space = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (space == MAP_FAILED)
        return fail_user(e, "%s needs %zu MiB of memory more than ulimit -v (%llu KiB) allows; raise it",
                         library, bytes >> 20, (unsigned long long)limit >> 10);
    munmap(space, bytes);
    return 0;
}

const char *limits_memory_note(char out[64]) {
    rlim_t limit;
    out[0] = '\0';
    if (read_limit(RLIMIT_AS, &limit))
        snprintf(out, 64, " (ulimit -v allows %llu KiB)", (unsigned long long)limit >> 10);
    return out;
}

int limits_fail_thread(struct error *e, const char *what, int status) {
    rlim_t stack, memory;
    bool memory_limited = read_limit(RLIMIT_AS, &memory);
    if (read_limit(RLIMIT_STACK, &stack) && stack > LARGE_STACK)
        return fail_user(
            e,
            "cannot start %s: %s: each thread asks for a stack of %llu MiB; lower ulimit -s, for "
            "example to 8192",
            what, strerror(status), (unsigned long long)stack >> 20);
    if (memory_limited)
        return fail_user(e,
                         "cannot start %s: %s; ulimit -v limits memory to %llu KiB: raise it, or lower "
                         "system.threads",
                         what, strerror(status), (unsigned long long)memory >> 10);
    return fail_run(e,
                    "cannot start %s: %s; lower system.threads, or raise the limits on processes and memory "
                    "(ulimit -u, the container's pids.max)",
                    what, strerror(status));
}

/* Replaces the C library's fsync in a test program: counts the calls, or fails them with a chosen errno. */
#ifndef IHA_TESTS_LIB_COUNTED_FSYNC_H
#define IHA_TESTS_LIB_COUNTED_FSYNC_H

#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

static int sync_calls, sync_errno; /* sync_errno 0: it works */

int fsync(int fd) {
    sync_calls++;
    if (sync_errno) {
        errno = sync_errno;
        return -1;
    }
    return (int)syscall(SYS_fsync, fd);
}

#endif

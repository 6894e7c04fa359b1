/* The program's stdio streams, on top of calls that can fail: see inject.c. */
#include "inject.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static struct stream {
    atomic_bool in_use; /* atomic, because checkpoints are written by a thread of their own */
    FILE *file;
    int fd; /* -1: memory */
    char *data, **data_out;
    size_t length, *length_out;
} streams[64];

static struct stream *free_stream(void) {
    for (int i = 0; i < 64; i++)
        if (!atomic_exchange(&streams[i].in_use, true))
            return &streams[i];
    abort();
}

/* SHORT and INTERRUPT do not apply: stdio retries short writes, and takes EINTR for an error, but no
 * signal handler of the program interrupts a write to a file. */
static ssize_t write_file(void *cookie, const char *data, size_t bytes) {
    struct stream *s = cookie;
    enum outcome v = inject_begin(WRITE, "stream write", NULL, NULL, s->fd);
    if (v == FAIL)
        return 0;
    ssize_t n = syscall(SYS_write, s->fd, data, inject_is_torn() ? bytes / 2 : bytes);
    inject_end();
    return n < 0 ? 0 : n;
}

static int close_file(void *cookie) {
    struct stream *s = cookie;
    bool fail = inject_begin(CLOSE, "stream close", NULL, NULL, s->fd) == FAIL;
    int err = errno, result = (int)syscall(SYS_close, s->fd);
    s->file = NULL;
    atomic_store(&s->in_use, false);
    if (fail)
        errno = err;
    return fail ? -1 : result;
}

FILE *inject_fopen(const char *path, const char *mode) {
    int flags = (strchr(mode, '+') ? O_RDWR : O_WRONLY) | (mode[0] == 'r'   ? 0
                                                           : mode[0] == 'a' ? O_CREAT | O_APPEND
                                                                            : O_CREAT | O_TRUNC);
    struct stream *s = free_stream();
    s->fd = (int)syscall(SYS_openat, AT_FDCWD, path, flags | (strchr(mode, 'e') ? O_CLOEXEC : 0), 0666);
    if (s->fd < 0) {
        atomic_store(&s->in_use, false);
        return NULL;
    }
    inject_file_opened(s->fd);
    s->file = fopencookie(s, "w", (cookie_io_functions_t){.write = write_file, .close = close_file});
    return s->file;
}

/* The C library knows no descriptor for streams of fopencookie. */
int fileno(FILE *f) {
    for (int i = 0; i < 64; i++)
        if (streams[i].file == f && streams[i].fd >= 0)
            return streams[i].fd;
    return NEXT(fileno)(f);
}

/* ---- memory streams ---- */

static ssize_t write_memory(void *cookie, const char *data, size_t bytes) {
    struct stream *s = cookie;
    if (inject_begin(ALLOC, "open_memstream grows", NULL, NULL, -1) == FAIL)
        return 0;
    char *more = realloc(s->data, s->length + bytes + 1);
    if (!more)
        return 0;
    memcpy(more + s->length, data, bytes);
    s->data = more;
    s->length += bytes;
    s->data[s->length] = '\0';
    *s->data_out = s->data;
    *s->length_out = s->length;
    return (ssize_t)bytes;
}

static int seek_memory(void *cookie, off64_t *at, int whence) {
    struct stream *s = cookie;
    if (*at != 0 || whence == SEEK_SET)
        return -1; /* only needed to tell the position */
    *at = (off64_t)s->length;
    return 0;
}

static int close_memory(void *cookie) {
    struct stream *s = cookie;
    s->file = NULL;
    atomic_store(&s->in_use, false);
    return 0;
}

FILE *inject_open_memstream(char **data, size_t *length) {
    struct stream *s = free_stream();
    s->fd = -1;
    s->data_out = data;
    s->length_out = length;
    s->length = 0;
    *length = 0;
    *data = s->data = calloc(1, 1);
    s->file = fopencookie(
        s, "w", (cookie_io_functions_t){.write = write_memory, .seek = seek_memory, .close = close_memory});
    return s->file;
}

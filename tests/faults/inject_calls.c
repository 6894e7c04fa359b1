/* The functions that can fail: each asks enter(), and calls the real one or returns what a failure returns.
 * See inject.c. */
#include "inject.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

/* A function whose failure is one value, and nothing to be noted about its success. */
#define PLAIN(type, name, params, args, class, path, path2, fd, failure)                                     \
    type name params {                                                                                       \
        if (!OURS)                                                                                           \
            return NEXT(name) args;                                                                          \
        if (enter(class, #name, path, path2, fd) == FAIL)                                                    \
            return failure;                                                                                  \
        type result = NEXT(name) args;                                                                       \
        leave();                                                                                             \
        return result;                                                                                       \
    }

/* ---- memory ---- */

/* dlsym may allocate while the real allocator is being looked up: a little memory for that time. */
static char nursery[1 << 16] __attribute__((aligned(64)));
static size_t nursery_used;

static bool in_nursery(const void *p) {
    return (const char *)p >= nursery && (const char *)p < nursery + sizeof nursery;
}

static void *from_nursery(size_t bytes) {
    char *p = nursery + nursery_used;
    nursery_used += (bytes + 63) / 64 * 64;
    return nursery_used <= sizeof nursery ? p : NULL;
}

static struct {
    void *(*malloc)(size_t);
    void *(*calloc)(size_t, size_t);
    void *(*realloc)(void *, size_t);
    void (*free)(void *);
    bool busy;
} real;

/* False while they are being looked up. */
static bool have_real(void) {
    if (real.free)
        return true;
    if (real.busy)
        return false;
    real.busy = true;
    real.malloc = dlsym(RTLD_NEXT, "malloc");
    real.calloc = dlsym(RTLD_NEXT, "calloc");
    real.realloc = dlsym(RTLD_NEXT, "realloc");
    real.free = dlsym(RTLD_NEXT, "free");
    real.busy = false;
    return true;
}

/* Must this allocation fail? */
static bool starved(const char *call, const void *caller) {
    if (is_ours(caller))
        return enter(ALLOC, call, NULL, NULL, -1) == FAIL;
    return is_library(caller) && enter(LIBRARY, call, NULL, NULL, -1) == FAIL;
}

void *malloc(size_t bytes) {
    if (!have_real())
        return from_nursery(bytes);
    return starved("malloc", __builtin_return_address(0)) ? NULL : real.malloc(bytes);
}

void *calloc(size_t count, size_t bytes) {
    if (!have_real())
        return from_nursery(count * bytes); /* static memory is zeroed */
    return starved("calloc", __builtin_return_address(0)) ? NULL : real.calloc(count, bytes);
}

void *realloc(void *old, size_t bytes) {
    if (!have_real() || in_nursery(old)) {
        void *p = have_real() ? real.malloc(bytes) : from_nursery(bytes);
        if (p && old) {
            size_t room = (size_t)(nursery + sizeof nursery - (char *)old);
            memcpy(p, old, bytes < room ? bytes : room);
        }
        return p;
    }
    return starved("realloc", __builtin_return_address(0)) ? NULL : real.realloc(old, bytes);
}

void free(void *p) {
    if (p && !in_nursery(p) && have_real())
        real.free(p);
}

PLAIN(void *, aligned_alloc, (size_t alignment, size_t bytes), (alignment, bytes), ALLOC, NULL, NULL, -1,
      NULL)
PLAIN(int, posix_memalign, (void **p, size_t alignment, size_t bytes), (p, alignment, bytes), ALLOC, NULL,
      NULL, -1, errno)
PLAIN(char *, strdup, (const char *text), (text), ALLOC, NULL, NULL, -1, NULL)
PLAIN(char *, strndup, (const char *text, size_t n), (text, n), ALLOC, NULL, NULL, -1, NULL)
PLAIN(ssize_t, getline, (char **line, size_t *room, FILE *f), (line, room, f), ALLOC, NULL, NULL, -1, -1)
PLAIN(int, glob, (const char *pattern, int flags, int (*bad)(const char *, int), glob_t *found),
      (pattern, flags, bad, found), ALLOC, pattern, NULL, -1, GLOB_NOSPACE)

void *mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset) {
    if (OURS && enter(flags & MAP_ANONYMOUS ? ALLOC : MAP, "mmap", NULL, NULL, fd) == FAIL)
        return MAP_FAILED;
    return (void *)syscall(SYS_mmap, at, bytes, protection, flags, fd, offset);
}

/* ---- opening ---- */

static bool writes(int flags) {
    return (flags & O_ACCMODE) != O_RDONLY || flags & O_CREAT;
}

static int pass_open(int dir, const char *path, int flags, mode_t mode) {
    int fd = (int)syscall(SYS_openat, dir, path, flags, mode);
    if (fd >= 0 && writes(flags))
        opened(fd);
    leave();
    return fd;
}

int open(const char *path, int flags, ...) {
    va_list args;
    va_start(args, flags);
    mode_t mode = flags & O_CREAT ? va_arg(args, mode_t) : 0;
    va_end(args);
    if (!OURS)
        return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
    if (enter(writes(flags) ? OPEN_WRITE : OPEN_READ, "open", path, NULL, -1) == FAIL)
        return -1;
    return pass_open(AT_FDCWD, path, flags, mode);
}

int openat(int dir, const char *path, int flags, ...) {
    va_list args;
    va_start(args, flags);
    mode_t mode = flags & O_CREAT ? va_arg(args, mode_t) : 0;
    va_end(args);
    if (!OURS)
        return (int)syscall(SYS_openat, dir, path, flags, mode);
    if (enter(writes(flags) ? OPEN_WRITE : OPEN_READ, "openat", path, NULL, dir) == FAIL)
        return -1;
    return pass_open(dir, path, flags, mode);
}

FILE *fopen(const char *path, const char *mode) {
    if (!OURS)
        return NEXT(fopen)(path, mode);
    bool reads = mode[0] == 'r' && !strchr(mode, '+');
    if (enter(reads ? OPEN_READ : OPEN_WRITE, "fopen", path, NULL, -1) == FAIL)
        return NULL;
    FILE *f = reads ? NEXT(fopen)(path, mode) : stream_open(path, mode);
    leave();
    return f;
}

FILE *open_memstream(char **data, size_t *length) {
    if (!OURS)
        return NEXT(open_memstream)(data, length);
    return enter(ALLOC, "open_memstream", NULL, NULL, -1) == FAIL ? NULL : stream_memory(data, length);
}

/* ---- reading and writing ---- */

/* A number of bytes that is not all of them, and not none. */
static size_t half(size_t bytes) {
    return bytes > 1 ? bytes / 2 : bytes;
}

ssize_t write(int fd, const void *data, size_t bytes) {
    if (!OURS || fd == STDOUT_FILENO || fd == STDERR_FILENO)
        return syscall(SYS_write, fd, data, bytes);
    enum verdict v = enter(WRITE, "write", NULL, NULL, fd);
    if (v == FAIL || v == INTERRUPT)
        return -1;
    ssize_t n = syscall(SYS_write, fd, data, v == SHORT || torn() ? half(bytes) : bytes);
    leave();
    return n;
}

ssize_t pwrite(int fd, const void *data, size_t bytes, off_t at) {
    if (!OURS)
        return syscall(SYS_pwrite64, fd, data, bytes, at);
    enum verdict v = enter(WRITE, "pwrite", NULL, NULL, fd);
    if (v == FAIL || v == INTERRUPT)
        return -1;
    ssize_t n = syscall(SYS_pwrite64, fd, data, v == SHORT || torn() ? half(bytes) : bytes, at);
    leave();
    return n;
}

ssize_t read(int fd, void *data, size_t bytes) {
    if (!OURS)
        return syscall(SYS_read, fd, data, bytes);
    enum verdict v = enter(READ, "read", NULL, NULL, fd);
    if (v == FAIL || v == INTERRUPT)
        return -1;
    return syscall(SYS_read, fd, data, v == SHORT ? half(bytes) : bytes);
}

ssize_t pread(int fd, void *data, size_t bytes, off_t at) {
    if (!OURS)
        return syscall(SYS_pread64, fd, data, bytes, at);
    enum verdict v = enter(READ, "pread", NULL, NULL, fd);
    if (v == FAIL || v == INTERRUPT)
        return -1;
    return syscall(SYS_pread64, fd, data, v == SHORT ? half(bytes) : bytes, at);
}

PLAIN(char *, fgets, (char *line, int room, FILE *f), (line, room, f), READ, NULL, NULL, -1, NULL)

int fsync(int fd) {
    if (!OURS)
        return (int)syscall(SYS_fsync, fd);
    if (enter(SYNC, "fsync", NULL, NULL, fd) == FAIL)
        return -1;
    synced(fd); /* the harness need not wait for the real one */
    leave();
    return 0;
}

int fdatasync(int fd) {
    if (!OURS)
        return (int)syscall(SYS_fdatasync, fd);
    if (enter(SYNC, "fdatasync", NULL, NULL, fd) == FAIL)
        return -1;
    synced(fd);
    leave();
    return 0;
}

/* A close that fails has closed all the same. */
int close(int fd) {
    int flags = fcntl(fd, F_GETFL);
    if (!OURS || flags < 0 || (flags & O_ACCMODE) == O_RDONLY)
        return (int)syscall(SYS_close, fd);
    bool fail = enter(CLOSE, "close", NULL, NULL, fd) == FAIL;
    int err = errno, result = (int)syscall(SYS_close, fd);
    if (fail)
        errno = err;
    return fail ? -1 : result;
}

/* ---- names ---- */

PLAIN(int, rename, (const char *from, const char *to), (from, to), RENAME, from, to, -1, -1)
PLAIN(int, renameat, (int d, const char *from, int d2, const char *to), (d, from, d2, to), RENAME, from, to,
      -1, -1)
PLAIN(int, renameat2, (int d, const char *from, int d2, const char *to, unsigned how), (d, from, d2, to, how),
      RENAME, from, to, -1, -1)
PLAIN(int, mkdir, (const char *path, mode_t mode), (path, mode), MAKE_DIR, path, NULL, -1, -1)
PLAIN(int, unlink, (const char *path), (path), REMOVE, path, NULL, -1, -1)
PLAIN(int, unlinkat, (int dir, const char *path, int flags), (dir, path, flags), REMOVE, path, NULL, dir, -1)
PLAIN(int, rmdir, (const char *path), (path), REMOVE, path, NULL, -1, -1)
PLAIN(int, remove, (const char *path), (path), REMOVE, path, NULL, -1, -1)
PLAIN(int, symlink, (const char *target, const char *path), (target, path), LINK, path, target, -1, -1)
PLAIN(int, link, (const char *from, const char *to), (from, to), LINK, from, to, -1, -1)
PLAIN(int, ftruncate, (int fd, off_t length), (fd, length), TRUNCATE, NULL, NULL, fd, -1)
PLAIN(int, truncate, (const char *path, off_t length), (path, length), TRUNCATE, path, NULL, -1, -1)
PLAIN(int, flock, (int fd, int how), (fd, how), LOCK, NULL, NULL, fd, -1)
PLAIN(int, statvfs, (const char *path, struct statvfs *s), (path, s), SPACE, path, NULL, -1, -1)
PLAIN(int, stat, (const char *path, struct stat *s), (path, s), STAT, path, NULL, -1, -1)
PLAIN(int, lstat, (const char *path, struct stat *s), (path, s), STAT, path, NULL, -1, -1)
PLAIN(int, fstat, (int fd, struct stat *s), (fd, s), STAT, NULL, NULL, fd, -1)
PLAIN(int, access, (const char *path, int how), (path, how), STAT, path, NULL, -1, -1)
PLAIN(ssize_t, readlink, (const char *path, char *out, size_t room), (path, out, room), STAT, path, NULL, -1,
      -1)
PLAIN(DIR *, opendir, (const char *path), (path), LIST, path, NULL, -1, NULL)
PLAIN(DIR *, fdopendir, (int fd), (fd), LIST, NULL, NULL, fd, NULL)
PLAIN(struct dirent *, readdir, (DIR * dir), (dir), LIST, NULL, NULL, dirfd(dir), NULL)

/* ---- threads and ranks ---- */

PLAIN(int, pthread_create, (pthread_t * thread, const pthread_attr_t *a, void *(*f)(void *), void *x),
      (thread, a, f, x), THREAD, NULL, NULL, -1, errno)

/* Arguments of MPI functions are words, twelve at most; handing on more than the caller gave is harmless in
 * the calling conventions of the machines this runs on. MPI_ERR_OTHER is 15 or 16: any non-zero will do. */
#define WORDS long a, long b, long c, long d, long e, long f, long g, long h, long i, long j, long k, long l
#define RANKS(class, name)                                                                                   \
    int name(WORDS);                                                                                         \
    PLAIN(int, name, (WORDS), (a, b, c, d, e, f, g, h, i, j, k, l), class, NULL, NULL, -1, 15)
RANKS(MPI, MPI_Init)
RANKS(MPI, MPI_Init_thread)
RANKS(FINALIZE, MPI_Finalize)
RANKS(MPI, MPI_Abort)
RANKS(MPI, MPI_Error_string)
RANKS(MPI, MPI_Get_processor_name)
RANKS(MPI, MPI_Comm_rank)
RANKS(MPI, MPI_Comm_size)
RANKS(MPI, MPI_Comm_set_errhandler)
RANKS(MPI, MPI_Comm_free)
RANKS(MPI, MPI_Comm_dup)
RANKS(MPI, MPI_Comm_split)
RANKS(MPI, MPI_Comm_split_type)
RANKS(MPI, MPI_Barrier)
RANKS(MPI, MPI_Ibarrier)
RANKS(MPI, MPI_Bcast)
RANKS(MPI, MPI_Ibcast)
RANKS(MPI, MPI_Gather)
RANKS(MPI, MPI_Allgather)
RANKS(MPI, MPI_Iallgather)
RANKS(MPI, MPI_Allgatherv)
RANKS(MPI, MPI_Iallgatherv)
RANKS(MPI, MPI_Allreduce)
RANKS(MPI, MPI_Iallreduce)
RANKS(MPI, MPI_Reduce)
RANKS(MPI, MPI_Ireduce)
RANKS(MPI, MPI_Reduce_scatter)
RANKS(MPI, MPI_Ireduce_scatter)
RANKS(MPI, MPI_Reduce_scatter_block)
RANKS(MPI, MPI_Ireduce_scatter_block)
RANKS(MPI, MPI_Alltoall)
RANKS(MPI, MPI_Send)
RANKS(MPI, MPI_Isend)
RANKS(MPI, MPI_Recv)
RANKS(MPI, MPI_Irecv)
RANKS(MPI, MPI_Sendrecv)
RANKS(MPI, MPI_Wait)
RANKS(MPI, MPI_Waitall)
RANKS(POLL, MPI_Test)
RANKS(POLL, MPI_Testall)

/* The intercepted functions: each asks inject_begin, and calls the real one or returns its failure value. See
 * inject.c. */
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

/* A function with a single failure value, whose success needs no bookkeeping. */
#define INTERCEPT(type, name, params, args, class, path, path2, fd, failure)                                 \
    type name params {                                                                                       \
        if (!FROM_PROGRAM)                                                                                   \
            return NEXT(name) args;                                                                          \
        if (inject_begin(class, #name, path, path2, fd) == FAIL)                                             \
            return failure;                                                                                  \
        type result = NEXT(name) args;                                                                       \
        inject_end();                                                                                        \
        return result;                                                                                       \
    }

/* ---- memory ---- */

/* dlsym may allocate while it looks up the real allocator: this memory is for that time. */
static char early_heap[1 << 16] __attribute__((aligned(64)));
static size_t early_used;

static bool in_early_heap(const void *p) {
    return (const char *)p >= early_heap && (const char *)p < early_heap + sizeof early_heap;
}

static void *early_alloc(size_t bytes) {
    char *p = early_heap + early_used;
    early_used += (bytes + 63) / 64 * 64;
    return early_used <= sizeof early_heap ? p : NULL;
}

static struct {
    void *(*malloc)(size_t);
    void *(*calloc)(size_t, size_t);
    void *(*realloc)(void *, size_t);
    void (*free)(void *);
    bool busy;
} real;

/* False while dlsym looks them up. */
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

/* Whether this allocation must fail. */
static bool alloc_fails(const char *call, const void *caller) {
    if (inject_is_program(caller))
        return inject_begin(ALLOC, call, NULL, NULL, -1) == FAIL;
    return inject_is_library(caller) && inject_begin(LIBRARY, call, NULL, NULL, -1) == FAIL;
}

void *malloc(size_t bytes) {
    if (!have_real())
        return early_alloc(bytes);
    return alloc_fails("malloc", __builtin_return_address(0)) ? NULL : real.malloc(bytes);
}

void *calloc(size_t count, size_t bytes) {
    if (!have_real())
        return early_alloc(count * bytes); /* static memory is zeroed */
    return alloc_fails("calloc", __builtin_return_address(0)) ? NULL : real.calloc(count, bytes);
}

void *realloc(void *old, size_t bytes) {
    if (!have_real() || in_early_heap(old)) {
        void *p = have_real() ? real.malloc(bytes) : early_alloc(bytes);
        if (p && old) {
            size_t size = (size_t)(early_heap + sizeof early_heap - (char *)old);
            memcpy(p, old, bytes < size ? bytes : size);
        }
        return p;
    }
    return alloc_fails("realloc", __builtin_return_address(0)) ? NULL : real.realloc(old, bytes);
}

void free(void *p) {
    if (p && !in_early_heap(p) && have_real())
        real.free(p);
}

INTERCEPT(void *, aligned_alloc, (size_t alignment, size_t bytes), (alignment, bytes), ALLOC, NULL, NULL, -1,
          NULL)
INTERCEPT(int, posix_memalign, (void **p, size_t alignment, size_t bytes), (p, alignment, bytes), ALLOC, NULL,
          NULL, -1, errno)
INTERCEPT(char *, strdup, (const char *text), (text), ALLOC, NULL, NULL, -1, NULL)
INTERCEPT(char *, strndup, (const char *text, size_t n), (text, n), ALLOC, NULL, NULL, -1, NULL)
INTERCEPT(ssize_t, getline, (char **line, size_t *size, FILE *f), (line, size, f), ALLOC, NULL, NULL, -1, -1)
INTERCEPT(int, glob, (const char *pattern, int flags, int (*bad)(const char *, int), glob_t *found),
          (pattern, flags, bad, found), ALLOC, pattern, NULL, -1, GLOB_NOSPACE)

void *mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset) {
    if (FROM_PROGRAM && inject_begin(flags & MAP_ANONYMOUS ? ALLOC : MAP, "mmap", NULL, NULL, fd) == FAIL)
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
        inject_file_opened(fd);
    inject_end();
    return fd;
}

int open(const char *path, int flags, ...) {
    va_list args;
    va_start(args, flags);
    mode_t mode = flags & O_CREAT ? va_arg(args, mode_t) : 0;
    va_end(args);
    if (!FROM_PROGRAM)
        return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
    if (inject_begin(writes(flags) ? OPEN_WRITE : OPEN_READ, "open", path, NULL, -1) == FAIL)
        return -1;
    return pass_open(AT_FDCWD, path, flags, mode);
}

int openat(int dir, const char *path, int flags, ...) {
    va_list args;
    va_start(args, flags);
    mode_t mode = flags & O_CREAT ? va_arg(args, mode_t) : 0;
    va_end(args);
    if (!FROM_PROGRAM)
        return (int)syscall(SYS_openat, dir, path, flags, mode);
    if (inject_begin(writes(flags) ? OPEN_WRITE : OPEN_READ, "openat", path, NULL, dir) == FAIL)
        return -1;
    return pass_open(dir, path, flags, mode);
}

FILE *fopen(const char *path, const char *mode) {
    if (!FROM_PROGRAM)
        return NEXT(fopen)(path, mode);
    bool reads = mode[0] == 'r' && !strchr(mode, '+');
    if (inject_begin(reads ? OPEN_READ : OPEN_WRITE, "fopen", path, NULL, -1) == FAIL)
        return NULL;
    FILE *f = reads ? NEXT(fopen)(path, mode) : inject_fopen(path, mode);
    inject_end();
    return f;
}

FILE *open_memstream(char **data, size_t *length) {
    if (!FROM_PROGRAM)
        return NEXT(open_memstream)(data, length);
    return inject_begin(ALLOC, "open_memstream", NULL, NULL, -1) == FAIL
               ? NULL
               : inject_open_memstream(data, length);
}

/* ---- reading and writing ---- */

/* A short count: not all bytes, and not none. */
static size_t half(size_t bytes) {
    return bytes > 1 ? bytes / 2 : bytes;
}

ssize_t write(int fd, const void *data, size_t bytes) {
    if (!FROM_PROGRAM || fd == STDOUT_FILENO || fd == STDERR_FILENO)
        return syscall(SYS_write, fd, data, bytes);
    enum outcome v = inject_begin(WRITE, "write", NULL, NULL, fd);
    if (v == FAIL || v == INTERRUPT)
        return -1;
    ssize_t n = syscall(SYS_write, fd, data, v == SHORT || inject_is_torn() ? half(bytes) : bytes);
    inject_end();
    return n;
}

ssize_t pwrite(int fd, const void *data, size_t bytes, off_t at) {
    if (!FROM_PROGRAM)
        return syscall(SYS_pwrite64, fd, data, bytes, at);
    enum outcome v = inject_begin(WRITE, "pwrite", NULL, NULL, fd);
    if (v == FAIL || v == INTERRUPT)
        return -1;
    ssize_t n = syscall(SYS_pwrite64, fd, data, v == SHORT || inject_is_torn() ? half(bytes) : bytes, at);
    inject_end();
    return n;
}

ssize_t read(int fd, void *data, size_t bytes) {
    if (!FROM_PROGRAM)
        return syscall(SYS_read, fd, data, bytes);
    enum outcome v = inject_begin(READ, "read", NULL, NULL, fd);
    if (v == FAIL || v == INTERRUPT)
        return -1;
    return syscall(SYS_read, fd, data, v == SHORT ? half(bytes) : bytes);
}

ssize_t pread(int fd, void *data, size_t bytes, off_t at) {
    if (!FROM_PROGRAM)
        return syscall(SYS_pread64, fd, data, bytes, at);
    enum outcome v = inject_begin(READ, "pread", NULL, NULL, fd);
    if (v == FAIL || v == INTERRUPT)
        return -1;
    return syscall(SYS_pread64, fd, data, v == SHORT ? half(bytes) : bytes, at);
}

INTERCEPT(char *, fgets, (char *line, int size, FILE *f), (line, size, f), READ, NULL, NULL, -1, NULL)

int fsync(int fd) {
    if (!FROM_PROGRAM)
        return (int)syscall(SYS_fsync, fd);
    if (inject_begin(SYNC, "fsync", NULL, NULL, fd) == FAIL)
        return -1;
    inject_file_synced(fd); /* without the real fsync, which takes long */
    inject_end();
    return 0;
}

int fdatasync(int fd) {
    if (!FROM_PROGRAM)
        return (int)syscall(SYS_fdatasync, fd);
    if (inject_begin(SYNC, "fdatasync", NULL, NULL, fd) == FAIL)
        return -1;
    inject_file_synced(fd);
    inject_end();
    return 0;
}

/* A failing close closes the descriptor too. */
int close(int fd) {
    int flags = fcntl(fd, F_GETFL);
    if (!FROM_PROGRAM || flags < 0 || (flags & O_ACCMODE) == O_RDONLY)
        return (int)syscall(SYS_close, fd);
    bool fail = inject_begin(CLOSE, "close", NULL, NULL, fd) == FAIL;
    int err = errno, result = (int)syscall(SYS_close, fd);
    if (fail)
        errno = err;
    return fail ? -1 : result;
}

/* ---- names and attributes ---- */

INTERCEPT(int, rename, (const char *from, const char *to), (from, to), RENAME, from, to, -1, -1)
INTERCEPT(int, renameat, (int d, const char *from, int d2, const char *to), (d, from, d2, to), RENAME, from,
          to, -1, -1)
INTERCEPT(int, renameat2, (int d, const char *from, int d2, const char *to, unsigned how),
          (d, from, d2, to, how), RENAME, from, to, -1, -1)
INTERCEPT(int, mkdir, (const char *path, mode_t mode), (path, mode), MAKE_DIR, path, NULL, -1, -1)
INTERCEPT(int, unlink, (const char *path), (path), REMOVE, path, NULL, -1, -1)
INTERCEPT(int, unlinkat, (int dir, const char *path, int flags), (dir, path, flags), REMOVE, path, NULL, dir,
          -1)
INTERCEPT(int, rmdir, (const char *path), (path), REMOVE, path, NULL, -1, -1)
INTERCEPT(int, remove, (const char *path), (path), REMOVE, path, NULL, -1, -1)
INTERCEPT(int, symlink, (const char *target, const char *path), (target, path), LINK, path, target, -1, -1)
INTERCEPT(int, link, (const char *from, const char *to), (from, to), LINK, from, to, -1, -1)
INTERCEPT(int, ftruncate, (int fd, off_t length), (fd, length), TRUNCATE, NULL, NULL, fd, -1)
INTERCEPT(int, truncate, (const char *path, off_t length), (path, length), TRUNCATE, path, NULL, -1, -1)
INTERCEPT(int, flock, (int fd, int how), (fd, how), LOCK, NULL, NULL, fd, -1)
INTERCEPT(int, statvfs, (const char *path, struct statvfs *s), (path, s), SPACE, path, NULL, -1, -1)
INTERCEPT(int, stat, (const char *path, struct stat *s), (path, s), STAT, path, NULL, -1, -1)
INTERCEPT(int, lstat, (const char *path, struct stat *s), (path, s), STAT, path, NULL, -1, -1)
INTERCEPT(int, fstat, (int fd, struct stat *s), (fd, s), STAT, NULL, NULL, fd, -1)
INTERCEPT(int, access, (const char *path, int how), (path, how), STAT, path, NULL, -1, -1)
INTERCEPT(ssize_t, readlink, (const char *path, char *out, size_t size), (path, out, size), STAT, path, NULL,
          -1, -1)
INTERCEPT(DIR *, opendir, (const char *path), (path), LIST, path, NULL, -1, NULL)
INTERCEPT(DIR *, fdopendir, (int fd), (fd), LIST, NULL, NULL, fd, NULL)
INTERCEPT(struct dirent *, readdir, (DIR * dir), (dir), LIST, NULL, NULL, dirfd(dir), NULL)

/* ---- threads and ranks ---- */

INTERCEPT(int, pthread_create, (pthread_t * thread, const pthread_attr_t *a, void *(*f)(void *), void *x),
          (thread, a, f, x), THREAD, NULL, NULL, -1, errno)

/* The arguments of MPI functions are word-sized, twelve at most; passing on more than the caller gave is
 * harmless in the calling conventions of the supported machines. MPI_ERR_OTHER is 15 or 16: any non-zero
 * value will do. */
#define WORDS long a, long b, long c, long d, long e, long f, long g, long h, long i, long j, long k, long l
#define INTERCEPT_MPI(class, name)                                                                           \
    int name(WORDS);                                                                                         \
    INTERCEPT(int, name, (WORDS), (a, b, c, d, e, f, g, h, i, j, k, l), class, NULL, NULL, -1, 15)
INTERCEPT_MPI(MPI, MPI_Init)
INTERCEPT_MPI(MPI, MPI_Init_thread)
INTERCEPT_MPI(FINALIZE, MPI_Finalize)
INTERCEPT_MPI(MPI, MPI_Abort)
INTERCEPT_MPI(MPI, MPI_Error_string)
INTERCEPT_MPI(MPI, MPI_Get_processor_name)
INTERCEPT_MPI(MPI, MPI_Comm_rank)
INTERCEPT_MPI(MPI, MPI_Comm_size)
INTERCEPT_MPI(MPI, MPI_Comm_set_errhandler)
INTERCEPT_MPI(MPI, MPI_Comm_free)
INTERCEPT_MPI(MPI, MPI_Comm_dup)
INTERCEPT_MPI(MPI, MPI_Comm_split)
INTERCEPT_MPI(MPI, MPI_Comm_split_type)
INTERCEPT_MPI(MPI, MPI_Barrier)
INTERCEPT_MPI(MPI, MPI_Ibarrier)
INTERCEPT_MPI(MPI, MPI_Bcast)
INTERCEPT_MPI(MPI, MPI_Ibcast)
INTERCEPT_MPI(MPI, MPI_Gather)
INTERCEPT_MPI(MPI, MPI_Allgather)
INTERCEPT_MPI(MPI, MPI_Iallgather)
INTERCEPT_MPI(MPI, MPI_Allgatherv)
INTERCEPT_MPI(MPI, MPI_Iallgatherv)
INTERCEPT_MPI(MPI, MPI_Allreduce)
INTERCEPT_MPI(MPI, MPI_Iallreduce)
INTERCEPT_MPI(MPI, MPI_Reduce)
INTERCEPT_MPI(MPI, MPI_Ireduce)
INTERCEPT_MPI(MPI, MPI_Reduce_scatter)
INTERCEPT_MPI(MPI, MPI_Ireduce_scatter)
INTERCEPT_MPI(MPI, MPI_Reduce_scatter_block)
INTERCEPT_MPI(MPI, MPI_Ireduce_scatter_block)
INTERCEPT_MPI(MPI, MPI_Alltoall)
INTERCEPT_MPI(MPI, MPI_Send)
INTERCEPT_MPI(MPI, MPI_Isend)
INTERCEPT_MPI(MPI, MPI_Recv)
INTERCEPT_MPI(MPI, MPI_Irecv)
INTERCEPT_MPI(MPI, MPI_Sendrecv)
INTERCEPT_MPI(MPI, MPI_Wait)
INTERCEPT_MPI(MPI, MPI_Waitall)
INTERCEPT_MPI(POLL, MPI_Test)
INTERCEPT_MPI(POLL, MPI_Testall)

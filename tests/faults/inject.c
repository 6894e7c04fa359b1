/* A library for LD_PRELOAD that makes the N-th call of a class fail, or kills the process there.
 *
 *   IHA_FAULT=CLASS:N          the N-th call of the class fails (N from 1) with the class's usual errno
 *   IHA_FAULT=CLASS:N:ERRNO    ... with this errno, a number
 *   IHA_FAULT=CLASS:N+[:ERRNO] ... and so does every later one: a disk that stays full
 *   IHA_FAULT=CLASS:N:short    reads or writes half (N = 0: every time); the program must cope
 *   IHA_FAULT=CLASS:N:eintr    fails with EINTR once (N = 0: every second call); likewise
 *   IHA_FAULT=CLASS:N:late     fails after a third of a second, in which other ranks go on
 *   IHA_FAULT=CLASS:N:stop     the process stops there (SIGSTOP), as if it hung
 *   IHA_FAULT=crash:N:before   SIGKILL before the N-th call that changes the disk
 *   IHA_FAULT=crash:N:after    ... after it
 *   IHA_FAULT=crash:N:torn     ... in it: half of a write is done
 *   IHA_FAULT=crash:N:cut      ... before it, after truncating files to what was synced: a power cut
 *   IHA_FAULT_TRACE=FILE       every counted call, one per line: class, its number, call, path[, path]
 *   IHA_FAULT_RANK=R           only the process whose OMPI_COMM_WORLD_RANK is R has the fault; all ranks write
 *                              a trace, to FILE.RANK
 *
 * Only calls from the program's own code count, told by their return address, so that changes inside
 * libraries do not shift the numbers. Class `library` counts the allocations of those libraries that
 * report out of memory to their caller. The C library's stdio calls write() internally, where it cannot be
 * intercepted, so streams that the program opens are reimplemented: see inject_stream.c. The intercepted
 * functions are in inject_calls.c. */
#include "inject.h"

#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static const struct {
    const char *name;
    int err;
    bool changes_disk;
} classes[CLASS_COUNT] = {
    [ALLOC] = {"alloc", ENOMEM, false},
    [LIBRARY] = {"library", ENOMEM, false},
    [MAP] = {"map", ENOMEM, false},
    [OPEN_READ] = {"open_read", EIO, false},
    [OPEN_WRITE] = {"open_write", ENOSPC, true},
    [READ] = {"read", EIO, false},
    [WRITE] = {"write", ENOSPC, true},
    [CLOSE] = {"close", ENOSPC, false},
    [SYNC] = {"sync", EIO, true},
    [RENAME] = {"rename", EIO, true},
    [MAKE_DIR] = {"mkdir", ENOSPC, true},
    [REMOVE] = {"remove", EIO, true},
    [LINK] = {"link", ENOSPC, true},
    [TRUNCATE] = {"truncate", EIO, true},
    [LOCK] = {"lock", ENOLCK, false},
    [SPACE] = {"space", EIO, false},
    [STAT] = {"stat", EIO, false},
    [LIST] = {"list", EIO, false},
    [THREAD] = {"thread", EAGAIN, false},
    [MPI] = {"mpi", EIO, false},
    [FINALIZE] = {"finalize", EIO, false},
    [POLL] = {"poll", EIO, false},
};

/* Libraries that return NULL to the program when out of memory. */
static const char *const LIBRARIES[] = {"libcjson", "libinih", "libpcre2"};

enum moment { BEFORE, AFTER, TORN, CUT };

static struct {
    bool crash, sticky, late, stop;
    int which; /* enum fault_class */
    long number;
    int err;
    enum outcome outcome;
    enum moment moment;
} plan = {.which = -1};

static struct {
    uintptr_t begin, end;
    bool library;
} texts[16];
static int text_count;
static int trace = -1;
static atomic_long counts[CLASS_COUNT], disk_changes;
static _Thread_local bool die_after, die_torn;

/* ---- who calls ---- */

static bool in_text(const void *address, bool library) {
    for (int i = 0; i < text_count; i++)
        if (texts[i].library == library && (uintptr_t)address >= texts[i].begin &&
            (uintptr_t)address < texts[i].end)
            return true;
    return false;
}

bool inject_is_program(const void *address) {
    return in_text(address, false);
}

bool inject_is_library(const void *address) {
    return in_text(address, true);
}

/* dl_iterate_phdr reports the program itself first. */
static int add_object(struct dl_phdr_info *object, size_t size, void *count) {
    bool program = (*(int *)count)++ == 0, library = false;
    (void)size;
    for (size_t i = 0; i < sizeof LIBRARIES / sizeof *LIBRARIES && !program; i++)
        library |= strstr(object->dlpi_name, LIBRARIES[i]) != NULL;
    for (int i = 0; i < object->dlpi_phnum && (program || library); i++) {
        const ElfW(Phdr) *h = &object->dlpi_phdr[i];
        if (h->p_type != PT_LOAD || !(h->p_flags & PF_X) || text_count == sizeof texts / sizeof *texts)
            continue;
        texts[text_count].begin = object->dlpi_addr + h->p_vaddr;
        texts[text_count].end = texts[text_count].begin + h->p_memsz;
        texts[text_count++].library = library;
    }
    return 0;
}

/* ---- reading IHA_FAULT ---- */

__attribute__((noreturn)) static void exit_usage(const char *text) {
    dprintf(2, "inject: IHA_FAULT=%s: not a fault; see tests/faults/inject.c\n", text);
    _exit(99);
}

static void read_option(const char *option, const char *text) {
    static const char *const moments[] = {"before", "after", "torn", "cut"};
    if (plan.crash) {
        for (int i = 0; i < 4; i++)
            if (strcmp(option, moments[i]) == 0) {
                plan.moment = (enum moment)i;
                return;
            }
        exit_usage(text);
    }
    if (strcmp(option, "short") == 0)
        plan.outcome = SHORT;
    else if (strcmp(option, "eintr") == 0)
        plan.outcome = INTERRUPT;
    else if (strcmp(option, "late") == 0)
        plan.late = true;
    else if (strcmp(option, "stop") == 0)
        plan.stop = true;
    else if ((plan.err = atoi(option)) <= 0)
        exit_usage(text);
}

static void read_plan(const char *text) {
    char name[32] = "", option[32] = "";
    const char *colon = strchr(text, ':');
    if (!colon || colon - text >= (long)sizeof name)
        exit_usage(text);
    memcpy(name, text, (size_t)(colon - text));
    plan.crash = strcmp(name, "crash") == 0;
    for (int c = 0; c < CLASS_COUNT; c++)
        if (strcmp(name, classes[c].name) == 0)
            plan.which = c;
    if (!plan.crash && plan.which < 0)
        exit_usage(text);
    char *rest;
    plan.number = strtol(colon + 1, &rest, 10);
    if (*rest == '+') {
        plan.sticky = true;
        rest++;
    }
    plan.outcome = FAIL;
    plan.err = plan.crash ? 0 : classes[plan.which].err;
    if (*rest == ':') {
        snprintf(option, sizeof option, "%s", rest + 1);
        read_option(option, text);
    } else if (*rest) {
        exit_usage(text);
    }
}

__attribute__((constructor)) static void start(void) {
    const char *text = getenv("IHA_FAULT"), *path = getenv("IHA_FAULT_TRACE");
    const char *fault_rank = getenv("IHA_FAULT_RANK"), *rank = getenv("OMPI_COMM_WORLD_RANK");
    char own[1024];
    int count = 0;
    if (text && *text && (!fault_rank || strcmp(fault_rank, rank ? rank : "0") == 0))
        read_plan(text);
    if (path) {
        snprintf(own, sizeof own, "%s%s%s", path, rank ? "." : "", rank ? rank : "");
        int fd = (int)syscall(SYS_openat, AT_FDCWD, own, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
        trace = fcntl(fd, F_DUPFD_CLOEXEC,
                      700); /* a high number, so that the program's descriptors stay the same */
        syscall(SYS_close, fd);
        if (trace < 0)
            exit_usage(path);
    }
    dl_iterate_phdr(add_object, &count);
}

/* ---- a power cut ---- */

/* Files opened for writing so far: a duplicate descriptor, and how many bytes are synced. */
static struct {
    int fd;
    dev_t dev;
    ino_t ino;
    off_t synced;
} files[512];
static atomic_int file_count;

static int find_file(int fd, struct stat *st) {
    if (NEXT(fstat)(fd, st) != 0 || !S_ISREG(st->st_mode))
        return -1;
    for (int i = 0; i < file_count; i++)
        if (files[i].dev == st->st_dev && files[i].ino == st->st_ino)
            return i;
    return file_count;
}

void inject_file_opened(int fd) {
    struct stat st;
    if (!plan.crash || plan.moment != CUT)
        return;
    int i = find_file(fd, &st);
    if (i < 0 || i == sizeof files / sizeof *files)
        return;
    if (i == file_count) {
        files[i].fd = fcntl(fd, F_DUPFD_CLOEXEC, 100);
        files[i].dev = st.st_dev;
        files[i].ino = st.st_ino;
        files[i].synced = st.st_size;
        file_count++;
    } else if (st.st_size < files[i].synced) {
        files[i].synced = st.st_size; /* opened with O_TRUNC */
    }
}

void inject_file_synced(int fd) {
    struct stat st;
    if (!plan.crash || plan.moment != CUT)
        return;
    int i = find_file(fd, &st);
    if (i >= 0 && i < file_count)
        files[i].synced = st.st_size;
}

__attribute__((noreturn)) static void die(void) {
    for (int i = 0; plan.moment == CUT && i < file_count; i++) {
        struct stat st;
        if (NEXT(fstat)(files[i].fd, &st) == 0 && st.st_size > files[i].synced)
            syscall(SYS_ftruncate, files[i].fd, files[i].synced);
    }
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;)
        syscall(SYS_pause);
}

/* ---- counting and deciding ---- */

static void write_trace(enum fault_class c, long number, const char *call, const char *path,
                        const char *path2, int fd) {
    char line[2048], link[64], from[512] = "";
    if (trace < 0)
        return;
    if (fd >= 0) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t n = readlink(link, from, sizeof from - 1);
        from[n > 0 ? n : 0] = '\0';
        path2 = path; /* openat, unlinkat */
        path = from;
    }
    int length = snprintf(line, sizeof line, "%s\t%ld\t%s\t%s\t%s\n", classes[c].name, number, call,
                          path ? path : "", path2 ? path2 : "");
    syscall(SYS_write, trace, line, (size_t)length);
}

static enum outcome decide(enum fault_class c, long number) {
    if (plan.crash && classes[c].changes_disk) {
        bool at_crash = atomic_fetch_add(&disk_changes, 1) + 1 == plan.number;
        if (at_crash && (plan.moment == BEFORE || plan.moment == CUT))
            die();
        die_after = at_crash;
        die_torn = at_crash && plan.moment == TORN;
        return PASS;
    }
    if ((int)c != plan.which)
        return PASS;
    bool every = plan.number == 0 && (plan.outcome == SHORT || (plan.outcome == INTERRUPT && number % 2));
    return every || number == plan.number || (plan.sticky && number > plan.number) ? plan.outcome : PASS;
}

enum outcome inject_begin(enum fault_class c, const char *call, const char *path, const char *path2, int fd) {
    int saved = errno;
    long number = atomic_fetch_add(&counts[c], 1) + 1;
    write_trace(c, number, call, path, path2, fd);
    enum outcome v = decide(c, number);
    if (v == FAIL && plan.stop) {
        syscall(SYS_kill, getpid(), SIGSTOP);
        v = PASS; /* continued only to be killed */
    }
    if (v == FAIL && plan.late)
        nanosleep(&(struct timespec){.tv_nsec = 333000000}, NULL);
    errno = v == FAIL ? plan.err : v == INTERRUPT ? EINTR : saved;
    return v;
}

void inject_end(void) {
    if (die_after)
        die();
}

bool inject_is_torn(void) {
    return die_torn;
}

/* What the parts of the fault library share: see inject.c. */
#ifndef IHA_TESTS_FAULTS_INJECT_H
#define IHA_TESTS_FAULTS_INJECT_H

#include <dlfcn.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/types.h>

enum fault_class {
    ALLOC,      /* memory, for our own code */
    LIBRARY,    /* memory, for the libraries named in inject.c */
    MAP,        /* a file into memory */
    OPEN_READ,  /* also for reading a directory's names */
    OPEN_WRITE, /* also creating */
    READ,
    WRITE,
    CLOSE, /* of what was open for writing */
    SYNC,
    RENAME,
    MAKE_DIR,
    REMOVE,
    LINK,
    TRUNCATE,
    LOCK,
    SPACE, /* statvfs */
    STAT,
    LIST, /* the names in a directory */
    THREAD,
    MPI,
    FINALIZE,
    POLL, /* MPI_Test and the like: how often they are called depends on the moment */
    CLASS_COUNT
};

/* What becomes of a call. */
enum verdict { PASS, FAIL, SHORT, INTERRUPT };

/* Is the address in the program's own text? In that of a library whose allocations count? */
bool is_ours(const void *address);
bool is_library(const void *address);

/* Every counted call begins with enter(), which decides, writes the trace, sets errno for FAIL and may end
 * the process; one that passed and may have changed the disk ends with leave(), which may end the process
 * too. path and path2 may be NULL; with fd >= 0 the path is that of the descriptor. */
enum verdict enter(enum fault_class c, const char *call, const char *path, const char *path2, int fd);
void leave(void);

/* Does the process have to die in the middle of this write? */
bool torn(void);

/* For the power cut: this descriptor is open for writing; its bytes are on the disk. */
void opened(int fd);
void synced(int fd);

/* Streams that write through write() here, so that stdio fails as it does on a full disk. */
FILE *stream_open(const char *path, const char *mode);
FILE *stream_memory(char **data, size_t *length);

/* The next function of that name: what would have been called. */
#define NEXT(name)                                                                                           \
    ({                                                                                                       \
        static __typeof__(&name) next;                                                                       \
        if (!next)                                                                                           \
            next = (__typeof__(&name))dlsym(RTLD_NEXT, #name);                                               \
        next;                                                                                                \
    })

#define OURS is_ours(__builtin_return_address(0))

#endif

/* What the files of the fault-injection library share: see inject.c. */
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
    POLL, /* MPI_Test and the like: how often they are called depends on timing */
    CLASS_COUNT
};

/* What happens to a call. */
enum outcome { PASS, FAIL, SHORT, INTERRUPT };

/* Whether an address is in the program's own code, or in that of a library whose allocations count. */
bool inject_is_program(const void *address);
bool inject_is_library(const void *address);

/* Every counted call starts with inject_begin, which decides, writes the trace, sets errno for FAIL, and
 * may kill the process. One that passed and may have changed the disk ends with inject_end, which may kill
 * the process too. path and path2 may be NULL; with fd >= 0 the path is that of the descriptor. */
enum outcome inject_begin(enum fault_class c, const char *call, const char *path, const char *path2, int fd);
void inject_end(void);

/* Whether this write must stop half way, because inject_end will kill the process. */
bool inject_is_torn(void);

/* For the power cut: a descriptor was opened for writing; its data were synced to the disk. */
void inject_file_opened(int fd);
void inject_file_synced(int fd);

/* Streams whose writes can fail, as stdio's do on a full disk. */
FILE *inject_fopen(const char *path, const char *mode);
FILE *inject_open_memstream(char **data, size_t *length);

/* The real function: the next of this name in the search order of the dynamic linker. */
#define NEXT(name)                                                                                           \
    ({                                                                                                       \
        static __typeof__(&name) next;                                                                       \
        if (!next)                                                                                           \
            next = (__typeof__(&name))dlsym(RTLD_NEXT, #name);                                               \
        next;                                                                                                \
    })

#define FROM_PROGRAM inject_is_program(__builtin_return_address(0))

#endif

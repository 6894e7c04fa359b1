/* What the fuzz targets share. A target is one reader of the program: libFuzzer hands it bytes, the target
 * makes them the file that the reader opens, and checks what comes of it. That nothing crashes is left to the
 * sanitizers; what a target CHECKs is the contract: a refusal is a user error of one line, a success has
 * values within the documented ranges. Included once by each target. */
#ifndef IHA_TESTS_FUZZ_FUZZ_H
#define IHA_TESTS_FUZZ_FUZZ_H

#define _GNU_SOURCE
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kernels/error.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerInitialize(int *argc, char ***argv);
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed);

/* Not assert: it stays when NDEBUG is set, and writes to the descriptor, whatever became of stderr. */
#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            dprintf(STDERR_FILENO, "CHECK failed: %s:%d: %s: %s\n", __FILE__, __LINE__, __func__,            \
                    #condition);                                                                             \
            abort();                                                                                         \
        }                                                                                                    \
    } while (0)

/* A file that is wrong is the user's to correct: exit code 2, and one line that a terminal can show. */
static inline void check_user_error(const struct error *e) {
    CHECK(e->exit_code == EXIT_USER);
    size_t length = strnlen(e->text, sizeof e->text);
    CHECK(length > 0 && length < sizeof e->text);
    for (size_t i = 0; i < length; i++) {
        unsigned char c = (unsigned char)e->text[i], next = (unsigned char)e->text[i + 1];
        CHECK(c >= ' ' && c != 0x7f);
        CHECK(c != 0xc2 || next < 0x80 || next > 0x9f); /* U+0080 to U+009F, which terminals obey too */
    }
}

/* The bytes as a file in memory; its path can be opened any number of times, and for writing too. Each slot
 * is one file, the same in every run. */
static inline const char *fuzz_file(int slot, const void *data, size_t size) {
    static struct {
        int fd;
        char path[32];
    } files[2];
    if (!files[slot].path[0]) {
        files[slot].fd = memfd_create("fuzz", MFD_CLOEXEC);
        CHECK(files[slot].fd >= 0);
        snprintf(files[slot].path, sizeof files[slot].path, "/proc/self/fd/%d", files[slot].fd);
    }
    CHECK(ftruncate(files[slot].fd, 0) == 0);
    CHECK(size == 0 || pwrite(files[slot].fd, data, size, 0) == (ssize_t)size);
    return files[slot].path;
}

/* The bytes with a NUL behind them; the caller frees. A size of its own, so that the sanitizer sees the end.
 */
static inline char *fuzz_text(const uint8_t *data, size_t size) {
    char *text = malloc(size + 1);
    CHECK(text);
    if (size)
        memcpy(text, data, size);
    text[size] = 0;
    return text;
}

/* Where the first RECORD_SEPARATOR stands, or size: inputs of several parts are cut there. */
enum { RECORD_SEPARATOR = 0x1e };
static inline size_t fuzz_part(const uint8_t *data, size_t size) {
    const uint8_t *found = size ? memchr(data, RECORD_SEPARATOR, size) : NULL;
    return found ? (size_t)(found - data) : size;
}

#endif

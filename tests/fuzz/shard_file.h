/* A file of tokens or of labels, made of a fuzzer's input. Bits of the form: RAW, the file is given as it is; else
 * its 12 bytes of header that count, and the ids. COUNTED: the header's count is set to what the file holds.
 * REPEATED: the ids are repeated to several of the reader's blocks. */
#ifndef IHA_TESTS_FUZZ_SHARD_FILE_H
#define IHA_TESTS_FUZZ_SHARD_FILE_H

#include "tests/fuzz/fuzz.h"

enum { RAW = 128, REPEATED = 64, COUNTED = 32, FIELDS = 12, HEADER = 1024, ENOUGH = 9000 };

struct file {
    uint8_t *bytes;
    size_t size, copies; /* copies: how often the ids are repeated */
};

/* width_of: bytes of an id in a file with this header. */
static inline struct file build_file(uint8_t form, const uint8_t *data, size_t size,
                                     size_t (*width_of)(const uint8_t *header)) {
    struct file f = {.size = size, .copies = 1};
    size_t body = size > FIELDS ? size - FIELDS : 0;
    if (form & REPEATED && body >= 4 && !(form & RAW))
        f.copies = 2 + 4 * ENOUGH / body;
    if (!(form & RAW))
        f.size = size < FIELDS ? size : HEADER + f.copies * body;
    f.bytes = calloc(f.size + 1, 1);
    CHECK(f.bytes);
    if (form & RAW || size < FIELDS) {
        if (size)
            memcpy(f.bytes, data, size);
    } else {
        memcpy(f.bytes, data, FIELDS);
        for (size_t i = 0; i < f.copies; i++)
            memcpy(f.bytes + HEADER + i * body, data + FIELDS, body);
    }
    if (form & COUNTED && f.size >= HEADER) {
        int32_t count = (int32_t)((f.size - HEADER) / width_of(f.bytes));
        memcpy(f.bytes + 8, &count, 4);
    }
    return f;
}

#endif

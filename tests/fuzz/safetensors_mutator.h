/* Mutations of a safetensors file. Changed as plain bytes, the header's length and the data's would never fit
 * again; so header and data are changed one at a time, and then made to fit, mostly. */
#ifndef IHA_TESTS_FUZZ_SAFETENSORS_MUTATOR_H
#define IHA_TESTS_FUZZ_SAFETENSORS_MUTATOR_H

#include "tests/fuzz/fuzz.h"

enum { LENGTH = 8 };

static inline uint64_t header_length(const uint8_t *file, size_t size) {
    uint64_t length = 0;
    if (size >= LENGTH)
        memcpy(&length, file, LENGTH);
    return size >= LENGTH && length <= size - LENGTH ? length : UINT64_MAX;
}

/* The largest number that follows a comma or a bracket in the header: where the data should end. */
static inline size_t data_end(const uint8_t *header, size_t length) {
    size_t largest = 0;
    for (size_t i = 0; i + 1 < length; i++) {
        if (header[i] != ',' && header[i] != '[')
            continue;
        size_t number = 0;
        for (size_t k = i + 1; k < length && header[k] >= '0' && header[k] <= '9' && number < 1 << 20; k++)
            number = 10 * number + (size_t)(header[k] - '0');
        largest = number > largest ? number : largest;
    }
    return largest;
}

static inline size_t mutate_safetensors(uint8_t *file, size_t size, size_t max_size, unsigned seed) {
    uint64_t length = header_length(file, size);
    if (length == UINT64_MAX || seed % 16 == 0 || max_size < 2 * LENGTH)
        return LLVMFuzzerMutate(file, size, max_size);
    size_t data = size - LENGTH - length;
    if (seed % 4 == 1) /* the data alone */
        return LENGTH + length + LLVMFuzzerMutate(file + LENGTH + length, data, max_size - LENGTH - length);
    uint8_t *copy = malloc(data + 1);
    CHECK(copy);
    memcpy(copy, file + LENGTH + length, data);
    size_t room = max_size - LENGTH > data ? max_size - LENGTH - data : length;
    size_t old_end = data_end(file + LENGTH, length);
    length = LLVMFuzzerMutate(file + LENGTH, length, room);
    memcpy(file, &length, LENGTH);
    size_t end = data_end(file + LENGTH, length), fit = data;
    if (seed % 8 != 2 && end != old_end && LENGTH + length + end <= max_size)
        fit = end;
    for (size_t i = 0; i < fit; i++)
        file[LENGTH + length + i] = i < data ? copy[i] : (uint8_t)i;
    free(copy);
    return LENGTH + length + fit;
}

#endif

/* Segments of made-up lengths, for tests of operations and of models. */
#ifndef IHA_TESTS_LIB_SEGMENTS_H
#define IHA_TESTS_LIB_SEGMENTS_H

#include <stdint.h>

/* Lengths in tokens, over and over until the sequence ends; 0 ends the list. Sequence b begins with the b-th
 * length of the list. */
enum { SEGMENT_LENGTHS = 8 };

/* The segment [*first, *last) of token t of sequence b. */
static inline void segment_of_token(const int64_t lengths[SEGMENT_LENGTHS], int64_t b, int64_t tokens,
                                    int64_t t, int32_t *first, int32_t *last) {
    int64_t count = 0, begin = 0;
    while (count < SEGMENT_LENGTHS && lengths[count] > 0)
        count++;
    for (int64_t i = b;; i++) {
        int64_t end = begin + lengths[i % count];
        if (t < end) {
            *first = (int32_t)begin;
            *last = (int32_t)(end < tokens ? end : tokens);
            return;
        }
        begin = end;
    }
}

/* segments [2,B,T], as attention takes them. The first half is what a model's batch takes. */
static inline void fill_segments(const int64_t lengths[SEGMENT_LENGTHS], int64_t batch, int64_t tokens,
                                 int32_t *segments) {
    for (int64_t b = 0; b < batch; b++)
        for (int64_t t = 0; t < tokens; t++)
            segment_of_token(lengths, b, tokens, t, &segments[b * tokens + t],
                             &segments[(batch + b) * tokens + t]);
}

#endif

/* Search among ranges that lie one behind the other, such as the sequences of one file after another. */
#ifndef IHA_DATA_RANGE_H
#define IHA_DATA_RANGE_H

#include <stddef.h>
#include <stdint.h>

/* The last of `count` ranges that begins at or before x. first: where range 0 begins; those of the others follow,
 * `stride` bytes apart, in ascending order. */
static inline int64_t range_find(const int64_t *first, size_t stride, int64_t count, int64_t x) {
    int64_t low = 0, high = count;
    while (high - low > 1) {
        int64_t middle = low + (high - low) / 2;
        if (*(const int64_t *)((const char *)first + (size_t)middle * stride) <= x)
            low = middle;
        else
            high = middle;
    }
    return low;
}

#endif

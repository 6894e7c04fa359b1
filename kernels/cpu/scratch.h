/* Scratch memory of a thread, cut into arrays. */
#ifndef IHA_KERNELS_CPU_SCRATCH_H
#define IHA_KERNELS_CPU_SCRATCH_H

#include "kernels/cpu/real.h"

/* An array of a thread's scratch. */
struct part {
    void *where; /* the pointer to set */
    int64_t count;
};

/* Sets the pointers to arrays behind `base`, which may be NULL, and returns their bytes. Arrays begin at cache
 * lines; one line between them keeps arrays of a power of two from starting in the same cache set. Each thread
 * has pages of its own. */
static inline size_t lay_out(const struct part *parts, size_t count, char *base) {
    size_t offset = 0;
    for (size_t i = 0; i < count; i++) {
        void *at = base ? base + offset : NULL;
        memcpy(parts[i].where, &at, sizeof at);
        offset += (size_t)round_up(parts[i].count * (int64_t)sizeof(real), 64) + 64;
    }
    return (size_t)round_up((int64_t)offset, 4096);
}

#endif

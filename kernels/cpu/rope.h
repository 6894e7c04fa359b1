/* Rotary position embedding of one head (Su et al. 2021): the pair (i, i + d/2) is rotated by the angle whose
 * cosine and sine are in the table's row for the position. */
#ifndef IHA_KERNELS_CPU_ROPE_H
#define IHA_KERNELS_CPU_ROPE_H

#include <stdbool.h>

#include "kernels/cpu/real.h"

typedef real vhalf __attribute__((vector_size(VECTOR_BYTES / 2), aligned(sizeof(real)), may_alias));

/* sign = 1 rotates, -1 rotates back. x may be out. stream: out's halves are whole aligned vectors, and are stored past
 * the caches. */
static inline void rope_rotate(const real *x, const real *row, int64_t head_dim, real sign, bool stream,
                               real *out) {
    int64_t half = head_dim / 2, i = 0;
    const real *cosine = row, *sine = row + half;
    for (; i + VL <= half; i += VL) {
        vreal a = vload(x + i), b = vload(x + i + half), c = vload(cosine + i), s = sign * vload(sine + i);
        vreal first = a * c - b * s, second = b * c + a * s;
        if (stream) {
            vstream(out + i, first);
            vstream(out + i + half, second);
        } else {
            vstore(out + i, first);
            vstore(out + i + half, second);
        }
    }
    for (; i + VL / 2 <= half; i += VL / 2) { /* half a vector is left: with AVX-512, all of a head of 16 */
        vhalf a = *(const vhalf *)(x + i), b = *(const vhalf *)(x + i + half);
        vhalf c = *(const vhalf *)(cosine + i), s = sign * *(const vhalf *)(sine + i);
        *(vhalf *)(out + i) = a * c - b * s;
        *(vhalf *)(out + i + half) = b * c + a * s;
    }
    for (; i < half; i++) {
        real a = x[i], b = x[i + half], c = cosine[i], s = sign * sine[i];
        out[i] = a * c - b * s;
        out[i + half] = b * c + a * s;
    }
}

#endif

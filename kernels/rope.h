/* The frequencies of RoPE, which every backend tabulates in double (rope_table in ops.def). */
#ifndef IHA_KERNELS_ROPE_H
#define IHA_KERNELS_ROPE_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>

/* llama3: the scaling of Llama 3.1, as Transformers computes it. Wavelengths above original / low_factor tokens are
 * stretched by `factor`, those below original / high_factor stay, and between them the two are blended. */
struct rope_spec {
    double theta;
    bool llama3;
    double factor, low_factor, high_factor;
    double original; /* tokens */
};

/* Radians a token of the pair (i, i + half). */
static inline double rope_frequency(const struct rope_spec *s, int64_t i, int64_t half) {
    double frequency = pow(s->theta, -(double)i / (double)half);
    if (!s->llama3)
        return frequency;
    double wavelengths = s->original * frequency / 6.283185307179586; /* in `original` tokens */
    double smooth = (wavelengths - s->low_factor) / (s->high_factor - s->low_factor);
    smooth = smooth < 0 ? 0 : smooth > 1 ? 1 : smooth;
    return (1 - smooth) * frequency / s->factor + smooth * frequency;
}

#endif

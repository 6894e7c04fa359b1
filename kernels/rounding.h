/* Conversion from fp32 to bf16 and back.
 *
 * Stochastic rounding goes up or down at random, with probabilities that make the result exact on average.
 * The random bits are a hash of (step, index), not from a generator with a state, so a parameter's bf16 value
 * is a function of its master, its index and the updates so far: a run resumed from its master weights has
 * the same values as one that never stopped. */
#ifndef IHA_KERNELS_ROUNDING_H
#define IHA_KERNELS_ROUNDING_H

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define ROUNDING static inline __host__ __device__
#else
#define ROUNDING static inline
#endif

/* The bits of x rounded to the nearest bf16, ties to even. */
ROUNDING uint16_t round_to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(bits >> 16 | 0x40u); /* a NaN stays one */
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

ROUNDING float from_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* The bits of x rounded to bf16, up or down at random. index: of the parameter in the model, independent of ranks and
 * padding; step: AdamW's t, at least 1. */
ROUNDING uint16_t round_stochastic(float x, uint32_t step, uint64_t index) {
    uint32_t bits,
        h = (uint32_t)index * 0x9e3779b1u ^ (uint32_t)(index >> 32) * 0x85ebca6bu ^ step * 0xc2b2ae35u;
    memcpy(&bits, &x, sizeof bits);
    h ^= h >> 16; /* MurmurHash3's final mixing of 32 bits */
    h *= 0x85ebca6bu;
    h ^= h >> 13;
    h *= 0xc2b2ae35u;
    h ^= h >> 16;
    if ((bits & 0x7f800000u) != 0x7f800000u)
        bits += h & 0xffffu;
    return (uint16_t)(bits >> 16);
}

#endif

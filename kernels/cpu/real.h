/* The number types of the CPU backend, and vectors of them.
 *
 *   real   what is computed in; also gradients of parameters, statistics and the table of angles
 *   elem   what parameters and activations are stored in
 *
 * The operations are built three times, attention and mixing four times:
 *
 *                       real     elem
 *                       float    float    training and evaluation in fp32
 *   -DKERNELS_BF16      float    bf16     training in bf16; CPU(name) names other functions
 *   and -DKERNELS_PAIRS float    bf16     the same with vdpbf16ps, for processors where it is fast (word.h)
 *   -DKERNELS_DOUBLE    double   double   gradient tests
 *
 * Vectors are GCC's vector extension, as wide as the target processor's registers. */
#ifndef IHA_KERNELS_CPU_REAL_H
#define IHA_KERNELS_CPU_REAL_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "kernels/rounding.h"
#include "kernels/tensor.h"

#ifdef KERNELS_DOUBLE
typedef double real;
typedef int64_t real_bits;
#define REAL_DTYPE DTYPE_F64
#define REAL_SQRT sqrt
#else
typedef float real;
typedef int32_t real_bits;
#define REAL_DTYPE DTYPE_F32
#define REAL_SQRT sqrtf
#endif

/* A struct, so that the compiler refuses arithmetic on what is not converted. */
#ifdef KERNELS_BF16
typedef struct {
    uint16_t bits;
} __attribute__((may_alias)) elem;
#define ELEM_DTYPE DTYPE_BF16
#ifdef KERNELS_PAIRS
#define CPU(name) cpu_pairs_##name
#else
#define CPU(name) cpu_bf16_##name
#endif
#else
typedef real elem;
#define ELEM_DTYPE REAL_DTYPE
#define CPU(name) cpu_##name
#endif

#if defined __AVX512F__
#define VECTOR_BYTES 64
#elif defined __AVX__
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

#define ALWAYS_INLINE static inline __attribute__((always_inline))

enum { VL = VECTOR_BYTES / sizeof(real) }; /* lanes */

typedef real vreal __attribute__((vector_size(VECTOR_BYTES)));
typedef real_bits vbits __attribute__((vector_size(VECTOR_BYTES)));
typedef real vreal_unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));

static inline vreal vload(const real *p) {
    return *(const vreal_unaligned *)p;
}

static inline void vstore(real *p, vreal v) {
    *(vreal_unaligned *)p = v;
}

/* A store that goes to memory past the caches, which spares reading the line first. p is aligned to a whole vector.
 * vstream_end: before another thread reads what this one has stored so. */
static inline void vstream(real *p, vreal v) {
#if defined __AVX512F__
    _mm512_stream_si512((__m512i *)p, (__m512i)v);
#elif defined __AVX__
    _mm256_stream_si256((__m256i *)p, (__m256i)v);
#elif defined __SSE2__
    _mm_stream_si128((__m128i *)p, (__m128i)v);
#else
    vstore(p, v);
#endif
}

static inline void vstream_end(void) {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

/* ---- elements ---- */

#ifdef KERNELS_BF16

static inline real from_elem(elem x) {
    return from_bf16(x.bits);
}

/* To nearest, ties to even. */
static inline elem to_elem(real x) {
    return (elem){round_to_bf16(x)};
}

typedef uint16_t vhalves __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint16_t vhalves_unaligned
    __attribute__((vector_size(VECTOR_BYTES / 2), aligned(sizeof(uint16_t)), may_alias));
typedef uint32_t vwords __attribute__((vector_size(VECTOR_BYTES)));

static inline vreal vload_elem(const elem *p) {
    vhalves halves = *(const vhalves_unaligned *)p;
#ifdef __AVX512F__
    return (vreal)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)halves),
                                    16); /* GCC would convert halves of it */
#else
    return (vreal)(__builtin_convertvector(halves, vwords) << 16);
#endif
}

/* As to_elem. The instruction makes numbers below 2^-126 zero, which are of no account. */
static inline void vstore_elem(elem *p, vreal v) {
#ifdef __AVX512BF16__
    *(vhalves_unaligned *)p = (vhalves)_mm512_cvtneps_pbh((__m512)v);
#else
    vwords bits = (vwords)v, nan = (vwords)((bits & 0x7fffffffu) > 0x7f800000u);
    vwords rounded = bits + 0x7fffu + (bits >> 16 & 1u);
    rounded = ((rounded & ~nan) | ((bits | 0x400000u) & nan)) >> 16;
    *(vhalves_unaligned *)p = __builtin_convertvector(rounded, vhalves);
#endif
}

/* n elements as reals: converted into `scratch`, or where they are. */
static inline const real *read_elems(const elem *p, int64_t n, real *scratch) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL)
        vstore(scratch + i, vload_elem(p + i));
    for (; i < n; i++)
        scratch[i] = from_elem(p[i]);
    return scratch;
}

/* Where to compute n elements that write_elems() then stores at p. */
static inline real *elems_buffer(elem *p, real *scratch) {
    (void)p;
    return scratch;
}

static inline void write_elems(elem *p, int64_t n, const real *buffer) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL)
        vstore_elem(p + i, vload(buffer + i));
    for (; i < n; i++)
        p[i] = to_elem(buffer[i]);
}

#else

static inline real from_elem(elem x) {
    return x;
}

static inline elem to_elem(real x) {
    return x;
}

static inline vreal vload_elem(const elem *p) {
    return vload(p);
}

static inline void vstore_elem(elem *p, vreal v) {
    vstore(p, v);
}

static inline const real *read_elems(const elem *p, int64_t n, real *scratch) {
    (void)n, (void)scratch;
    return p;
}

static inline real *elems_buffer(elem *p, real *scratch) {
    (void)scratch;
    return p;
}

static inline void write_elems(elem *p, int64_t n, const real *buffer) {
    (void)p, (void)n, (void)buffer;
}

#endif

/* n <= VL elements; the other lanes are 0. */
static inline vreal load_part(const elem *x, int64_t n) {
    elem part[VL] = {0};
    if (n >= VL)
        return vload_elem(x);
    memcpy(part, x, (size_t)n * sizeof(elem));
    return vload_elem(part);
}

static inline void store_part(elem *out, vreal v, int64_t n) {
    elem part[VL];
    if (n >= VL) {
        vstore_elem(out, v);
        return;
    }
    vstore_elem(part, v);
    memcpy(out, part, (size_t)n * sizeof(elem));
}

/* The same in reals. */
static inline vreal load_reals(const real *x, int64_t n) {
    vreal v = {0};
    if (n >= VL)
        return vload(x);
    memcpy(&v, x, (size_t)n * sizeof(real));
    return v;
}

static inline void store_reals(real *out, vreal v, int64_t n) {
    if (n >= VL)
        vstore(out, v);
    else
        memcpy(out, &v, (size_t)n * sizeof(real));
}

/* ---- vectors ---- */

static inline vreal vsplat(real x) {
    return x - (vreal){0}; /* not +, which would turn -0 into 0 */
}

/* v with lane i holding lane (i + by) mod VL. */
ALWAYS_INLINE vreal vrotate(vreal v, const int by) {
#ifdef __clang__
    vreal r;
    for (int i = 0; i < VL; i++)
        r[i] = v[(i + by) % VL];
    return r;
#else
    vbits from;
    for (int i = 0; i < VL; i++)
        from[i] = (i + by) % VL;
    return __builtin_shuffle(v, from);
#endif
}

/* Combines the lanes by halves: 16, 8, 4, 2, 1. Written out, so that every rotation is by a constant. */
#define VFOLD(v, op)                                                                                         \
    do {                                                                                                     \
        if (VL > 8)                                                                                          \
            v = op(v, vrotate(v, 8));                                                                        \
        if (VL > 4)                                                                                          \
            v = op(v, vrotate(v, 4));                                                                        \
        if (VL > 2)                                                                                          \
            v = op(v, vrotate(v, 2));                                                                        \
        v = op(v, vrotate(v, 1));                                                                            \
    } while (0)

static inline vreal vadd(vreal a, vreal b) {
    return a + b;
}

static inline real vsum(vreal v) {
    VFOLD(v, vadd);
    return v[0];
}

/* a's lanes whose index lacks the bit h, added to their partners (index + h), and b's lanes whose index has it,
 * added to theirs. h is a power of two. */
ALWAYS_INLINE vreal vadd_pairs(vreal a, vreal b, const int h) {
#ifdef __clang__
    vreal straight, crossed;
    for (int i = 0; i < VL; i++) {
        straight[i] = i & h ? b[i] : a[i];
        crossed[i] = i & h ? b[i ^ h] : a[i ^ h];
    }
    return straight + crossed;
#else
    vbits straight, other, cross;
    for (int i = 0; i < VL; i++) {
        straight[i] = i & h ? VL + i : i;
        other[i] = i & h ? i : VL + i;
        cross[i] = i ^ h;
    }
    return __builtin_shuffle(a, b, straight) + __builtin_shuffle(__builtin_shuffle(a, b, other), cross);
#endif
}

/* v, in a register from here on. GCC otherwise reads a vector that several multiply-adds use from memory for each of
 * them, and the loads take longer than the arithmetic. */
ALWAYS_INLINE vreal vkeep(vreal v) {
#if defined __x86_64__
    __asm__("" : "+v"(v));
#elif defined __aarch64__
    __asm__("" : "+w"(v));
#endif
    return v;
}

/* Lane i of the result is the sum of v[i]'s lanes: VL sums for little more than the price of one. v is written
 * over. */
ALWAYS_INLINE vreal vsum_each(vreal v[VL]) {
    UNROLL
    for (int i = 0; VL > 8 && i < 8; i++)
        v[i] = vadd_pairs(v[i], v[(i + 8) % VL], 8);
    UNROLL
    for (int i = 0; VL > 4 && i < 4; i++)
        v[i] = vadd_pairs(v[i], v[(i + 4) % VL], 4);
    UNROLL
    for (int i = 0; VL > 2 && i < 2; i++)
        v[i] = vadd_pairs(v[i], v[(i + 2) % VL], 2);
    return vadd_pairs(v[0], v[1], 1);
}

/* mask ? a : b, lane by lane. Comparing two vectors gives a mask: all bits of a lane are set, or none. */
static inline vreal vselect(vbits mask, vreal a, vreal b) {
    return (vreal)(((vbits)a & mask) | ((vbits)b & ~mask));
}

/* A NaN in b stays. */
static inline vreal vmax(vreal a, vreal b) {
#if defined __AVX512F__ && !defined KERNELS_DOUBLE
    return (vreal)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return vselect(a > b, a, b);
#endif
}

/* Whether any lane of a mask is set. */
static inline bool vany(vbits mask) {
#if defined __AVX512F__ && !defined KERNELS_DOUBLE
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
    for (int i = 0; i < VL; i++)
        if (mask[i])
            return true;
    return false;
#endif
}

static inline real vmax_lanes(vreal v) {
    VFOLD(v, vmax);
    return v[0];
}

static inline int64_t round_up(int64_t n, int64_t to) {
    return (n + to - 1) / to * to;
}

static inline int64_t min64(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static inline int64_t max64(int64_t a, int64_t b) {
    return a > b ? a : b;
}

#ifdef KERNELS_DOUBLE

/* The double build checks gradients; it may be slow but must be exact. */
static inline vreal vexp(vreal x) {
    for (int i = 0; i < VL; i++)
        x[i] = exp(x[i]);
    return x;
}

/* Not inlined: attention has it dozens of times in a block, and compiling would take minutes. */
static __attribute__((noinline, unused)) vreal vexp2(vreal x) {
    for (int i = 0; i < VL; i++)
        x[i] = exp2(x[i]);
    return x;
}

#else

/* 2^f for f in [-1/2, 1/2] times 2^n, where `shifted` = n + 1.5 * 2^23 holds n in its low bits. The series of
 * e^(f ln 2) to the 6th power: relative error below 2e-7. Arguments must lie within [-126, 127]. A product
 * rather than a sum of exponents, so that every NaN in p stays one. */
static inline vreal vscale_exp(vreal p, vreal shifted) {
    vbits one = (vbits)vsplat(1);
    return p * (vreal)(one + ((vbits)shifted << 23));
}

#define EXP_SHIFT 12582912.0f /* 1.5 * 2^23: adding it rounds to an integer */

static inline vreal vexp_series(vreal r) {
    vreal p = vsplat(1.0f / 720);
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    return p * r + 1.0f;
}

/* The best polynomial of degree 5 for 2^f in [-1/2, 1/2] that is 1 at 0: relative error below 1.7e-7, as evaluated. */
static inline vreal vexp2_series(vreal f) {
    vreal p = vsplat(0.00132647272f);
    p = p * f + 0.00967151281f;
    p = p * f + 0.0555073374f;
    p = p * f + 0.240222421f;
    p = p * f + 0.693146978f;
    return p * f + 1.0f;
}

#ifdef __AVX512DQ__

/* 2^x; a masked -inf gives exactly 0, NaN stays NaN. Two instructions do what takes seven otherwise: reduce subtracts the
 * nearest integer (of an infinity: all), and scalef multiplies by a power of two, over the whole range. */
static inline vreal vexp2(vreal x) {
    __m512 f = _mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return (vreal)_mm512_scalef_ps((__m512)vexp2_series((vreal)f), (__m512)(x - (vreal)f));
}

#else

/* The same, but 0 below -126.5 and 2^127 above 127. The low bits of `shifted` are n + 127, which is the exponent of
 * 2^n, and 0 for n = -127. */
static inline vreal vexp2(vreal x) {
    const float shift = EXP_SHIFT + 127;
    vreal y = vmax(vsplat(-127.0f), x);
    y = vselect(y > 127.0f, vsplat(127.0f), y);
    vreal shifted = y + shift;
    return vexp2_series(y - (shifted - shift)) * (vreal)((vbits)shifted << 23);
}

#endif

/* e^x, reduced in two parts (Cody and Waite) so that large arguments keep their precision. */
static inline vreal vexp(vreal x) {
    vreal low = vsplat(-87.0f), high = vsplat(88.0f);
    vreal y = vselect(x < low, low, x);
    y = vselect(y > high, high, y);
    vreal shifted = y * 1.44269504f + EXP_SHIFT;
    vreal n = shifted - EXP_SHIFT;
    vreal f = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    vreal r = vscale_exp(vexp_series(f), shifted);
    return vselect(x < low, vsplat(0), r);
}

#endif
#endif

/* What the operands of small matrix products are held in: words, each of PAIR numbers that are neighbours along the
 * products' sum.
 *
 *                                word            PAIR   one multiply-add of a vector of words is
 *   default                      a real          1      a multiply-add of reals
 *   -DKERNELS_PAIRS (in bf16)    two bf16        2      vdpbf16ps: two products for each fp32 sum;
 *                                                      subnormal numbers count as zero
 *
 * An array of words whose sums run along its columns holds rows as they are: of two bf16 it has half as many columns.
 * One whose sums run along its rows has half as many rows, each of two rows of numbers interleaved (the VNNI layout).
 * An odd count is padded with a zero.
 *
 * A vector of words is passed as a vreal of the same bits. */
#ifndef IHA_KERNELS_CPU_WORD_H
#define IHA_KERNELS_CPU_WORD_H

#include "kernels/cpu/real.h"

#ifdef KERNELS_PAIRS
enum { PAIR = 2 };
typedef uint32_t word __attribute__((may_alias));
#else
enum { PAIR = 1 };
typedef real word;
#endif

/* Whether elements have to be converted to be words. */
enum { WORDS_CONVERT = PAIR * sizeof(elem) < sizeof(word) };

/* Loaded and stored as vectors of reals: GCC passes a vector of integers through memory where it is used as one of
 * reals. */
typedef real vwords_unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(2), may_alias));

/* Words for n numbers. */
static inline int64_t words_of(int64_t n) {
    return (n + PAIR - 1) / PAIR;
}

static inline vreal vload_words(const word *p) {
    return *(const vwords_unaligned *)p;
}

static inline void vstore_words(word *p, vreal v) {
    *(vwords_unaligned *)p = v;
}

static inline vreal vsplat_word(word w) {
#ifdef KERNELS_PAIRS
    float x;
    memcpy(&x, &w, sizeof x);
    return (vreal)_mm512_set1_ps(x); /* no arithmetic, which could change the bits of a NaN */
#else
    return vsplat(w);
#endif
}

/* sum + a b, for every lane. */
ALWAYS_INLINE vreal vmultiply_add(vreal sum, vreal a, vreal b) {
#ifdef KERNELS_PAIRS
    return (vreal)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    return sum + a * b;
#endif
}

/* The sum of the products of two words' numbers. */
static inline real word_product(word a, word b) {
#ifdef KERNELS_PAIRS
    return from_bf16((uint16_t)a) * from_bf16((uint16_t)b) +
           from_bf16((uint16_t)(a >> 16)) * from_bf16((uint16_t)(b >> 16));
#else
    return a * b;
#endif
}

/* The words of two rows interleaved, lane by lane; where words are reals, those of `low`. */
ALWAYS_INLINE vreal vpair(vreal low, vreal high) {
#ifdef KERNELS_PAIRS
    const __m512i turn = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                          22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (vreal)_mm512_permutexvar_epi16(turn, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
#else
    (void)high;
    return low;
#endif
}

/* n <= VL elements of each of two rows, interleaved. high: NULL for a row of zeros. */
static inline vreal load_pair(const elem *low, const elem *high, int64_t n) {
#ifdef KERNELS_PAIRS
    vwords above = high ? (vwords)load_part(high, n) : (vwords){0};
    return (vreal)(above | (vwords)load_part(low, n) >> 16);
#else
    (void)high;
    return load_part(low, n);
#endif
}

/* The first n of a vector's words. */
static inline void store_words_part(word *out, vreal v, int64_t n) {
    if (n >= VL)
        vstore_words(out, v);
    else
        memcpy(out, &v, (size_t)n * sizeof(word));
}

/* n words; the other lanes are 0. */
static inline vreal load_words_part(const word *x, int64_t n) {
    if (n >= VL)
        return vload_words(x);
#ifdef KERNELS_PAIRS
    return (vreal)_mm512_maskz_loadu_ps((__mmask16)((1 << n) - 1), x);
#else
    vreal v = {0};
    memcpy(&v, x, (size_t)n * sizeof(word));
    return v;
#endif
}

/* `count` vectors of a row of reals as words. */
ALWAYS_INLINE void vstore_row_words(const int count, const vreal x[4], word *out) {
#ifdef KERNELS_PAIRS
    UNROLL
    for (int j = 0; j < count; j += 2)
        if (j + 1 < count)
            vstore_words(out + j / 2 * VL, (vreal)_mm512_cvtne2ps_pbh((__m512)x[j + 1], (__m512)x[j]));
        else
            _mm256_storeu_si256((__m256i *)(out + j / 2 * VL), (__m256i)_mm512_cvtneps_pbh((__m512)x[j]));
#else
    UNROLL
    for (int j = 0; j < count; j++)
        vstore_words(out + j * VL, x[j]);
#endif
}

/* A row of n elements as words. */
static inline void row_to_words(const elem *x, int64_t n, word *out) {
#ifdef KERNELS_PAIRS
    int64_t c = 0;
    for (; c + VL <= n; c += VL)
        memcpy(out + c / 2, x + c, VL * sizeof(elem));
    if (c < n) {
        out[words_of(n) - 1] = 0;
        memcpy(out + c / 2, x + c, (size_t)(n - c) * sizeof(elem));
    }
#else
    for (int64_t c = 0; c < n; c += VL)
        store_words_part(out + c, load_part(x + c, n - c), n - c);
#endif
}

/* `rows` rows of d elements as words along d, into `scratch` where elements have to be converted, or where they are; d
 * is even where words are pairs. */
static inline const word *rows_as_words(const elem *x, int64_t rows, int64_t d, word *scratch) {
#ifdef KERNELS_PAIRS
    (void)rows, (void)d, (void)scratch;
    return (const word *)x;
#else
    return read_elems(x, rows * d, scratch);
#endif
}

/* Words along d as words along the rows, into scratch [words_of(rows), d]; of reals they are the same. */
static inline const word *rows_to_pairs(const word *x, int64_t rows, int64_t d, word *scratch) {
#ifdef KERNELS_PAIRS
    for (int64_t i = 0; i < rows; i += PAIR) {
        const elem *low = (const elem *)x + i * d, *high = i + 1 < rows ? low + d : NULL;
        for (int64_t c = 0; c < d; c += VL)
            store_words_part(scratch + i / PAIR * d + c, load_pair(low + c, high ? high + c : NULL, d - c),
                             d - c);
    }
    return scratch;
#else
    (void)rows, (void)d, (void)scratch;
    return x;
#endif
}

/* Where to compute n numbers that write_words() then stores as a row of words at p. */
static inline real *words_buffer(word *p, real *scratch) {
    return PAIR == 1 ? (real *)p : scratch;
}

static inline void write_words(word *p, int64_t n, const real *buffer) {
#ifdef KERNELS_PAIRS
    write_elems((elem *)p, n, buffer);
#else
    (void)p, (void)n, (void)buffer;
#endif
}

#endif

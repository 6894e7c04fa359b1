/* Mixing along the head axis, for qkv_mix and collapse: for each token, a small matrix times the heads,
 *
 *   out[t,i,:] = sum_j M[i,j] in[t,j,:]        and its weight gradient
 *   dM[i,j] += sum_t <dout[t,i,:], in[t,j,:]>
 *
 * with (I,J) = (P*H, H) to expand, (H, P*H) to collapse, and M transposed for the input gradients. Operands are words
 * (word.h): along the heads for the first, along d for the second, whose rows have W words. */
#ifndef IHA_KERNELS_CPU_HEAD_MIX_H
#define IHA_KERNELS_CPU_HEAD_MIX_H

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/tile.h"

/* Where the products' results go, and what they bring into the caches on the way. These operations need about as
 * long for their bytes as for their arithmetic, so memory must be read while products are computed. The hardware
 * does not foresee what comes after a token's few kilobytes. */
struct mix_memory {
    bool stream;       /* store past the caches */
    const elem *write; /* where rows like those of the result are stored later, or NULL */
    const char *at[2]; /* what is read next: `bytes` of it are prefetched, spread over the products */
    int64_t bytes[2];
};

/* As tile_block; prefetches `step` bytes each time that k advances. */
ALWAYS_INLINE void mix_block(const int mr, const int nv, int64_t k, const word *a, int64_t row, int64_t col,
                             const word *b, real *c, int64_t ld, const elem *write, bool stream,
                             const char *const *at, const int64_t *step) {
    vreal acc[TILE_ROWS_1][4];
    const char *first = at[0], *second = at[1];
    UNROLL
    for (int i = 0; i < mr; i++)
        UNROLL
    for (int j = 0; j < nv; j++) {
        acc[i][j] = vsplat(0);
        if (write)
            __builtin_prefetch(write + i * ld + j * VL, 1);
    }
    for (int64_t l = 0; l < k; l++) {
        vreal bv[4];
        UNROLL
        for (int j = 0; j < nv; j++)
            bv[j] = vkeep(vload_words(b + l * ld + j * VL));
        __builtin_prefetch(first, 0, 2);
        __builtin_prefetch(first + step[0] / 2, 0, 2);
        __builtin_prefetch(second, 0, 2);
        first += step[0];
        second += step[1];
        UNROLL
        for (int i = 0; i < mr; i++) {
            vreal av = vsplat_word(a[i * row + l * col]);
            UNROLL
            for (int j = 0; j < nv; j++)
                acc[i][j] = vmultiply_add(acc[i][j], av, bv[j]);
        }
    }
    UNROLL
    for (int i = 0; i < mr; i++)
        UNROLL
    for (int j = 0; j < nv; j++)
        if (stream)
            vstream(c + i * ld + j * VL, acc[i][j]);
        else
            vstore(c + i * ld + j * VL, acc[i][j]);
}

ALWAYS_INLINE void mix_panel(const int nv, int64_t m, int64_t k, const word *a, int64_t row, int64_t col,
                             const word *b, int64_t ld, real *c, const elem *write, bool stream,
                             const char **at, const int64_t *step) {
    int64_t rows;
    for (int64_t i = 0; i < m; i += rows) {
        const word *ai = a + i * row;
        const elem *to = write ? write + i * ld : NULL;
        real *ci = c + i * ld;
        if (m - i >= TILE_ROWS_4) {
            rows = TILE_ROWS_4;
            mix_block(TILE_ROWS_4, nv, k, ai, row, col, b, ci, ld, to, stream, at, step);
        } else if (m - i >= 4) {
            rows = 4;
            mix_block(4, nv, k, ai, row, col, b, ci, ld, to, stream, at, step);
        } else if (m - i >= 2) {
            rows = 2;
            mix_block(2, nv, k, ai, row, col, b, ci, ld, to, stream, at, step);
        } else {
            rows = 1;
            mix_block(1, nv, k, ai, row, col, b, ci, ld, to, stream, at, step);
        }
        at[0] += k * step[0];
        at[1] += k * step[1];
    }
}

/* out = M in for one token: out [I,d] = M [I,J] in [J,d], J in words. Element (i,j) of M is m[i*row + j*col]; in and out
 * are contiguous. */
static inline void head_mix(int64_t I, int64_t J, int64_t d, const word *m, int64_t row, int64_t col,
                            const word *in, real *out, const struct mix_memory *memory) {
    int64_t j = 0, panels = d / VL / 4 + d / VL % 4 / 2 + d / VL % 2;
    int64_t times = max64(1, (I + TILE_ROWS_4 - 1) / TILE_ROWS_4 * panels * J);
    int64_t step[2] = {(memory->bytes[0] + times - 1) / times, (memory->bytes[1] + times - 1) / times};
    const char *at[2] = {memory->at[0], memory->at[1]};
    const elem *write = memory->write;
    bool stream = memory->stream;
    for (; j + 4 * VL <= d; j += 4 * VL)
        mix_panel(4, I, J, m, row, col, in + j, d, out + j, write ? write + j : NULL, stream, at, step);
    for (; j + 2 * VL <= d; j += 2 * VL)
        mix_panel(2, I, J, m, row, col, in + j, d, out + j, write ? write + j : NULL, stream, at, step);
    for (; j + VL <= d; j += VL)
        mix_panel(1, I, J, m, row, col, in + j, d, out + j, write ? write + j : NULL, stream, at, step);
    if (j < d)
        tile_gemm(I, d - j, J, m, row, col, in + j, d, out + j, d, false);
}

/* A matrix [rows, cols] as the operand M of head_mix, its words along the columns (row cols, col 1; in pairs row
 * words_of(cols)), or to be used transposed along the rows (row 1, col cols). scratch: as many reals, where it cannot be
 * used as it is. */
static inline const word *mix_matrix(const elem *m, int64_t rows, int64_t cols, bool transposed,
                                     word *scratch) {
    if (PAIR == 1)
        return rows_as_words(m, rows, cols, scratch);
    for (int64_t i = 0; !transposed && i < rows; i++)
        row_to_words(m + i * cols, cols, scratch + i * words_of(cols));
    return transposed ? rows_to_pairs((const word *)m, rows, cols, scratch) : scratch;
}

/* Where rows will be stored next: at `to`, if the product is computed elsewhere first, or else behind what the product
 * itself stores there. NULL where stores go past the caches. */
static inline const elem *mix_write(bool stream, const real *product, const elem *to, int64_t stride) {
    return stream ? NULL : (const void *)product == to ? to + stride : to;
}

/* Results of so many bytes leave the caches before they are read again, so reals are stored past them. About the
 * last-level cache that a core shares with few others. */
static inline bool mix_streams(const void *out, int64_t count, int64_t d) {
    const int64_t bytes = (int64_t)32 << 20;
    return sizeof(elem) == sizeof(real) && count * (int64_t)sizeof(real) >= bytes && d % (2 * VL) == 0 &&
           (uintptr_t)out % VECTOR_BYTES == 0;
}

/* Rows and columns of a block of dM: its sums are as many vectors in registers, and a load of one operand feeds
 * as many multiply-adds as the block has columns or rows. */
#if VECTOR_BYTES == 64
enum { OUTER_ROWS = 4, OUTER_COLS = 4 };
#else
enum { OUTER_ROWS = 2, OUTER_COLS = 4 };
#endif

/* The rows that a block reads: past the end the last one again, whose sums are dropped. */
ALWAYS_INLINE void outer_rows(const int count, const word *x, int64_t first, int64_t rows, int64_t W,
                              const word **out) {
    UNROLL
    for (int r = 0; r < count; r++)
        out[r] = x + min64(first + r, rows - 1) * W;
}

/* One vector of n words of the rows of both operands. */
ALWAYS_INLINE void outer_add(const word *const a[OUTER_ROWS], const word *const b[OUTER_COLS], int64_t c,
                             int64_t n, vreal acc[OUTER_ROWS * OUTER_COLS]) {
    vreal bv[OUTER_COLS];
    UNROLL
    for (int m = 0; m < OUTER_COLS; m++)
        bv[m] = vkeep(load_words_part(b[m] + c, n));
    UNROLL
    for (int l = 0; l < OUTER_ROWS; l++) {
        vreal av = vkeep(load_words_part(a[l] + c, n));
        UNROLL
        for (int m = 0; m < OUTER_COLS; m++)
            acc[l * OUTER_COLS + m] = vmultiply_add(acc[l * OUTER_COLS + m], av, bv[m]);
    }
}

/* The block of dM at (i,j), which stays in registers over all tokens. */
ALWAYS_INLINE void outer_block(int64_t i, int64_t j, int64_t I, int64_t J, int64_t W, int64_t tokens,
                               const word *dout, int64_t dout_stride, const word *in, int64_t in_stride,
                               real *dm, const char *next, int64_t next_stride, int64_t next_bytes) {
    enum { R = OUTER_ROWS, C = OUTER_COLS };
    const word *a[R], *b[C];
    vreal acc[R * C] = {{0}};
    real sum[R * C];
    outer_rows(R, dout, i, I, W, a);
    outer_rows(C, in, j, J, W, b);
    int64_t steps = (W + VL - 1) / VL, step = (next_bytes + steps - 1) / steps;
    for (int64_t t = 0; t < tokens; t++) {
        const char *at = next + t * next_stride;
        for (int64_t c = 0; c < W; c += VL) {
            __builtin_prefetch(at, 0, 2);
            __builtin_prefetch(at + step / 2, 0, 2);
            at += step;
            if (c + VL <= W)
                outer_add(a, b, c, VL, acc);
            else
                outer_add(a, b, c, W - c, acc);
        }
        UNROLL
        for (int l = 0; l < R; l++)
            a[l] += dout_stride;
        UNROLL
        for (int m = 0; m < C; m++)
            b[m] += in_stride;
    }
    UNROLL
    for (int l = 0; l < R * C; l += VL)
        vstore(sum + l, vsum_each(acc + l));
    for (int64_t l = 0; l < min64(R, I - i); l++)
        for (int64_t m = 0; m < min64(C, J - j); m++)
            dm[(i + l) * J + j + m] += sum[l * C + m];
}

/* dM [I,J] += sum over `tokens` tokens, whose dout [I,W] and in [J,W] are dout_stride and in_stride words apart.
 * The inner loop runs over the operand with fewer rows, which should fit in the L1 cache. Meanwhile next_bytes
 * from next on are prefetched, and as many from each of `tokens` places that are next_stride bytes apart. */
static inline void head_outer(int64_t I, int64_t J, int64_t W, int64_t tokens, const word *dout,
                              int64_t dout_stride, const word *in, int64_t in_stride, real *dm,
                              const char *next, int64_t next_stride, int64_t next_bytes) {
    int64_t rows = (I + OUTER_ROWS - 1) / OUTER_ROWS, cols = (J + OUTER_COLS - 1) / OUTER_COLS;
    int64_t blocks = rows * cols, bytes = (next_bytes + blocks - 1) / blocks;
    for (int64_t n = 0; n < blocks; n++) {
        int64_t row = I < J ? n % rows : n / cols, col = I < J ? n / rows : n % cols;
        outer_block(row * OUTER_ROWS, col * OUTER_COLS, I, J, W, tokens, dout, dout_stride, in, in_stride, dm,
                    next + n * bytes, next_stride, bytes);
    }
}

/* Tokens that a thread takes at a time in backward, of `tokens` in all: enough that storing a block's sums costs
 * little, few enough that the operand with `heads` rows stays near the L1 cache, and the one with heads * pseudo rows in
 * half of the L2 cache, and that every thread gets some. */
static inline int64_t mix_tokens(const struct device *dev, int64_t tokens, int64_t heads, int64_t pseudo,
                                 int64_t d) {
    const int64_t most = 16, small = 48 << 10, large = 512 << 10;
    int64_t share = (tokens + dev->threads - 1) / dev->threads, bytes = heads * d * (int64_t)sizeof(real);
    return max64(1, min64(min64(most, share), min64(small / bytes, large / (bytes * pseudo))));
}

#endif

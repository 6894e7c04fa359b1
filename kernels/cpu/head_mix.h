/* Mixing along the head axis, for qkv_mix and collapse: for each token, a small matrix times the heads,
 *
 *   out[t,i,:] = sum_j M[i,j] in[t,j,:]        and its weight gradient
 *   dM[i,j] += sum_t <dout[t,i,:], in[t,j,:]>
 *
 * with (I,J) = (P*H, H) to expand, (H, P*H) to collapse, and M transposed for the input gradients. */
#ifndef IHA_KERNELS_CPU_HEAD_MIX_H
#define IHA_KERNELS_CPU_HEAD_MIX_H

#include "kernels/cpu/tile.h"

/* out = M in for one token. Element (i,j) of M is m[i*row + j*col]; in [J,d] and out [I,d] are contiguous. */
static inline void head_mix(int64_t I, int64_t J, int64_t d, const real *m, int64_t row, int64_t col,
                            const real *in, real *out) {
    tile_gemm(I, d, J, m, row, col, in, d, out, d, false);
}

/* Rows and columns of a block of dM: its sums are as many vectors in registers, and a load of one operand feeds
 * as many multiply-adds as the block has columns or rows. */
#if VECTOR_BYTES == 64
enum { OUTER_ROWS = 4, OUTER_COLS = 4 };
#else
enum { OUTER_ROWS = 2, OUTER_COLS = 4 };
#endif

/* The rows that a block reads: past the end the last one again, whose sums are dropped. */
ALWAYS_INLINE void outer_rows(const int count, const real *x, int64_t first, int64_t rows, int64_t d,
                              const real **out) {
    UNROLL
    for (int r = 0; r < count; r++)
        out[r] = x + min64(first + r, rows - 1) * d;
}

/* The block of dM at (i,j), which stays in registers over all tokens. */
ALWAYS_INLINE void outer_block(int64_t i, int64_t j, int64_t I, int64_t J, int64_t d, int64_t tokens,
                               const real *dout, int64_t dout_stride, const real *in, int64_t in_stride,
                               real *dm) {
    enum { R = OUTER_ROWS, C = OUTER_COLS };
    const real *a[R], *b[C];
    vreal acc[R * C] = {{0}};
    real sum[R * C] = {0};
    outer_rows(R, dout, i, I, d, a);
    outer_rows(C, in, j, J, d, b);
    for (int64_t t = 0; t < tokens; t++) {
        int64_t c = 0;
        for (; c + VL <= d; c += VL) {
            vreal bv[C];
            UNROLL
            for (int m = 0; m < C; m++)
                bv[m] = vload(b[m] + c);
            UNROLL
            for (int l = 0; l < R; l++) {
                vreal av = vload(a[l] + c);
                UNROLL
                for (int m = 0; m < C; m++)
                    acc[l * C + m] += av * bv[m];
            }
        }
        for (; c < d; c++)
            for (int l = 0; l < R * C; l++)
                sum[l] += a[l / C][c] * b[l % C][c];
        UNROLL
        for (int l = 0; l < R; l++)
            a[l] += dout_stride;
        UNROLL
        for (int m = 0; m < C; m++)
            b[m] += in_stride;
    }
    UNROLL
    for (int l = 0; l < R * C; l += VL)
        vstore(sum + l, vload(sum + l) + vsum_each(acc + l));
    for (int64_t l = 0; l < min64(R, I - i); l++)
        for (int64_t m = 0; m < min64(C, J - j); m++)
            dm[(i + l) * J + j + m] += sum[l * C + m];
}

/* dM [I,J] += sum over `tokens` tokens, whose dout [I,d] and in [J,d] are dout_stride and in_stride apart.
 * The inner loop runs over the operand with fewer rows, which should fit in the L1 cache. */
static inline void head_outer(int64_t I, int64_t J, int64_t d, int64_t tokens, const real *dout,
                              int64_t dout_stride, const real *in, int64_t in_stride, real *dm) {
    int64_t rows = (I + OUTER_ROWS - 1) / OUTER_ROWS, cols = (J + OUTER_COLS - 1) / OUTER_COLS;
    for (int64_t n = 0; n < rows * cols; n++) {
        int64_t row = I < J ? n % rows : n / cols, col = I < J ? n / rows : n % cols;
        outer_block(row * OUTER_ROWS, col * OUTER_COLS, I, J, d, tokens, dout, dout_stride, in, in_stride,
                    dm);
    }
}

/* Tokens that backward takes at a time: enough that storing a block's sums costs little, few enough that the
 * operand with `heads` rows stays in the L1 cache. */
static inline int64_t mix_tokens(int64_t heads, int64_t d) {
    const int64_t bytes = 24 << 10, most = 16;
    return max64(1, min64(most, bytes / (heads * d * (int64_t)sizeof(real))));
}

#endif

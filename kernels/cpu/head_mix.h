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

/* A block of dM, mi by mj, which stays in registers over all tokens: 4 x 4 vectors, so that a load of one
 * feeds four multiply-adds. */
TILE_INLINE void outer_block(const int mi, const int mj, int64_t tokens, int64_t d, const real *dout,
                             int64_t dout_stride, const real *in, int64_t in_stride, real *dm, int64_t ldm) {
    vreal acc[4][4] = {{{0}}};
    real tail[4][4] = {{0}};
    for (int64_t t = 0; t < tokens; t++, dout += dout_stride, in += in_stride) {
        int64_t c = 0;
        for (; c + VL <= d; c += VL) {
            vreal b[4];
            UNROLL
            for (int j = 0; j < mj; j++)
                b[j] = vload(in + j * d + c);
            UNROLL
            for (int i = 0; i < mi; i++) {
                vreal a = vload(dout + i * d + c);
                UNROLL
                for (int j = 0; j < mj; j++)
                    acc[i][j] += a * b[j];
            }
        }
        for (; c < d; c++)
            for (int i = 0; i < mi; i++)
                for (int j = 0; j < mj; j++)
                    tail[i][j] += dout[i * d + c] * in[j * d + c];
    }
    for (int i = 0; i < mi; i++)
        for (int j = 0; j < mj; j++)
            dm[i * ldm + j] += vsum(acc[i][j]) + tail[i][j];
}

/* dM [I,J] += sum over `tokens` tokens, whose dout [I,d] and in [J,d] are dout_stride and in_stride apart. */
static inline void head_outer(int64_t I, int64_t J, int64_t d, int64_t tokens, const real *dout,
                              int64_t dout_stride, const real *in, int64_t in_stride, real *dm) {
    for (int64_t i = 0; i < I; i += I - i >= 4 ? 4 : 1)
        for (int64_t j = 0; j < J; j += J - j >= 4 ? 4 : 1) {
            const real *a = dout + i * d, *b = in + j * d;
            real *out = dm + i * J + j;
            if (I - i >= 4 && J - j >= 4)
                outer_block(4, 4, tokens, d, a, dout_stride, b, in_stride, out, J);
            else if (I - i >= 4)
                outer_block(4, 1, tokens, d, a, dout_stride, b, in_stride, out, J);
            else if (J - j >= 4)
                outer_block(1, 4, tokens, d, a, dout_stride, b, in_stride, out, J);
            else
                outer_block(1, 1, tokens, d, a, dout_stride, b, in_stride, out, J);
        }
}

/* Tokens that backward processes at a time: enough that storing outer_block's sums costs little, few enough
 * that they stay in cache between the two gradients. */
enum { MIX_TOKENS = 16 };

#endif

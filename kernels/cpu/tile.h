/* Small matrix products with sums in registers, for attention and head mixing.
 *
 *   C[m,n] (+)= A[m,k] B[k,n], A and B in words (word.h), C in reals; k counts words
 *
 * A is read element by element through two strides, so it may be transposed at no cost; B and C have
 * contiguous rows. A block of mr rows by nv vectors of C stays in registers while k runs, and each load of B
 * feeds mr multiply-adds. */
#ifndef IHA_KERNELS_CPU_TILE_H
#define IHA_KERNELS_CPU_TILE_H

#include <stdbool.h>

#include "kernels/cpu/word.h"

/* acc += A B for a block of mr rows and nv vectors, which are compile-time constants at every call. */
ALWAYS_INLINE void tile_products(const int mr, const int nv, int64_t k, const word *a, int64_t row,
                                 int64_t col, const word *b, int64_t ldb, vreal acc[16][4]) {
    for (int64_t l = 0; l < k; l++) {
        vreal bv[4];
        UNROLL
        for (int j = 0; j < nv; j++)
            bv[j] = vkeep(vload_words(b + l * ldb + j * VL));
        UNROLL
        for (int i = 0; i < mr; i++) {
            vreal av = vkeep(vsplat_word(a[i * row + l * col]));
            UNROLL
            for (int j = 0; j < nv; j++)
                acc[i][j] = vmultiply_add(acc[i][j], av, bv[j]);
        }
    }
}

/* One register block; mr and nv are compile-time constants at every call. */
ALWAYS_INLINE void tile_block(const int mr, const int nv, int64_t k, const word *a, int64_t row, int64_t col,
                              const word *b, int64_t ldb, real *c, int64_t ldc, bool accumulate) {
    vreal acc[16][4];
    UNROLL
    for (int i = 0; i < mr; i++)
        UNROLL
    for (int j = 0; j < nv; j++)
        acc[i][j] = accumulate ? vload(c + i * ldc + j * VL) : vsplat(0);
    tile_products(mr, nv, k, a, row, col, b, ldb, acc);
    UNROLL
    for (int i = 0; i < mr; i++)
        UNROLL
    for (int j = 0; j < nv; j++)
        vstore(c + i * ldc + j * VL, acc[i][j]);
}

/* A panel of nv vectors of columns, in row blocks of mr, then 4, 2, 1. */
ALWAYS_INLINE void tile_panel(const int mr, const int nv, int64_t m, int64_t k, const word *a, int64_t row,
                              int64_t col, const word *b, int64_t ldb, real *c, int64_t ldc,
                              bool accumulate) {
    int64_t i = 0;
    for (; i + mr <= m; i += mr)
        tile_block(mr, nv, k, a + i * row, row, col, b, ldb, c + i * ldc, ldc, accumulate);
    for (; i + 4 <= m; i += 4)
        tile_block(4, nv, k, a + i * row, row, col, b, ldb, c + i * ldc, ldc, accumulate);
    for (; i + 2 <= m; i += 2)
        tile_block(2, nv, k, a + i * row, row, col, b, ldb, c + i * ldc, ldc, accumulate);
    for (; i < m; i++)
        tile_block(1, nv, k, a + i * row, row, col, b, ldb, c + i * ldc, ldc, accumulate);
}

/* Rows of blocks that are 1, 2 and 4 vectors wide: the sums, a row of B and an element of A fill the 32
 * vector registers of AVX-512, or the 16 of other processors, as far as possible. */
#if VECTOR_BYTES == 64
enum { TILE_ROWS_1 = 16, TILE_ROWS_2 = 12, TILE_ROWS_4 = 6 };
#else
enum { TILE_ROWS_1 = 8, TILE_ROWS_2 = 6, TILE_ROWS_4 = 3 };
#endif

/* C[m,n] (+)= A[m,k] B[k,n]; A's element (i,l) is a[i*row + l*col]. Columns past the last whole vector are
 * done one by one: pad n to a multiple of VL where speed matters. */
static inline void tile_gemm(int64_t m, int64_t n, int64_t k, const word *a, int64_t row, int64_t col,
                             const word *b, int64_t ldb, real *c, int64_t ldc, bool accumulate) {
    int64_t j = 0;
    for (; j + 4 * VL <= n; j += 4 * VL)
        tile_panel(TILE_ROWS_4, 4, m, k, a, row, col, b + j, ldb, c + j, ldc, accumulate);
    for (; j + 2 * VL <= n; j += 2 * VL)
        tile_panel(TILE_ROWS_2, 2, m, k, a, row, col, b + j, ldb, c + j, ldc, accumulate);
    for (; j + VL <= n; j += VL)
        tile_panel(TILE_ROWS_1, 1, m, k, a, row, col, b + j, ldb, c + j, ldc, accumulate);
    for (; j < n; j++)
        for (int64_t i = 0; i < m; i++) {
            real sum = accumulate ? c[i * ldc + j] : 0;
            for (int64_t l = 0; l < k; l++)
                sum += word_product(a[i * row + l * col], b[l * ldb + j]);
            c[i * ldc + j] = sum;
        }
}

#endif

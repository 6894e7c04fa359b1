/* Attention's scores: products whose results become probabilities while they are in registers.
 *
 * Blocks and panels are those of tile_gemm (tile.h). */
#ifndef IHA_KERNELS_CPU_ATTENTION_SCORES_H
#define IHA_KERNELS_CPU_ATTENTION_SCORES_H

#include "kernels/cpu/attention_pack.h"
#include "kernels/cpu/tile.h"

ALWAYS_INLINE void start_zero(const int mr, const int nv, vreal acc[16][4]) {
    UNROLL
    for (int i = 0; i < mr; i++)
        UNROLL
    for (int j = 0; j < nv; j++)
        acc[i][j] = vsplat(0);
}

/* Products that begin at -x[i] are less x[i] at no cost. */
ALWAYS_INLINE void start_rows(const int mr, const int nv, const real *x, vreal acc[16][4]) {
    UNROLL
    for (int i = 0; i < mr; i++) {
        vreal start = vsplat(-x[i]);
        UNROLL
        for (int j = 0; j < nv; j++)
            acc[i][j] = start;
    }
}

/* Rows of numbers to words along the rows; an odd row's partner is 0. */
ALWAYS_INLINE void store_pairs(const int mr, const int nv, const vreal x[16][4], word *out) {
    UNROLL
    for (int i = 0; i < mr; i += PAIR)
        UNROLL
    for (int j = 0; j < nv; j++)
        vstore_words(out + i / PAIR * TILE + j * VL,
                     vpair(x[i][j], PAIR == 2 && i + 1 < mr ? x[(i + 1) % 16][j] : vsplat(0)));
}

/* Forward: scores of `keys` keys from key `key` with columns of a tile of queries. W: words of a row. */
struct forward_scores {
    int64_t W, keys;
    real_bits key;
    real scale;                     /* of scores, in base 2 */
    const word *k, *qt;             /* rows [keys, W], columns [W, TILE] */
    const real *reference;          /* [TILE] */
    const real_bits *begins, *ends; /* [TILE] the keys that each query sees */
    word *p;                        /* pairs [keys, TILE] become exp2(score - reference), 0 where masked */
    real *sum;                      /* [TILE] the sum of p is added */
    struct rows_ahead *ahead;
};

/* Vectors of scores less their references, of keys from row i0 on. Sums that began at -reference would save the
 * subtraction, and be as imprecise as if scores were as large as references. */
ALWAYS_INLINE void forward_products(const int mr, const int nv, const bool masked,
                                    const struct forward_scores *f, int64_t i0, int64_t column,
                                    vreal acc[16][4]) {
    start_zero(mr, nv, acc);
    tile_products(mr, nv, f->W, f->k + i0 * f->W, f->W, 1, f->qt + column, TILE, acc);
    UNROLL
    for (int j = 0; j < nv; j++) {
        int64_t c = column + j * VL;
        vreal base = vload(f->reference + c);
        vbits begin = (vbits)vload((const real *)(f->begins + c)),
              end = (vbits)vload((const real *)(f->ends + c));
        UNROLL
        for (int i = 0; i < mr; i++) {
            real_bits key = f->key + (real_bits)(i0 + i);
            acc[i][j] = acc[i][j] * f->scale - base;
            if (masked)
                acc[i][j] = vselect((key >= begin) & (key < end), acc[i][j], vsplat(-INFINITY));
        }
    }
}

ALWAYS_INLINE void forward_block(const int mr, const int nv, const bool masked,
                                 const struct forward_scores *f, int64_t i0, int64_t column) {
    vreal acc[16][4];
    prefetch_next(f->ahead);
    forward_products(mr, nv, masked, f, i0, column, acc);
    UNROLL
    for (int j = 0; j < nv; j++) {
        int64_t c = column + j * VL;
        vreal sum = vload(f->sum + c);
        UNROLL
        for (int i = 0; i < mr; i++) {
            acc[i][j] = vexp2(acc[i][j]);
            sum += acc[i][j];
        }
        vstore(f->sum + c, sum);
    }
    store_pairs(mr, nv, acc, f->p + i0 / PAIR * TILE + column);
}

/* The largest score of each of VL columns less its reference, or 0 if that is larger. Rarely needed. */
static __attribute__((noinline, unused)) vreal largest_scores(const struct forward_scores *f,
                                                              int64_t column) {
    vreal acc[16][4], top = {0};
    for (int64_t i = 0; i < f->keys; i++) {
        forward_products(1, 1, true, f, i, column, acc);
        top = vmax(top, acc[0][0]);
    }
    return top;
}

ALWAYS_INLINE void forward_panel(const int mr, const int nv, const bool masked,
                                 const struct forward_scores *f, int64_t column) {
    int64_t i = 0;
    for (; i + mr <= f->keys; i += mr)
        forward_block(mr, nv, masked, f, i, column);
    for (; i + 4 <= f->keys; i += 4)
        forward_block(4, nv, masked, f, i, column);
    for (; PAIR == 2 && i + 2 <= f->keys; i += 2)
        forward_block(2, nv, masked, f, i, column);
    for (; i < f->keys; i++)
        forward_block(1, nv, masked, f, i, column);
}

ALWAYS_INLINE void forward_panels(const bool masked, const struct forward_scores *f, int64_t begin,
                                  int64_t end) {
    int64_t c = begin;
    for (; c + 4 * VL <= end; c += 4 * VL)
        forward_panel(TILE_ROWS_4, 4, masked, f, c);
    for (; c + 2 * VL <= end; c += 2 * VL)
        forward_panel(TILE_ROWS_2, 2, masked, f, c);
    for (; c < end; c += VL)
        forward_panel(TILE_ROWS_1, 1, masked, f, c);
}

/* Columns [begin, end), whole vectors. */
static inline void forward_scores(const struct forward_scores *f, int64_t begin, int64_t end, bool masked) {
    if (masked)
        forward_panels(true, f, begin, end);
    else
        forward_panels(false, f, begin, end);
}

/* Backward: P = exp2(score - lse), dS = P (dO V^T - delta) of `rows` queries with columns of a tile of keys
 * from key `key`. W: words of a row. */
struct backward_scores {
    int64_t W, rows;
    real_bits key;
    real scale;                     /* of scores, in base 2 */
    const word *q, *d_o;            /* rows [rows, W] */
    const word *kt, *vt;            /* columns [W, TILE] */
    const real *lse, *delta;        /* [rows] */
    const real_bits *begins, *ends; /* [rows] the keys that each query sees */
    word *p, *ds;                   /* pairs [rows, TILE]; 0 where masked */
    word *ds_rows; /* dS again, as rows [rows, words_of(TILE)]; where words are reals, ds itself */
    struct rows_ahead *ahead;
};

ALWAYS_INLINE void backward_block(const int mr, const int nv, const bool masked,
                                  const struct backward_scores *w, int64_t i0, int64_t column) {
    vreal acc[16][4], e[16][4];
    int64_t at = i0 / PAIR * TILE + column;
    vbits lane;
    for (int l = 0; l < VL; l++)
        lane[l] = l;
    prefetch_next(w->ahead);
    start_zero(mr, nv, acc);
    tile_products(mr, nv, w->W, w->q + i0 * w->W, w->W, 1, w->kt + column, TILE, acc);
    UNROLL
    for (int i = 0; i < mr; i++) {
        vreal lse = vsplat(w->lse[i0 + i]);
        UNROLL
        for (int j = 0; j < nv; j++) {
            e[i][j] = vexp2(acc[i][j] * w->scale - lse);
            if (masked) {
                vbits key = lane + (w->key + (real_bits)(column + j * VL));
                e[i][j] = vselect((key >= w->begins[i0 + i]) & (key < w->ends[i0 + i]), e[i][j], vsplat(0));
            }
        }
    }
    store_pairs(mr, nv, e, w->p + at);
    start_rows(mr, nv, w->delta + i0, acc);
    tile_products(mr, nv, w->W, w->d_o + i0 * w->W, w->W, 1, w->vt + column, TILE, acc);
    UNROLL
    for (int i = 0; i < mr; i++)
        UNROLL
    for (int j = 0; j < nv; j++) /* reals are read where they were stored rather than kept twice */
        acc[i][j] *= PAIR == 1 ? vload_words(w->p + at + i * TILE + j * VL) : e[i][j];
    store_pairs(mr, nv, acc, w->ds + at);
    UNROLL
    for (int i = 0; PAIR == 2 && i < mr; i++)
        vstore_row_words(nv, acc[i], w->ds_rows + (i0 + i) * words_of(TILE) + column / PAIR);
}

ALWAYS_INLINE void backward_panel(const int mr, const int nv, const bool masked,
                                  const struct backward_scores *w, int64_t column) {
    int64_t i = 0;
    for (; i + mr <= w->rows; i += mr)
        backward_block(mr, nv, masked, w, i, column);
    for (; i + 4 <= w->rows; i += 4)
        backward_block(4, nv, masked, w, i, column);
    for (; PAIR == 2 && i + 2 <= w->rows; i += 2)
        backward_block(2, nv, masked, w, i, column);
    for (; i < w->rows; i++)
        backward_block(1, nv, masked, w, i, column);
}

ALWAYS_INLINE void backward_panels(const bool masked, const struct backward_scores *w, int64_t begin,
                                   int64_t end) {
    int64_t c = begin;
    for (; c + 4 * VL <= end; c += 4 * VL)
        backward_panel(TILE_ROWS_4, 4, masked, w, c);
    for (; c + 2 * VL <= end; c += 2 * VL)
        backward_panel(TILE_ROWS_2, 2, masked, w, c);
    for (; c < end; c += VL)
        backward_panel(TILE_ROWS_1, 1, masked, w, c);
}

/* Columns [begin, end), whole vectors. */
static inline void backward_scores(const struct backward_scores *w, int64_t begin, int64_t end, bool masked) {
    if (masked)
        backward_panels(true, w, begin, end);
    else
        backward_panels(false, w, begin, end);
}

#endif

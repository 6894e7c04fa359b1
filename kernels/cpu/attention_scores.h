/* Attention's scores: products whose results become probabilities while they are in registers.
 *
 * Blocks and panels are those of tile_gemm (tile.h). */
#ifndef IHA_KERNELS_CPU_ATTENTION_SCORES_H
#define IHA_KERNELS_CPU_ATTENTION_SCORES_H

#include "kernels/cpu/attention_pack.h"
#include "kernels/cpu/tile.h"

/* acc = A B for mr rows of A [., d] and nv vectors of B [d, TILE]. */
ALWAYS_INLINE void score_block(const int mr, const int nv, int64_t d, const real *a, const real *b,
                               vreal acc[16][4]) {
    UNROLL
    for (int i = 0; i < mr; i++)
        UNROLL
    for (int j = 0; j < nv; j++)
        acc[i][j] = vsplat(0);
    for (int64_t l = 0; l < d; l++) {
        vreal bv[4];
        UNROLL
        for (int j = 0; j < nv; j++)
            bv[j] = vload(b + l * TILE + j * VL);
        UNROLL
        for (int i = 0; i < mr; i++) {
            vreal av = vsplat(a[i * d + l]);
            UNROLL
            for (int j = 0; j < nv; j++)
                acc[i][j] += av * bv[j];
        }
    }
}

/* Forward: scores of `keys` keys from key `key`, k [keys, d], with columns of a tile of queries. */
struct forward_scores {
    int64_t d, keys;
    real_bits key;
    const real *k, *qt, *reference; /* [d, TILE], [TILE] */
    const real_bits *begins, *ends; /* [TILE] the keys that each query sees */
    real *p;                        /* [keys, TILE] becomes exp2(score - reference), 0 where masked */
    real *top, *sum;                /* [TILE] the largest score and the sum of p are joined in */
    struct rows_ahead *ahead;
};

ALWAYS_INLINE void forward_block(const int mr, const int nv, const bool masked,
                                 const struct forward_scores *f, int64_t i0, int64_t column) {
    vreal acc[16][4];
    prefetch_next(f->ahead);
    score_block(mr, nv, f->d, f->k + i0 * f->d, f->qt + column, acc);
    UNROLL
    for (int j = 0; j < nv; j++) {
        int64_t c = column + j * VL;
        vreal base = vload(f->reference + c), top = vload(f->top + c), sum = vload(f->sum + c);
        vbits begin = (vbits)vload((const real *)(f->begins + c)),
              end = (vbits)vload((const real *)(f->ends + c));
        UNROLL
        for (int i = 0; i < mr; i++) {
            vreal score = acc[i][j];
            real_bits key = f->key + (real_bits)(i0 + i);
            if (masked)
                score = vselect((key >= begin) & (key < end), score, vsplat(-INFINITY));
            vreal e = vexp2(score - base);
            vstore(f->p + (i0 + i) * TILE + c, e);
            top = vmax(top, score);
            sum += e;
        }
        vstore(f->top + c, top);
        vstore(f->sum + c, sum);
    }
}

ALWAYS_INLINE void forward_panel(const int mr, const int nv, const bool masked,
                                 const struct forward_scores *f, int64_t column) {
    int64_t i = 0;
    for (; i + mr <= f->keys; i += mr)
        forward_block(mr, nv, masked, f, i, column);
    for (; i + 4 <= f->keys; i += 4)
        forward_block(4, nv, masked, f, i, column);
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
 * from key `key`. */
struct backward_scores {
    int64_t d, rows;
    real_bits key;
    const real *q, *d_o;            /* [rows, d] */
    const real *kt, *vt;            /* [d, TILE] */
    const real *lse, *delta;        /* [rows] */
    const real_bits *begins, *ends; /* [rows] the keys that each query sees */
    real *p, *ds;                   /* [rows, TILE]; 0 where masked */
    struct rows_ahead *ahead;
};

ALWAYS_INLINE void backward_block(const int mr, const int nv, const bool masked,
                                  const struct backward_scores *w, int64_t i0, int64_t column) {
    vreal acc[16][4];
    real *p = w->p + i0 * TILE + column, *ds = w->ds + i0 * TILE + column;
    vbits lane;
    for (int l = 0; l < VL; l++)
        lane[l] = l;
    prefetch_next(w->ahead);
    score_block(mr, nv, w->d, w->q + i0 * w->d, w->kt + column, acc);
    UNROLL
    for (int i = 0; i < mr; i++) {
        vreal lse = vsplat(w->lse[i0 + i]);
        UNROLL
        for (int j = 0; j < nv; j++) {
            vreal e = vexp2(acc[i][j] - lse);
            if (masked) {
                vbits key = lane + (w->key + (real_bits)(column + j * VL));
                e = vselect((key >= w->begins[i0 + i]) & (key < w->ends[i0 + i]), e, vsplat(0));
            }
            vstore(p + i * TILE + j * VL, e);
        }
    }
    score_block(mr, nv, w->d, w->d_o + i0 * w->d, w->vt + column, acc);
    UNROLL
    for (int i = 0; i < mr; i++) {
        vreal delta = vsplat(w->delta[i0 + i]);
        UNROLL
        for (int j = 0; j < nv; j++)
            vstore(ds + i * TILE + j * VL, vload(p + i * TILE + j * VL) * (acc[i][j] - delta));
    }
}

ALWAYS_INLINE void backward_panel(const int mr, const int nv, const bool masked,
                                  const struct backward_scores *w, int64_t column) {
    int64_t i = 0;
    for (; i + mr <= w->rows; i += mr)
        backward_block(mr, nv, masked, w, i, column);
    for (; i + 4 <= w->rows; i += 4)
        backward_block(4, nv, masked, w, i, column);
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

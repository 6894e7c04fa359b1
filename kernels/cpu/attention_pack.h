/* Attention's tiles in scratch memory: packed from tensors, and written back.
 *
 * A tile holds TILE queries or keys of one head. As an operand of products it consists of words (word.h):
 *
 *   rows         [TILE, W]        for sums over d; W = words_of(d)
 *   columns      [W, TILE]        the same, transposed
 *   pairs        [TILE, ld]       for sums over queries or keys; stored as TILE/PAIR rows */
#ifndef IHA_KERNELS_CPU_ATTENTION_PACK_H
#define IHA_KERNELS_CPU_ATTENTION_PACK_H

#include "kernels/cpu/attention_tiles.h"
#include "kernels/cpu/word.h"

/* One head of a tensor [B,S,H,d]. */
struct head_rows {
    elem *data;
    int64_t stride; /* between the rows of consecutive queries or keys */
};

static inline struct head_rows head_of(tensor t, int64_t b, int64_t h) {
    return (struct head_rows){(elem *)t.data + b * t.stride[0] + h * t.stride[2], t.stride[1]};
}

enum { PREFETCH_ROWS = 12 };

/* A head's rows are a token apart, too far for the hardware prefetcher. Past the last row a prefetch does
 * nothing. */
static inline void prefetch_row(struct head_rows x, int64_t row, int64_t d) {
    for (int64_t c = 0; c < d; c += 64 / (int64_t)sizeof(elem))
        __builtin_prefetch(x.data + (row + PREFETCH_ROWS) * x.stride + c);
}

/* Rows that will be needed soon, of several tensors. What computes calls prefetch_next() between blocks of
 * products: asked for a few lines at a time, the memory never makes it wait. They go to the L2 cache. */
struct rows_ahead {
    struct head_rows x[4];
    int count; /* of x */
    int64_t d, row, end, step;
};

static inline void prefetch_next(struct rows_ahead *a) {
    int64_t end = min64(a->row + a->step, a->end);
    for (; a->row < end; a->row++)
        for (int i = 0; i < a->count; i++)
            for (int64_t c = 0; c < a->d; c += 64 / (int64_t)sizeof(elem))
                __builtin_prefetch(a->x[i].data + a->row * a->x[i].stride + c, 0, 2);
}

/* Rows [row, row + rows) as words along d: out [rows, W]. */
static inline void pack_rows(struct head_rows x, int64_t row, int64_t rows, int64_t d, word *out) {
    for (int64_t i = 0; i < rows; i++) {
        prefetch_row(x, row + i, d);
        row_to_words(x.data + (row + i) * x.stride, d, out + i * words_of(d));
    }
}

/* The same as words along the rows: out [words_of(rows), ld], with zeros from column d to ld. */
static inline void pack_pairs(struct head_rows x, int64_t row, int64_t rows, int64_t d, int64_t ld,
                              word *out) {
    for (int64_t i = 0; i < rows; i += PAIR) {
        const elem *low = x.data + (row + i) * x.stride, *high = i + 1 < rows ? low + x.stride : NULL;
        for (int l = 0; l < PAIR; l++)
            prefetch_row(x, row + i + l, d);
        for (int64_t c = 0; c < d; c += VL)
            store_words_part(out + i / PAIR * ld + c, load_pair(low + c, high ? high + c : NULL, d - c),
                             ld - c);
    }
}

/* r[i][l] becomes r[l][i]. Each round exchanges blocks of `by` x `by` across the diagonal. */
static inline __attribute__((always_inline)) void transpose_round(vreal r[VL], const int by) {
#ifdef __clang__
    for (int i = 0; i < VL; i++) {
        if (i & by)
            continue;
        vreal a = r[i], b = r[i + by];
        for (int l = 0; l < VL; l++) {
            r[i][l] = l & by ? b[l - by] : a[l];
            r[i + by][l] = l & by ? b[l] : a[l + by];
        }
    }
#else
    vbits low, high;
    for (int l = 0; l < VL; l++) {
        low[l] = l & by ? VL + l - by : l;
        high[l] = l & by ? VL + l : l + by;
    }
    for (int i = 0; i < VL; i++) {
        if (i & by)
            continue;
        vreal a = __builtin_shuffle(r[i], r[i + by], low);
        r[i + by] = __builtin_shuffle(r[i], r[i + by], high);
        r[i] = a;
    }
#endif
}

static inline void transpose(vreal r[VL]) {
    if (VL > 8)
        transpose_round(r, 8);
    if (VL > 4)
        transpose_round(r, 4);
    if (VL > 2)
        transpose_round(r, 2);
    transpose_round(r, 1);
}

/* Words x [rows, W] to out [W, TILE], with zeros from column `rows` to TILE. */
static inline void transpose_rows(const word *x, int64_t rows, int64_t W, word *out) {
    for (int64_t j = 0; j < TILE; j += VL)
        for (int64_t c = 0; c < W; c += VL) {
            vreal r[VL];
            for (int64_t i = 0; i < VL; i++)
                r[i] = j + i < rows ? load_words_part(x + (j + i) * W + c, W - c) : (vreal){0};
            transpose(r);
            for (int64_t i = 0; i < min64(W - c, VL); i++)
                vstore_words(out + (c + i) * TILE + j, r[i]);
        }
}

/* x [d, TILE] to out [TILE, ld], row j times factors[j]. ld is whole vectors. */
static inline void transpose_columns(const real *x, const real *factors, int64_t rows, int64_t d, int64_t ld,
                                     real *out) {
    for (int64_t j = 0; j < rows; j += VL)
        for (int64_t c = 0; c < d; c += VL) {
            vreal r[VL], factor = vload(factors + j);
            for (int64_t i = 0; i < VL; i++)
                r[i] = c + i < d ? vload(x + (c + i) * TILE + j) * factor : (vreal){0};
            transpose(r);
            for (int64_t i = 0; i < VL; i++)
                vstore(out + (j + i) * ld + c, r[i]);
        }
}

/* Rows [row, row + rows) become x [rows, ld] times `factor`, or have it added. */
static inline void unpack_rows(const real *x, int64_t rows, int64_t d, int64_t ld, real factor, bool add,
                               struct head_rows out, int64_t row) {
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t c = 0; c < d; c += 64 / (int64_t)sizeof(elem))
            __builtin_prefetch(out.data + (row + i + PREFETCH_ROWS) * out.stride + c, 1);
        for (int64_t c = 0; c < d; c += VL) {
            elem *to = out.data + (row + i) * out.stride + c;
            vreal v = vload(x + i * ld + c) * factor;
            store_part(to, add ? v + load_part(to, d - c) : v, d - c);
        }
    }
}

/* The lanes of the result are the sums of r[0], r[1], ...; r is overwritten. */
static inline vreal sum_each(vreal r[VL]) {
    transpose(r);
    for (int by = VL / 2; by > 0; by /= 2)
        for (int i = 0; i < by; i++)
            r[i] += r[i + by];
    return r[0];
}

/* out[i] = factor <x[row + i], y[row + i]>; out is padded to whole vectors. */
static inline void row_dots(struct head_rows x, struct head_rows y, int64_t row, int64_t rows, int64_t d,
                            real factor, real *out) {
    for (int64_t i = 0; i < rows; i += VL) {
        vreal r[VL];
        for (int64_t l = 0; l < VL; l++) {
            r[l] = (vreal){0};
            if (i + l >= rows)
                continue;
            prefetch_row(x, row + i + l, d);
            prefetch_row(y, row + i + l, d);
            const elem *a = x.data + (row + i + l) * x.stride, *b = y.data + (row + i + l) * y.stride;
            for (int64_t c = 0; c < d; c += VL)
                r[l] += load_part(a + c, d - c) * load_part(b + c, d - c);
        }
        vstore(out + i, sum_each(r) * factor);
    }
}

#endif

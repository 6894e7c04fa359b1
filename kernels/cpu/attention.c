/* Fused attention, forward and backward, without an S x S array (Dao et al. 2022, Milakov & Gimelshein 2018).
 *
 * Each (batch, head) is computed by one thread. It packs the head's keys and values once into tiles that the
 * small matrix products of tile.h read in order, then computes the tiles of scores that are inside the mask's
 * band; the others are skipped. Scores are in base 2 (q is scaled by scale * log2 e), so that each takes one
 * exp2. Saved for backward: the log-sum-exp, in base 2, [B,H,S].
 *
 * Which keys a query sees: attention_keys() and, in segments, attention_segment_keys() in kernels.h. They are
 * one interval; attention_tiles.h. */
#include "kernels/cpu/attention_tiles.h"

#include "kernels/cpu/tile.h"

int64_t attention_tiles_visited;

static const real LOG2E = (real)1.4426950408889634, LN2 = (real)0.6931471805599453;

static int64_t padded_dim(const struct attention_spec *s) {
    return round_up(s->head_dim, VL);
}

static int64_t padded_length(const struct attention_spec *s) {
    return round_up(s->length, TILE);
}

/* Scratch of one thread, the same layout for forward and backward; forward does not use all of it. */
struct scratch {
    real *q;                         /* [S, d'] scaled by scale * log2 e; d' is d padded to whole vectors */
    real *d_o;                       /* [S, d'] */
    real *k;                         /* [S, d'] */
    real *v;                         /* [S, d'] forward */
    real *kt, *vt;                   /* [S/TILE][d][TILE]: tiles transposed */
    real *acc;                       /* [S, d'] the output, or dq, being summed */
    real *dk, *dv;                   /* [TILE, d'] */
    real *p, *ds;                    /* [TILE, TILE] scores, then probabilities; and their gradient */
    real *row_max, *row_sum, *delta; /* [S] */
};

/* Sets *out to arrays behind `base`, which may be NULL, and returns their bytes. Arrays begin at cache lines;
 * one line between them keeps arrays of a power of two from starting in the same cache set. Each thread has
 * pages of its own. */
static size_t layout_scratch(const struct attention_spec *s, char *base, struct scratch *out) {
    int64_t S = padded_length(s), D = padded_dim(s);
    size_t offset = 0;
    struct {
        real **where;
        int64_t count;
    } parts[] = {{&out->q, S * D},     {&out->d_o, S * D},     {&out->k, S * D},        {&out->v, S * D},
                 {&out->kt, S * D},    {&out->vt, S * D},      {&out->acc, S * D},      {&out->dk, TILE * D},
                 {&out->dv, TILE * D}, {&out->p, TILE * TILE}, {&out->ds, TILE * TILE}, {&out->row_max, S},
                 {&out->row_sum, S},   {&out->delta, S}};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        *parts[i].where = base ? (real *)(base + offset) : NULL;
        offset += (size_t)round_up(parts[i].count * (int64_t)sizeof(real), 64) + 64;
    }
    return (size_t)round_up((int64_t)offset, 4096);
}

struct op_cost attention_plan(const struct device *dev, const struct attention_spec *s) {
    struct scratch unused;
    size_t each = layout_scratch(s, NULL, &unused);
    return (struct op_cost){.saved = (size_t)(s->batch * s->heads * s->length) * sizeof(real),
                            .workspace = (size_t)dev->threads * each};
}

/* One head of [B,S,H,d]. */
static real *head_of(tensor t, int64_t b, int64_t h) {
    return (real *)t.data + b * t.stride[0] + h * t.stride[2];
}

/* A head's rows are a token apart, too far for the hardware prefetcher. */
static inline void prefetch_row(const real *row, int64_t d) {
    for (int64_t c = 0; c < d; c += 64 / (int64_t)sizeof(real))
        __builtin_prefetch(row + c);
}

enum { PREFETCH_ROWS = 12 };

/* Copies rows [S, d] at `stride` to [S', d'], times `factor`, with zeros in the padding. Contiguous rows and
 * whole vectors are what tile_gemm is fast on. */
static void pack_rows(const struct attention_spec *s, const real *x, int64_t stride, real factor, real *out) {
    int64_t D = padded_dim(s), d = s->head_dim;
    for (int64_t i = 0; i < s->length; i++) {
        prefetch_row(x + (i + PREFETCH_ROWS) * stride, d);
#pragma omp simd
        for (int64_t c = 0; c < d; c++)
            out[i * D + c] = factor * x[i * stride + c];
        for (int64_t c = d; c < D; c++)
            out[i * D + c] = 0;
    }
    memset(out + s->length * D, 0, (size_t)((padded_length(s) - s->length) * D) * sizeof(real));
}

/* The same, each tile of TILE rows transposed: in q k^T, tile_gemm needs the keys along the vectors. */
static void pack_transposed(const struct attention_spec *s, const real *x, int64_t stride, real *out) {
    int64_t d = s->head_dim;
    for (int64_t begin = 0; begin < s->length; begin += TILE) {
        real *tile = out + begin * d;
        int64_t rows = min64(TILE, s->length - begin);
        if (rows < TILE)
            memset(tile, 0, (size_t)(TILE * d) * sizeof(real));
        for (int64_t j = 0; j < rows; j++) {
            prefetch_row(x + (begin + j + PREFETCH_ROWS) * stride, d);
            for (int64_t c = 0; c < d; c++)
                tile[c * TILE + j] = x[(begin + j) * stride + c];
        }
    }
}

/* A tile is computed in strips of STRIP queries: at the band's edges a strip computes only the columns that
 * one of its queries sees, which saves nearly half of the work for narrow windows. */
enum { STRIP = 16 };

/* Columns [*begin, *end), whole vectors, of the tile of keys from k0 that queries [q0, q0 + rows) see. */
static void strip_columns(const struct attention_mask *m, int64_t q0, int64_t rows, int64_t k0,
                          int64_t *begin, int64_t *end) {
    int64_t unused;
    mask_keys(m, q0, begin, &unused);
    mask_keys(m, q0 + rows - 1, &unused, end);
    *begin = max64(*begin - k0, 0) / VL * VL;
    *end = round_up(min64(*end - k0, TILE), VL);
}

/* Scores of a strip against columns [begin, end) of the tile from k0. */
static void score_strip(const struct attention_spec *s, const struct scratch *w, int64_t q0, int64_t rows,
                        int64_t k0, int64_t begin, int64_t end) {
    int64_t D = padded_dim(s);
    tile_gemm(rows, end - begin, s->head_dim, w->q + q0 * D, D, 1, w->kt + k0 * s->head_dim + begin, TILE,
              w->p + begin, TILE, false);
}

/* The visible columns [*first, *last) of one query within the strip's [begin, end). May be empty. */
static void visible_columns(const struct attention_mask *m, int64_t query, int64_t k0, int64_t begin,
                            int64_t end, int64_t *first, int64_t *last) {
    mask_keys(m, query, first, last);
    *first = max64(*first - k0, begin);
    *last = max64(min64(*last - k0, end), *first);
}

static void mask_row(real *row, int64_t begin, int64_t first, int64_t last, int64_t end) {
    vbits lane;
    for (int i = 0; i < VL; i++)
        lane[i] = i;
    for (int64_t j = begin; j < end; j += VL) {
        if (j >= first && j + VL <= last)
            continue;
        vbits column = lane + (real_bits)j;
        vbits seen = (column >= (real_bits)first) & (column < (real_bits)last);
        vstore(row + j, vselect(seen, vload(row + j), vsplat(-INFINITY)));
    }
}

/* One row of the online softmax: scores become exp2(score - maximum so far); the sums over earlier tiles are
 * rescaled if the maximum grew. */
static void softmax_row(real *row, int64_t columns, int64_t D, real *row_max, real *row_sum, real *acc) {
    vreal m = vload(row);
    for (int64_t j = VL; j < columns; j += VL)
        m = vmax(m, vload(row + j));
    real top = vmax_lanes(m);
    if (top > *row_max) {
        real factor = vexp2(vsplat(*row_max - top))[0]; /* 0 at the first tile, where row_max is -inf */
        *row_max = top;
        *row_sum *= factor;
        for (int64_t c = 0; c < D; c += VL)
            vstore(acc + c, vload(acc + c) * factor);
    }
    vreal sum = {0}, shift = vsplat(*row_max);
    for (int64_t j = 0; j < columns; j += VL) {
        vreal e = vexp2(vload(row + j) - shift);
        vstore(row + j, e);
        sum += e;
    }
    *row_sum += vsum(sum);
}

static void forward_strip(const struct attention_mask *m, const struct scratch *w, int64_t q0, int64_t rows,
                          int64_t k0, real *row_max, real *row_sum, real *acc) {
    const struct attention_spec *s = m->spec;
    int64_t D = padded_dim(s), begin, end;
    strip_columns(m, q0, rows, k0, &begin, &end);
    if (begin >= end)
        return;
    score_strip(s, w, q0, rows, k0, begin, end);
    for (int64_t i = 0; i < rows; i++) {
        int64_t first, last;
        real *row = w->p + i * TILE;
        visible_columns(m, q0 + i, k0, begin, end, &first, &last);
        if (first == last) {
            memset(row + begin, 0, (size_t)(end - begin) * sizeof(real));
            continue;
        }
        mask_row(row, begin, first, last, end);
        softmax_row(row + begin, end - begin, D, &row_max[i], &row_sum[i], acc + i * D);
    }
    tile_gemm(rows, D, end - begin, w->p + begin, TILE, 1, w->v + (k0 + begin) * D, D, acc, D, true);
}

static void forward_tile(const struct attention_mask *m, const struct scratch *w, int64_t q0, int64_t rows,
                         int64_t k0) {
    for (int64_t i = 0; i < rows; i += STRIP)
        forward_strip(m, w, q0 + i, min64(STRIP, rows - i), k0, w->row_max + i, w->row_sum + i,
                      w->acc + i * padded_dim(m->spec));
}

static void forward_head(const struct attention_mask *m, const struct scratch *w, const real *q,
                         int64_t q_stride, const real *k, int64_t k_stride, const real *v, int64_t v_stride,
                         real *o, int64_t o_stride, real *lse) {
    const struct attention_spec *s = m->spec;
    int64_t D = padded_dim(s), visited = 0;
    pack_rows(s, q, q_stride, (real)s->scale * LOG2E, w->q);
    pack_rows(s, v, v_stride, 1, w->v);
    pack_transposed(s, k, k_stride, w->kt);
    for (int64_t q0 = 0; q0 < s->length; q0 += TILE) {
        int64_t rows = min64(TILE, s->length - q0), begin, end;
        memset(w->acc, 0, (size_t)(rows * D) * sizeof(real));
        for (int64_t i = 0; i < rows; i++) {
            w->row_max[i] = -INFINITY;
            w->row_sum[i] = 0;
        }
        tiles_of_queries(m, q0, rows, &begin, &end);
        for (int64_t k0 = begin; k0 < end; k0 += TILE, visited++)
            forward_tile(m, w, q0, rows, k0);
        for (int64_t i = 0; i < rows; i++) {
            real inverse = 1 / w->row_sum[i];
#pragma omp simd
            for (int64_t c = 0; c < s->head_dim; c++)
                o[(q0 + i) * o_stride + c] = w->acc[i * D + c] * inverse;
            lse[q0 + i] = w->row_max[i] + (real)log2((double)w->row_sum[i]);
        }
    }
#pragma omp atomic
    attention_tiles_visited += visited;
}

static void check_attention(const char *op, const struct attention_spec *s, tensor q, tensor k, tensor v,
                            tensor segments, tensor o) {
    int64_t B = s->batch, S = s->length, H = s->heads, d = s->head_dim;
    check_real(op, "q", q, B, S, H, d, 0);
    check_real(op, "k", k, B, S, H, d, 0);
    check_real(op, "v", v, B, S, H, d, 0);
    check_real(op, "o", o, B, S, H, d, 0);
    if (s->segmented)
        check_shape(op, "segments", segments, DTYPE_I32, 2, B, S / s->pseudo, 0, 0);
}

void cpu_attention(struct device *dev, const struct attention_spec *s, tensor q, tensor k, tensor v,
                   tensor segments, tensor o, void *saved) {
    call_progress_callback(dev);
    check_attention("attention", s, q, k, v, segments, o);
    char *base = cpu_workspace(dev, attention_plan(dev, s).workspace, "attention");
    struct scratch unused;
    size_t each = layout_scratch(s, NULL, &unused);
#pragma omp parallel for schedule(dynamic) num_threads(dev->threads)
    for (int64_t bh = 0; bh < s->batch * s->heads; bh++) {
        int64_t b = bh / s->heads, h = bh % s->heads;
        struct attention_mask m = mask_of_sequence(s, segments, b);
        struct scratch w;
        layout_scratch(s, base + (size_t)omp_get_thread_num() * each, &w);
        forward_head(&m, &w, head_of(q, b, h), q.stride[1], head_of(k, b, h), k.stride[1], head_of(v, b, h),
                     v.stride[1], head_of(o, b, h), o.stride[1], (real *)saved + bh * s->length);
    }
}

/* P = exp2(score - lse);  dS = P (dO v - delta). w->p and w->ds enter as scores and dO V^T. */
static void gradient_strip(const struct attention_mask *m, const struct scratch *w, const real *lse,
                           int64_t q0, int64_t rows, int64_t k0, int64_t begin, int64_t end) {
    for (int64_t i = 0; i < rows; i++) {
        int64_t first, last;
        real *p = w->p + i * TILE, *ds = w->ds + i * TILE;
        visible_columns(m, q0 + i, k0, begin, end, &first, &last);
        mask_row(p, begin, first, last, end);
        vreal shift = vsplat(lse[q0 + i]), delta = vsplat(w->delta[q0 + i]);
        for (int64_t j = begin; j < end; j += VL) {
            vreal e = vexp2(vload(p + j) - shift);
            vstore(p + j, e);
            vstore(ds + j, e * (vload(ds + j) - delta));
        }
    }
}

static void backward_strip(const struct attention_mask *m, const struct scratch *w, const real *lse,
                           int64_t q0, int64_t rows, int64_t k0) {
    const struct attention_spec *s = m->spec;
    int64_t D = padded_dim(s), d = s->head_dim, begin, end;
    strip_columns(m, q0, rows, k0, &begin, &end);
    if (begin >= end)
        return;
    int64_t columns = end - begin;
    const real *d_o = w->d_o + q0 * D, *p = w->p + begin, *ds = w->ds + begin;
    score_strip(s, w, q0, rows, k0, begin, end);
    tile_gemm(rows, columns, d, d_o, D, 1, w->vt + k0 * d + begin, TILE, w->ds + begin, TILE, false);
    gradient_strip(m, w, lse, q0, rows, k0, begin, end);
    tile_gemm(columns, D, rows, p, 1, TILE, d_o, D, w->dv + begin * D, D, true);
    tile_gemm(columns, D, rows, ds, 1, TILE, w->q + q0 * D, D, w->dk + begin * D, D, true);
    tile_gemm(rows, D, columns, ds, TILE, 1, w->k + (k0 + begin) * D, D, w->acc + q0 * D, D, true);
}

static void backward_tile(const struct attention_mask *m, const struct scratch *w, const real *lse,
                          int64_t q0, int64_t k0) {
    int64_t rows = min64(TILE, m->spec->length - q0);
    for (int64_t i = 0; i < rows; i += STRIP)
        backward_strip(m, w, lse, q0 + i, min64(STRIP, rows - i), k0);
}

static void unpack_rows(const real *x, int64_t rows, int64_t D, int64_t d, real factor, real *out,
                        int64_t stride) {
    for (int64_t i = 0; i < rows; i++)
#pragma omp simd
        for (int64_t c = 0; c < d; c++)
            out[i * stride + c] = factor * x[i * D + c];
}

/* delta = <dO, O>, which is what the softmax's backward subtracts from every score's gradient in a row. */
static void row_deltas(const struct attention_spec *s, const struct scratch *w, const real *o,
                       int64_t o_stride) {
    int64_t D = padded_dim(s);
    for (int64_t i = 0; i < s->length; i++) {
        real dot = 0;
        prefetch_row(o + (i + PREFETCH_ROWS) * o_stride, s->head_dim);
#pragma omp simd reduction(+ : dot)
        for (int64_t c = 0; c < s->head_dim; c++)
            dot += w->d_o[i * D + c] * o[i * o_stride + c];
        w->delta[i] = dot;
    }
}

/* Keys in the outer loop, queries in the inner: dk and dv of a tile stay in cache until complete; dq, which
 * every tile of keys adds to, is kept for the whole head. */
static void backward_head(const struct attention_mask *m, const struct scratch *w, const real *lse, real *dk,
                          int64_t dk_stride, real *dv, int64_t dv_stride) {
    const struct attention_spec *s = m->spec;
    int64_t D = padded_dim(s), visited = 0;
    memset(w->acc, 0, (size_t)(padded_length(s) * D) * sizeof(real));
    for (int64_t k0 = 0; k0 < s->length; k0 += TILE) {
        int64_t keys = min64(TILE, s->length - k0), begin, end;
        tiles_of_keys(m, k0, keys, &begin, &end);
        memset(w->dk, 0, (size_t)(TILE * D) * sizeof(real));
        memset(w->dv, 0, (size_t)(TILE * D) * sizeof(real));
        for (int64_t q0 = begin; q0 < end; q0 += TILE, visited++)
            backward_tile(m, w, lse, q0, k0);
        /* w->q is scaled by scale * log2 e, and dk by scale alone */
        unpack_rows(w->dk, keys, D, s->head_dim, LN2, dk + k0 * dk_stride, dk_stride);
        unpack_rows(w->dv, keys, D, s->head_dim, 1, dv + k0 * dv_stride, dv_stride);
    }
#pragma omp atomic
    attention_tiles_visited += visited;
}

void cpu_attention_backward(struct device *dev, const struct attention_spec *s, tensor q, tensor k, tensor v,
                            tensor segments, tensor o, tensor d_o, const void *saved, tensor dq, tensor dk,
                            tensor dv) {
    call_progress_callback(dev);
    check_attention("attention_backward", s, q, k, v, segments, o);
    check_attention("attention_backward (gradients)", s, dq, dk, dv, segments, d_o);
    char *base = cpu_workspace(dev, attention_plan(dev, s).workspace, "attention_backward");
    struct scratch unused;
    size_t each = layout_scratch(s, NULL, &unused);
#pragma omp parallel for schedule(dynamic) num_threads(dev->threads)
    for (int64_t bh = 0; bh < s->batch * s->heads; bh++) {
        int64_t b = bh / s->heads, h = bh % s->heads;
        struct attention_mask m = mask_of_sequence(s, segments, b);
        struct scratch w;
        layout_scratch(s, base + (size_t)omp_get_thread_num() * each, &w);
        pack_rows(s, head_of(q, b, h), q.stride[1], (real)s->scale * LOG2E, w.q);
        pack_rows(s, head_of(k, b, h), k.stride[1], 1, w.k);
        pack_rows(s, head_of(d_o, b, h), d_o.stride[1], 1, w.d_o);
        pack_transposed(s, head_of(k, b, h), k.stride[1], w.kt);
        pack_transposed(s, head_of(v, b, h), v.stride[1], w.vt);
        row_deltas(s, &w, head_of(o, b, h), o.stride[1]);
        backward_head(&m, &w, (const real *)saved + bh * s->length, head_of(dk, b, h), dk.stride[1],
                      head_of(dv, b, h), dv.stride[1]);
        unpack_rows(w.acc, s->length, padded_dim(s), s->head_dim, (real)s->scale, head_of(dq, b, h),
                    dq.stride[1]);
    }
}

/* simplicial: attention to pairs of keys (2-simplicial attention, arXiv 2507.02754), of which no array of all exists:
 *
 *   A_ijk = scale sum_l q_il k_jl k'_kl over visible j and k,  P = softmax of A_i over pairs,
 *   o_i = sum_jk P_ijk v_j * v'_k
 *
 * For one query, q_i * k'_k are as many vectors as it sees keys; their products with the keys are the scores, PAIRS of
 * these vectors at a time, with a running softmax. Sum_j P_jk v_j is a product likewise, and so are all the gradients
 * (dS = P (dP - D), D = <o, do>). A thread takes a head of a sequence: gradients of keys and values are its own.
 *
 * Saved: the largest score and one over the sum, [2][B,H,S]. */
#include "kernels/cpu/attention_tiles.h"
#include "kernels/cpu/tile.h"

enum { PAIRS = 16 };

/* Scratch of one thread; S is the sequence or the keys of a cache. */
struct scratch {
    real *k, *kt, *v, *vt, *k2, *v2;  /* [S,d], transposed ones [d,S'], S' whole vectors */
    real *dk, *dv, *dk2, *dv2;        /* [S,d] */
    real *vectors, *sums, *gradients; /* [PAIRS,d] */
    real *scores, *dscores;           /* [PAIRS,S'] */
    real *q, *o, *d_o, *dq;           /* [d] of the query */
};

static size_t layout_scratch(int64_t S, int64_t d, char *base, struct scratch *w) {
    int64_t all = S * d, transposed = d * round_up(S, VL), few = PAIRS * d, wide = PAIRS * round_up(S, VL);
    struct part parts[] = {
        {&w->k, all},         {&w->kt, transposed}, {&w->v, all},        {&w->vt, transposed},
        {&w->k2, all},        {&w->v2, all},        {&w->dk, all},       {&w->dv, all},
        {&w->dk2, all},       {&w->dv2, all},       {&w->vectors, few},  {&w->sums, few},
        {&w->gradients, few}, {&w->scores, wide},   {&w->dscores, wide}, {&w->q, d},
        {&w->o, d},           {&w->d_o, d},         {&w->dq, d}};
    return lay_out(parts, sizeof parts / sizeof *parts, base);
}

struct op_cost CPU(simplicial_plan)(const struct device *dev, const struct attention_spec *s) {
    struct scratch unused;
    return (struct op_cost){.saved = 2 * (size_t)(s->batch * s->heads * s->length) * sizeof(real),
                            .workspace =
                                (size_t)dev->threads * layout_scratch(s->length, s->head_dim, NULL, &unused)};
}

/* Keys [first, first + count) of a head; of a ring buffer those at their index modulo its length. */
static void read_head(tensor t, int64_t b, int64_t h, int64_t first, int64_t count, int64_t d, real *out) {
    for (int64_t i = 0; i < count; i++) {
        const elem *from =
            (elem *)t.data + b * t.stride[0] + (first + i) % t.shape[1] * t.stride[1] + h * t.stride[2];
        for (int64_t c = 0; c < d; c++)
            out[i * d + c] = from_elem(from[c]);
    }
}

static void transpose(const real *rows, int64_t count, int64_t ld, int64_t d, real *out) {
    for (int64_t c = 0; c < d; c++)
        for (int64_t i = 0; i < ld; i++)
            out[c * ld + i] = i < count ? rows[i * d + c] : 0;
}

static void read_row(tensor t, int64_t b, int64_t i, int64_t h, int64_t d, real *out) {
    const elem *from = (elem *)t.data + b * t.stride[0] + i * t.stride[1] + h * t.stride[2];
    for (int64_t c = 0; c < d; c++)
        out[c] = from_elem(from[c]);
}

static void write_row(tensor t, int64_t b, int64_t i, int64_t h, int64_t d, const real *values) {
    elem *to = (elem *)t.data + b * t.stride[0] + i * t.stride[1] + h * t.stride[2];
    for (int64_t c = 0; c < d; c++)
        to[c] = to_elem(values[c]);
}

/* One query's keys: `count` of those that the scratch holds, from `begin` on. ld: of transposed arrays and scores. */
struct query {
    int64_t d, begin, count, ld;
    real scale;
};

/* Pairs with the second keys [k, k + rows): the vectors scale q * k', and their scores with all first keys. */
static void score_pairs(const struct query *x, const struct scratch *w, int64_t k, int64_t rows) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < x->d; c++)
            w->vectors[r * x->d + c] = x->scale * w->q[c] * w->k2[(x->begin + k + r) * x->d + c];
    tile_gemm(rows, x->count, x->d, w->vectors, x->d, 1, w->kt + x->begin, x->ld, w->scores, x->ld, false);
}

static real largest_score(const struct query *x, const struct scratch *w, int64_t rows, real largest) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < x->count; j++) {
            real score = w->scores[r * x->ld + j];
            largest = score > largest || score != score ? score : largest; /* NaN stays */
        }
    return largest;
}

/* Scores become exp(score - top) times `factor`. Returns their sum. */
static real exponentials(const struct query *x, const struct scratch *w, int64_t rows, real top,
                         real factor) {
    real sum = 0;
    for (int64_t r = 0; r < rows; r++) {
        real *row = w->scores + r * x->ld;
        int64_t j = 0;
        vreal sums = vsplat(0);
        for (; j + VL <= x->count; j += VL) {
            vreal e = vexp(vload(row + j) - top) * factor;
            vstore(row + j, e);
            sums += e;
        }
        for (; j < x->count; j++)
            sum += row[j] = (real)exp((double)(row[j] - top)) * factor;
        sum += vsum(sums);
    }
    return sum;
}

/* w->o of the query in w->q; *top and *inverse: what its softmax is made of. */
static void forward_query(const struct query *x, const struct scratch *w, real *top, real *inverse) {
    real sum = 0;
    *top = (real)-1e30;
    memset(w->o, 0, (size_t)x->d * sizeof(real));
    for (int64_t k = 0; k < x->count; k += PAIRS) {
        int64_t rows = min64(PAIRS, x->count - k);
        score_pairs(x, w, k, rows);
        real higher = largest_score(x, w, rows, *top), factor = (real)exp((double)(*top - higher));
        *top = higher;
        sum = sum * factor + exponentials(x, w, rows, higher, 1);
        tile_gemm(rows, x->d, x->count, w->scores, x->ld, 1, w->v + x->begin * x->d, x->d, w->sums, x->d,
                  false);
        for (int64_t c = 0; c < x->d; c++) {
            real o = w->o[c] * factor;
            for (int64_t r = 0; r < rows; r++)
                o += w->sums[r * x->d + c] * w->v2[(x->begin + k + r) * x->d + c];
            w->o[c] = o;
        }
    }
    *inverse = 1 / sum;
    for (int64_t c = 0; c < x->d; c++)
        w->o[c] *= *inverse;
}

static void check_inputs(const char *op, const struct attention_spec *s, const tensor inputs[5],
                         tensor segments, tensor o) {
    static const char *const names[] = {"q", "k", "v", "k2", "v2"};
    for (int i = 0; i < 5; i++)
        check_elem(op, names[i], inputs[i], s->batch, s->length, s->heads, s->head_dim, 0);
    check_elem(op, "o", o, s->batch, s->length, s->heads, s->head_dim, 0);
    if (s->segmented)
        check_shape(op, "segments", segments, DTYPE_I32, 2, s->batch, s->length, 0, 0);
}

static void read_keys(const struct attention_spec *s, const struct scratch *w, int64_t b, int64_t h,
                      int64_t first, int64_t count, tensor k, tensor v, tensor k2, tensor v2) {
    int64_t d = s->head_dim;
    read_head(k, b, h, first, count, d, w->k);
    read_head(v, b, h, first, count, d, w->v);
    read_head(k2, b, h, first, count, d, w->k2);
    read_head(v2, b, h, first, count, d, w->v2);
    transpose(w->k, count, round_up(count, VL), d, w->kt);
}

static struct query query_at(const struct attention_mask *m, int64_t i) {
    const struct attention_spec *s = m->spec;
    int64_t begin, end;
    mask_keys(m, i, &begin, &end);
    return (struct query){s->head_dim, begin, end - begin, round_up(s->length, VL), (real)s->scale};
}

void CPU(simplicial)(struct device *dev, const struct attention_spec *s, tensor q, tensor k, tensor v,
                     tensor k2, tensor v2, tensor segments, tensor o, void *saved) {
    call_progress_callback(dev);
    check_inputs("simplicial", s, (tensor[]){q, k, v, k2, v2}, segments, o);
    char *base = cpu_workspace(dev, CPU(simplicial_plan)(dev, s).workspace, "simplicial");
    const int64_t S = s->length, heads = s->batch * s->heads;
    real *tops = saved, *inverses = tops + heads * S;
#pragma omp parallel num_threads(dev->threads)
    {
        struct scratch w;
        size_t each = layout_scratch(S, s->head_dim, NULL, &w);
        layout_scratch(S, s->head_dim, base + (size_t)omp_get_thread_num() * each, &w);
#pragma omp for schedule(dynamic)
        for (int64_t bh = 0; bh < heads; bh++) {
            int64_t b = bh / s->heads, h = bh % s->heads;
            struct attention_mask m = mask_of_sequence(s, segments, b);
            read_keys(s, &w, b, h, 0, S, k, v, k2, v2);
            for (int64_t i = 0; i < S; i++) {
                struct query x = query_at(&m, i);
                read_row(q, b, i, h, x.d, w.q);
                forward_query(&x, &w, tops + bh * S + i, inverses + bh * S + i);
                write_row(o, b, i, h, x.d, w.o);
            }
        }
    }
}

/* Adds to the gradients of keys and values, and computes w->dq. */
static void backward_query(const struct query *x, const struct scratch *w, real top, real inverse) {
    const int64_t d = x->d, n = x->count, ld = x->ld, at = x->begin * d;
    real along = 0;
    for (int64_t c = 0; c < d; c++)
        along += w->o[c] * w->d_o[c];
    memset(w->dq, 0, (size_t)d * sizeof(real));
    for (int64_t k = 0; k < n; k += PAIRS) {
        int64_t rows = min64(PAIRS, n - k), first = at + k * d;
        score_pairs(x, w, k, rows);
        exponentials(x, w, rows, top, inverse);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < d; c++)
                w->gradients[r * d + c] = w->d_o[c] * w->v2[first + r * d + c];
        tile_gemm(rows, n, d, w->gradients, d, 1, w->vt + x->begin, ld, w->dscores, ld, false);
        tile_gemm(rows, d, n, w->scores, ld, 1, w->v + at, d, w->sums, d, false);
        tile_gemm(n, d, rows, w->scores, 1, ld, w->gradients, d, w->dv + at, d, true);
        for (int64_t r = 0; r < rows; r++) {
            for (int64_t c = 0; c < d; c++)
                w->dv2[first + r * d + c] += w->d_o[c] * w->sums[r * d + c];
            for (int64_t j = 0; j < n; j++)
                w->dscores[r * ld + j] = w->scores[r * ld + j] * (w->dscores[r * ld + j] - along);
        }
        tile_gemm(rows, d, n, w->dscores, ld, 1, w->k + at, d, w->sums, d, false);
        tile_gemm(n, d, rows, w->dscores, 1, ld, w->vectors, d, w->dk + at, d, true);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < d; c++) {
                real sum = x->scale * w->sums[r * d + c];
                w->dq[c] += sum * w->k2[first + r * d + c];
                w->dk2[first + r * d + c] += sum * w->q[c];
            }
    }
}

void CPU(simplicial_backward)(struct device *dev, const struct attention_spec *s, tensor q, tensor k,
                              tensor v, tensor k2, tensor v2, tensor segments, tensor o, tensor d_o,
                              const void *saved, tensor dq, tensor dk, tensor dv, tensor dk2, tensor dv2) {
    call_progress_callback(dev);
    check_inputs("simplicial_backward", s, (tensor[]){q, k, v, k2, v2}, segments, o);
    check_inputs("simplicial_backward", s, (tensor[]){dq, dk, dv, dk2, dv2}, segments, d_o);
    char *base = cpu_workspace(dev, CPU(simplicial_plan)(dev, s).workspace, "simplicial_backward");
    const int64_t S = s->length, d = s->head_dim, heads = s->batch * s->heads;
    const real *tops = saved, *inverses = tops + heads * S;
#pragma omp parallel num_threads(dev->threads)
    {
        struct scratch w;
        size_t each = layout_scratch(S, d, NULL, &w);
        layout_scratch(S, d, base + (size_t)omp_get_thread_num() * each, &w);
        const tensor targets[] = {dk, dv, dk2, dv2};
        real *const sums[] = {w.dk, w.dv, w.dk2, w.dv2};
#pragma omp for schedule(dynamic)
        for (int64_t bh = 0; bh < heads; bh++) {
            int64_t b = bh / s->heads, h = bh % s->heads;
            struct attention_mask m = mask_of_sequence(s, segments, b);
            read_keys(s, &w, b, h, 0, S, k, v, k2, v2);
            transpose(w.v, S, round_up(S, VL), d, w.vt);
            for (int part = 0; part < 4; part++)
                memset(sums[part], 0, (size_t)(S * d) * sizeof(real));
            for (int64_t i = 0; i < S; i++) {
                struct query x = query_at(&m, i);
                read_row(q, b, i, h, d, w.q);
                read_row(o, b, i, h, d, w.o);
                read_row(d_o, b, i, h, d, w.d_o);
                backward_query(&x, &w, tops[bh * S + i], inverses[bh * S + i]);
                write_row(dq, b, i, h, d, w.dq);
            }
            for (int part = 0; part < 4; part++)
                for (int64_t i = 0; i < S; i++)
                    write_row(targets[part], b, i, h, d, sums[part] + i * d);
        }
    }
}

/* The keys that the n queries see are read from the caches once. */
void CPU(simplicial_decode)(struct device *dev, const struct attention_spec *s, tensor q, tensor k, tensor v,
                            tensor k2, tensor v2, tensor cache_k, tensor cache_v, tensor cache_k2,
                            tensor cache_v2, int64_t first, tensor o) {
    const tensor inputs[] = {k, v, k2, v2}, caches[] = {cache_k, cache_v, cache_k2, cache_v2};
    const int64_t n = s->length, d = s->head_dim, capacity = cache_k.shape[1];
    struct attention_spec all = *s;
    all.length = capacity;
    check_inputs("simplicial_decode", s, (tensor[]){q, k, v, k2, v2}, tensor_none(), o);
    char *base = cpu_workspace(dev, CPU(simplicial_plan)(dev, &all).workspace, "simplicial_decode");
    for (int part = 0; part < 4; part++)
        CPU(append_to_cache)(s, inputs[part], caches[part], first);
    int64_t begin, end, unused;
    attention_keys(s, first, first + n, &begin, &unused);
    attention_keys(s, first + n - 1, first + n, &unused, &end);
#pragma omp parallel num_threads(dev->threads)
    {
        struct scratch w;
        size_t each = layout_scratch(capacity, d, NULL, &w);
        layout_scratch(capacity, d, base + (size_t)omp_get_thread_num() * each, &w);
#pragma omp for schedule(dynamic)
        for (int64_t bh = 0; bh < s->batch * s->heads; bh++) {
            int64_t b = bh / s->heads, h = bh % s->heads;
            read_keys(s, &w, b, h, begin, end - begin, cache_k, cache_v, cache_k2, cache_v2);
            for (int64_t i = 0; i < n; i++) {
                int64_t from, to;
                real top, inverse;
                attention_keys(s, first + i, first + n, &from, &to);
                struct query x = {d, from - begin, to - from, round_up(end - begin, VL), (real)s->scale};
                read_row(q, b, i, h, d, w.q);
                forward_query(&x, &w, &top, &inverse);
                write_row(o, b, i, h, d, w.o);
            }
        }
    }
}

/* talking: attention whose heads are mixed before the softmax and after it (Shazeer et al. 2020, arXiv 2003.02436),
 * without an array of all scores.
 *
 *   M_h = sum_k logits[h,k] scale q_k k_k^T over visible keys,  W = softmax(M),  U_h = sum_k weights[h,k] W_k,
 *   o_h = U_h v_h
 *
 * A tile is QUERIES x KEYS scores of all heads, stored [H][KEYS][QUERIES], so that vectors run along the queries and
 * mixing is a matrix product with the tile. A weight needs its head's whole row before it is mixed, so that a pass over
 * the keys finds the largest score and the sum of each row, and a second one the outputs. Backward goes over the tiles
 * three times: for D = sum_j W_j dW_j of each row; by queries for dq and the gradients of the mixing matrices; by keys
 * for dk and dv. Each computes the scores again.
 *
 * Saved: the largest score and one over the sum, [2][B,H,S]. */
#include "kernels/cpu/attention_tiles.h"
#include "kernels/cpu/tile.h"

enum { QUERIES = 2 * VL, KEYS = 32 };

/* Scratch of one thread. */
struct scratch {
    real *qt, *dot;             /* [H][d][QUERIES] queries times scale, and d_o, transposed */
    real *q, *d_o, *out;        /* [H][QUERIES][d]; out: o, or dq */
    real *k, *v, *dk, *dv;      /* [H][KEYS][d] */
    real *scores, *w, *du, *dw; /* tiles */
    real *top, *sum, *row_dot;  /* [H][QUERIES] */
    real_bits *begins, *ends;   /* [QUERIES] keys that each query sees */
    real *logits, *weights;     /* [H,H] of all threads */
    real *dlogits, *dweights;   /* [H,H] partial sums */
};

static int64_t tile_reals(const struct attention_spec *s) {
    return s->heads * KEYS * QUERIES;
}

static size_t layout_scratch(const struct attention_spec *s, char *base, struct scratch *w) {
    int64_t H = s->heads, rows = H * QUERIES * s->head_dim, keys = H * KEYS * s->head_dim,
            tile = tile_reals(s);
    struct part parts[] = {
        {&w->qt, rows},        {&w->dot, rows},        {&w->q, rows},          {&w->d_o, rows},
        {&w->out, rows},       {&w->k, keys},          {&w->v, keys},          {&w->dk, keys},
        {&w->dv, keys},        {&w->scores, tile},     {&w->w, tile},          {&w->du, tile},
        {&w->dw, tile},        {&w->top, H * QUERIES}, {&w->sum, H * QUERIES}, {&w->row_dot, H * QUERIES},
        {&w->begins, QUERIES}, {&w->ends, QUERIES},    {&w->logits, H * H},    {&w->weights, H * H},
        {&w->dlogits, H * H},  {&w->dweights, H * H}};
    return lay_out(parts, sizeof parts / sizeof *parts, base);
}

static int64_t rows_of(const struct attention_spec *s) {
    return s->batch * s->heads * s->length;
}

/* D of every row, then each thread's scratch. */
struct op_cost CPU(talking_plan)(const struct device *dev, const struct attention_spec *s) {
    struct scratch unused;
    return (struct op_cost){.saved = 2 * (size_t)rows_of(s) * sizeof(real),
                            .workspace = (size_t)round_up(rows_of(s), 16) * sizeof(real) +
                                         (size_t)dev->threads * layout_scratch(s, NULL, &unused)};
}

/* ---- rows in and out ---- */

static elem *row_at(tensor t, int64_t b, int64_t i, int64_t h) {
    return (elem *)t.data + b * t.stride[0] + i * t.stride[1] + h * t.stride[2];
}

/* Rows [first, first + count) of every head times `factor` as [H][space][d], zeros after them. */
static void read_rows(const struct attention_spec *s, tensor t, int64_t b, int64_t first, int64_t count,
                      int64_t space, real factor, real *out) {
    int64_t d = s->head_dim;
    for (int64_t h = 0; h < s->heads; h++)
        for (int64_t i = 0; i < space; i++, out += d) {
            const elem *from = i < count ? row_at(t, b, first + i, h) : NULL;
            for (int64_t c = 0; c < d; c++)
                out[c] = from ? factor * from_elem(from[c]) : 0;
        }
}

static void write_rows(const struct attention_spec *s, tensor t, int64_t b, int64_t first, int64_t count,
                       int64_t space, real factor, const real *values) {
    int64_t d = s->head_dim;
    for (int64_t h = 0; h < s->heads; h++)
        for (int64_t i = 0; i < count; i++) {
            elem *to = row_at(t, b, first + i, h);
            for (int64_t c = 0; c < d; c++)
                to[c] = to_elem(factor * values[(h * space + i) * d + c]);
        }
}

/* [H][QUERIES][d] to [H][d][QUERIES]. */
static void transpose_queries(const struct attention_spec *s, const real *rows, real *out) {
    int64_t d = s->head_dim;
    for (int64_t h = 0; h < s->heads; h++)
        for (int64_t c = 0; c < d; c++)
            for (int64_t i = 0; i < QUERIES; i++)
                out[(h * d + c) * QUERIES + i] = rows[(h * QUERIES + i) * d + c];
}

/* A block of queries of one sequence, whose rows are in the scratch. */
struct block {
    int64_t b, q0, rows, begin, end; /* the keys that some of them see */
};

static struct block block_at(const struct attention_mask *m, const struct scratch *w, int64_t b, int64_t q0) {
    struct block block = {b, q0, min64(QUERIES, m->spec->length - q0), m->spec->length, 0};
    for (int64_t i = 0; i < QUERIES; i++) {
        int64_t begin = 0, end = 0;
        if (i < block.rows) {
            mask_keys(m, q0 + i, &begin, &end);
            block.begin = min64(block.begin, begin);
            block.end = max64(block.end, end);
        }
        w->begins[i] = (real_bits)begin;
        w->ends[i] = (real_bits)end;
    }
    return block;
}

static void read_queries(const struct attention_spec *s, const struct scratch *w, const struct block *x,
                         tensor q) {
    read_rows(s, q, x->b, x->q0, x->rows, QUERIES, (real)s->scale, w->q);
    transpose_queries(s, w->q, w->qt);
}

static void read_output_gradients(const struct attention_spec *s, const struct scratch *w,
                                  const struct block *x, tensor d_o) {
    read_rows(s, d_o, x->b, x->q0, x->rows, QUERIES, 1, w->d_o);
    transpose_queries(s, w->d_o, w->dot);
}

/* Statistics of the block's rows, [H][QUERIES], from or to [B,H,S]. */
static void read_statistics(const struct attention_spec *s, const struct block *x, const real *all,
                            real *out) {
    for (int64_t h = 0; h < s->heads; h++)
        for (int64_t i = 0; i < QUERIES; i++)
            out[h * QUERIES + i] = i < x->rows ? all[(x->b * s->heads + h) * s->length + x->q0 + i] : 0;
}

static void write_statistics(const struct attention_spec *s, const struct block *x, const real *values,
                             real *all) {
    for (int64_t h = 0; h < s->heads; h++)
        for (int64_t i = 0; i < x->rows; i++)
            all[(x->b * s->heads + h) * s->length + x->q0 + i] = values[h * QUERIES + i];
}

/* ---- tiles ---- */

/* out[h] = matrix (transposed: its transpose) times the heads of `in`, tiles both. */
static void mix_tile(const struct attention_spec *s, const real *matrix, bool transposed, const real *in,
                     real *out) {
    int64_t H = s->heads, n = KEYS * QUERIES;
    tile_gemm(H, n, H, matrix, transposed ? 1 : H, transposed ? H : 1, in, n, out, n, false);
}

/* out[h] [KEYS,QUERIES] = rows[h] [KEYS,d] times columns[h] [d,QUERIES]. */
static void products(const struct attention_spec *s, const real *rows, const real *columns, real *out) {
    int64_t d = s->head_dim;
    for (int64_t h = 0; h < s->heads; h++)
        tile_gemm(KEYS, QUERIES, d, rows + h * KEYS * d, d, 1, columns + h * d * QUERIES, QUERIES,
                  out + h * KEYS * QUERIES, QUERIES, false);
}

/* out[h] [QUERIES,d] += tile[h]^T times rows[h] [KEYS,d]. */
static void add_by_queries(const struct attention_spec *s, const real *tile, const real *rows, real *out) {
    int64_t d = s->head_dim;
    for (int64_t h = 0; h < s->heads; h++)
        tile_gemm(QUERIES, d, KEYS, tile + h * KEYS * QUERIES, 1, QUERIES, rows + h * KEYS * d, d,
                  out + h * QUERIES * d, d, true);
}

/* out[h] [KEYS,d] += tile[h] times rows[h] [QUERIES,d]. */
static void add_by_keys(const struct attention_spec *s, const real *tile, const real *rows, real *out) {
    int64_t d = s->head_dim;
    for (int64_t h = 0; h < s->heads; h++)
        tile_gemm(KEYS, d, QUERIES, tile + h * KEYS * QUERIES, QUERIES, 1, rows + h * QUERIES * d, d,
                  out + h * KEYS * d, d, true);
}

/* The scores of the keys from k0, and in w->w the mixed ones, -inf where a query does not see the key. */
static void score_tile(const struct attention_spec *s, const struct scratch *w, int64_t k0) {
    products(s, w->k, w->qt, w->scores);
    mix_tile(s, w->logits, false, w->scores, w->w);
    for (int64_t h = 0; h < s->heads; h++)
        for (int64_t j = 0; j < KEYS; j++)
            for (int64_t i = 0; i < QUERIES; i++) {
                real *x = w->w + (h * KEYS + j) * QUERIES + i;
                *x = k0 + j >= w->begins[i] && k0 + j < w->ends[i] ? *x : -INFINITY;
            }
}

/* The tile's weights in w->w: a row's exponentials times one over its sum. */
static void weigh_tile(const struct attention_spec *s, const struct scratch *w) {
    for (int64_t h = 0; h < s->heads; h++)
        for (int64_t i = 0; i < QUERIES; i += VL) {
            vreal top = vload(w->top + h * QUERIES + i), inverse = vload(w->sum + h * QUERIES + i);
            for (int64_t j = 0; j < KEYS; j++) {
                real *x = w->w + (h * KEYS + j) * QUERIES + i;
                vstore(x, vexp(vload(x) - top) * inverse);
            }
        }
}

/* Rows' largest scores and sums so far, with this tile's. */
static void add_to_softmax(const struct attention_spec *s, const struct scratch *w) {
    for (int64_t h = 0; h < s->heads; h++)
        for (int64_t i = 0; i < QUERIES; i += VL) {
            real *top_at = w->top + h * QUERIES + i, *sum_at = w->sum + h * QUERIES + i;
            const real *x = w->w + h * KEYS * QUERIES + i;
            vreal before = vload(top_at), top = before, sum = vsplat(0);
            for (int64_t j = 0; j < KEYS; j++)
                top = vmax(top, vload(x + j * QUERIES));
            for (int64_t j = 0; j < KEYS; j++)
                sum += vexp(vload(x + j * QUERIES) - top);
            vstore(top_at, top);
            vstore(sum_at, vload(sum_at) * vexp(before - top) + sum);
        }
}

/* ---- forward ---- */

/* The tile of keys from k0 to `end`, key k at index k mod the tensor's length: a sequence's, or a ring buffer's. */
static void read_tile(const struct attention_spec *s, tensor t, int64_t b, int64_t k0, int64_t end,
                      real *out) {
    int64_t d = s->head_dim;
    for (int64_t h = 0; h < s->heads; h++)
        for (int64_t j = 0; j < KEYS; j++, out += d) {
            const elem *from = k0 + j < end ? row_at(t, b, (k0 + j) % t.shape[1], h) : NULL;
            for (int64_t c = 0; c < d; c++)
                out[c] = from ? from_elem(from[c]) : 0;
        }
}

static void read_keys(const struct attention_spec *s, const struct scratch *w, int64_t b, int64_t k0,
                      int64_t end, tensor k, tensor v) {
    read_tile(s, k, b, k0, end, w->k);
    read_tile(s, v, b, k0, end, w->v);
}

/* o of a block. saved: see above, or NULL. */
static void forward_block(const struct attention_spec *s, const struct scratch *w, const struct block *x,
                          tensor q, tensor k, tensor v, tensor o, real *saved) {
    int64_t rows = s->heads * QUERIES;
    read_queries(s, w, x, q);
    for (int64_t i = 0; i < rows; i++) {
        w->top[i] = (real)-1e30; /* -inf would make differences NaN */
        w->sum[i] = 0;
    }
    for (int64_t k0 = x->begin; k0 < x->end; k0 += KEYS) {
        read_tile(s, k, x->b, k0, x->end, w->k);
        score_tile(s, w, k0);
        add_to_softmax(s, w);
    }
    for (int64_t i = 0; i < rows; i++)
        w->sum[i] = w->sum[i] == 0 ? 0 : 1 / w->sum[i]; /* 0: past the last query */
    if (saved) {
        write_statistics(s, x, w->top, saved);
        write_statistics(s, x, w->sum, saved + rows_of(s));
    }
    memset(w->out, 0, (size_t)(rows * s->head_dim) * sizeof(real));
    for (int64_t k0 = x->begin; k0 < x->end; k0 += KEYS) {
        read_keys(s, w, x->b, k0, x->end, k, v);
        score_tile(s, w, k0);
        weigh_tile(s, w);
        mix_tile(s, w->weights, false, w->w, w->scores);
        add_by_queries(s, w->scores, w->v, w->out);
    }
    write_rows(s, o, x->b, x->q0, x->rows, QUERIES, 1, w->out);
}

static void read_matrix(const struct attention_spec *s, tensor t, real *out) {
    for (int64_t i = 0; i < s->heads * s->heads; i++)
        out[i] = from_elem(((const elem *)t.data)[i]);
}

static void check_talking(const char *op, const struct attention_spec *s, tensor logits, tensor weights) {
    check_elem(op, "logits", logits, s->heads, s->heads, 0, 0, 0);
    check_elem(op, "weights", weights, s->heads, s->heads, 0, 0, 0);
}

void CPU(talking)(struct device *dev, const struct attention_spec *s, tensor q, tensor k, tensor v,
                  tensor segments, tensor logits, tensor weights, tensor o, void *saved) {
    call_progress_callback(dev);
    CPU(check_attention)("talking", s, q, k, v, segments, o);
    check_talking("talking", s, logits, weights);
    char *base = cpu_workspace(dev, CPU(talking_plan)(dev, s).workspace, "talking");
    int64_t blocks = (s->length + QUERIES - 1) / QUERIES;
#pragma omp parallel num_threads(dev->threads)
    {
        struct scratch w;
        size_t each = layout_scratch(s, NULL, &w);
        layout_scratch(s, base + (size_t)omp_get_thread_num() * each, &w);
        read_matrix(s, logits, w.logits);
        read_matrix(s, weights, w.weights);
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < s->batch * blocks; unit++) {
            struct attention_mask m = mask_of_sequence(s, segments, unit % s->batch);
            struct block x = block_at(&m, &w, unit % s->batch, (blocks - 1 - unit / s->batch) * QUERIES);
            forward_block(s, &w, &x, q, k, v, o, saved);
        }
    }
}

/* ---- backward ---- */

/* A tile's weights, and the gradients of the mixed weights, du, and of the weights, dw. */
static void gradient_tile(const struct attention_spec *s, const struct scratch *w, int64_t k0) {
    score_tile(s, w, k0);
    weigh_tile(s, w);
    products(s, w->v, w->dot, w->du);
    mix_tile(s, w->weights, true, w->du, w->dw);
}

/* dw becomes the gradient of the mixed scores, W (dW - D). */
static void through_softmax(const struct attention_spec *s, const struct scratch *w) {
    for (int64_t h = 0; h < s->heads; h++)
        for (int64_t j = 0; j < KEYS; j++)
            for (int64_t i = 0; i < QUERIES; i++) {
                int64_t at = (h * KEYS + j) * QUERIES + i;
                w->dw[at] = w->w[at] * (w->dw[at] - w->row_dot[h * QUERIES + i]);
            }
}

/* matrix[h,k] += <a[h], b[k]> of tiles. */
static void add_outer(const struct attention_spec *s, const real *a, const real *b, real *matrix) {
    int64_t H = s->heads, n = KEYS * QUERIES;
    for (int64_t h = 0; h < H; h++)
        for (int64_t k = 0; k < H; k++) {
            vreal sum = vsplat(0);
            for (int64_t i = 0; i < n; i += VL)
                sum += vload(a + h * n + i) * vload(b + k * n + i);
            matrix[h * H + k] += vsum(sum);
        }
}

static void backward_queries(const struct attention_spec *s, const struct scratch *w, const struct block *x,
                             tensor q, tensor k, tensor v, tensor d_o, const real *saved, tensor dq,
                             real *row_dots) {
    int64_t rows = s->heads * QUERIES;
    read_queries(s, w, x, q);
    read_output_gradients(s, w, x, d_o);
    read_statistics(s, x, saved, w->top);
    read_statistics(s, x, saved + rows_of(s), w->sum);
    memset(w->row_dot, 0, (size_t)rows * sizeof(real));
    for (int64_t k0 = x->begin; k0 < x->end; k0 += KEYS) {
        read_keys(s, w, x->b, k0, x->end, k, v);
        gradient_tile(s, w, k0);
        for (int64_t h = 0; h < s->heads; h++)
            for (int64_t j = 0; j < KEYS; j++)
                for (int64_t i = 0; i < QUERIES; i++) {
                    int64_t at = (h * KEYS + j) * QUERIES + i;
                    w->row_dot[h * QUERIES + i] += w->w[at] * w->dw[at];
                }
    }
    write_statistics(s, x, w->row_dot, row_dots);
    memset(w->out, 0, (size_t)(rows * s->head_dim) * sizeof(real));
    for (int64_t k0 = x->begin; k0 < x->end; k0 += KEYS) {
        read_keys(s, w, x->b, k0, x->end, k, v);
        gradient_tile(s, w, k0);
        add_outer(s, w->du, w->w, w->dweights);
        through_softmax(s, w);
        add_outer(s, w->dw, w->scores, w->dlogits);
        mix_tile(s, w->logits, true, w->dw, w->du);
        add_by_queries(s, w->du, w->k, w->out);
    }
    write_rows(s, dq, x->b, x->q0, x->rows, QUERIES, (real)s->scale, w->out);
}

/* dk and dv of the keys from k0, from every block of queries that sees any of them. */
static void backward_keys(const struct attention_mask *m, const struct scratch *w, int64_t b, int64_t k0,
                          tensor q, tensor k, tensor v, tensor d_o, const real *saved, const real *row_dots,
                          tensor dk, tensor dv) {
    const struct attention_spec *s = m->spec;
    int64_t count = min64(KEYS, s->length - k0), keys = s->heads * KEYS * s->head_dim;
    memset(w->dk, 0, (size_t)keys * sizeof(real));
    memset(w->dv, 0, (size_t)keys * sizeof(real));
    read_keys(s, w, b, k0, k0 + count, k, v);
    for (int64_t q0 = 0; q0 < s->length; q0 += QUERIES) {
        struct block x = block_at(m, w, b, q0);
        if (x.end <= k0 || x.begin >= k0 + count)
            continue;
        read_queries(s, w, &x, q);
        read_output_gradients(s, w, &x, d_o);
        read_statistics(s, &x, saved, w->top);
        read_statistics(s, &x, saved + rows_of(s), w->sum);
        read_statistics(s, &x, row_dots, w->row_dot);
        gradient_tile(s, w, k0);
        mix_tile(s, w->weights, false, w->w, w->scores);
        add_by_keys(s, w->scores, w->d_o, w->dv);
        through_softmax(s, w);
        mix_tile(s, w->logits, true, w->dw, w->du);
        add_by_keys(s, w->du, w->q, w->dk);
    }
    write_rows(s, dk, b, k0, count, KEYS, 1, w->dk);
    write_rows(s, dv, b, k0, count, KEYS, 1, w->dv);
}

void CPU(talking_backward)(struct device *dev, const struct attention_spec *s, tensor q, tensor k, tensor v,
                           tensor segments, tensor logits, tensor weights, tensor d_o, const void *saved,
                           tensor dq, tensor dk, tensor dv, tensor dlogits, tensor dweights,
                           bool accumulate) {
    call_progress_callback(dev);
    CPU(check_attention)("talking_backward", s, q, k, v, segments, d_o);
    CPU(check_attention)("talking_backward", s, dq, dk, dv, segments, d_o);
    check_talking("talking_backward", s, logits, weights);
    check_real("talking_backward", "dlogits", dlogits, s->heads, s->heads, 0, 0, 0);
    check_real("talking_backward", "dweights", dweights, s->heads, s->heads, 0, 0, 0);
    real *row_dots = cpu_workspace(dev, CPU(talking_plan)(dev, s).workspace, "talking_backward");
    char *base = (char *)(row_dots + round_up(rows_of(s), 16));
    int64_t H = s->heads, blocks = (s->length + QUERIES - 1) / QUERIES,
            key_blocks = (s->length + KEYS - 1) / KEYS;
    struct scratch first;
    size_t each = layout_scratch(s, NULL, &first);
    layout_scratch(s, base, &first);
#pragma omp parallel num_threads(dev->threads)
    {
        struct scratch w;
        layout_scratch(s, base + (size_t)omp_get_thread_num() * each, &w);
        read_matrix(s, logits, w.logits);
        read_matrix(s, weights, w.weights);
        memset(w.dlogits, 0, (size_t)(H * H) * sizeof(real));
        memset(w.dweights, 0, (size_t)(H * H) * sizeof(real));
        /* Not dynamic: which blocks a thread sums up decides the rounding of the matrices' gradients. */
#pragma omp for schedule(static, 1)
        for (int64_t unit = 0; unit < s->batch * blocks; unit++) {
            struct attention_mask m = mask_of_sequence(s, segments, unit / blocks);
            struct block x = block_at(&m, &w, unit / blocks, unit % blocks * QUERIES);
            backward_queries(s, &w, &x, q, k, v, d_o, saved, dq, row_dots);
        }
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < s->batch * key_blocks; unit++) {
            struct attention_mask m = mask_of_sequence(s, segments, unit % s->batch);
            backward_keys(&m, &w, unit % s->batch, unit / s->batch * KEYS, q, k, v, d_o, saved, row_dots, dk,
                          dv);
        }
    }
    int64_t stride = (int64_t)(each / sizeof(real));
    sum_partials(first.dlogits, dev->threads, stride, H * H, dlogits.data, accumulate);
    sum_partials(first.dweights, dev->threads, stride, H * H, dweights.data, accumulate);
}

/* ---- decoding ---- */

/* Queries one by one, each in the first lane of a block: there is one of them, or a chunk of a prompt. */
void CPU(talking_decode)(struct device *dev, const struct attention_spec *s, tensor q, tensor k, tensor v,
                         tensor logits, tensor weights, tensor cache_k, tensor cache_v, int64_t first,
                         tensor o) {
    check_talking("talking_decode", s, logits, weights);
    check_elem("talking_decode", "q", q, s->batch, s->length, s->heads, s->head_dim, 0);
    check_elem("talking_decode", "o", o, s->batch, s->length, s->heads, s->head_dim, 0);
    char *base = cpu_workspace(dev, CPU(talking_plan)(dev, s).workspace, "talking_decode");
    CPU(append_to_cache)(s, k, cache_k, first);
    CPU(append_to_cache)(s, v, cache_v, first);
#pragma omp parallel num_threads(dev->threads)
    {
        struct scratch w;
        size_t each = layout_scratch(s, NULL, &w);
        layout_scratch(s, base + (size_t)omp_get_thread_num() * each, &w);
        read_matrix(s, logits, w.logits);
        read_matrix(s, weights, w.weights);
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < s->batch * s->length; unit++) {
            struct block x = {unit / s->length, unit % s->length, 1, 0, 0};
            memset(w.begins, 0, QUERIES * sizeof *w.begins);
            memset(w.ends, 0, QUERIES * sizeof *w.ends);
            attention_keys(s, first + x.q0, first + s->length, &x.begin, &x.end);
            w.begins[0] = (real_bits)x.begin;
            w.ends[0] = (real_bits)x.end;
            forward_block(s, &w, &x, q, cache_k, cache_v, o, NULL);
        }
    }
}

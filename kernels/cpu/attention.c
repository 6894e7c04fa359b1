/* Fused attention without an S x S array (Dao et al. 2022, Milakov & Gimelshein 2018): forward, and what it has
 * in common with backward (attention_backward.c).
 *
 * The work is cut into units that any thread takes: in forward a group of tiles of queries, which meets every
 * tile of keys that it sees. Tiles outside the mask's band are skipped. A thread's scratch holds one group and
 * a few tiles.
 *
 * In forward, vectors run along the queries: scores are K Q^T, the softmax is computed lane by lane, and the
 * output is V^T P, transposed. So both products have rows of TILE elements, whatever the head dimension.
 *
 * Scores are in base 2, so that each takes one exp2. Saved for backward: the log-sum-exp, in base 2, [B,H,S].
 *
 * Which keys a query sees: attention_keys() and, in segments, attention_segment_keys() in kernels.h. They are
 * one interval; attention_tiles.h. */
#include "kernels/cpu/attention_scores.h"
#include "kernels/cpu/attention_units.h"

int64_t CPU(attention_tiles_visited);

/* Scratch of one thread; G is the tiles of a group. */
struct scratch {
    word *qt;                 /* [G] columns [W, TILE] */
    real *ot;                 /* [G][d][TILE] the output being summed */
    word *k, *v;              /* rows [TILE, W], pairs [TILE, d] */
    word *p;                  /* pairs [TILE of keys, TILE] */
    real *o;                  /* [TILE, d'] of one tile; d' is d padded to whole vectors */
    real *reference, *sum;    /* [G][TILE] */
    real *part;               /* [TILE] the sum of a strip */
    real_bits *begins, *ends; /* [G][TILE] the keys that each query sees */
};

static size_t layout_scratch(const struct attention_spec *s, int64_t group, char *base, struct scratch *w) {
    int64_t d = s->head_dim, W = words_of(d), rows = group * TILE;
    struct part parts[] = {{&w->qt, rows * W},
                           {&w->ot, rows * d},
                           {&w->k, TILE * W},
                           {&w->v, words_of(TILE) * d},
                           {&w->p, words_of(TILE) * TILE},
                           {&w->o, TILE * round_up(d, VL)},
                           {&w->reference, rows},
                           {&w->sum, rows},
                           {&w->part, TILE},
                           {&w->begins, rows},
                           {&w->ends, rows}};
    return lay_out(parts, sizeof parts / sizeof *parts, base);
}

struct op_cost CPU(attention_plan)(const struct device *dev, const struct attention_spec *s) {
    LEAVE_TO_PAIRS(dev, s->head_dim, attention_plan(dev, s));
    struct scratch unused;
    struct units u = units_of(dev, s, s->heads), v = units_of(dev, s, attention_kv_heads(s));
    size_t shared, forward = layout_scratch(s, u.group, NULL, &unused),
                   backward = CPU(attention_backward_scratch)(s, &v, &shared);
    return (struct op_cost){.saved = (size_t)(s->batch * s->heads * s->length) * sizeof(real),
                            .workspace =
                                shared + (size_t)dev->threads * (forward > backward ? forward : backward)};
}

/* A tile of queries of the group. */
struct query_tile {
    int64_t q0, rows;
    word *qt;
    real *ot, *reference, *sum;
    real_bits *begins, *ends;
};

static struct query_tile query_tile_of(const struct attention_spec *s, const struct scratch *w, int64_t first,
                                       int64_t i) {
    int64_t d = s->head_dim, q0 = first + i * TILE;
    return (struct query_tile){.q0 = q0,
                               .rows = min64(TILE, s->length - q0),
                               .qt = w->qt + i * words_of(d) * TILE,
                               .ot = w->ot + i * d * TILE,
                               .reference = w->reference + i * TILE,
                               .sum = w->sum + i * TILE,
                               .begins = w->begins + i * TILE,
                               .ends = w->ends + i * TILE};
}

/* The sum of a strip may be so large, 2^40, before the query's reference rises: a sum of them is well within the range of
 * numbers, and the precision is the same. */
static const real LARGEST_SUM = (real)(1ll << 40);

/* Where a strip's sum exceeds that, make the largest score the reference, and rescale the sums of what came before.
 * Whether there were any. */
static bool raise_references(const struct query_tile *t, const struct forward_scores *f, int64_t d,
                             int64_t begin, int64_t end) {
    bool any = false;
    for (int64_t j = begin; j < end; j += VL) {
        vbits rises = vload(f->sum + j) > LARGEST_SUM;
        if (!vany(rises))
            continue;
        vreal rise = vselect(rises, largest_scores(f, j), vsplat(0)), factor = vexp2(-rise);
        vstore(t->reference + j, vload(t->reference + j) + rise);
        vstore(t->sum + j, vload(t->sum + j) * factor);
        for (int64_t c = 0; c < d; c++)
            vstore(t->ot + c * TILE + j, vload(t->ot + c * TILE + j) * factor);
        any = true;
    }
    return any;
}

static void clear_part(const struct scratch *w, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; j += VL)
        vstore(w->part + j, vsplat(0));
}

/* `keys` keys from k0, which are the packed tile's from row i on, with columns [begin, end) of a tile of
 * queries. */
static void forward_strip(const struct attention_spec *s, const struct scratch *w, const struct query_tile *t,
                          int64_t k0, int64_t i, int64_t keys, int64_t begin, int64_t end, bool masked,
                          struct rows_ahead *ahead) {
    int64_t d = s->head_dim, W = words_of(d);
    struct forward_scores f = {.W = W,
                               .keys = keys,
                               .key = (real_bits)k0,
                               .scale = (real)s->scale * LOG2E,
                               .k = w->k + i * W,
                               .qt = t->qt,
                               .reference = t->reference,
                               .begins = t->begins,
                               .ends = t->ends,
                               .p = w->p,
                               .sum = w->part,
                               .ahead = ahead};
    clear_part(w, begin, end);
    forward_scores(&f, begin, end, masked);
    if (raise_references(t, &f, d, begin, end)) {
        clear_part(w, begin, end);
        forward_scores(&f, begin, end, masked);
    }
    for (int64_t j = begin; j < end; j += VL)
        vstore(t->sum + j, vload(t->sum + j) + vload(w->part + j));
    tile_gemm(d, end - begin, words_of(keys), w->v + i / PAIR * d, 1, d, w->p + begin, TILE, t->ot + begin,
              TILE, true);
}

static void forward_tile(const struct attention_spec *s, const struct scratch *w, const struct query_tile *t,
                         int64_t k0, int64_t keys, struct rows_ahead *ahead) {
    int64_t columns = round_up(t->rows, VL);
    if (t->begins[TILE - 1] <= k0 && k0 + keys <= t->ends[0]) {
        forward_strip(s, w, t, k0, 0, keys, 0, columns, false, ahead);
        return;
    }
    for (int64_t i = 0; i < keys; i += STRIP) {
        int64_t count = min64(STRIP, keys - i), begin = 0, end = columns;
        while (begin < end && t->ends[begin + VL - 1] <= k0 + i)
            begin += VL;
        while (begin < end && t->begins[end - VL] >= k0 + i + count)
            end -= VL;
        if (begin < end)
            forward_strip(s, w, t, k0 + i, i, count, begin, end, true, ahead);
    }
}

/* A query's first reference is its score with the key at its own index, which every query sees. */
static void start_queries(const struct attention_mask *m, const struct scratch *w, const struct head *x,
                          const struct query_tile *t) {
    int64_t d = m->spec->head_dim;
    memset(t->ot, 0, (size_t)(d * TILE) * sizeof(real));
    memset(t->sum, 0, TILE * sizeof(real));
    memset(t->reference, 0, TILE * sizeof(real));
    pack_rows(x->q, t->q0, t->rows, d, w->k);
    transpose_rows(w->k, t->rows, words_of(d), t->qt);
    row_dots(x->q, x->k, t->q0, t->rows, d, (real)m->spec->scale * LOG2E, t->reference);
    for (int64_t j = 0; j < TILE; j += VL) /* -inf would make differences NaN */
        vstore(t->reference + j, vmax(vsplat((real)-1e38), vload(t->reference + j)));
    visible_keys(m, t->q0, t->rows, t->begins, t->ends);
}

static void finish_queries(const struct attention_mask *m, const struct scratch *w, const struct head *x,
                           const struct query_tile *t) {
    int64_t d = m->spec->head_dim, D = round_up(d, VL);
    for (int64_t i = 0; i < t->rows; i++)
        x->lse[t->q0 + i] = t->reference[i] + (real)log2((double)t->sum[i]);
    for (int64_t i = 0; i < TILE; i++)
        t->sum[i] = 1 / t->sum[i];
    transpose_columns(t->ot, t->sum, t->rows, d, D, w->o);
    unpack_rows(w->o, t->rows, d, D, 1, false, x->o, t->q0);
}

/* `count` tiles of queries from q0. Returns the tiles of scores computed. */
static int64_t forward_unit(const struct attention_mask *m, const struct scratch *w, const struct head *x,
                            int64_t q0, int64_t count) {
    const struct attention_spec *s = m->spec;
    int64_t d = s->head_dim, visited = 0, begin = s->length, end = 0;
    for (int64_t i = 0; i < count; i++) {
        struct query_tile t = query_tile_of(s, w, q0, i);
        start_queries(m, w, x, &t);
        begin = min64(begin, t.begins[0]);
        end = max64(end, t.ends[TILE - 1]);
    }
    for (int64_t k0 = begin - begin % TILE; k0 < end; k0 += TILE) {
        int64_t keys = min64(TILE, s->length - k0);
        pack_rows(x->k, k0, keys, d, w->k);
        pack_pairs(x->v, k0, keys, d, d, w->v);
        int64_t next = k0 + keys;
        struct rows_ahead ahead = {{x->k, x->v}, 2, d, next, min64(next + TILE, end), 1 + 6 / count};
        for (int64_t i = 0; i < count; i++) {
            struct query_tile t = query_tile_of(s, w, q0, i);
            if (k0 + TILE <= t.begins[0] || k0 >= t.ends[TILE - 1])
                continue;
            forward_tile(s, w, &t, k0, keys, &ahead);
            visited++;
        }
    }
    for (int64_t i = 0; i < count; i++) {
        struct query_tile t = query_tile_of(s, w, q0, i);
        finish_queries(m, w, x, &t);
    }
    return visited;
}

void CPU(check_attention)(const char *op, const struct attention_spec *s, tensor q, tensor k, tensor v,
                          tensor segments, tensor o) {
    int64_t B = s->batch, S = s->length, H = s->heads, G = attention_kv_heads(s), d = s->head_dim;
    check_elem(op, "q", q, B, S, H, d, 0);
    check_elem(op, "k", k, B, S, G, d, 0);
    check_elem(op, "v", v, B, S, G, d, 0);
    check_elem(op, "o", o, B, S, H, d, 0);
    if (s->segmented)
        check_shape(op, "segments", segments, DTYPE_I32, 2, B, S / s->pseudo, 0, 0);
}

void CPU(attention)(struct device *dev, const struct attention_spec *s, tensor q, tensor k, tensor v,
                    tensor segments, tensor o, void *saved) {
    LEAVE_TO_PAIRS(dev, s->head_dim, attention(dev, s, q, k, v, segments, o, saved));
    call_progress_callback(dev);
    CPU(check_attention)("attention", s, q, k, v, segments, o);
    char *base = cpu_workspace(dev, CPU(attention_plan)(dev, s).workspace, "attention");
    struct scratch unused;
    struct units u = units_of(dev, s, s->heads);
    int64_t group = attention_group(s);
    size_t each = layout_scratch(s, u.group, NULL, &unused);
    int64_t next = 0;
#pragma omp parallel num_threads(dev->threads)
    {
        struct scratch w;
        int64_t visited = 0;
        layout_scratch(s, u.group, base + (size_t)omp_get_thread_num() * each, &w);
        for (int64_t unit = take_unit(&next); unit < u.count; unit = take_unit(&next)) {
            /* under a causal mask the last queries are the most work: they come first */
            int64_t bh = unit % u.heads, b = bh / s->heads, h = bh % s->heads;
            int64_t tile = (u.per_head - 1 - unit / u.heads) * u.group;
            struct attention_mask m = mask_of_sequence(s, segments, b);
            struct head x = {.q = head_of(q, b, h),
                             .k = head_of(k, b, h / group),
                             .v = head_of(v, b, h / group),
                             .o = head_of(o, b, h),
                             .lse = (real *)saved + bh * s->length};
            visited += forward_unit(&m, &w, &x, tile * TILE, min64(u.group, u.tiles - tile));
        }
#pragma omp atomic
        CPU(attention_tiles_visited) += visited;
    }
}

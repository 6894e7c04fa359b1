/* Fused attention, backward. Scores are computed again from the saved log-sum-exp.
 *
 * A unit of work is a group of tiles of keys, which meets every tile of queries that sees it, of one query head
 * after another where several attend to these keys. Vectors run along the keys: scores are Q K^T, and dK and dV
 * are summed transposed, as Q^T dS and dO^T P. dQ = dS K gets a part from every group of keys. A group adds its
 * part to the tensor when the groups before it have: the order of the sum is that of the keys, whichever thread is
 * faster, so the bits do not depend on the schedule.
 *
 * Queries are met from the last to the first. Under a causal mask the next group's queries begin later, so that it
 * reaches those it shares with this group when they are done here; in the other order it would wait. */
#include <sched.h>

#include "kernels/cpu/attention_scores.h"
#include "kernels/cpu/attention_units.h"

/* Scratch of one thread; G is the tiles of a group, d' is d padded to whole vectors. Where words are reals, q_pairs,
 * d_o_pairs and ds_rows are q, d_o and ds. */
struct scratch {
    word *kt, *vt;             /* [G] columns [W, TILE] */
    word *k;                   /* [G] pairs [TILE, d'] */
    real *dkt, *dvt;           /* [G][d][TILE] being summed */
    word *q, *d_o;             /* rows [TILE, W] */
    word *q_pairs, *d_o_pairs; /* pairs [TILE, d] */
    real *dq;                  /* [TILE, d'] the group's part */
    word *p, *ds;              /* pairs [TILE of queries, TILE] */
    word *ds_rows;             /* rows [TILE of queries, words_of(TILE)] */
    real_bits *begins, *ends;  /* [TILE] the keys that each query sees */
};

static size_t layout_scratch(const struct attention_spec *s, int64_t group, char *base, struct scratch *w) {
    int64_t d = s->head_dim, W = words_of(d), D = round_up(d, VL), rows = group * TILE,
            tile_words = words_of(TILE);
    bool apart = PAIR == 2;
    struct part parts[] = {{&w->kt, rows * W},
                           {&w->vt, rows * W},
                           {&w->k, words_of(rows) * D},
                           {&w->dkt, rows * d},
                           {&w->dvt, rows * d},
                           {&w->q, TILE * W},
                           {&w->d_o, TILE * W},
                           {&w->q_pairs, apart ? tile_words * d : 0},
                           {&w->d_o_pairs, apart ? tile_words * d : 0},
                           {&w->dq, TILE * D},
                           {&w->p, tile_words * TILE},
                           {&w->ds, tile_words * TILE},
                           {&w->ds_rows, apart ? TILE * tile_words : 0},
                           {&w->begins, TILE},
                           {&w->ends, TILE}};
    size_t bytes = lay_out(parts, sizeof parts / sizeof *parts, base);
    if (!apart) {
        w->q_pairs = w->q;
        w->d_o_pairs = w->d_o;
        w->ds_rows = w->ds;
    }
    return bytes;
}

/* What threads share, for each query head: the counters `turns`; for each query <dO, O>, which is what the
 * softmax's backward subtracts from the gradients of its scores; and sums of dq [S, d] where the tensor's
 * elements would round every part that is added (otherwise NULL). */
static size_t layout_shared(const struct attention_spec *s, const struct units *u, char *base,
                            int32_t **turns, real **deltas, real **sums) {
    int64_t heads = s->batch * s->heads, tiles = heads * u->tiles,
            counters = round_up(tiles * (int64_t)sizeof(int32_t), 64);
    bool beside = sizeof(elem) < sizeof(real) && u->per_head > 1;
    int64_t count = tiles * TILE + (beside ? heads * s->length * s->head_dim : 0);
    *turns = (int32_t *)base;
    *deltas = base ? (real *)(base + counters) : NULL;
    *sums = base && beside ? *deltas + tiles * TILE : NULL;
    return (size_t)round_up(counters + count * (int64_t)sizeof(real), 4096);
}

size_t CPU(attention_backward_scratch)(const struct attention_spec *s, const struct units *u,
                                       size_t *shared) {
    struct scratch unused;
    int32_t *turns;
    real *deltas, *sums;
    *shared = layout_shared(s, u, NULL, &turns, &deltas, &sums);
    return layout_scratch(s, u->group, NULL, &unused);
}

/* A tile of queries, and the unit that meets it. */
struct meeting {
    const struct attention_mask *mask;
    const struct scratch *w;
    const struct head *x;
    int64_t group, first_tile, count; /* of keys: the tiles of a group, and the unit's tiles */
    bool alone;                       /* the head has one unit, which computes deltas itself */
    int64_t first_query;              /* of those that see the unit's keys */
    int64_t q0, rows;
    bool masks_known; /* begins and ends are filled */
    int64_t *packed;  /* the unit's tiles of keys that are packed: the first ones */
    struct rows_ahead ahead;
};

/* Queries [i, i + rows) of the tile with columns [begin, end) of the unit's tile j. */
static void backward_strip(struct meeting *t, int64_t j, int64_t i, int64_t rows, int64_t begin, int64_t end,
                           bool masked) {
    const struct scratch *w = t->w;
    const struct attention_spec *s = t->mask->spec;
    int64_t d = s->head_dim, W = words_of(d), D = round_up(d, VL), columns = end - begin;
    struct backward_scores b = {.W = W,
                                .rows = rows,
                                .key = (real_bits)((t->first_tile + j) * TILE),
                                .scale = (real)s->scale * LOG2E,
                                .q = w->q + i * W,
                                .d_o = w->d_o + i * W,
                                .kt = w->kt + j * W * TILE,
                                .vt = w->vt + j * W * TILE,
                                .lse = t->x->lse + t->q0 + i,
                                .delta = t->x->deltas + t->q0 + i,
                                .begins = w->begins + i,
                                .ends = w->ends + i,
                                .p = w->p,
                                .ds = w->ds,
                                .ds_rows = w->ds_rows,
                                .ahead = &t->ahead};
    backward_scores(&b, begin, end, masked);
    int64_t pairs = words_of(rows), at = j * d * TILE + begin, from = i / PAIR * d;
    tile_gemm(d, columns, pairs, w->d_o_pairs + from, 1, d, w->p + begin, TILE, w->dvt + at, TILE, true);
    tile_gemm(d, columns, pairs, w->q_pairs + from, 1, d, w->ds + begin, TILE, w->dkt + at, TILE, true);
    tile_gemm(rows, D, columns / PAIR, w->ds_rows + begin / PAIR, words_of(TILE), 1,
              w->k + (j * TILE + begin) / PAIR * D, D, w->dq + i * D, D, true);
}

static void backward_tile(struct meeting *t, int64_t j) {
    const struct scratch *w = t->w;
    int64_t k0 = (t->first_tile + j) * TILE, begin, end, unused;
    mask_keys(t->mask, t->q0, &unused, &end);
    mask_keys(t->mask, t->q0 + t->rows - 1, &begin, &unused);
    if (begin <= k0 && k0 + TILE <= end) {
        backward_strip(t, j, 0, t->rows, 0, TILE, false);
        return;
    }
    if (!t->masks_known)
        visible_keys(t->mask, t->q0, t->rows, w->begins, w->ends);
    t->masks_known = true;
    for (int64_t i = 0; i < t->rows; i += STRIP) {
        int64_t rows = min64(STRIP, t->rows - i);
        begin = max64(w->begins[i] - k0, 0) / VL * VL;
        end = round_up(min64(w->ends[i + rows - 1] - k0, TILE), VL);
        if (begin < end)
            backward_strip(t, j, i, rows, begin, end, true);
    }
}

/* Rows of the tile in x->dq_sums, to which the parts of all units but the last are added. The last unit's part
 * becomes the sum. */
static void add_to_sums(const struct meeting *t, bool first, bool last) {
    const struct attention_spec *s = t->mask->spec;
    int64_t d = s->head_dim, D = round_up(d, VL);
    for (int64_t i = 0; i < t->rows; i++)
        for (int64_t c = 0; c < d; c += VL) {
            real *sum = t->x->dq_sums + (t->q0 + i) * d + c, *part = t->w->dq + i * D + c;
            vreal v = first ? vload(part) : load_reals(sum, d - c) + vload(part);
            if (last)
                vstore(part, v);
            else
                store_reals(sum, v, d - c);
        }
}

/* Add the unit's part of dq when the `before` units of smaller keys have; `after` units follow. */
static void add_dq(const struct meeting *t, int64_t before, int64_t after) {
    const struct attention_spec *s = t->mask->spec;
    int32_t *turn = t->x->turns + t->q0 / TILE;
    while (__atomic_load_n(turn, __ATOMIC_ACQUIRE) != before)
        sched_yield();
    if (t->x->dq_sums)
        add_to_sums(t, before == 0, after == 0);
    if (!t->x->dq_sums || after == 0)
        unpack_rows(t->w->dq, t->rows, s->head_dim, round_up(s->head_dim, VL), (real)s->scale,
                    before > 0 && !t->x->dq_sums, t->x->dq, t->q0);
    __atomic_store_n(turn, (int32_t)before + 1, __ATOMIC_RELEASE);
}

/* The unit's tile j of keys. */
static void start_keys(const struct meeting *t, int64_t j) {
    const struct scratch *w = t->w;
    const struct attention_spec *s = t->mask->spec;
    int64_t d = s->head_dim, W = words_of(d), D = round_up(d, VL), k0 = (t->first_tile + j) * TILE;
    int64_t keys = min64(TILE, s->length - k0), at = j * d * TILE;
    word *k = w->k + j * words_of(TILE) * D, *rows = (word *)w->dq; /* which is not in use yet */
    pack_pairs(t->x->k, k0, keys, d, D, k);
    memset(k + words_of(keys) * D, 0, (size_t)((words_of(TILE) - words_of(keys)) * D) * sizeof(word));
    pack_rows(t->x->k, k0, keys, d, rows);
    transpose_rows(rows, keys, W, w->kt + j * W * TILE);
    pack_rows(t->x->v, k0, keys, d, rows);
    transpose_rows(rows, keys, W, w->vt + j * W * TILE);
    memset(w->dkt + at, 0, (size_t)(d * TILE) * sizeof(real));
    memset(w->dvt + at, 0, (size_t)(d * TILE) * sizeof(real));
}

/* A tile of queries with those of the unit's tiles that it sees. Returns how many. */
static int64_t meet_queries(struct meeting t) {
    const struct attention_spec *s = t.mask->spec;
    const struct scratch *w = t.w;
    const struct head *x = t.x;
    int64_t d = s->head_dim, D = round_up(d, VL), begin, end;
    tiles_of_queries(t.mask, t.q0, t.rows, &begin, &end);
    int64_t from = max64(begin / TILE - t.first_tile, 0),
            to = min64((end + TILE - 1) / TILE - t.first_tile, t.count);
    if (from >= to)
        return 0;
    t.ahead = (struct rows_ahead){{x->q, x->d_o, x->dq}, 3, d, max64(t.q0 - TILE, t.first_query), t.q0,
                                  1 + 6 / (to - from)};
    pack_rows(x->q, t.q0, t.rows, d, w->q);
    pack_rows(x->d_o, t.q0, t.rows, d, w->d_o);
    if (w->q_pairs != w->q) {
        pack_pairs(x->q, t.q0, t.rows, d, d, w->q_pairs);
        pack_pairs(x->d_o, t.q0, t.rows, d, d, w->d_o_pairs);
    }
    if (t.alone)
        row_dots(x->d_o, x->o, t.q0, t.rows, d, 1, x->deltas + t.q0);
    for (; *t.packed < to; ++*t.packed)
        start_keys(&t, *t.packed);
    memset(w->dq, 0, (size_t)(t.rows * D) * sizeof(real));
    for (int64_t j = from; j < to; j++)
        backward_tile(&t, j);
    int64_t unit = t.first_tile / t.group;
    add_dq(&t, unit - begin / TILE / t.group, (end - 1) / TILE / t.group - unit);
    return to - from;
}

/* Rows of `out` become x [d, TILE] transposed, times factor. */
static void unpack_keys(const struct scratch *w, const real *x, real factor, int64_t rows, int64_t d,
                        struct head_rows out, int64_t row) {
    int64_t D = round_up(d, VL);
    real factors[TILE];
    for (int i = 0; i < TILE; i++)
        factors[i] = factor;
    transpose_columns(x, factors, rows, d, D, w->dq); /* which is not in use any more */
    unpack_rows(w->dq, rows, d, D, 1, false, out, row);
}

/* Keys from k0 on of the unit's `count` tiles. */
static int64_t unit_keys(const struct attention_spec *s, int64_t k0, int64_t count) {
    return min64(count * TILE, s->length - k0);
}

/* The unit of the tiles of keys from `first` on, with the queries of one head. Returns the tiles of scores
 * computed. */
static int64_t meet_head(const struct attention_mask *m, const struct scratch *w, const struct head *x,
                         const struct units *u, int64_t first, int64_t *packed) {
    const struct attention_spec *s = m->spec;
    int64_t count = min64(u->group, u->tiles - first), visited = 0, begin, end;
    int64_t k0 = first * TILE, keys = unit_keys(s, k0, count);
    tiles_of_keys(m, k0, keys, &begin, &end);
    for (int64_t q0 = (end - 1) / TILE * TILE; q0 >= begin; q0 -= TILE)
        visited += meet_queries((struct meeting){.mask = m,
                                                 .w = w,
                                                 .x = x,
                                                 .group = u->group,
                                                 .first_tile = first,
                                                 .count = count,
                                                 .alone = u->per_head == 1,
                                                 .first_query = begin,
                                                 .q0 = q0,
                                                 .rows = min64(TILE, s->length - q0),
                                                 .packed = packed});
    return visited;
}

/* The gradients of the unit's keys and values. */
static void finish_unit(const struct attention_spec *s, const struct scratch *w, const struct head *x,
                        const struct units *u, int64_t first) {
    int64_t d = s->head_dim, count = min64(u->group, u->tiles - first);
    int64_t k0 = first * TILE, keys = unit_keys(s, k0, count);
    for (int64_t j = 0; j < count; j++) {
        int64_t rows = min64(TILE, keys - j * TILE), at = j * d * TILE;
        unpack_keys(w, w->dkt + at, (real)s->scale, rows, d, x->dk, k0 + j * TILE);
        unpack_keys(w, w->dvt + at, 1, rows, d, x->dv, k0 + j * TILE);
    }
}

void CPU(attention_backward)(struct device *dev, const struct attention_spec *s, tensor q, tensor k, tensor v,
                             tensor segments, tensor o, tensor d_o, const void *saved, tensor dq, tensor dk,
                             tensor dv) {
    LEAVE_TO_PAIRS(dev, s->head_dim,
                   attention_backward(dev, s, q, k, v, segments, o, d_o, saved, dq, dk, dv));
    call_progress_callback(dev);
    CPU(check_attention)("attention_backward", s, q, k, v, segments, o);
    CPU(check_attention)("attention_backward (gradients)", s, dq, dk, dv, segments, d_o);
    char *base = cpu_workspace(dev, CPU(attention_plan)(dev, s).workspace, "attention_backward");
    struct units u = units_of(dev, s, attention_kv_heads(s));
    int64_t heads = s->batch * s->heads, G = attention_kv_heads(s), group = attention_group(s);
    size_t shared, each = CPU(attention_backward_scratch)(s, &u, &shared);
    int32_t *turns;
    real *deltas, *sums;
    layout_shared(s, &u, base, &turns, &deltas, &sums);
    memset(turns, 0, (size_t)(heads * u.tiles) * sizeof *turns);
    int64_t next = 0;
#pragma omp parallel num_threads(dev->threads)
    {
        struct scratch w;
        int64_t visited = 0;
        layout_scratch(s, u.group, base + shared + (size_t)omp_get_thread_num() * each, &w);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < (u.per_head > 1 ? heads * u.tiles : 0); i++) {
            int64_t bh = i / u.tiles, q0 = i % u.tiles * TILE, b = bh / s->heads, h = bh % s->heads;
            row_dots(head_of(d_o, b, h), head_of(o, b, h), q0, min64(TILE, s->length - q0), s->head_dim, 1,
                     deltas + i * TILE);
        }
        for (int64_t unit = take_unit(&next); unit < u.count; unit = take_unit(&next)) {
            /* under a causal mask the first keys are the most work: they come first */
            int64_t b = unit % u.heads / G, g = unit % u.heads % G, tile = unit / u.heads * u.group,
                    packed = 0;
            struct attention_mask m = mask_of_sequence(s, segments, b);
            struct head x = {.k = head_of(k, b, g),
                             .v = head_of(v, b, g),
                             .dk = head_of(dk, b, g),
                             .dv = head_of(dv, b, g)};
            for (int64_t h = g * group; h < (g + 1) * group; h++) {
                int64_t bh = b * s->heads + h;
                x.q = head_of(q, b, h);
                x.o = head_of(o, b, h);
                x.d_o = head_of(d_o, b, h);
                x.dq = head_of(dq, b, h);
                x.lse = (real *)saved + bh * s->length;
                x.deltas = deltas + bh * u.tiles * TILE;
                x.dq_sums = sums ? sums + bh * s->length * s->head_dim : NULL;
                x.turns = turns + bh * u.tiles;
                visited += meet_head(&m, &w, &x, &u, tile, &packed);
            }
            finish_unit(s, &w, &x, &u, tile);
        }
#pragma omp atomic
        CPU(attention_tiles_visited) += visited;
    }
}

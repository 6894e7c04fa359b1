/* Fused attention, forward and backward, without an S x S array (Dao et al. 2022, Milakov & Gimelshein 2018).
 *
 * The work is cut into units that any thread takes: in forward a group of tiles of queries, which meets every
 * tile of keys that it sees; in backward a group of tiles of keys, which meets every tile of queries that sees
 * it. Tiles outside the mask's band are skipped. A thread's scratch holds one group and a few tiles.
 *
 * In forward, vectors run along the queries: scores are K Q^T, the softmax is computed lane by lane, and the
 * output is V^T P, transposed. In backward they run along the keys: scores are Q K^T, and dK and dV are
 * summed transposed, as Q^T dS and dO^T P. So nearly all products have rows of TILE elements, whatever the
 * head dimension. dQ = dS K gets a part from every group of keys. A group adds its part to the tensor when the
 * groups before it have: the order of the sum is that of the keys, whichever thread is faster, so the bits do
 * not depend on the schedule.
 *
 * Scores are in base 2 (q is scaled by scale * log2 e), so that each takes one exp2. Saved for backward: the
 * log-sum-exp, in base 2, [B,H,S].
 *
 * Which keys a query sees: attention_keys() and, in segments, attention_segment_keys() in kernels.h. They are
 * one interval; attention_tiles.h. */
#include <sched.h>

#include "kernels/cpu/attention_pack.h"
#include "kernels/cpu/tile.h"

int64_t attention_tiles_visited;

static const real LOG2E = (real)1.4426950408889634, LN2 = (real)0.6931471805599453;

/* What no query has seen: low enough for every score to exceed it, and finite, so that a difference to a
 * masked score of -inf is not NaN. */
static const real UNSEEN = (real)-1e38;

/* ---- units and scratch ---- */

/* How the work of one call is cut. */
struct units {
    int64_t tiles; /* of a head */
    int64_t group; /* tiles of a unit; the last unit of a head may have fewer */
    int64_t per_head, count;
};

/* Packing is shared by the tiles of a group, so it is large, but half of the L2 cache holds it, and there are
 * enough units to give every thread about the same work. */
static struct units units_of(const struct device *dev, const struct attention_spec *s) {
    const int64_t enough = 8 * (int64_t)dev->threads, heads = s->batch * s->heads;
    struct units u = {.tiles = (s->length + TILE - 1) / TILE, .group = s->head_dim <= 64 ? 4 : 2};
    while (u.group > 1 && heads * ((u.tiles + u.group - 1) / u.group) < enough)
        u.group /= 2;
    u.per_head = (u.tiles + u.group - 1) / u.group;
    u.count = heads * u.per_head;
    return u;
}

/* Scratch of one thread, the same layout for forward and backward; G is the tiles of a group, d' is d padded
 * to whole vectors. */
struct scratch {
    union {
        struct {
            real *qt;                 /* [G][d][TILE] scaled by scale * log2 e */
            real *ot;                 /* [G][d][TILE] the output being summed */
            real *k, *v;              /* [TILE, d] */
            real *p;                  /* [TILE of keys][TILE] scores, then exp2(score - reference) */
            real *reference, *sum;    /* [G][TILE] */
            real_bits *begins, *ends; /* [G][TILE] the keys that each query sees */
        } forward;
        struct {
            real *kt, *vt;            /* [G][d][TILE] */
            real *k;                  /* [G][TILE, d'] */
            real *dkt, *dvt;          /* [G][d][TILE] being summed */
            real *q, *d_o;            /* [TILE, d] q scaled by scale * log2 e */
            real *dq;                 /* [TILE, d'] the group's part */
            real *p, *ds;             /* [TILE of queries][TILE] */
            real *delta;              /* [TILE] */
            real *factors;            /* [TILE] for unpack_transposed */
            real_bits *begins, *ends; /* [TILE] */
        } backward;
    };
};

struct part {
    void *where; /* a pointer to set */
    int64_t count;
};

/* Sets the pointers to arrays behind `base`, which may be NULL, and returns their bytes. Arrays begin at cache
 * lines; one line between them keeps arrays of a power of two from starting in the same cache set. Each thread
 * has pages of its own. */
static size_t lay_out(const struct part *parts, size_t count, char *base) {
    size_t offset = 0;
    for (size_t i = 0; i < count; i++) {
        void *at = base ? base + offset : NULL;
        memcpy(parts[i].where, &at, sizeof at);
        offset += (size_t)round_up(parts[i].count * (int64_t)sizeof(real), 64) + 64;
    }
    return (size_t)round_up((int64_t)offset, 4096);
}

static size_t layout_forward(const struct attention_spec *s, int64_t group, char *base, struct scratch *w) {
    int64_t d = s->head_dim, rows = group * TILE;
    struct part parts[] = {
        {&w->forward.qt, rows * d}, {&w->forward.ot, rows * d},   {&w->forward.k, TILE * d},
        {&w->forward.v, TILE * d},  {&w->forward.p, TILE * TILE}, {&w->forward.reference, rows},
        {&w->forward.sum, rows},    {&w->forward.begins, rows},   {&w->forward.ends, rows}};
    return lay_out(parts, sizeof parts / sizeof *parts, base);
}

static size_t layout_backward(const struct attention_spec *s, int64_t group, char *base, struct scratch *w) {
    int64_t d = s->head_dim, D = round_up(d, VL), rows = group * TILE;
    struct part parts[] = {
        {&w->backward.kt, rows * d},    {&w->backward.vt, rows * d},  {&w->backward.k, rows * D},
        {&w->backward.dkt, rows * d},   {&w->backward.dvt, rows * d}, {&w->backward.q, TILE * d},
        {&w->backward.d_o, TILE * d},   {&w->backward.dq, TILE * D},  {&w->backward.p, TILE * TILE},
        {&w->backward.ds, TILE * TILE}, {&w->backward.delta, TILE},   {&w->backward.factors, TILE},
        {&w->backward.begins, TILE},    {&w->backward.ends, TILE}};
    return lay_out(parts, sizeof parts / sizeof *parts, base);
}

/* Bytes of the counters `turns`: one for each tile of queries. */
static size_t turns_bytes(const struct attention_spec *s, const struct units *u) {
    return (size_t)round_up(s->batch * s->heads * u->tiles * (int64_t)sizeof(int32_t), 4096);
}

struct op_cost attention_plan(const struct device *dev, const struct attention_spec *s) {
    struct scratch unused;
    struct units u = units_of(dev, s);
    size_t forward = layout_forward(s, u.group, NULL, &unused),
           backward = layout_backward(s, u.group, NULL, &unused);
    return (struct op_cost){.saved = (size_t)(s->batch * s->heads * s->length) * sizeof(real),
                            .workspace = turns_bytes(s, &u) +
                                         (size_t)dev->threads * (forward > backward ? forward : backward)};
}

/* The next unit that no thread has taken. Units are handed out in order, which OpenMP's dynamic schedule does
 * not promise, and a unit of backward waits only for units before it: the first unfinished one never waits. */
static int64_t take_unit(int64_t *next) {
    return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
}

/* ---- masks ---- */

/* The keys [begins[i], ends[i]) that query q0 + i sees. Those past the last query repeat it, so that both ends
 * grow over the whole tile. */
static void visible_keys(const struct attention_mask *m, int64_t q0, int64_t rows, real_bits *begins,
                         real_bits *ends) {
    for (int64_t i = 0; i < TILE; i++) {
        int64_t begin, end;
        mask_keys(m, q0 + min64(i, rows - 1), &begin, &end);
        begins[i] = (real_bits)begin;
        ends[i] = (real_bits)end;
    }
}

/* A tile at the band's edges is computed in strips of STRIP rows, each with only the columns that it needs,
 * which saves nearly half of the work for narrow windows. */
enum { STRIP = 16 };

/* ---- forward ---- */

/* A tile of queries of forward's group. */
struct query_tile {
    int64_t q0, rows;
    real *qt, *ot, *reference, *sum;
    real_bits *begins, *ends;
};

static struct query_tile query_tile_of(const struct attention_spec *s, const struct scratch *w, int64_t first,
                                       int64_t i) {
    int64_t d = s->head_dim, q0 = first + i * TILE;
    return (struct query_tile){.q0 = q0,
                               .rows = min64(TILE, s->length - q0),
                               .qt = w->forward.qt + i * d * TILE,
                               .ot = w->forward.ot + i * d * TILE,
                               .reference = w->forward.reference + i * TILE,
                               .sum = w->forward.sum + i * TILE,
                               .begins = w->forward.begins + i * TILE,
                               .ends = w->forward.ends + i * TILE};
}

/* -inf where one of VL queries does not see one of the keys from k0; p [keys][TILE]. */
static void mask_lanes(real *p, int64_t keys, int64_t k0, const real_bits *begins, const real_bits *ends) {
    vbits begin = (vbits)vload((const real *)begins), end = (vbits)vload((const real *)ends);
    for (int64_t i = 0; i < keys; i++) {
        real_bits key = (real_bits)(k0 + i);
        vbits seen = (key >= begin) & (key < end);
        vstore(p + i * TILE, vselect(seen, vload(p + i * TILE), vsplat(-INFINITY)));
    }
}

/* Scores between a query's reference and RISE above it are as precise as those below: fp32 has exponents
 * enough for 2^RISE times any sum. So the reference, and what is summed, seldom change. */
static const real RISE = 8;

/* The online softmax of VL queries, one a lane, over `keys` scores p [keys][TILE]: they become exp2(score -
 * reference). Where the reference rises, the earlier sums are rescaled. */
static void softmax_lanes(real *p, int64_t keys, int64_t d, real *reference, real *sum, real *ot) {
    vreal top = vload(p), base = vload(reference), total = {0};
    for (int64_t i = 1; i < keys; i++)
        top = vmax(top, vload(p + i * TILE));
    vbits rises = top > base + RISE;
    if (vany(rises)) {
        vreal higher = vselect(rises, top, base), factor = vexp2(base - higher);
        base = higher;
        vstore(reference, base);
        vstore(sum, vload(sum) * factor);
        for (int64_t c = 0; c < d; c++)
            vstore(ot + c * TILE, vload(ot + c * TILE) * factor);
    }
    for (int64_t i = 0; i < keys; i++) {
        vreal e = vexp2(vload(p + i * TILE) - base);
        vstore(p + i * TILE, e);
        total += e;
    }
    vstore(sum, vload(sum) + total);
}

/* Keys [k0, k0 + keys), packed in k and v, with columns [begin, end) of a tile of queries. */
static void forward_strip(const struct query_tile *t, int64_t d, const real *k, const real *v, int64_t k0,
                          int64_t keys, int64_t begin, int64_t end, bool masked, real *p) {
    tile_gemm(keys, end - begin, d, k, d, 1, t->qt + begin, TILE, p + begin, TILE, false);
    for (int64_t j = begin; j < end; j += VL) {
        if (masked)
            mask_lanes(p + j, keys, k0, t->begins + j, t->ends + j);
        softmax_lanes(p + j, keys, d, t->reference + j, t->sum + j, t->ot + j);
    }
    tile_gemm(d, end - begin, keys, v, 1, d, p + begin, TILE, t->ot + begin, TILE, true);
}

static void forward_tile(const struct query_tile *t, int64_t d, const struct scratch *w, int64_t k0,
                         int64_t keys) {
    const real *k = w->forward.k, *v = w->forward.v;
    int64_t columns = round_up(t->rows, VL);
    if (t->begins[TILE - 1] <= k0 && k0 + keys <= t->ends[0]) {
        forward_strip(t, d, k, v, k0, keys, 0, columns, false, w->forward.p);
        return;
    }
    for (int64_t i = 0; i < keys; i += STRIP) {
        int64_t count = min64(STRIP, keys - i), begin = 0, end = columns;
        while (begin < end && t->ends[begin + VL - 1] <= k0 + i)
            begin += VL;
        while (begin < end && t->begins[end - VL] >= k0 + i + count)
            end -= VL;
        if (begin < end)
            forward_strip(t, d, k + i * d, v + i * d, k0 + i, count, begin, end, true, w->forward.p);
    }
}

/* One head's tensors. */
struct head {
    struct head_rows q, k, v, o, d_o, dq, dk, dv;
    real *lse;
    int32_t *turns; /* [tiles] of queries: groups of keys that have added their part of dq */
};

static void start_queries(const struct attention_mask *m, const struct head *x, const struct query_tile *t) {
    int64_t d = m->spec->head_dim;
    pack_transposed(x->q, t->q0, t->rows, d, (real)m->spec->scale * LOG2E, t->qt);
    memset(t->ot, 0, (size_t)(d * TILE) * sizeof(real));
    for (int64_t i = 0; i < TILE; i++) {
        t->reference[i] = UNSEEN;
        t->sum[i] = 0;
    }
    visible_keys(m, t->q0, t->rows, t->begins, t->ends);
}

static void finish_queries(const struct attention_mask *m, const struct head *x, const struct query_tile *t) {
    for (int64_t i = 0; i < t->rows; i++)
        x->lse[t->q0 + i] = t->reference[i] + (real)log2((double)t->sum[i]);
    for (int64_t i = 0; i < TILE; i++)
        t->sum[i] = 1 / t->sum[i];
    unpack_transposed(t->ot, t->sum, t->rows, m->spec->head_dim, x->o, t->q0);
}

/* `count` tiles of queries from q0. Returns the tiles of scores computed. */
static int64_t forward_unit(const struct attention_mask *m, const struct scratch *w, const struct head *x,
                            int64_t q0, int64_t count) {
    const struct attention_spec *s = m->spec;
    int64_t d = s->head_dim, visited = 0, begin = s->length, end = 0;
    for (int64_t i = 0; i < count; i++) {
        struct query_tile t = query_tile_of(s, w, q0, i);
        start_queries(m, x, &t);
        begin = min64(begin, t.begins[0]);
        end = max64(end, t.ends[TILE - 1]);
    }
    for (int64_t k0 = begin - begin % TILE; k0 < end; k0 += TILE) {
        int64_t keys = min64(TILE, s->length - k0);
        pack_rows(x->k, k0, keys, d, d, 1, w->forward.k);
        pack_rows(x->v, k0, keys, d, d, 1, w->forward.v);
        for (int64_t i = 0; i < count; i++) {
            struct query_tile t = query_tile_of(s, w, q0, i);
            if (k0 + TILE <= t.begins[0] || k0 >= t.ends[TILE - 1])
                continue;
            forward_tile(&t, d, w, k0, keys);
            visited++;
        }
    }
    for (int64_t i = 0; i < count; i++) {
        struct query_tile t = query_tile_of(s, w, q0, i);
        finish_queries(m, x, &t);
    }
    return visited;
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
    struct units u = units_of(dev, s);
    size_t each = layout_forward(s, u.group, NULL, &unused);
    int64_t next = 0, heads = s->batch * s->heads;
#pragma omp parallel num_threads(dev->threads)
    {
        struct scratch w;
        int64_t visited = 0;
        layout_forward(s, u.group, base + (size_t)omp_get_thread_num() * each, &w);
        for (int64_t unit = take_unit(&next); unit < u.count; unit = take_unit(&next)) {
            /* under a causal mask the last queries are the most work: they come first */
            int64_t bh = unit % heads, b = bh / s->heads, h = bh % s->heads,
                    tile = (u.per_head - 1 - unit / heads) * u.group;
            struct attention_mask m = mask_of_sequence(s, segments, b);
            struct head x = {.q = head_of(q, b, h),
                             .k = head_of(k, b, h),
                             .v = head_of(v, b, h),
                             .o = head_of(o, b, h),
                             .lse = (real *)saved + bh * s->length};
            visited += forward_unit(&m, &w, &x, tile * TILE, min64(u.group, u.tiles - tile));
        }
#pragma omp atomic
        attention_tiles_visited += visited;
    }
}

/* ---- backward ---- */

/* 0 where the query does not see the key. p, columns [begin, end) of a tile from k0. */
static void mask_row(real *p, int64_t k0, int64_t begin, int64_t end, real_bits first, real_bits last) {
    vbits lane;
    for (int i = 0; i < VL; i++)
        lane[i] = i;
    for (int64_t j = begin; j < end; j += VL) {
        vbits key = lane + (real_bits)(k0 + j);
        vbits seen = (key >= first) & (key < last);
        vstore(p + j, vselect(seen, vload(p + j), vsplat(0)));
    }
}

/* P = exp2(score - lse);  dS = P (dO v - delta). p and ds enter as scores and dO V^T. */
static void gradient_row(real *p, real *ds, int64_t begin, int64_t end, real lse) {
    vreal shift = vsplat(lse);
    (void)ds;
    for (int64_t j = begin; j < end; j += VL)
        vstore(p + j, vexp2(vload(p + j) - shift));
}

/* Queries [i, i + rows) of the packed tile from q0, with columns [begin, end) of the tile `j` of the group. */
static void backward_strip(const struct attention_spec *s, const struct scratch *w, const real *lse,
                           int64_t i, int64_t rows, int64_t k0, int64_t j, int64_t begin, int64_t end,
                           bool masked) {
    int64_t d = s->head_dim, D = round_up(d, VL), columns = end - begin, at = j * d * TILE + begin;
    const real *q = w->backward.q + i * d, *d_o = w->backward.d_o + i * d;
    real *p = w->backward.p, *ds = w->backward.ds;
    tile_gemm(rows, columns, d, q, d, 1, w->backward.kt + at, TILE, p + begin, TILE, false);
    tile_gemm(rows, columns, d, d_o, d, 1, w->backward.vt + at, TILE, ds + begin, TILE, false);
    for (int64_t r = 0; r < rows; r++) {
        real *row = p + r * TILE, *gradient = ds + r * TILE;
        gradient_row(row, gradient, begin, end, lse[i + r]);
        if (masked)
            mask_row(row, k0, begin, end, w->backward.begins[i + r], w->backward.ends[i + r]);
        vreal delta = vsplat(w->backward.delta[i + r]);
        for (int64_t c = begin; c < end; c += VL)
            vstore(gradient + c, vload(row + c) * (vload(gradient + c) - delta));
    }
    tile_gemm(d, columns, rows, d_o, 1, d, p + begin, TILE, w->backward.dvt + at, TILE, true);
    tile_gemm(d, columns, rows, q, 1, d, ds + begin, TILE, w->backward.dkt + at, TILE, true);
    tile_gemm(rows, D, columns, ds + begin, TILE, 1, w->backward.k + (j * TILE + begin) * D, D,
              w->backward.dq + i * D, D, true);
}

static void backward_tile(const struct attention_spec *s, const struct scratch *w, const real *lse,
                          int64_t rows, int64_t k0, int64_t j) {
    const real_bits *begins = w->backward.begins, *ends = w->backward.ends;
    if (begins[rows - 1] <= k0 && k0 + TILE <= ends[0]) {
        backward_strip(s, w, lse, 0, rows, k0, j, 0, TILE, false);
        return;
    }
    for (int64_t i = 0; i < rows; i += STRIP) {
        int64_t count = min64(STRIP, rows - i);
        int64_t begin = max64(begins[i] - k0, 0) / VL * VL,
                end = round_up(min64(ends[i + count - 1] - k0, TILE), VL);
        if (begin < end)
            backward_strip(s, w, lse, i, count, k0, j, begin, end, true);
    }
}

/* Add the group's part of dq when the `before` groups of smaller keys have. */
static void add_dq(const struct attention_spec *s, const struct scratch *w, const struct head *x, int64_t q0,
                   int64_t rows, int64_t before) {
    int32_t *turn = x->turns + q0 / TILE;
    while (__atomic_load_n(turn, __ATOMIC_ACQUIRE) != before)
        sched_yield();
    unpack_rows(w->backward.dq, rows, s->head_dim, round_up(s->head_dim, VL), (real)s->scale, before > 0,
                x->dq, q0);
    __atomic_store_n(turn, (int32_t)before + 1, __ATOMIC_RELEASE);
}

/* A tile of queries from q0 with those of the group's tiles that it sees. Returns how many. */
static int64_t backward_queries(const struct attention_mask *m, const struct scratch *w, const struct head *x,
                                int64_t q0, int64_t group, int64_t first_tile, int64_t count) {
    const struct attention_spec *s = m->spec;
    int64_t d = s->head_dim, D = round_up(d, VL), rows = min64(TILE, s->length - q0), begin, end;
    tiles_of_queries(m, q0, rows, &begin, &end);
    int64_t from = max64(begin / TILE, first_tile), to = min64((end + TILE - 1) / TILE, first_tile + count);
    if (from >= to)
        return 0;
    visible_keys(m, q0, rows, w->backward.begins, w->backward.ends);
    pack_rows(x->q, q0, rows, d, d, (real)s->scale * LOG2E, w->backward.q);
    pack_rows(x->d_o, q0, rows, d, d, 1, w->backward.d_o);
    row_dots(w->backward.d_o, d, x->o, q0, rows, d, w->backward.delta);
    memset(w->backward.dq, 0, (size_t)(rows * D) * sizeof(real));
    for (int64_t j = from; j < to; j++)
        backward_tile(s, w, x->lse + q0, rows, j * TILE, j - first_tile);
    add_dq(s, w, x, q0, rows, first_tile / group - begin / TILE / group);
    return to - from;
}

/* `count` tiles of keys from the tile `first`. Returns the tiles of scores computed. */
static int64_t backward_unit(const struct attention_mask *m, const struct scratch *w, const struct head *x,
                             int64_t group, int64_t first, int64_t count) {
    const struct attention_spec *s = m->spec;
    int64_t d = s->head_dim, D = round_up(d, VL), visited = 0, begin, end;
    int64_t k0 = first * TILE, keys = min64(count * TILE, s->length - k0);
    for (int64_t j = 0; j < count; j++) {
        int64_t rows = min64(TILE, keys - j * TILE);
        pack_transposed(x->k, k0 + j * TILE, rows, d, 1, w->backward.kt + j * d * TILE);
        pack_transposed(x->v, k0 + j * TILE, rows, d, 1, w->backward.vt + j * d * TILE);
    }
    pack_rows(x->k, k0, keys, d, D, 1, w->backward.k);
    memset(w->backward.k + keys * D, 0, (size_t)((count * TILE - keys) * D) * sizeof(real));
    memset(w->backward.dkt, 0, (size_t)(count * d * TILE) * sizeof(real));
    memset(w->backward.dvt, 0, (size_t)(count * d * TILE) * sizeof(real));
    tiles_of_keys(m, k0, keys, &begin, &end);
    for (int64_t q0 = begin; q0 < end; q0 += TILE)
        visited += backward_queries(m, w, x, q0, group, first, count);
    for (int64_t j = 0; j < count; j++) {
        int64_t rows = min64(TILE, keys - j * TILE);
        for (int i = 0; i < TILE; i++) /* q is scaled by scale * log2 e, and dk by scale alone */
            w->backward.factors[i] = LN2;
        unpack_transposed(w->backward.dkt + j * d * TILE, w->backward.factors, rows, d, x->dk, k0 + j * TILE);
        for (int i = 0; i < TILE; i++)
            w->backward.factors[i] = 1;
        unpack_transposed(w->backward.dvt + j * d * TILE, w->backward.factors, rows, d, x->dv, k0 + j * TILE);
    }
    return visited;
}

void cpu_attention_backward(struct device *dev, const struct attention_spec *s, tensor q, tensor k, tensor v,
                            tensor segments, tensor o, tensor d_o, const void *saved, tensor dq, tensor dk,
                            tensor dv) {
    call_progress_callback(dev);
    check_attention("attention_backward", s, q, k, v, segments, o);
    check_attention("attention_backward (gradients)", s, dq, dk, dv, segments, d_o);
    char *base = cpu_workspace(dev, attention_plan(dev, s).workspace, "attention_backward");
    struct scratch unused;
    struct units u = units_of(dev, s);
    size_t each = layout_backward(s, u.group, NULL, &unused);
    int64_t next = 0, heads = s->batch * s->heads;
    int32_t *turns = (int32_t *)base;
    base += turns_bytes(s, &u);
    memset(turns, 0, (size_t)(heads * u.tiles) * sizeof *turns);
#pragma omp parallel num_threads(dev->threads)
    {
        struct scratch w;
        int64_t visited = 0;
        layout_backward(s, u.group, base + (size_t)omp_get_thread_num() * each, &w);
        for (int64_t unit = take_unit(&next); unit < u.count; unit = take_unit(&next)) {
            /* under a causal mask the first keys are the most work, and they come first */
            int64_t bh = unit % heads, b = bh / s->heads, h = bh % s->heads, tile = unit / heads * u.group;
            struct attention_mask m = mask_of_sequence(s, segments, b);
            struct head x = {.q = head_of(q, b, h),
                             .k = head_of(k, b, h),
                             .v = head_of(v, b, h),
                             .o = head_of(o, b, h),
                             .d_o = head_of(d_o, b, h),
                             .dq = head_of(dq, b, h),
                             .dk = head_of(dk, b, h),
                             .dv = head_of(dv, b, h),
                             .lse = (real *)saved + bh * s->length,
                             .turns = turns + bh * u.tiles};
            visited += backward_unit(&m, &w, &x, u.group, tile, min64(u.group, u.tiles - tile));
        }
#pragma omp atomic
        attention_tiles_visited += visited;
    }
}

/* Attention, forward and backward, against its definition computed in float64: which query sees which key at
 * every edge of a tile, a window or a pseudo-token, packed and strided views, and no write outside them.
 *
 * The tolerance is not picked by hand: the error of a tensor may be at most three times that of the plain
 * computation (scores, softmax, product) with every operation rounded to fp32, or a few roundings where the
 * plain error happens to be smaller still. Then: which tiles are visited, and how their
 * number grows with the sequence. */
#include "tests/lib/model_fixture.h"
#include "tests/lib/attention_cases.h"

#include "kernels/cpu/cpu.h"

static const double FACTOR = 3;
static const double ROUNDINGS = 4 * 1.2e-7;

enum { GUARD = 64, MAX_LENGTH = 256 };
static const float SENTINEL = 12345.5f;

static uint64_t SEED = 11;

/* ---- the reference ---- */

/* One head in double; all arrays [S,d] but the probabilities, [S,S]. */
struct head {
    double *q, *k, *v, *d_o, *o, *dq, *dk, *dv, *p;
    double score;            /* the largest visible */
    const int32_t *segments; /* [2,B,T], or NULL */
    int64_t b;               /* the head's sequence */
};

/* What an operation in double becomes in fp32: the same, rounded (53 bits are enough to round only once). */
static double rounded(double x, bool plain) {
    return plain ? (double)(float)x : x;
}

static double dot(const double *a, const double *b, int64_t n, bool plain) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum = rounded(sum + rounded(a[i] * b[i], plain), plain);
    return sum;
}

static void add_scaled(double *out, double factor, const double *x, int64_t n, bool plain) {
    for (int64_t i = 0; i < n; i++)
        out[i] = rounded(out[i] + rounded(factor * x[i], plain), plain);
}

/* Probabilities of one query over the keys; zero where it does not see. */
static void softmax(const struct attention_spec *a, struct head *w, int64_t s, bool plain) {
    double *p = w->p + s * a->length, top = -INFINITY, sum = 0, scale = rounded(a->scale, plain);
    int64_t d = a->head_dim;
    for (int64_t key = 0; key < a->length; key++) {
        p[key] = attention_visible_in(a, w->segments, w->b, s, key)
                     ? rounded(scale * dot(w->q + s * d, w->k + key * d, d, plain), plain)
                     : (double)-INFINITY;
        top = fmax(top, p[key]);
        w->score = isfinite(p[key]) ? fmax(w->score, fabs(p[key])) : w->score;
    }
    for (int64_t key = 0; key < a->length; key++) {
        p[key] = isfinite(p[key]) ? rounded(exp(rounded(p[key] - top, plain)), plain) : 0;
        sum = rounded(sum + p[key], plain);
    }
    for (int64_t key = 0; key < a->length; key++)
        p[key] = rounded(p[key] / sum, plain);
}

static void reference_query(const struct attention_spec *a, struct head *w, int64_t s, bool plain) {
    int64_t S = a->length, d = a->head_dim;
    double *p = w->p + s * S, dp[MAX_LENGTH], delta = 0, scale = rounded(a->scale, plain);
    const double *d_o = w->d_o + s * d;
    softmax(a, w, s, plain);
    for (int64_t key = 0; key < S; key++) {
        if (p[key] == 0)
            continue;
        add_scaled(w->o + s * d, p[key], w->v + key * d, d, plain);
        add_scaled(w->dv + key * d, p[key], d_o, d, plain);
        dp[key] = dot(d_o, w->v + key * d, d, plain);
        delta = rounded(delta + rounded(p[key] * dp[key], plain), plain);
    }
    for (int64_t key = 0; key < S; key++) {
        if (p[key] == 0)
            continue;
        double ds = rounded(p[key] * rounded(dp[key] - delta, plain), plain);
        ds = rounded(ds * scale, plain);
        add_scaled(w->dq + s * d, ds, w->k + key * d, d, plain);
        add_scaled(w->dk + key * d, ds, w->q + s * d, d, plain);
    }
}

static struct head head_alloc(const struct attention_spec *a) {
    size_t n = (size_t)(a->length * a->head_dim);
    double *block = calloc(8 * n + (size_t)(a->length * a->length), sizeof *block);
    return (struct head){block,         block + n,     block + 2 * n, block + 3 * n, block + 4 * n,
                         block + 5 * n, block + 6 * n, block + 7 * n, block + 8 * n, .score = 0};
}

/* ---- tensors with sentinels around them ---- */

/* A view into a buffer of its own, or into the one it shares with its neighbours. */
struct buffer {
    float *data;
    int64_t count;
};

static struct buffer buffer_alloc(int64_t inner) {
    struct buffer b = {malloc((size_t)(inner + 2 * GUARD) * sizeof(float)), inner + 2 * GUARD};
    for (int64_t i = 0; i < b.count; i++)
        b.data[i] = SENTINEL;
    return b;
}

/* [B,S,H,d] with `gap` elements after every row of d. */
static tensor gapped(const struct attention_spec *a, struct buffer *b, int64_t gap) {
    int64_t row = a->head_dim + gap;
    *b = buffer_alloc(a->batch * a->length * a->heads * row);
    tensor t = tensor_of(b->data + GUARD, DTYPE_F32, a->batch, a->length, a->heads, a->head_dim, 0);
    t.stride[2] = row;
    t.stride[1] = a->heads * row;
    t.stride[0] = a->length * a->heads * row;
    return t;
}

/* Three tensors: slices of one [B,S,3,H,d], or each with its own buffer. */
static void three(const struct attention_spec *a, bool packed, struct buffer b[3], tensor t[3]) {
    tensor all = {0};
    if (packed) {
        b[0] = buffer_alloc(3 * a->batch * a->length * a->heads * a->head_dim);
        all = tensor_of(b[0].data + GUARD, DTYPE_F32, a->batch, a->length, 3, a->heads, a->head_dim);
    }
    for (int i = 0; i < 3; i++)
        t[i] = packed ? tensor_select(all, 2, i) : gapped(a, &b[i], i == 1 ? 3 : 0);
    for (int i = 1; packed && i < 3; i++)
        b[i] = b[0];
}

static float *row_of(tensor t, int64_t b, int64_t s, int64_t h) {
    return (float *)t.data + b * t.stride[0] + s * t.stride[1] + h * t.stride[2];
}

static void for_rows(tensor t, void (*visit)(float *row, int64_t d, void *context), void *context) {
    for (int64_t b = 0; b < t.shape[0]; b++)
        for (int64_t s = 0; s < t.shape[1]; s++)
            for (int64_t h = 0; h < t.shape[2]; h++)
                visit(row_of(t, b, s, h), t.shape[3], context);
}

static void fill_row(float *row, int64_t d, void *magnitude) {
    for (int64_t i = 0; i < d; i++)
        row[i] = *(float *)magnitude * (float)fixture_noise(&SEED);
}

static void clear_row(float *row, int64_t d, void *unused) {
    (void)unused;
    for (int64_t i = 0; i < d; i++)
        row[i] = SENTINEL;
}

/* ---- one case ---- */

struct attention_case {
    struct attention_spec spec;
    bool packed;
    float magnitude;        /* of q and k */
    const int64_t *lengths; /* of segments; NULL: none */
    int32_t *segments;      /* [2,B,T] */
    tensor in[3], d_o, o, grad[3];
    struct buffer in_buffer[3], d_o_buffer, o_buffer, grad_buffer[3];
    char *saved, *workspace;
    struct op_cost cost;
};

static void case_open(struct attention_case *c) {
    struct error e = {0};
    float one = 1;
    struct op_spec op = {.kind = OP_ATTENTION, .attention = c->spec};
    assert_int_equal(kernels_cpu()->plan(fixture_device(), &op, &c->cost, &e), 0);
    three(&c->spec, c->packed, c->in_buffer, c->in);
    three(&c->spec, c->packed, c->grad_buffer, c->grad);
    c->d_o = gapped(&c->spec, &c->d_o_buffer, 0);
    c->o = gapped(&c->spec, &c->o_buffer, c->packed ? 0 : 5);
    for (int i = 0; i < 3; i++)
        for_rows(c->in[i], fill_row, i < 2 ? &c->magnitude : &one);
    for_rows(c->d_o, fill_row, &one);
    int64_t tokens = c->spec.length / c->spec.pseudo;
    c->segments = c->lengths ? malloc((size_t)(2 * c->spec.batch * tokens) * sizeof *c->segments) : NULL;
    if (c->lengths)
        fill_segments(c->lengths, c->spec.batch, tokens, c->segments);
    c->saved = malloc(c->cost.saved + GUARD);
    c->workspace = aligned_alloc(4096, (c->cost.workspace + GUARD + 4095) / 4096 * 4096);
    memset(c->saved, 0x5a, c->cost.saved + GUARD);
    memset(c->workspace, 0x5a, c->cost.workspace + GUARD);
}

static void case_close(struct attention_case *c) {
    for (int i = 0; i < (c->packed ? 1 : 3); i++) {
        free(c->in_buffer[i].data);
        free(c->grad_buffer[i].data);
    }
    free(c->d_o_buffer.data);
    free(c->o_buffer.data);
    free(c->segments);
    free(c->saved);
    free(c->workspace);
}

static tensor segments_of(const struct attention_case *c) {
    if (!c->segments)
        return tensor_none();
    return tensor_of(c->segments, DTYPE_I32, 2, c->spec.batch, c->spec.length / c->spec.pseudo, 0, 0);
}

static void run_forward(struct attention_case *c) {
    const struct kernels *k = kernels_cpu();
    k->set_workspace(fixture_device(), c->workspace, c->cost.workspace);
    k->attention(fixture_device(), &c->spec, c->in[0], c->in[1], c->in[2], segments_of(c), c->o, c->saved);
}

static void run_backward(struct attention_case *c) {
    kernels_cpu()->attention_backward(fixture_device(), &c->spec, c->in[0], c->in[1], c->in[2],
                                      segments_of(c), c->o, c->d_o, c->saved, c->grad[0], c->grad[1],
                                      c->grad[2]);
}

static void fail_case(const struct attention_case *c, const char *what) {
    const struct attention_spec *s = &c->spec;
    fail_msg("B %d S %d H %d d %d P %d causal %d token %d window %d segments of %d packed %d: %s",
             (int)s->batch, (int)s->length, (int)s->heads, (int)s->head_dim, (int)s->pseudo, s->causal,
             s->token_mask, (int)s->window, c->lengths ? (int)c->lengths[0] : 0, c->packed, what);
}

/* Squares of errors and norms of o, dq, dk, dv over all heads. */
enum { RESULTS = 4 };
struct errors {
    double kernel[RESULTS], plain[RESULTS], norm[RESULTS];
    double score; /* the largest */
};

static void load_head(const struct attention_case *c, struct head *w, int64_t b, int64_t h) {
    int64_t d = c->spec.head_dim;
    double *to[] = {w->q, w->k, w->v, w->d_o};
    tensor from[] = {c->in[0], c->in[1], c->in[2], c->d_o};
    for (int i = 0; i < 4; i++)
        for (int64_t s = 0; s < c->spec.length; s++)
            for (int64_t j = 0; j < d; j++)
                to[i][s * d + j] = (double)row_of(from[i], b, s, h)[j];
    for (int64_t i = 0; i < 4 * c->spec.length * d; i++)
        w->o[i] = 0;
    w->segments = c->segments;
    w->b = b;
}

static void reference_head(const struct attention_case *c, struct head *w, int64_t b, int64_t h, bool plain) {
    load_head(c, w, b, h);
    for (int64_t s = 0; s < c->spec.length; s++)
        reference_query(&c->spec, w, s, plain);
}

static void add_errors(const struct attention_case *c, const struct head *exact, const struct head *plain,
                       int64_t b, int64_t h, struct errors *e) {
    const double *want[] = {exact->o, exact->dq, exact->dk, exact->dv};
    const double *near[] = {plain->o, plain->dq, plain->dk, plain->dv};
    tensor got[] = {c->o, c->grad[0], c->grad[1], c->grad[2]};
    int64_t d = c->spec.head_dim;
    for (int i = 0; i < RESULTS; i++)
        for (int64_t j = 0; j < c->spec.length * d; j++) {
            double x = want[i][j], error = (double)row_of(got[i], b, j / d, h)[j % d] - x;
            e->kernel[i] += error * error;
            e->plain[i] += (near[i][j] - x) * (near[i][j] - x);
            e->norm[i] += x * x;
        }
}

/* The floor: a few roundings of the norm, times the largest score, since a rounding of the score is one of
 * e^score. Gradients are judged by the norm of all three, since dq and dk are differences of two sums as
 * large as those of dv, which the kernel takes in different orders (and may be exactly zero). */
static void check_errors(const struct attention_case *c, const struct errors *e) {
    static const char *const names[] = {"o", "dq", "dk", "dv"};
    double gradients = sqrt(e->norm[1] + e->norm[2] + e->norm[3]);
    for (int i = 0; i < RESULTS; i++) {
        double norm = i > 0 ? gradients : sqrt(e->norm[i]), error = sqrt(e->kernel[i]),
               plain = sqrt(e->plain[i]);
        char text[128];
        snprintf(text, sizeof text, "%s: error %.3g, plain fp32 %.3g, norm %.3g, largest score %.3g",
                 names[i], error, plain, norm, e->score);
        if (!(error <= fmax(FACTOR * plain, ROUNDINGS * norm * fmax(1, e->score))))
            fail_case(c, text);
    }
}

static void compare_with_reference(const struct attention_case *c) {
    struct errors e = {0};
    struct head exact = head_alloc(&c->spec), plain = head_alloc(&c->spec);
    for (int64_t b = 0; b < c->spec.batch; b++)
        for (int64_t h = 0; h < c->spec.heads; h++) {
            reference_head(c, &exact, b, h, false);
            reference_head(c, &plain, b, h, true);
            add_errors(c, &exact, &plain, b, h, &e);
        }
    e.score = exact.score;
    free(exact.q);
    free(plain.q);
    check_errors(c, &e);
}

/* Overwrites the views with the sentinel, so it is called last: another value was then written outside of
 * them. */
static void check_sentinels(struct attention_case *c) {
    for_rows(c->o, clear_row, NULL);
    for (int i = 0; i < 3; i++)
        for_rows(c->grad[i], clear_row, NULL);
    struct buffer all[] = {c->o_buffer, c->grad_buffer[0], c->grad_buffer[1], c->grad_buffer[2]};
    for (int i = 0; i < 4; i++)
        for (int64_t j = 0; j < all[i].count; j++)
            if (all[i].data[j] != SENTINEL)
                fail_case(c, i == 0 ? "wrote outside of o" : "wrote outside of a gradient");
    for (int i = 0; i < GUARD; i++)
        if (c->saved[c->cost.saved + (size_t)i] != 0x5a ||
            c->workspace[c->cost.workspace + (size_t)i] != 0x5a)
            fail_case(c, "wrote past the bytes of its plan");
}

static void check_segmented(struct attention_spec spec, const int64_t *lengths, bool packed,
                            float magnitude) {
    if (!in_sample())
        return;
    struct attention_case c = {.spec = spec, .packed = packed, .magnitude = magnitude, .lengths = lengths};
    c.spec.scale = 1 / sqrt((double)spec.head_dim);
    case_open(&c);
    run_forward(&c);
    run_backward(&c);
    compare_with_reference(&c);
    check_sentinels(&c);
    case_close(&c);
}

static void check_case(struct attention_spec spec, bool packed, float magnitude) {
    check_segmented(spec, NULL, packed, magnitude);
}

/* ---- the table ---- */

static const int64_t DIMS[] = {4, 8, 16, 20, 64};

static size_t drawn(size_t n) {
    return (size_t)((fixture_noise(&SEED) + 1) / 2 * (double)n);
}

/* Head dims, batches, heads and packing are drawn at random. */
static void check_drawn_segments(struct attention_spec s, const int64_t *lengths) {
    s.batch = 1 + (int64_t)drawn(2);
    s.heads = drawn(2) ? 3 : 1;
    s.head_dim = DIMS[drawn(lengths ? COUNT(DIMS) - 1 : COUNT(DIMS))];
    check_segmented(s, lengths, drawn(2), 1);
}

static void check_drawn(struct attention_spec s) {
    check_drawn_segments(s, NULL);
}

static void every_case(void **state) {
    (void)state;
    attention_each_case(ON_CPU, check_drawn);
}

static void every_segmented_case(void **state) {
    (void)state;
    attention_each_segmented(ON_CPU, 130, check_drawn_segments);
}

static void every_head_dim(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT(DIMS); i++)
        for (int packed = 0; packed < 2; packed++) {
            check_case((struct attention_spec){2, 130, 3, DIMS[i], 2, true, true, 63, 0, false, 0, false},
                       packed, 1);
            check_case((struct attention_spec){1, 65, 1, DIMS[i], 1, true, false, 0, 0, false, 0, false},
                       packed, 1);
            check_segmented((struct attention_spec){2, 130, 3, DIMS[i], 2, true, true, 63, 0, true, 0, false},
                            ATTENTION_SEGMENTS[COUNT(ATTENTION_SEGMENTS) - 1], packed, 1);
        }
}

/* Heads enough that a unit of work is a group of tiles: of two tiles, so that a head has two groups, and of
 * four. */
static void groups_of_tiles(void **state) {
    (void)state;
    for (int64_t heads = 8; heads <= 16; heads += 8)
        for (int64_t window = 0; window < 200; window += 97) {
            check_case((struct attention_spec){1, 250, heads, 4, 2, true, false, window, 0, false, 0, false},
                       true, 1);
            check_segmented(
                (struct attention_spec){1, 250, heads, 4, 2, true, true, window, 0, true, 0, false},
                ATTENTION_SEGMENTS[4], false, 1);
        }
    check_case((struct attention_spec){1, 250, 8, 4, 1, false, false, 0, 0, false, 0, false}, false, 1);
}

/* ---- extreme numbers ---- */

/* Scores of 1e4 leave one key with all of the weight, or two whose difference fp32 hardly resolves. */
static void large_scores(void **state) {
    (void)state;
    for (int64_t window = 0; window < 70; window += 33) {
        check_case((struct attention_spec){1, 130, 2, 16, 1, true, false, window, 0, false, 0, false}, true,
                   120);
        check_case((struct attention_spec){1, 66, 2, 8, 3, true, true, window, 0, false, 0, false}, false,
                   200);
    }
}

static bool all_nan(const float *row, int64_t d) {
    for (int64_t i = 0; i < d; i++)
        if (!isnan(row[i]))
            return false;
    return true;
}

static bool all_finite(const float *row, int64_t d) {
    for (int64_t i = 0; i < d; i++)
        if (!isfinite(row[i]))
            return false;
    return true;
}

static void fail_nan(const struct attention_case *c, const char *what, bool in_key, int64_t at, int64_t row) {
    char text[96];
    snprintf(text, sizeof text, "%s %d of %s, in row %d", what, (int)at, in_key ? "k" : "q", (int)row);
    fail_case(c, text);
}

/* A NaN in one element of q or k: the outputs of exactly the queries that use it are NaN; in backward,
 * gradients of the keys as well. */
static void check_nan(bool in_key, int64_t at, float nan) {
    struct attention_case c = {.spec = {1, 130, 1, 8, 1, true, false, 40, 0.3}, .magnitude = 1};
    case_open(&c);
    row_of(c.in[in_key], 0, at, 0)[5] = nan;
    run_forward(&c);
    run_backward(&c);
    for (int64_t s = 0; s < c.spec.length; s++) {
        bool hit = in_key ? attention_visible(&c.spec, s, at) : s == at;
        if (!(hit ? all_nan : all_finite)(row_of(c.o, 0, s, 0), 8))
            fail_nan(&c, hit ? "o is not NaN" : "o has a NaN that it does not see", in_key, at, s);
        if (hit && !all_nan(row_of(c.grad[0], 0, s, 0), 8))
            fail_nan(&c, "dq is not NaN", in_key, at, s);
        if (!in_key && attention_visible(&c.spec, at, s) && !all_nan(row_of(c.grad[2], 0, s, 0), 8))
            fail_nan(&c, "dv is not NaN", in_key, at, s);
    }
    case_close(&c);
}

static void nan_reaches_what_depends_on_it(void **state) {
    (void)state;
    static const int64_t at[] = {0, 1, 15, 16, 63, 64, 100, 129};
    for (size_t i = 0; i < COUNT(at); i++)
        for (int in_key = 0; in_key < 2; in_key++) {
            check_nan(in_key, at[i], NAN);
            check_nan(in_key, at[i], -NAN);
            check_nan(in_key, at[i], nanf("0x1"));
        }
}

/* ---- tiles ---- */

enum { TILE_SIDE = 64, MAX_TILED = 449 };

static int64_t visits(struct attention_spec spec, const int64_t *lengths, bool backward) {
    struct attention_case c = {.spec = spec, .magnitude = 1, .packed = true, .lengths = lengths};
    c.spec.scale = 0.3;
    case_open(&c);
    run_forward(&c);
    int64_t before = cpu_attention_tiles_visited;
    (backward ? run_backward : run_forward)(&c);
    case_close(&c);
    return cpu_attention_tiles_visited - before;
}

static void check_segmented_tiles(struct attention_spec s, const int64_t *lengths) {
    if (!in_sample())
        return;
    int32_t segments[2 * 2 * MAX_TILED];
    s.batch = 1 + !s.token_mask;
    s.heads = 2;
    s.head_dim = 4;
    if (lengths)
        fill_segments(lengths, s.batch, s.length / s.pseudo, segments);
    int64_t needed = attention_tiles_needed_in(&s, lengths ? segments : NULL, TILE_SIDE, TILE_SIDE);
    assert_int_equal(visits(s, lengths, false), needed);
    assert_int_equal(visits(s, lengths, true), needed);
}

static void check_tiles(struct attention_spec s) {
    check_segmented_tiles(s, NULL);
}

static void no_empty_tile_is_visited(void **state) {
    (void)state;
    static const int64_t lengths[] = {1, 64, 65, 200, 449}, windows[] = {0, 1, 2, 63, 64, 65, 66, 129, 500};
    attention_each_mask(ON_CPU, lengths, COUNT(lengths), windows, COUNT(windows), check_tiles);
    attention_each_segmented(ON_CPU, 200, check_segmented_tiles);
}

/* A window of 512 virtual tokens spans 9 tiles of keys, of which the first 8 rows of tiles lack 8, 7, ... 1:
 * so 9 n - 36 visits for n rows, and twice the tokens are twice the work. */
static void check_linear(int64_t heads, int64_t most_tokens, bool backward) {
    int64_t before = 0;
    most_tokens = sample_every() > 1 ? 2048 : most_tokens;
    for (int64_t T = 1024; T <= most_tokens; T *= 2) {
        struct attention_spec a = {1, 4 * T, heads, 8, 4, true, false, 512, 0, false, 0, false};
        int64_t count = visits(a, NULL, backward), rows = 4 * T / TILE_SIDE;
        assert_int_equal(count, heads * (9 * rows - 36));
        if (before > 0)
            assert_true(fabs((double)(count + 36 * heads) / (double)(before + 36 * heads) - 2) < 1e-9);
        if (T > 4096) /* where the start-up is small enough not to count */
            assert_true(fabs((double)count / (double)before - 2) < 0.04);
        before = count;
    }
}

static void windowed_work_grows_linearly(void **state) {
    (void)state;
    check_linear(1, 16384, false);
    check_linear(1, 16384, true);
    check_linear(8, 2048, false);
    check_linear(8, 2048, true);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_case),
        cmocka_unit_test(every_segmented_case),
        cmocka_unit_test(every_head_dim),
        cmocka_unit_test(groups_of_tiles),
        cmocka_unit_test(large_scores),
        cmocka_unit_test(nan_reaches_what_depends_on_it),
        cmocka_unit_test(no_empty_tile_is_visited),
        cmocka_unit_test(windowed_work_grows_linearly),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* The CUDA backend's built-in attention, forward and backward, against the CPU backend: every mask with
 * every edge of a tile, a window, a segment or a pseudo-token, packed and gapped views, extreme scores; which
 * tiles are visited; and that two runs give the same bits.
 *
 * The rule is the fixture's, with o rounded to the type under test before the plain backward reads it. The
 * gradients are judged by the norm of all three, since dq and dk are differences of two sums as large as
 * those of dv, taken in different orders (and may be exactly zero). */
#include "tests/cuda/fixture.h"
#include "tests/lib/attention_cases.h"

/* Tiles visited since the program began (kernels/cuda/attention/attention_bf16.cu). */
extern int64_t cuda_attention_tiles;

enum layout { SEPARATE, PACKED, GAPPED };

struct attention_case {
    struct attention_spec spec;
    enum layout layout;
    double magnitude;       /* of q and k */
    const int64_t *lengths; /* of segments (segments.h); NULL: none */
};

/* q, k, v or their gradients, and the buffers they are views of. */
struct three {
    struct operand whole[3], view[3];
};

static struct operand narrowed(struct operand x, int64_t d) {
    for (int i = 0; i < BACKENDS; i++)
        x.on[i].shape[3] = d;
    return x;
}

static struct operand selected(struct operand x, int64_t index) {
    for (int i = 0; i < BACKENDS; i++)
        x.on[i] = tensor_select(x.on[i], 2, index);
    return x;
}

/* [B,S,H,d], the rows `gap` elements further apart than d. */
static struct operand rows_with(struct backends *k, const struct attention_spec *s, int64_t gap, double scale,
                                double offset) {
    return scaled_input(k, k->compute, scale, offset, s->batch, s->length, s->heads, s->head_dim + gap, 0);
}

static struct three three_of(struct backends *k, const struct attention_case *c, bool out) {
    const struct attention_spec *s = &c->spec;
    struct three t;
    double offset = out ? (double)NAN : 0, scale = out ? 0 : c->magnitude;
    if (c->layout == PACKED) {
        t.whole[0] =
            scaled_input(k, k->compute, scale, offset, s->batch, s->length, 3, s->heads, s->head_dim);
        for (int i = 0; i < 3; i++) {
            t.whole[i] = t.whole[0];
            t.view[i] = selected(t.whole[0], i);
        }
        return t;
    }
    for (int i = 0; i < 3; i++) {
        t.whole[i] = rows_with(k, s, c->layout == GAPPED ? 3 + 2 * i : 0, i < 2 || out ? scale : 1, offset);
        t.view[i] = narrowed(t.whole[i], s->head_dim);
    }
    return t;
}

/* Segments of these lengths, [2,B,T]; NULL: absent. */
static struct operand segments_of(struct backends *k, const struct attention_spec *s,
                                  const int64_t *lengths) {
    int64_t T = s->length / s->pseudo, n = 2 * s->batch * T;
    if (!lengths)
        return absent();
    int32_t *bounds = (int32_t *)malloc((size_t)n * sizeof *bounds);
    double *values = (double *)malloc((size_t)n * sizeof *values);
    fill_segments(lengths, s->batch, T, bounds);
    for (int64_t i = 0; i < n; i++)
        values[i] = bounds[i];
    struct operand x = operand_of(k, DTYPE_I32, values, 2, s->batch, T, 0, 0);
    free(bounds);
    free(values);
    return x;
}

/* What a backend left in the view, contiguous; a write beside the view fails. `packed` buffers have no
 * elements beside their three views. */
static double *gather(const struct backend *b, struct operand whole, struct operand view, bool packed) {
    tensor x = on(whole, b), v = on(view, b);
    int64_t count = tensor_count(x), at = 0;
    size_t offset = (size_t)((char *)v.data - (char *)x.data) / dtype_bytes(x.dtype);
    double *all = values_on(b, whole), *values = (double *)malloc((size_t)(tensor_count(v) + 1) * 8);
    for (int64_t i = 0; i < v.shape[0]; i++)
        for (int64_t s = 0; s < v.shape[1]; s++)
            for (int64_t h = 0; h < v.shape[2]; h++)
                for (int64_t c = 0; c < v.shape[3]; c++) {
                    int64_t from = (int64_t)offset + i * v.stride[0] + s * v.stride[1] + h * v.stride[2] + c;
                    values[at++] = all[from];
                    all[from] = NAN;
                }
    for (int64_t i = 0; i < count && !packed; i++)
        if (!isnan(all[i]))
            fail_msg("wrote beside a view, at %lld", (long long)i);
    free(all);
    return values;
}

static const char *describe(const struct attention_case *c, const char *what) {
    static char text[256];
    const struct attention_spec *s = &c->spec;
    snprintf(text, sizeof text,
             "B %d S %d H %d d %d P %d causal %d token %d window %d segments of %d layout %d: %s",
             (int)s->batch, (int)s->length, (int)s->heads, (int)s->head_dim, (int)s->pseudo, s->causal,
             s->token_mask, (int)s->window, c->lengths ? (int)c->lengths[0] : 0, c->layout, what);
    return text;
}

/* The rule, on `count` results, which are judged by the norm of all of them; score: the largest, since a
 * rounding of a score is one of e^score. */
static void expect_results(struct backends *k, const struct attention_case *c, const char *const names[],
                           const struct operand whole[], const struct operand view[], int count,
                           double score) {
    int64_t n = tensor_count(view[0].on[EXACT]);
    double *values[3][BACKENDS] = {{NULL}}, *zero = (double *)calloc((size_t)n, 8), norm = 0, largest = 0;
    for (int i = 0; i < count; i++) {
        EACH(k, b)
        values[i][b->which] = gather(b, whole[i], view[i], c->layout == PACKED && count == 3);
        for (int64_t j = 0; j < n; j++)
            values[i][PLAIN][j] = round_to(k->compute, values[i][PLAIN][j]);
        struct deviation size = deviation(values[i][EXACT], zero, n);
        norm = hypot(norm, size.norm);
        largest = fmax(largest, size.largest);
    }
    double few = 4 * fmax(k->compute == DTYPE_BF16 ? 0x1p-9 : 0x1p-23, 0x1p-23 * score);
    for (int i = 0; i < count; i++) {
        struct deviation error = deviation(values[i][CUDA], values[i][EXACT], n);
        struct deviation plain = deviation(values[i][PLAIN], values[i][EXACT], n);
        if (!(error.norm <= FACTOR * plain.norm + few * norm) ||
            !(error.largest <= FACTOR * plain.largest + few * largest))
            fail_msg("%s: error %.3g (largest %.3g), of the plain computation %.3g (%.3g), norm %.3g",
                     describe(c, names[i]), error.norm, error.largest, plain.norm, plain.largest, norm);
        for (int j = 0; j < BACKENDS; j++)
            free(values[i][j]);
    }
    free(zero);
}

/* The largest score, which a rounding of is one of e^score. */
static double largest_score(struct backends *k, const struct attention_case *c, const struct three *in) {
    const struct attention_spec *s = &c->spec;
    struct backend *b = &k->each[EXACT];
    tensor q = on(in->view[0], b), key = on(in->view[1], b);
    double largest = 0;
    for (int64_t i = 0; i < s->batch; i++)
        for (int64_t h = 0; h < s->heads; h++)
            for (int64_t x = 0; x < s->length; x++)
                for (int64_t y = 0; y <= x; y++) {
                    const double *from =
                        (double *)q.data + i * q.stride[0] + x * q.stride[1] + h * q.stride[2];
                    const double *to =
                        (double *)key.data + i * key.stride[0] + y * key.stride[1] + h * key.stride[2];
                    double dot = 0;
                    for (int64_t j = 0; j < s->head_dim; j++)
                        dot += from[j] * to[j];
                    largest = fmax(largest, fabs(dot) * s->scale);
                }
    return largest;
}

/* On a GPU cuDNN serves some of the cases, unless IHA_ATTENTION=own. */
static bool by_cudnn(struct backends *k, const struct attention_spec *s) {
    size_t bytes;
    struct backend *b = &k->each[CUDA];
    return strcmp(b->k->attention_backend(b->dev, s, &bytes), "cuDNN") == 0;
}

static bool cudnn_may_serve(void) {
    const char *choice = getenv("IHA_ATTENTION");
    return emulator_on_gpu() && (!choice || strcmp(choice, "own") != 0);
}

static void check_case(enum device_precision precision, struct attention_case c) {
    static uint64_t seed;
    struct backends *k = backends(precision);
    struct attention_spec *s = &c.spec;
    s->scale = s->scale > 0 ? s->scale : 1 / sqrt((double)s->head_dim);
    plan(k, (struct op_spec){.kind = OP_ATTENTION, .attention = *s});
    if (c.layout == GAPPED && by_cudnn(k, s))
        c.layout = SEPARATE; /* it wants rows at multiples of 16 bytes, as the model's are */
    emulator_seed(seed++ % 5);
    struct three in = three_of(k, &c, false), out = three_of(k, &c, true);
    struct operand o = rows_with(k, s, c.layout == GAPPED, 0, (double)NAN), o_view = narrowed(o, s->head_dim);
    struct operand d_o = rows_with(k, s, 0, 1, 0), segments = segments_of(k, s, c.lengths);
    EACH(k, b)
    b->k->attention(b->dev, s, on(in.view[0], b), on(in.view[1], b), on(in.view[2], b), on(segments, b),
                    on(o_view, b), b->saved);
    double score = largest_score(k, &c, &in);
    static const char *const forward[] = {"o"}, *const backward[] = {"dq", "dk", "dv"};
    expect_results(k, &c, forward, &o, &o_view, 1, score);
    round_plain(k, o);
    EACH(k, b)
    b->k->attention_backward(b->dev, s, on(in.view[0], b), on(in.view[1], b), on(in.view[2], b),
                             on(segments, b), on(o_view, b), on(d_o, b), b->saved, on(out.view[0], b),
                             on(out.view[1], b), on(out.view[2], b));
    expect_results(k, &c, backward, out.whole, out.view, 3, score);
    done(k);
}

/* ---- the table ---- */

static const int64_t DIMS[] = {4, 8, 20, 24, 32, 7};

static size_t drawn(size_t n) {
    return (size_t)((fixture_noise() + 1) / 2 * (double)n);
}

/* Head dims, heads and layouts take turns at random. cuDNN takes a second or so to build each of its
 * graphs, up to four a case: there one case in five has to do. */
static void check_drawn(enum device_precision precision, struct attention_spec s, const int64_t *lengths) {
    static int next;
    if (next++ % (precision == DEVICE_BF16 && cudnn_may_serve() ? 5 : 1) != 0)
        return;
    s.batch = s.length < 64 ? 1 + (int64_t)drawn(2) : 1;
    s.heads = s.length < 64 ? 1 + (int64_t)drawn(3) : 1;
    s.head_dim = DIMS[drawn(COUNT(DIMS))];
    check_case(precision, (struct attention_case){s, (enum layout)drawn(3), 2, lengths});
}

static void check_bf16(struct attention_spec s) {
    check_drawn(DEVICE_BF16, s, NULL);
}

static void check_fp32(struct attention_spec s) {
    check_drawn(DEVICE_FP32, s, NULL);
}

static void check_segmented_bf16(struct attention_spec s, const int64_t *lengths) {
    check_drawn(DEVICE_BF16, s, lengths);
}

static void check_segmented_fp32(struct attention_spec s, const int64_t *lengths) {
    check_drawn(DEVICE_FP32, s, lengths);
}

/* Every kernel: one padded head dim each, with and without padding, over more than one tile. */
static void every_head_dim(enum device_precision precision) {
    static const int64_t dims[] = {32, 40, 64, 65, 72, 128, 136, 200, 256};
    for (size_t i = 0; i < COUNT(dims); i++) {
        bool wide = dims[i] > 128;
        check_case(precision, (struct attention_case){
                                  {1, wide ? 66 : 140, 2, dims[i], 2, true, true, 50, 0, false, 0, false},
                                  (enum layout)(i % 3),
                                  2,
                                  NULL});
        check_case(precision, (struct attention_case){
                                  {2, wide ? 66 : 140, 2, dims[i], 2, true, true, 50, 0, true, 0, false},
                                  (enum layout)(i % 3),
                                  2,
                                  ATTENTION_SEGMENTS[COUNT(ATTENTION_SEGMENTS) - 1]});
    }
    check_case(precision, (struct attention_case){
                              {2, 200, 3, 64, 4, true, true, 0, 0, false, 0, false}, PACKED, 2, NULL});
    check_case(precision, (struct attention_case){
                              {1, 130, 1, 128, 1, true, false, 0, 0, false, 0, false}, PACKED, 2, NULL});
}

/* Scores of 1e4 and more leave one key with all of the weight, or two that can hardly be told apart. The bf16
 * kernels scale and shift a score in one FMA, so the largest weight is 1 but for a rounding of the score: at
 * 1e5, where that would be as large as bf16's own, no model trains. */
static void large_scores(enum device_precision precision) {
    double magnitude = precision == DEVICE_BF16 ? 60 : 200;
    for (int64_t window = 0; window < 70; window += 33) {
        check_case(precision,
                   (struct attention_case){
                       {1, 130, 2, 16, 1, true, false, window, 0, false, 0, false}, PACKED, magnitude / 2, NULL});
        check_case(precision,
                   (struct attention_case){
                       {1, 66, 2, 8, 3, true, true, window, 0, false, 0, false}, SEPARATE, magnitude, NULL});
    }
}

static void table_bf16(void **state) {
    (void)state;
    attention_each_case(ON_CUDA, check_bf16);
}

static void table_fp32(void **state) {
    (void)state;
    attention_each_case(ON_CUDA, check_fp32);
}

static void segmented_bf16(void **state) {
    (void)state;
    attention_each_segmented(ON_CUDA, 140, check_segmented_bf16);
}

static void segmented_fp32(void **state) {
    (void)state;
    attention_each_segmented(ON_CUDA, 63, check_segmented_fp32); /* short: with several sequences */
}

static void head_dims(void **state) {
    (void)state;
    every_head_dim(DEVICE_BF16);
    every_head_dim(DEVICE_FP32);
}

static void extreme_scores(void **state) {
    (void)state;
    large_scores(DEVICE_BF16);
    large_scores(DEVICE_FP32);
}

/* ---- NaN ---- */

/* One pass of the CUDA backend alone, on separate tensors of one head. */
struct pass {
    struct backends *k;
    struct operand q, key, v, d_o, o, dq, dk, dv, segments;
    int64_t forward_tiles, backward_tiles;
};

static struct pass pass_of(enum device_precision precision, const struct attention_spec *s,
                           const int64_t *lengths, const double *q, const double *key) {
    struct pass p = {.k = backends(precision)};
    struct backends *k = p.k;
    int64_t n = s->batch * s->length * s->heads * s->head_dim;
    double *noise[4];
    for (int i = 0; i < 4; i++) {
        noise[i] = (double *)malloc((size_t)n * 8);
        for (int64_t j = 0; j < n; j++)
            noise[i][j] = fixture_noise();
    }
    const double *values[] = {q ? q : noise[0], key ? key : noise[1], noise[2], noise[3]};
    struct operand *in[] = {&p.q, &p.key, &p.v, &p.d_o}, *out[] = {&p.o, &p.dq, &p.dk, &p.dv};
    for (int i = 0; i < 4; i++) {
        *in[i] = operand_of(k, k->compute, values[i], s->batch, s->length, s->heads, s->head_dim, 0);
        *out[i] = rows_with(k, s, 0, 0, (double)NAN);
        free(noise[i]);
    }
    p.segments = segments_of(k, s, lengths);
    plan(k, (struct op_spec){.kind = OP_ATTENTION, .attention = *s});
    return p;
}

static void run_pass(struct pass *p, const struct attention_spec *s) {
    struct backend *b = &p->k->each[CUDA];
    int64_t start = cuda_attention_tiles;
    b->k->attention(b->dev, s, on(p->q, b), on(p->key, b), on(p->v, b), on(p->segments, b), on(p->o, b),
                    b->saved);
    free(values_on(b, p->o)); /* waits */
    p->forward_tiles = cuda_attention_tiles - start;
    b->k->attention_backward(b->dev, s, on(p->q, b), on(p->key, b), on(p->v, b), on(p->segments, b),
                             on(p->o, b), on(p->d_o, b), b->saved, on(p->dq, b), on(p->dk, b), on(p->dv, b));
    free(values_on(b, p->dq));
    p->backward_tiles = cuda_attention_tiles - start - p->forward_tiles;
}

enum { NAN_LENGTH = 130, NAN_DIM = 8 };

/* A NaN in one element of q or k: exactly the queries that use it say NaN; in backward the keys as well. So
 * nothing crosses the edge of a segment. */
static void check_nan(enum device_precision precision, const int64_t *lengths, bool in_key, int64_t at) {
    struct attention_spec s = {1, NAN_LENGTH, 1, NAN_DIM, 1, true, false, 40, 0.3, lengths != NULL, 0, false};
    int32_t segments[2 * NAN_LENGTH];
    if (lengths)
        fill_segments(lengths, 1, NAN_LENGTH, segments);
    double poisoned[NAN_LENGTH * NAN_DIM];
    for (int i = 0; i < NAN_LENGTH * NAN_DIM; i++)
        poisoned[i] = i == at * NAN_DIM + 5 ? (double)NAN : fixture_noise();
    struct pass p = pass_of(precision, &s, lengths, in_key ? NULL : poisoned, in_key ? poisoned : NULL);
    run_pass(&p, &s);
    struct backend *b = &p.k->each[CUDA];
    double *o = values_on(b, p.o), *dq = values_on(b, p.dq), *dv = values_on(b, p.dv);
    for (int64_t i = 0; i < NAN_LENGTH; i++) {
        const int32_t *of = lengths ? segments : NULL;
        bool hit = in_key ? attention_visible_in(&s, of, 0, i, at) : i == at;
        bool reached = in_key || attention_visible_in(&s, of, 0, at, i); /* gradients of key i */
        for (int64_t c = 0; c < NAN_DIM; c++) {
            assert_int_equal(isnan(o[i * NAN_DIM + c]) != 0, hit);
            assert_true(!hit || isnan(dq[i * NAN_DIM + c]));
            assert_true(in_key || (isnan(dv[i * NAN_DIM + c]) != 0) == reached);
        }
    }
    free(o);
    free(dq);
    free(dv);
    done(p.k);
}

static void nan_reaches_what_depends_on_it(void **state) {
    (void)state;
    if (cudnn_may_serve())
        skip(); /* a promise of our own kernels, not of cuDNN's */
    static const int64_t at[] = {0, 15, 64, 129}, lengths[SEGMENT_LENGTHS] = {11, 5, 50, 1};
    for (size_t i = 0; i < COUNT(at); i++)
        for (int in_key = 0; in_key < 2; in_key++) {
            check_nan(DEVICE_BF16, NULL, in_key, at[i]);
            check_nan(DEVICE_FP32, NULL, in_key, at[i]);
            check_nan(DEVICE_BF16, lengths, in_key, at[i]);
            check_nan(DEVICE_FP32, lengths, in_key, at[i]);
        }
}

/* ---- tiles ---- */

enum { MAX_TILED = 450 /* B T */ };

/* The sides of the tiles: see forward_shape, backward_shape and fp32_shape. */
static void check_tiles(enum device_precision precision, struct attention_spec s, const int64_t *lengths) {
    bool bf16 = precision == DEVICE_BF16, narrow = s.head_dim <= 64;
    int64_t rows = narrow ? 128 : 64;
    struct pass p = pass_of(precision, &s, lengths, NULL, NULL);
    int32_t segments[2 * MAX_TILED], *of = lengths ? segments : NULL;
    if (lengths)
        fill_segments(lengths, s.batch, s.length / s.pseudo, segments);
    run_pass(&p, &s);
    done(p.k);
    assert_int_equal(p.forward_tiles, bf16 ? attention_tiles_needed_in(&s, of, 128, 64)
                                           : attention_tiles_needed_in(&s, of, 32, 32));
    assert_int_equal(p.backward_tiles, bf16 ? attention_tiles_needed_in(&s, of, 32, rows) +
                                                  attention_tiles_needed_in(&s, of, rows, 32)
                                            : 2 * attention_tiles_needed_in(&s, of, 32, 32));
}

static void check_tiles_of_segments(struct attention_spec s, const int64_t *lengths) {
    if (lengths && s.window % 2 != 0)
        return; /* windows of 0, 2, 32 and 64 are enough */
    s.head_dim = 8;
    s.scale = 0.3;
    check_tiles(DEVICE_BF16, s, lengths);
    if (s.length == 65 || s.window == 32)
        check_tiles(DEVICE_FP32, s, lengths);
}

static void check_tiles_of_mask(struct attention_spec s) {
    check_tiles_of_segments(s, NULL);
}

static void no_empty_tile_is_visited(void **state) {
    (void)state;
    if (emulator_on_gpu())
        skip(); /* only the emulator counts */
    static const int64_t lengths[] = {1, 65, 129, 300}, windows[] = {0, 1, 2, 31, 33, 64, 65, 130, 500};
    attention_each_mask(ON_CUDA, lengths, COUNT(lengths), windows, COUNT(windows), check_tiles_of_mask);
    check_tiles(DEVICE_BF16, (struct attention_spec){1, 200, 1, 128, 3, true, true, 40, 0.1, false, 0, false},
                NULL);
    check_tiles(DEVICE_FP32, (struct attention_spec){2, 200, 2, 128, 3, true, true, 40, 0.1, false, 0, false},
                NULL);
    attention_each_segmented(ON_CUDA, 200, check_tiles_of_segments);
    check_tiles(DEVICE_BF16, (struct attention_spec){2, 450, 2, 128, 2, true, true, 0, 0.1, true, 0, false},
                ATTENTION_SEGMENTS[3]);
}

/* ---- bits ---- */

/* The order in which threads and blocks run does not show. */
static void check_bits(const int64_t *lengths) {
    struct attention_spec s = {2, 130, 2, 64, 2, true, true, 70, 0.125, lengths != NULL, 0, false};
    for (int precision = DEVICE_FP32; precision <= DEVICE_BF16; precision++) {
        struct pass p = pass_of((enum device_precision)precision, &s, lengths, NULL, NULL);
        struct backend *b = &p.k->each[CUDA];
        struct operand out[] = {p.o, p.dq, p.dk, p.dv};
        double *first[4];
        for (int run = 0; run < 3; run++) {
            emulator_seed((uint64_t)run);
            run_pass(&p, &s);
            for (int i = 0; i < 4; i++) {
                double *values = values_on(b, out[i]);
                if (run == 0) {
                    first[i] = values;
                    continue;
                }
                assert_memory_equal(values, first[i], (size_t)tensor_count(on(out[i], b)) * 8);
                free(values);
            }
        }
        for (int i = 0; i < 4; i++)
            free(first[i]);
        done(p.k);
    }
}

static void two_runs_give_the_same_bits(void **state) {
    (void)state;
    check_bits(NULL);
    check_bits(ATTENTION_SEGMENTS[3]);
}

/* A sequence that is one segment gives the bits of one without segments. */
static void one_segment_is_the_whole_sequence(void **state) {
    (void)state;
    static const int64_t lengths[SEGMENT_LENGTHS] = {65};
    for (int precision = DEVICE_FP32; precision <= DEVICE_BF16; precision++) {
        double *without[4];
        for (int segmented = 0; segmented < 2; segmented++) {
            struct attention_spec s = {1, 130, 2, 64, 2, true, true, 70, 0.125, segmented, 0, false};
            fixture_seed = 7;
            struct pass p =
                pass_of((enum device_precision)precision, &s, segmented ? lengths : NULL, NULL, NULL);
            struct operand out[] = {p.o, p.dq, p.dk, p.dv};
            run_pass(&p, &s);
            for (int i = 0; i < 4; i++) {
                double *values = values_on(&p.k->each[CUDA], out[i]);
                if (!segmented) {
                    without[i] = values;
                    continue;
                }
                assert_memory_equal(values, without[i], (size_t)tensor_count(out[i].on[CUDA]) * 8);
                free(values);
                free(without[i]);
            }
            done(p.k);
        }
    }
}

/* What there are no kernels for is refused by the plan. */
static void too_wide_is_refused(void **state) {
    (void)state;
    struct backends *k = backends(DEVICE_BF16);
    struct backend *b = &k->each[CUDA];
    struct op_spec s = {.kind = OP_ATTENTION, .attention = {1, 8, 1, 257, 1, true, false, 0, 1}};
    struct op_cost cost;
    struct error e = {0};
    assert_int_equal(b->k->plan(b->dev, &s, &cost, &e), -1);
    assert_int_equal(e.exit_code, EXIT_USER);
    assert_non_null(strstr(e.text, "257"));
    done(k);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(table_bf16),
        cmocka_unit_test(table_fp32),
        cmocka_unit_test(segmented_bf16),
        cmocka_unit_test(segmented_fp32),
        cmocka_unit_test(head_dims),
        cmocka_unit_test(extreme_scores),
        cmocka_unit_test(nan_reaches_what_depends_on_it),
        cmocka_unit_test(no_empty_tile_is_visited),
        cmocka_unit_test(two_runs_give_the_same_bits),
        cmocka_unit_test(one_segment_is_the_whole_sequence),
        cmocka_unit_test(too_wide_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

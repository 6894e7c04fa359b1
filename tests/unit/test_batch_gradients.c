/* What a batch brings beside its tokens, in double: segments, and targets of which some do not count.
 *  - Each segment of a packed batch has the loss and the gradients that it has alone, for every layer type,
 *    mask, window, P, position kind and collapse, causal or not; and nothing else of the batch has any
 *    influence on them.
 *  - Several passes with different numbers of targets are one step over all of their targets.
 *  - An evaluation says which targets have the largest logit. */
#define FIXTURE_THREADS 1 /* thousands of tiny passes: waking threads would take longer than the work */
#include "tests/lib/gradient_model.h"
#include "tests/lib/sample.h"
#include "tests/lib/segments.h"

#define COUNT(a) (sizeof(a) / sizeof *(a))

enum { B = 2, T = 12, N = B * T, VOCAB = GRADIENT_VOCAB };
static const int64_t LENGTHS[SEGMENT_LENGTHS] = {4, 1, 5, 2}, WHOLE[SEGMENT_LENGTHS] = {T, 5, 7},
                     SINGLE[SEGMENT_LENGTHS] = {1};
static const double ROUNDING = 1e-12; /* of the norm of all gradients, or of the loss */

static struct model_config base_config(void) {
    struct model_config c = gradient_config();
    c.max_position_embeddings = T;
    c.bias = true;
    c.tie_word_embeddings = false;
    return c;
}

static void open_model(struct model *m, const struct model_config *c, struct pass_shape shape) {
    fixture_model(m, c, shape);
    gradient_randomize(m);
}

/* A packed batch. */
struct packed {
    int32_t tokens[N], targets[N], segments[2 * N];
};

static struct packed packed_batch(const int64_t *lengths) {
    struct packed p;
    fixture_tokens(p.tokens, N, VOCAB, 1);
    fixture_tokens(p.targets, N, VOCAB, 2);
    fill_segments(lengths, B, T, p.segments);
    return p;
}

/* Call check for each segment: tokens [begin, end) of the batch. */
static void each_segment(const struct packed *p, void (*check)(void *context, int64_t begin, int64_t end),
                         void *context) {
    for (int64_t begin = 0, end; begin < N; begin = end) {
        end = begin - begin % T + p->segments[N + begin];
        check(context, begin, end);
    }
}

/* ---- each segment as alone ---- */

struct comparison {
    const char *name;
    const struct packed *batch;
    struct model *packed;
    const struct model_config *config;
    enum recompute recompute;
};

static void fail_comparison(const struct comparison *c, int64_t begin, const char *what, double error,
                            double norm) {
    const struct model_config *m = c->config;
    fail_msg(
        "%s: layer type %d, mask %d, P %d, windows %d and %d, position %d, rope %d, collapse %d, causal %d, "
        "recompute %d, segment from %d: %s: error %.3g, norm %.3g",
        c->name, m->layer_types[0], m->iha_mask, (int)m->num_pseudo_heads, (int)m->local_window,
        (int)m->iha_window, m->position_embedding, m->iha_rope, m->iha_collapse, m->causal, c->recompute,
        (int)begin, what, error, norm);
}

/* Gradients of both models. The first of the learned positions alone is the packed one's at `shift`. */
static void compare_gradients(const struct comparison *c, struct model *alone, int64_t begin, int64_t shift) {
    double whole = 0;
    for (int i = 0; i < alone->params.count; i++)
        for (int64_t j = 0; j < alone->params.list[i].count; j++)
            whole += pow(((double *)model_gradient(alone, i).data)[j], 2);
    for (int i = 0; i < alone->params.count; i++) {
        const double *want = model_gradient(alone, i).data, *got = model_gradient(c->packed, i).data;
        int64_t count = alone->params.list[i].count;
        if (i == alone->params.pos_embed) {
            got += shift * c->config->hidden_size;
            count -= shift * c->config->hidden_size;
        }
        double error = 0;
        for (int64_t j = 0; j < count; j++)
            error += pow(got[j] - want[j], 2);
        if (!(sqrt(error) <= ROUNDING * sqrt(whole)))
            fail_comparison(c, begin, alone->params.list[i].name, sqrt(error), sqrt(whole));
    }
}

/* The packed batch with the targets of one segment only, against that segment as a batch. shifted: learned
 * positions continue, so the segment alone is given the table from there. */
static void compare_segment(const struct comparison *c, int64_t begin, int64_t end, bool shifted) {
    struct model alone;
    struct packed one = *c->batch;
    int64_t length = end - begin, shift = shifted ? begin % T : 0, C = c->config->hidden_size;
    for (int64_t n = 0; n < N; n++)
        if (n < begin || n >= end)
            one.targets[n] = -1;
    open_model(&alone, c->config, (struct pass_shape){1, length, c->recompute, true, false, false, false});
    if (shift > 0) {
        double *table = model_param(&alone, alone.params.pos_embed).data;
        memmove(table, table + shift * C, (size_t)(length * C) * sizeof *table);
    }
    double want = fixture_loss(&alone, one.tokens + begin, one.targets + begin, 0.3);
    double got = fixture_batch_loss(c->packed, (struct batch){one.tokens, one.targets, one.segments}, 0.3);
    if (!(fabs(got - want) <= ROUNDING * want))
        fail_comparison(c, begin, "loss", fabs(got - want), want);
    compare_gradients(c, &alone, begin, shift);
    model_free(&alone);
}

static void compare_restarted(void *context, int64_t begin, int64_t end) {
    compare_segment(context, begin, end, false);
}

static void compare_continued(void *context, int64_t begin, int64_t end) {
    const struct comparison *c = context;
    compare_segment(c, begin, end, c->config->position_embedding == POSITION_LEARNED);
}

static void check_lengths(const struct model_config *config, const int64_t *lengths, bool restart) {
    if (!in_sample())
        return;
    static int number;
    struct model packed;
    struct packed batch = packed_batch(lengths);
    enum recompute recompute = (enum recompute)(number++ % (RECOMPUTE_FULL + 1));
    struct comparison c = {restart ? "restart" : "continue", &batch, &packed, config, recompute};
    open_model(&packed, config, (struct pass_shape){B, T, recompute, true, true, restart, false});
    each_segment(&batch, restart ? compare_restarted : compare_continued, &c);
    model_free(&packed);
}

static void check_config(const struct model_config *config, bool restart) {
    check_lengths(config, LENGTHS, restart);
}

/* Position kinds: virtual RoPE, token RoPE, learned, none. */
enum { POSITION_KINDS = 4 };
static void set_positions(struct model_config *c, int kind) {
    c->position_embedding = kind < 2 ? POSITION_ROPE : kind == 2 ? POSITION_LEARNED : POSITION_NONE;
    c->iha_rope = kind == 1 ? IHA_ROPE_TOKEN : IHA_ROPE_VIRTUAL;
}

/* Two layers of one type, so that what crosses an edge in the first reaches all of the second. */
static struct model_config two_layers(enum layer_type type, int positions) {
    struct model_config c = base_config();
    c.layer_types[0] = c.layer_types[1] = type;
    set_positions(&c, positions);
    return c;
}

static void mha_segments_are_as_alone(void **state) {
    (void)state;
    for (int positions = 0; positions < POSITION_KINDS; positions++)
        for (int restart = 0; restart < 2; restart++) {
            struct model_config c = two_layers(LAYER_MHA_GLOBAL, positions);
            check_config(&c, restart);
            c.causal = false;
            check_config(&c, restart);
            c = two_layers(LAYER_FOLDED_GLOBAL, positions);
            check_config(&c, restart);
            c = two_layers(LAYER_DIFF_GLOBAL, positions);
            check_config(&c, restart);
            c = two_layers(LAYER_MHA_LOCAL, positions);
            for (c.local_window = 1; c.local_window <= 5; c.local_window += 2)
                check_config(&c, restart);
        }
}

static void check_iha(struct model_config c, int collapse, int64_t P) {
    c.iha_collapse = (enum iha_collapse)collapse;
    c.num_pseudo_heads = P;
    for (int restart = 0; restart < 2; restart++)
        for (int mask = MASK_FLAT; mask <= MASK_TOKEN; mask++) {
            c.iha_mask = (enum iha_mask)mask;
            if (layer_is_local(c.layer_types[0]))
                for (c.iha_window = 1; c.iha_window <= 7; c.iha_window += 3)
                    check_config(&c, restart);
            else
                for (int causal = 0; causal < 2; causal++) {
                    c.causal = causal;
                    check_config(&c, restart);
                }
        }
}

static void iha_segments_are_as_alone(void **state) {
    (void)state;
    for (int positions = 0; positions < POSITION_KINDS; positions++)
        for (int collapse = COLLAPSE_FULL; collapse <= COLLAPSE_PER_HEAD; collapse++)
            for (int64_t P = 1; P <= 3; P++) {
                check_iha(two_layers(LAYER_IHA_GLOBAL, positions), collapse, P);
                check_iha(two_layers(LAYER_IHA_LOCAL, positions), collapse, P);
            }
}

static void layers_of_all_types_are_as_alone(void **state) {
    (void)state;
    struct model_config c = base_config();
    c.num_hidden_layers = 4;
    c.layer_types[2] = LAYER_IHA_GLOBAL;
    c.layer_types[3] = LAYER_MHA_LOCAL;
    for (int i = 0; i <= RECOMPUTE_FULL; i++)
        for (int restart = 0; restart < 2; restart++) {
            check_config(&c, restart);
            check_lengths(&c, WHOLE, restart);
            check_lengths(&c, SINGLE, restart);
        }
    c = two_layers(LAYER_IHA_GLOBAL, 0);
    c.causal = false;
    check_lengths(&c, WHOLE, true);
    check_lengths(&c, SINGLE, true);
}

/* ---- positions ---- */

/* The rows of one token in q or k of the first layer: [P,H,d]. */
static const double *rows_of(const struct model *m, tensor t, int64_t n) {
    return (const double *)t.data + n * m->specs[0].qkv_mix.pseudo * t.stride[1];
}

static void expect_same_rows(const struct model *a, int64_t n, const struct model *b, int64_t k) {
    const int64_t *shape = a->layers[0].q.shape;
    size_t bytes = (size_t)(a->specs[0].qkv_mix.pseudo * shape[2] * shape[3]) * sizeof(double);
    assert_memory_equal(rows_of(a, a->layers[0].q, n), rows_of(b, b->layers[0].q, k), bytes);
    assert_memory_equal(rows_of(a, a->layers[0].k, n), rows_of(b, b->layers[0].k, k), bytes);
}

/* What attention computes with RoPE does not depend on where a segment begins. The rotated queries and keys
 * do: restarted, they are those of a sequence that begins there; continued, those of the whole sequence. */
static void check_rotations(enum layer_type type, int positions) {
    struct model_config c = two_layers(type, positions);
    struct model whole, restarted, continued;
    struct packed p = packed_batch(LENGTHS);
    struct batch batch = {p.tokens, p.targets, p.segments};
    for (int64_t n = 0; n < N; n++)
        p.tokens[n] = 3; /* so that the position alone makes rows differ */
    open_model(&whole, &c, (struct pass_shape){B, T, RECOMPUTE_NONE, true, false, false, false});
    open_model(&restarted, &c, (struct pass_shape){B, T, RECOMPUTE_NONE, true, true, true, false});
    open_model(&continued, &c, (struct pass_shape){B, T, RECOMPUTE_NONE, true, true, false, false});
    fixture_batch_loss(&whole, batch, 1);
    fixture_batch_loss(&restarted, batch, 1);
    fixture_batch_loss(&continued, batch, 1);
    for (int64_t n = 0; n < N; n++) {
        expect_same_rows(&continued, n, &whole, n);
        expect_same_rows(&restarted, n, &whole, n % T - p.segments[n]);
    }
    assert_true(rows_of(&restarted, restarted.layers[0].q, T - 1)[0] !=
                rows_of(&continued, continued.layers[0].q, T - 1)[0]);
    model_free(&whole);
    model_free(&restarted);
    model_free(&continued);
}

static void positions_restart_or_continue(void **state) {
    (void)state;
    for (int positions = 0; positions < 3; positions++)
        check_rotations(LAYER_IHA_GLOBAL, positions);
    check_rotations(LAYER_MHA_LOCAL, 0);
}

/* ---- nothing crosses an edge ---- */

struct isolation {
    struct model *m;
    const struct packed *batch;
};

/* With other tokens in all other segments, the loss of this one has the same bits. */
static void check_isolated(void *context, int64_t begin, int64_t end) {
    const struct isolation *i = context;
    struct packed one = *i->batch;
    for (int64_t n = 0; n < N; n++)
        if (n < begin || n >= end)
            one.targets[n] = -1;
    struct batch batch = {one.tokens, one.targets, one.segments};
    double before = fixture_batch_loss(i->m, batch, 1);
    for (int64_t n = 0; n < N; n++)
        if (n < begin || n >= end)
            one.tokens[n] = (one.tokens[n] + 1) % VOCAB;
    assert_true(before > 0 && fixture_batch_loss(i->m, batch, 1) == before);
}

static void segments_do_not_depend_on_each_other(void **state) {
    (void)state;
    for (int causal = 0; causal < 2; causal++) {
        struct model m;
        struct packed batch = packed_batch(LENGTHS);
        struct model_config c = two_layers(LAYER_IHA_GLOBAL, 0);
        c.causal = causal;
        open_model(&m, &c, (struct pass_shape){B, T, RECOMPUTE_NONE, true, true, true, false});
        each_segment(&batch, check_isolated, &(struct isolation){&m, &batch});
        model_free(&m);
    }
}

/* ---- targets that do not count ---- */

enum { SEQUENCES = 6, ALL = SEQUENCES * T, MOST_PARAMS = 1 << 14 };

/* One optimizer step over all sequences, `batch` of them to a pass. */
static struct step_state train(int64_t batch, const int32_t *tokens, const int32_t *targets, double *values) {
    struct model m;
    struct step_state state;
    struct model_config c = base_config();
    open_model(&m, &c, (struct pass_shape){batch, T, RECOMPUTE_NONE, true, false, false, false});
    m.k->step_begin(m.dev, m.state, 0, 0.01);
    for (int64_t i = 0; i < SEQUENCES; i += batch)
        model_train_pass(&m, (struct batch){tokens + i * T, targets + i * T, NULL}, 1.0 / ALL,
                         (int)(i / batch), (int)(SEQUENCES / batch));
    model_update(&m, &(struct update_hyper){0.9, 0.95, 1e-8, 0.5, 0, ALL, 0});
    m.k->step_read(m.dev, m.state, &state);
    assert_true(m.params.elements < MOST_PARAMS);
    memcpy(values, m.values, (size_t)m.params.elements * sizeof *values);
    values[m.params.elements] = NAN;
    model_free(&m);
    return state;
}

/* The mean over the targets of one pass. */
static double mean_loss(const int32_t *tokens, const int32_t *targets, int64_t batch) {
    struct model m;
    struct model_config c = base_config();
    int count = 0;
    open_model(&m, &c, (struct pass_shape){batch, T, RECOMPUTE_NONE, false, false, false, false});
    for (int64_t n = 0; n < batch * T; n++)
        count += targets[n] >= 0;
    double loss = fixture_eval(&m, tokens, targets, 1) / count;
    model_free(&m);
    return loss;
}

static void passes_with_few_targets_are_one_step(void **state) {
    (void)state;
    static double want[MOST_PARAMS], got[MOST_PARAMS];
    int32_t tokens[ALL], targets[ALL];
    fixture_tokens(tokens, ALL, VOCAB, 3);
    fixture_tokens(targets, ALL, VOCAB, 4);
    int count = ALL;
    for (int64_t n = 0; n < ALL; n++) /* all of the first sequence, 1 in 2, 1 in 3, none, 1 in 5, 1 in 6 */
        if (n / T == 3 || n % (n / T + 1) != 0) {
            targets[n] = n % 2 ? -1 : -2;
            count--;
        }
    struct step_state one = train(SEQUENCES, tokens, targets, want);
    double mean = mean_loss(tokens, targets, SEQUENCES), mean_of_means = 0;
    for (int i = 0; i < SEQUENCES; i++)
        mean_of_means += i == 3 ? 0 : mean_loss(tokens + i * T, targets + i * T, 1) / (SEQUENCES - 1);
    assert_true(fabs(mean_of_means - mean) > 0.01 * mean); /* which is the well-known wrong figure */
    assert_true(fabs(one.loss - mean) <= ROUNDING * mean);
    assert_true(one.skip == STEP_APPLIED && one.targets == count);
    for (int64_t batch = 1; batch <= 3; batch++) {
        struct step_state several = train(batch, tokens, targets, got);
        assert_true(several.targets == one.targets);
        assert_true(fabs(several.loss - mean) <= ROUNDING * mean);
        assert_true(fabs(several.grad_norm - one.grad_norm) <= ROUNDING * one.grad_norm);
        for (int i = 0; !isnan(want[i]); i++)
            assert_true(fabs(got[i] - want[i]) <= 1e-9); /* of a step of 0.01 */
    }
}

static void a_step_without_targets_changes_nothing(void **state) {
    (void)state;
    struct model m;
    struct step_state before, after;
    struct model_config c = base_config();
    int32_t tokens[N], targets[N];
    static double values[MOST_PARAMS];
    fixture_tokens(tokens, N, VOCAB, 3);
    for (int n = 0; n < N; n++)
        targets[n] = -1 - n % 2;
    open_model(&m, &c, (struct pass_shape){B, T, RECOMPUTE_NONE, true, false, false, false});
    assert_true(m.params.elements < MOST_PARAMS);
    memcpy(values, m.values, (size_t)m.params.elements * sizeof *values);
    m.k->step_read(m.dev, m.state, &before);
    m.k->step_begin(m.dev, m.state, 0, 0.01);
    model_train_pass(&m, (struct batch){tokens, targets, NULL}, 1.0 / N, 0, 1);
    model_update(&m, &(struct update_hyper){0.9, 0.95, 1e-8, 0.5, 0, N, 0});
    m.k->step_read(m.dev, m.state, &after);
    assert_int_equal(after.skip, STEP_EMPTY);
    assert_true(after.targets == 0 && after.grad_norm == 0);
    assert_memory_equal(&after.history, &before.history, sizeof before.history);
    assert_memory_equal(values, m.values, (size_t)m.params.elements * sizeof *values);
    model_free(&m);
}

/* ---- which targets have the largest logit ---- */

/* The first of the largest logits of each row. */
static void argmax(struct model *m, int32_t *best) {
    double logits[N * VOCAB];
    struct linear_spec spec = {N, m->config.hidden_size, VOCAB};
    m->k->linear(m->dev, &spec, m->h, model_param(m, m->params.lm_head), tensor_none(),
                 tensor_of(logits, DTYPE_F64, N, VOCAB, 0, 0, 0));
    for (int n = 0; n < N; n++) {
        best[n] = 0;
        for (int v = 1; v < VOCAB; v++)
            if (logits[n * VOCAB + v] > logits[n * VOCAB + best[n]])
                best[n] = v;
    }
}

static void evaluation_says_which_targets_are_right(void **state) {
    (void)state;
    struct model m;
    struct model_config c = base_config();
    struct packed p = packed_batch(LENGTHS);
    struct batch batch = {p.tokens, p.targets, p.segments};
    int32_t best[N], correct[N], seen[3] = {0};
    open_model(&m, &c, (struct pass_shape){B, T, RECOMPUTE_NONE, false, true, true, false});
    double *head = model_param(&m, m.params.lm_head).data;
    for (int64_t i = 0; i < c.hidden_size; i++) /* ids 5, 6, ... have the logits of 0, 1, ... */
        for (int v = 5; v < VOCAB; v++)
            head[v * c.hidden_size + i] = head[(v - 5) * c.hidden_size + i];
    m.k->step_begin(m.dev, m.state, 0, 0);
    model_evaluate(&m, batch, 1, correct);
    argmax(&m, best);
    for (int n = 0; n < N; n++) /* right, one with the same logit that comes later, another, or none */
        p.targets[n] = n % 4 == 0 ? best[n] : n % 4 == 1 ? best[n] + 5 : n % 4 == 2 ? (best[n] + 1) % 5 : -1;
    memset(correct, 0x55, sizeof correct);
    model_evaluate(&m, batch, 1, correct);
    for (int n = 0; n < N; n++) {
        assert_int_equal(correct[n], p.targets[n] == best[n]);
        seen[n % 4 == 3 ? 2 : correct[n]]++;
    }
    assert_true(seen[0] == N / 2 && seen[1] == N / 4 && seen[2] == N / 4);
    model_evaluate(&m, batch, 1, NULL);
    model_free(&m);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(mha_segments_are_as_alone),
        cmocka_unit_test(iha_segments_are_as_alone),
        cmocka_unit_test(layers_of_all_types_are_as_alone),
        cmocka_unit_test(positions_restart_or_continue),
        cmocka_unit_test(segments_do_not_depend_on_each_other),
        cmocka_unit_test(passes_with_few_targets_are_one_step),
        cmocka_unit_test(a_step_without_targets_changes_nothing),
        cmocka_unit_test(evaluation_says_which_targets_are_right),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

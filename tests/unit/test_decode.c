/* Decoding with a cache gives the logits of a whole forward pass at every position: for every layer type,
 * mask, position rule and number of pseudo-heads, for every split into chunks, and after the ring caches have
 * wrapped. Also: conversations whose cache is kept against the same computed from the beginning, greedy decoding against recomputing the prefix, models that the decoder refuses, and the
 * distribution of sampled tokens. */
#define FIXTURE_THREADS 1
#include "tests/lib/sample.h"
#include "tests/lib/model_fixture.h"

#include "model/generate/chat.h"

enum { LAYERS = 6, VOCAB = 37, HIDDEN = 24, LENGTH = 40 };
static const double TOLERANCE = 1e-5; /* of the norm of the logits: two orders of summation in fp32 */

static struct model_config base_config(void) {
    return (struct model_config){
        .vocab_size = VOCAB,
        .hidden_size = HIDDEN,
        .num_hidden_layers = LAYERS,
        .num_attention_heads = 3,
        .head_dim = 8,
        .intermediate_size = 40,
        .max_position_embeddings = LENGTH,
        .rope_theta = 100,
        .rope_factor = 4,
        .rope_low_freq_factor = 1,
        .rope_high_freq_factor = 4,
        .rope_original_positions = 30,
        .norm_eps = 1e-5,
        .tie_word_embeddings = true,
        .causal = true,
        .layer_types = {LAYER_MHA_LOCAL, LAYER_IHA_LOCAL, LAYER_IHA_GLOBAL, LAYER_MHA_GLOBAL,
                        LAYER_FOLDED_GLOBAL, LAYER_FOLDED_LOCAL},
        .local_window = 5,
        .num_pseudo_heads = 2,
        .iha_window = 6,
    };
}

/* Weights far from their initial values, so that mixing, collapse and biases have an effect. */
static void fill_params(struct model *m, uint64_t seed) {
    for (int i = 0; i < m->params.count; i++) {
        const struct param *p = &m->params.list[i];
        float *values = malloc((size_t)p->count * sizeof *values);
        bool norm = strstr(p->name, "norm.weight") != NULL;
        for (int64_t j = 0; j < p->count; j++)
            values[j] = (float)((norm ? 1 : 0) + 0.4 * fixture_noise(&seed));
        model_set_param(m, i, values, 0);
        free(values);
    }
}

static void open_model(struct model *m, const struct model_config *config) {
    fixture_model(m, config, (struct pass_shape){1, LENGTH, RECOMPUTE_NONE, false, false, false, false});
    fill_params(m, 5);
}

static struct decoder open_decoder(struct model *m, int64_t chunk) {
    struct error e = {0};
    struct decoder d;
    if (decoder_create(&d, m, LENGTH, chunk, &e) != 0)
        fail_msg("%s", e.text);
    return d;
}

/* Logits [LENGTH, V] of one whole pass. */
static void full_logits(struct model *m, const int32_t *tokens, float *logits) {
    struct linear_spec spec = {LENGTH, HIDDEN, VOCAB};
    int32_t targets[LENGTH] = {0};
    model_upload(m, (struct batch){tokens, targets, NULL});
    model_forward(m);
    m->k->linear(m->dev, &spec, m->h, model_param(m, m->params.lm_head), tensor_none(),
                 tensor_of(logits, DTYPE_F32, LENGTH, VOCAB, 0, 0, 0));
}

/* ---- logits ---- */

static void compare(const struct decoder *d, const float *got, const float *all, const char *what) {
    const float *want = all + (d->position - 1) * VOCAB;
    double error = 0, norm = 0;
    for (int i = 0; i < VOCAB; i++) {
        error += ((double)got[i] - (double)want[i]) * ((double)got[i] - (double)want[i]);
        norm += (double)want[i] * (double)want[i];
    }
    if (!(sqrt(error) <= TOLERANCE * sqrt(norm)))
        fail_msg("%s, chunks of %d, position %d: error %.3g of %.3g", what, (int)d->chunk,
                 (int)d->position - 1, sqrt(error), sqrt(norm));
}

/* `offset` tokens first, then a chunk at a time, comparing after each. */
static void feed_from(struct decoder *d, int64_t offset, const int32_t *tokens, const float *all,
                      const char *what) {
    float logits[VOCAB];
    decoder_reset(d);
    for (int64_t n = offset; d->position < LENGTH; n = d->chunk) {
        if (n > LENGTH - d->position)
            n = LENGTH - d->position;
        if (n == 0)
            continue;
        decoder_feed(d, tokens + d->position, n, logits);
        compare(d, logits, all, what);
    }
}

static void check_chunk(struct model *m, int64_t chunk, const int32_t *tokens, const float *all,
                        const char *what) {
    float logits[VOCAB];
    struct decoder d = open_decoder(m, chunk);
    for (int64_t offset = 0; offset < d.chunk; offset++) /* so that every position ends a chunk */
        feed_from(&d, offset, tokens, all, what);
    decoder_reset(&d);
    decoder_feed(&d, tokens, LENGTH, logits); /* more than a chunk: split inside */
    compare(&d, logits, all, what);
    decoder_free(&d);
}

static void check_config(const struct model_config *config) {
    if (!in_sample())
        return;
    static const int64_t chunks[] = {1, 3, 7, 64};
    struct model m;
    int32_t tokens[LENGTH];
    float *all = calloc(LENGTH * VOCAB, sizeof *all);
    char what[160];
    snprintf(what, sizeof what, "P %d, mask %d, position %d, rope %d, windows %d and %d",
             (int)config->num_pseudo_heads, config->iha_mask, config->position_embedding, config->iha_rope,
             (int)config->local_window, (int)config->iha_window);
    fixture_tokens(tokens, LENGTH, VOCAB, 7);
    open_model(&m, config);
    full_logits(&m, tokens, all);
    for (int i = 0; i < 4; i++)
        check_chunk(&m, chunks[i], tokens, all, what);
    model_free(&m);
    free(all);
}

/* Pairs of heads, which the other models here cannot have. */
static void differential_layers(void **state) {
    (void)state;
    struct model_config c = base_config();
    c.num_attention_heads = 4;
    c.head_dim = 6;
    c.layer_types[0] = LAYER_DIFF_LOCAL;
    c.layer_types[1] = LAYER_DIFF_GLOBAL;
    for (int position = POSITION_ROPE; position <= POSITION_NONE; position++) {
        c.position_embedding = (enum position_embedding)position;
        c.num_hidden_layers =
            position == POSITION_ROPE ? LAYERS : 2; /* beside layers of other types, and alone */
        check_config(&c);
    }
}

/* Layer types that differ from MHA in attention alone, in one model. */
static void talking_and_simplicial_layers(void **state) {
    (void)state;
    struct model_config c = base_config();
    c.layer_types[0] = LAYER_TALKING_LOCAL;
    c.layer_types[1] = LAYER_TALKING_GLOBAL;
    c.layer_types[2] = LAYER_SIMPLICIAL_LOCAL;
    c.layer_types[3] = LAYER_SIMPLICIAL_GLOBAL;
    c.alpha_on = ALPHA_ON_V; /* of the folded layers after these */
    check_config(&c);
}

static const struct {
    enum position_embedding position;
    enum iha_rope rope;
} POSITIONS[] = {{POSITION_ROPE, IHA_ROPE_VIRTUAL},
                 {POSITION_ROPE, IHA_ROPE_TOKEN},
                 {POSITION_LEARNED, IHA_ROPE_VIRTUAL},
                 {POSITION_NONE, IHA_ROPE_VIRTUAL}};
static const struct {
    int64_t local, iha;
} WINDOWS[] = {{5, 6}, {1, 1}, {3, 8}, {2, 3}, {LENGTH + 9, 4 * LENGTH + 9}};

/* Every P, mask and position rule; the other options vary along with them. */
static void logits_equal_the_full_pass(void **state) {
    (void)state;
    int turn = 0;
    for (int64_t P = 1; P <= 4; P++)
        for (int mask = MASK_FLAT; mask <= MASK_TOKEN; mask++)
            for (int i = 0; i < 4; i++, turn++) {
                struct model_config c = base_config();
                c.num_pseudo_heads = P;
                c.iha_mask = (enum iha_mask)mask;
                c.position_embedding = POSITIONS[i].position;
                c.iha_rope = POSITIONS[i].rope;
                c.local_window = WINDOWS[turn % 5].local;
                c.iha_window = WINDOWS[turn % 5].iha;
                c.iha_collapse = turn % 3 ? COLLAPSE_FULL : COLLAPSE_PER_HEAD;
                c.activation = (enum activation)(turn % 3);
                c.norm = turn / 2 % 2 ? NORM_LAYERNORM : NORM_RMSNORM;
                c.bias = turn / 3 % 2;
                c.qkv_bias = turn / 4 % 2;
                if (turn % 4 == 3) { /* not of folded layers */
                    c.num_hidden_layers = 4;
                    c.num_key_value_heads = turn % 8 == 3 ? 1 : 3;
                    c.qk_norm = turn % 8 == 3 ? QK_NORM_NONE : QK_NORM_RMSNORM;
                }
                c.rope_scaling = i == 1 ? ROPE_SCALING_LLAMA3 : ROPE_SCALING_NONE;
                c.tie_word_embeddings = turn / 5 % 2;
                check_config(&c);
            }
}

/* The model's buffers and workspace are not touched: a pass gives the same before and after decoding. */
static void decoding_does_not_change_the_model(void **state) {
    (void)state;
    struct model_config c = base_config();
    struct model m;
    int32_t tokens[LENGTH];
    float before[LENGTH * VOCAB], after[LENGTH * VOCAB], logits[VOCAB];
    fixture_tokens(tokens, LENGTH, VOCAB, 9);
    open_model(&m, &c);
    full_logits(&m, tokens, before);
    struct decoder d = open_decoder(&m, 3);
    decoder_feed(&d, tokens, 10, logits);
    decoder_free(&d);
    full_logits(&m, tokens, after);
    assert_memory_equal(before, after, sizeof before);
    model_free(&m);
}

/* ---- generating ---- */

struct generated {
    int32_t tokens[LENGTH];
    int64_t length, stop_at;
};

static bool keep_token(void *context, int32_t token) {
    struct generated *s = context;
    s->tokens[s->length++] = token;
    return s->length < s->stop_at;
}

static int32_t argmax(const float *x, int64_t n) {
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
        best = x[i] > x[best] ? i : best;
    return (int32_t)best;
}

enum { PROMPT = 5 };

static struct generated generate_from_prompt(struct model *m, int64_t stop_at,
                                             const struct sampling *sampling) {
    struct error e = {0};
    struct generated s = {.length = PROMPT, .stop_at = stop_at};
    struct decoder d = open_decoder(m, 7);
    fixture_tokens(s.tokens, PROMPT, VOCAB, 3);
    assert_int_equal(generate(&d, s.tokens, PROMPT, LENGTH - PROMPT, sampling, keep_token, &s, &e), 0);
    decoder_free(&d);
    return s;
}

/* The same by whole passes: in a causal model, tokens after the prefix have no effect on it. */
static struct generated generate_by_recomputing(struct model *m) {
    struct generated s = {.length = PROMPT};
    float *logits = calloc(LENGTH * VOCAB, sizeof *logits);
    fixture_tokens(s.tokens, PROMPT, VOCAB, 3);
    for (; s.length < LENGTH; s.length++) {
        full_logits(m, s.tokens, logits);
        s.tokens[s.length] = argmax(logits + (s.length - 1) * VOCAB, VOCAB);
    }
    free(logits);
    return s;
}

static void greedy_equals_recomputing_the_prefix(void **state) {
    (void)state;
    for (int64_t P = 1; P <= 4; P++) {
        struct model_config c = base_config();
        struct model m;
        c.num_pseudo_heads = P;
        c.iha_mask = P % 2 ? MASK_FLAT : MASK_TOKEN;
        open_model(&m, &c);
        struct generated got = generate_from_prompt(&m, LENGTH, &(struct sampling){0, 0, 1, 1}),
                         want = generate_by_recomputing(&m);
        assert_int_equal(got.length, LENGTH);
        assert_memory_equal(got.tokens, want.tokens, sizeof want.tokens);
        model_free(&m);
    }
}

static void sampling_is_a_function_of_the_seed(void **state) {
    (void)state;
    struct model_config c = base_config();
    struct model m;
    open_model(&m, &c);
    struct generated a = generate_from_prompt(&m, LENGTH, &(struct sampling){1, 0, 1, 1});
    struct generated b = generate_from_prompt(&m, LENGTH, &(struct sampling){1, 0, 1, 1});
    struct generated other = generate_from_prompt(&m, LENGTH, &(struct sampling){1, 0, 1, 2});
    assert_memory_equal(a.tokens, b.tokens, sizeof a.tokens);
    assert_memory_not_equal(a.tokens, other.tokens, sizeof a.tokens);
    model_free(&m);
}

static void emit_can_stop_generation(void **state) {
    (void)state;
    struct model_config c = base_config();
    struct model m;
    open_model(&m, &c);
    assert_int_equal(generate_from_prompt(&m, PROMPT + 4, &(struct sampling){1, 0, 1, 1}).length, PROMPT + 4);
    model_free(&m);
}

/* ---- models the decoder refuses ---- */

static void check_refused(const struct model_config *c, int64_t capacity, const char *expected) {
    struct model m;
    struct decoder d;
    struct error e = {0};
    open_model(&m, c);
    assert_int_equal(decoder_create(&d, &m, capacity, 8, &e), -1);
    assert_int_equal(e.exit_code, EXIT_USER);
    if (!strstr(e.text, expected))
        fail_msg("\"%s\" does not say \"%s\"", e.text, expected);
    model_free(&m);
}

static void unsupported_models_are_refused(void **state) {
    (void)state;
    struct model_config c = base_config();
    c.causal = false;
    for (int i = 0; i < LAYERS; i++)
        c.layer_types[i] = LAYER_IHA_GLOBAL;
    check_refused(&c, 8, "not causal");
    c = base_config();
    c.position_embedding = POSITION_LEARNED;
    check_refused(&c, LENGTH + 1, "learned positions");
    struct model m;
    open_model(&m, &c);
    struct decoder d = open_decoder(&m, 8); /* exactly as many as there are */
    decoder_free(&d);
    model_free(&m);
}

/* ---- one draw ---- */

enum { CHOICES = 8, DRAWS = 20000 };
static const float LOGITS[CHOICES] = {0.3f, -1, 2.5f, 1.1f, 0, 2, -0.4f, 1.7f};

/* How often each token is drawn. */
static void draw(const struct sampling *s, int counts[CHOICES]) {
    uint64_t state = s->seed;
    memset(counts, 0, CHOICES * sizeof *counts);
    for (int i = 0; i < DRAWS; i++) {
        float logits[CHOICES];
        memcpy(logits, LOGITS, sizeof logits);
        int32_t token = sample_token(logits, CHOICES, s, &state);
        assert_in_range(token, 0, CHOICES - 1);
        counts[token]++;
    }
}

/* Softmax over the tokens in `allowed`, by the chi-squared statistic; 40 is beyond 1e-5 for 7 degrees. */
static void check_frequencies(const struct sampling *s, const bool allowed[CHOICES]) {
    int counts[CHOICES];
    double total = 0, chi = 0;
    draw(s, counts);
    for (int i = 0; i < CHOICES; i++)
        total += allowed[i] ? exp((double)LOGITS[i] / s->temperature) : 0;
    for (int i = 0; i < CHOICES; i++) {
        double expected = DRAWS * exp((double)LOGITS[i] / s->temperature) / total;
        if (allowed[i])
            chi += (counts[i] - expected) * (counts[i] - expected) / expected;
        else
            assert_int_equal(counts[i], 0);
    }
    if (!(chi < 40))
        fail_msg("temperature %g, top_k %d: chi-squared %.1f", s->temperature, (int)s->top_k, chi);
}

static void zero_temperature_is_argmax(void **state) {
    (void)state;
    int counts[CHOICES];
    draw(&(struct sampling){0, 0, 1, 42}, counts);
    assert_int_equal(counts[2], DRAWS);
    draw(&(struct sampling){0, 3, 1, 42}, counts);
    assert_int_equal(counts[2], DRAWS);
}

static void frequencies_follow_softmax(void **state) {
    (void)state;
    static const bool all[CHOICES] = {1, 1, 1, 1, 1, 1, 1, 1};
    check_frequencies(&(struct sampling){1, 0, 1, 42}, all);
    check_frequencies(&(struct sampling){0.7, 0, 1, 43}, all);
    check_frequencies(&(struct sampling){2.5, CHOICES, 1, 44}, all);
    check_frequencies(&(struct sampling){2.5, CHOICES + 5, 1, 45}, all);
}

static void top_k_keeps_the_k_largest(void **state) {
    (void)state;
    static const bool one[CHOICES] = {[2] = 1}, three[CHOICES] = {[2] = 1, [5] = 1, [7] = 1};
    static const bool seven[CHOICES] = {1, 0, 1, 1, 1, 1, 1, 1};
    check_frequencies(&(struct sampling){1, 1, 1, 42}, one);
    check_frequencies(&(struct sampling){1.5, 3, 1, 42}, three);
    check_frequencies(&(struct sampling){1, 7, 1, 42}, seven);
}

static void top_p_keeps_the_fewest_that_suffice(void **state) {
    (void)state;
    /* In descending order: tokens 2, 5, 7, 3, 0, 4, 6, 1, of probabilities 0.413, 0.250, 0.186, 0.102, ... */
    static const bool one[CHOICES] = {[2] = 1}, two[CHOICES] = {[2] = 1, [5] = 1};
    static const bool three[CHOICES] = {[2] = 1, [5] = 1, [7] = 1}, all[CHOICES] = {1, 1, 1, 1, 1, 1, 1, 1};
    double sum = 0, first = exp((double)LOGITS[2]), second = exp((double)LOGITS[5]);
    for (int i = 0; i < CHOICES; i++)
        sum += exp((double)LOGITS[i]);
    check_frequencies(&(struct sampling){1, 0, 0, 42}, one);
    check_frequencies(&(struct sampling){1, 0, 0.999 * first / sum, 43}, one);
    check_frequencies(&(struct sampling){1, 0, 1.001 * first / sum, 44}, two);
    check_frequencies(&(struct sampling){1, 0, 0.999 * (first + second) / sum, 45}, two);
    check_frequencies(&(struct sampling){1, 0, 1.001 * (first + second) / sum, 46}, three);
    check_frequencies(&(struct sampling){1, 0, 1 - 1e-9, 47}, all);
    /* After temperature, and among the k most likely. */
    check_frequencies(&(struct sampling){0.1, 0, 0.9, 48}, one);
    check_frequencies(&(struct sampling){1, 2, 0.999 * first / (first + second), 49}, one);
    check_frequencies(&(struct sampling){1, 2, 1.001 * first / (first + second), 50}, two);
}

/* Of equal ones those of the smallest ids, as many as suffice. */
static void top_p_with_equal_logits(void **state) {
    (void)state;
    uint64_t random = 1;
    int counts[CHOICES] = {0};
    for (int i = 0; i < DRAWS; i++) {
        float logits[CHOICES] = {-9, 1, 1, 1, 1, -9, -9, -9};
        counts[sample_token(logits, CHOICES, &(struct sampling){1, 0, 0.45, 0}, &random)]++;
    }
    assert_in_range(counts[1], DRAWS * 0.47, DRAWS * 0.53);
    assert_int_equal(counts[1] + counts[2], DRAWS);
}

/* ---- conversations ---- */

/* Turns of three tokens. Every token of `ends` ends an answer; what is fed or sampled goes to history. */
struct script {
    int turns, turn;
    bool ends[VOCAB];
    int32_t history[2 * LENGTH];
    bool sampled[2 * LENGTH];
    int length;
    int ended, cut; /* answers */
};

static void note(struct script *s, int32_t token, bool sampled) {
    assert_true(s->length < 2 * LENGTH);
    s->history[s->length] = token;
    s->sampled[s->length++] = sampled;
}

static int64_t script_next(void *context, enum chat_state state, int32_t **tokens, struct error *e) {
    struct script *s = context;
    (void)e;
    s->ended += state == CHAT_ENDED;
    s->cut += state == CHAT_CUT;
    assert_true((state == CHAT_FIRST) == (s->turn == 0));
    if (s->turn == s->turns)
        return 0;
    int64_t count = state == CHAT_ENDED ? 4 : 3;
    *tokens = malloc((size_t)count * sizeof **tokens);
    if (state == CHAT_ENDED) /* noted when it was sampled */
        **tokens = s->history[s->length - 1];
    for (int64_t i = count - 3; i < count; i++) {
        (*tokens)[i] = (int32_t)((7 * s->turn + 3 * i) % VOCAB);
        note(s, (*tokens)[i], false);
    }
    s->turn++;
    return count;
}

static bool script_is_end(void *context, int32_t token) {
    struct script *s = context;
    note(s, token, true);
    return s->ends[token];
}

static bool script_emit(void *context, int32_t token) {
    (void)context;
    (void)token;
    return true;
}

static void script_answered(void *context) {
    (void)context;
}

/* Every sampled token is the most likely one after all that precedes it, computed anew. */
static void check_history(struct model *m, const struct script *s) {
    struct decoder d = open_decoder(m, 7);
    float logits[VOCAB];
    for (int i = 1; i < s->length; i++) {
        if (!s->sampled[i])
            continue;
        int best = 0;
        decoder_reset(&d);
        decoder_feed(&d, s->history, i, logits);
        for (int k = 1; k < VOCAB; k++)
            best = logits[k] > logits[best] ? k : best;
        if (best != s->history[i])
            fail_msg("token %d of the conversation is %d, and computed from its beginning %d", i,
                     s->history[i], best);
    }
    decoder_free(&d);
}

static int run_script(struct model *m, struct script *s, int64_t limit, struct error *e) {
    struct decoder d = open_decoder(m, 7);
    struct chat_hooks hooks = {s, script_next, script_is_end, script_emit, script_answered};
    struct sampling greedy = {0, 0, 1, 1};
    int status = chat(&d, &hooks, limit, &greedy, e);
    /* Each token was computed once; the last one is not fed. */
    assert_int_equal(d.position, s->length - (s->sampled[s->length - 1] ? 1 : 0));
    decoder_free(&d);
    return status;
}

static void test_conversation(void **state) {
    (void)state;
    struct model_config config = base_config();
    struct model m;
    struct error e = {0};
    open_model(&m, &config);
    struct script cut = {.turns = 4};
    assert_int_equal(run_script(&m, &cut, 4, &e), 0);
    assert_true(cut.cut == 4 && cut.length == 4 * 7);
    check_history(&m, &cut);
    struct script some = {.turns = 4};
    for (int i = 0; i < 4; i++) /* the second token of two answers */
        some.ends[cut.history[7 * (i % 2) + 4]] = true;
    assert_int_equal(run_script(&m, &some, 4, &e), 0);
    assert_true(some.ended > 0 && some.ended + some.cut == 4);
    check_history(&m, &some);
    struct script full = {.turns = 100};
    assert_int_equal(run_script(&m, &full, 4, &e), -1);
    assert_true(e.exit_code == EXIT_RUN && strstr(e.text, "filled the model's context of 40 tokens"));
    check_history(&m, &full);
    model_free(&m);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_conversation),
        cmocka_unit_test(logits_equal_the_full_pass),
        cmocka_unit_test(differential_layers),
        cmocka_unit_test(talking_and_simplicial_layers),
        cmocka_unit_test(decoding_does_not_change_the_model),
        cmocka_unit_test(greedy_equals_recomputing_the_prefix),
        cmocka_unit_test(sampling_is_a_function_of_the_seed),
        cmocka_unit_test(emit_can_stop_generation),
        cmocka_unit_test(unsupported_models_are_refused),
        cmocka_unit_test(zero_temperature_is_argmax),
        cmocka_unit_test(frequencies_follow_softmax),
        cmocka_unit_test(top_k_keeps_the_k_largest),
        cmocka_unit_test(top_p_keeps_the_fewest_that_suffice),
        cmocka_unit_test(top_p_with_equal_logits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

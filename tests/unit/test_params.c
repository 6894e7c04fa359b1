/* Parameters with their names, shapes and initial values; memory, which must be allocated and used
 * exactly as planned. */
#include "tests/lib/model_configs.h"
#include "tests/lib/model_fixture.h"

#define COUNT(a) (sizeof(a) / sizeof *(a))

/* ---- parameters ---- */

static struct params list_params(const struct model_config *c) {
    struct params p;
    struct error e = {0};
    assert_int_equal(params_create(&p, c, 1, &e), 0);
    return p;
}

static const struct param *find(const struct params *p, const char *name) {
    for (int i = 0; i < p->count; i++)
        if (strcmp(p->list[i].name, name) == 0)
            return &p->list[i];
    fail_msg("no parameter %s", name);
    return NULL;
}

struct named_shape {
    const char *name, *shape;
};

static void check_shapes(const struct model_config *c, const struct named_shape *expected, size_t count) {
    struct params p = list_params(c);
    int64_t num_params = 0;
    for (size_t i = 0; i < count; i++) {
        char shape[64];
        const struct param *t = find(&p, expected[i].name);
        param_shape_text(t, shape, sizeof shape);
        if (strcmp(shape, expected[i].shape) != 0)
            fail_msg("%s is %s, not %s", t->name, shape, expected[i].shape);
        num_params += t->count;
    }
    assert_int_equal(p.count, count);
    assert_int_equal(p.num_params, num_params);
    params_free(&p);
}

static struct model_config small_config(void) {
    struct model_config c = other_config();
    c.hidden_size = 10;
    c.num_hidden_layers = 2;
    c.head_dim = 4;
    c.intermediate_size = 20;
    c.num_pseudo_heads = 2;
    c.iha_collapse = COLLAPSE_FULL;
    return c;
}

static void names_and_shapes(void **state) {
    (void)state;
    static const struct named_shape expected[] = {
        {"embed.weight", "[31, 10]"},
        {"pos_embed.weight", "[24, 10]"},
        {"layers.0.attn_norm.weight", "[10]"},
        {"layers.0.attn_norm.bias", "[10]"},
        {"layers.0.attn.qkv.weight", "[36, 10]"},
        {"layers.0.attn.qkv.bias", "[36]"},
        {"layers.0.attn.alpha_q", "[2, 3, 3]"},
        {"layers.0.attn.alpha_k", "[2, 3, 3]"},
        {"layers.0.attn.alpha_v", "[2, 3, 3]"},
        {"layers.0.attn.collapse", "[3, 2, 3]"},
        {"layers.0.attn.out.weight", "[10, 12]"},
        {"layers.0.attn.out.bias", "[10]"},
        {"layers.0.mlp_norm.weight", "[10]"},
        {"layers.0.mlp_norm.bias", "[10]"},
        {"layers.0.mlp.up.weight", "[20, 10]"},
        {"layers.0.mlp.up.bias", "[20]"},
        {"layers.0.mlp.gate.weight", "[20, 10]"},
        {"layers.0.mlp.down.weight", "[10, 20]"},
        {"layers.0.mlp.down.bias", "[10]"},
        {"layers.1.attn_norm.weight", "[10]"},
        {"layers.1.attn_norm.bias", "[10]"},
        {"layers.1.attn.qkv.weight", "[36, 10]"},
        {"layers.1.attn.qkv.bias", "[36]"},
        {"layers.1.attn.out.weight", "[10, 12]"},
        {"layers.1.attn.out.bias", "[10]"},
        {"layers.1.mlp_norm.weight", "[10]"},
        {"layers.1.mlp_norm.bias", "[10]"},
        {"layers.1.mlp.up.weight", "[20, 10]"},
        {"layers.1.mlp.up.bias", "[20]"},
        {"layers.1.mlp.gate.weight", "[20, 10]"},
        {"layers.1.mlp.down.weight", "[10, 20]"},
        {"layers.1.mlp.down.bias", "[10]"},
        {"final_norm.weight", "[10]"},
        {"final_norm.bias", "[10]"},
        {"lm_head.weight", "[31, 10]"},
    };
    struct model_config c = small_config();
    check_shapes(&c, expected, COUNT(expected));
}

/* rmsnorm has no bias even where the projections have; a per-head collapse is [H,P]. */
static void names_and_shapes_of_a_tied_rmsnorm_model(void **state) {
    (void)state;
    static const struct named_shape expected[] = {
        {"embed.weight", "[31, 10]"},
        {"layers.0.attn_norm.weight", "[10]"},
        {"layers.0.attn.qkv.weight", "[36, 10]"},
        {"layers.0.attn.qkv.bias", "[36]"},
        {"layers.0.attn.alpha_q", "[2, 3, 3]"},
        {"layers.0.attn.alpha_k", "[2, 3, 3]"},
        {"layers.0.attn.alpha_v", "[2, 3, 3]"},
        {"layers.0.attn.collapse", "[3, 2]"},
        {"layers.0.attn.out.weight", "[10, 12]"},
        {"layers.0.attn.out.bias", "[10]"},
        {"layers.0.mlp_norm.weight", "[10]"},
        {"layers.0.mlp.up.weight", "[20, 10]"},
        {"layers.0.mlp.up.bias", "[20]"},
        {"layers.0.mlp.down.weight", "[10, 20]"},
        {"layers.0.mlp.down.bias", "[10]"},
        {"final_norm.weight", "[10]"},
    };
    struct model_config c = small_config();
    c.num_hidden_layers = 1;
    c.norm = NORM_RMSNORM;
    c.activation = ACTIVATION_GELU_TANH;
    c.position_embedding = POSITION_ROPE;
    c.tie_word_embeddings = true;
    c.iha_collapse = COLLAPSE_PER_HEAD;
    check_shapes(&c, expected, COUNT(expected));
}

/* Units cover the buffer in order, and every parameter is within its unit. */
static void every_parameter_is_within_its_unit(void **state) {
    (void)state;
    struct model_config configs[] = {plain_config(), other_config()};
    for (size_t i = 0; i < COUNT(configs); i++) {
        struct params p = list_params(&configs[i]);
        assert_int_equal(p.unit_count, configs[i].num_hidden_layers + 2);
        assert_int_equal(p.unit_offset[0], 0);
        assert_int_equal(p.unit_offset[p.unit_count], p.elements);
        for (int j = 0; j < p.count; j++) {
            const struct param *t = &p.list[j];
            assert_true(t->offset >= p.unit_offset[t->unit]);
            assert_true(t->offset + t->count <= p.unit_offset[t->unit + 1]);
            assert_true(t->layer < 0 ? t->unit == 0 || t->unit == p.unit_count - 1 : t->unit == t->layer + 1);
        }
        params_free(&p);
    }
}

/* Stochastic rounding hashes rounding_index, so it must not change: with the number of ranks, with padded rows, or
 * from one version of this program to the next. It was the offset when tables had no padded rows. */
static void rounding_indices_are_offsets_without_ranks_and_padded_rows(void **state) {
    (void)state;
    struct model_config configs[] = {plain_config(), other_config(), small_config()};
    for (size_t i = 0; i < COUNT(configs); i++)
        for (int ranks = 1; ranks <= 8; ranks++) {
            struct params p;
            struct error e = {0};
            int64_t index = 0;
            assert_int_equal(params_create(&p, &configs[i], ranks, &e), 0);
            for (int j = 0; j < p.count; j++) {
                assert_int_equal(p.list[j].rounding_index, index);
                index += (p.list[j].count + 63) / 64 * 64;
            }
            params_free(&p);
        }
}

/* Only the table that the classifier multiplies by is padded, and nothing lies in its padding. */
static void the_classifiers_table_is_padded(void **state) {
    (void)state;
    static const int64_t vocabularies[][2] = {{1, 128},   {128, 128}, {129, 256},
                                              {259, 384}, {300, 384}, {512, 512}};
    for (size_t i = 0; i < 2 * COUNT(vocabularies); i++) {
        struct model_config c = plain_config();
        c.vocab_size = vocabularies[i / 2][0];
        c.tie_word_embeddings = i % 2;
        struct params p = list_params(&c);
        for (int j = 0; j < p.count; j++) {
            const struct param *t = &p.list[j];
            int64_t end = t->offset + t->padded_rows * (t->count / t->shape[0]);
            assert_int_equal(t->padded_rows, j == p.lm_head ? vocabularies[i / 2][1] : t->shape[0]);
            assert_true(end <= (j + 1 < p.count ? p.list[j + 1].offset : p.elements));
        }
        params_free(&p);
    }
}

/* Initial values of one tensor; the caller frees them. */
static float *initial(const struct model_config *c, const char *name, uint64_t seed, int64_t *count) {
    struct params p = list_params(c);
    const struct param *t = find(&p, name);
    float *values = malloc((size_t)t->count * sizeof *values);
    params_initial(t, c, seed, values);
    *count = t->count;
    params_free(&p);
    return values;
}

/* Mean and deviation, within five standard errors of each. */
static void check_normal(const struct model_config *c, const char *name, double deviation) {
    int64_t n;
    float *x = initial(c, name, 1, &n);
    double mean = 0, square = 0;
    for (int64_t i = 0; i < n; i++)
        mean += (double)x[i] / (double)n;
    for (int64_t i = 0; i < n; i++)
        square += ((double)x[i] - mean) * ((double)x[i] - mean) / (double)n;
    if (!(fabs(mean) < 5 * deviation / sqrt((double)n) &&
          fabs(sqrt(square) / deviation - 1) < 5 / sqrt(2 * (double)n)))
        fail_msg("%s: mean %.3g, deviation %.4g, not %.4g", name, mean, sqrt(square), deviation);
    free(x);
}

static void check_constant(const struct model_config *c, const char *name, float value) {
    int64_t n;
    float *x = initial(c, name, 1, &n);
    for (int64_t i = 0; i < n; i++)
        assert_true(x[i] == value);
    free(x);
}

static void matrices_are_initially_normal(void **state) {
    (void)state;
    struct model_config c = other_config();
    double output = 0.02 / sqrt(8); /* four layers */
    check_normal(&c, "embed.weight", 0.02);
    check_normal(&c, "pos_embed.weight", 0.02);
    check_normal(&c, "lm_head.weight", 0.02);
    check_normal(&c, "layers.0.attn.qkv.weight", 0.02);
    check_normal(&c, "layers.3.mlp.up.weight", 0.02);
    check_normal(&c, "layers.3.mlp.gate.weight", 0.02);
    check_normal(&c, "layers.0.attn.out.weight", output);
    check_normal(&c, "layers.3.mlp.down.weight", output);
    check_constant(&c, "layers.1.attn_norm.weight", 1);
    check_constant(&c, "final_norm.weight", 1);
    check_constant(&c, "final_norm.bias", 0);
    check_constant(&c, "layers.2.mlp.down.bias", 0);
}

/* alpha[p,h,m] is 1 where h = m; with noise, near it. */
static void check_alpha(const struct model_config *c, const char *name) {
    int64_t n, H = c->num_attention_heads;
    float *x = initial(c, name, 1, &n);
    bool noisy = false;
    for (int64_t i = 0; i < n; i++) {
        double off = (double)x[i] - (i / H % H == i % H);
        assert_true(fabs(off) < (c->init_alpha == ALPHA_NOISE ? 0.1 : 1e-30));
        noisy |= off != 0;
    }
    assert_true(noisy == (c->init_alpha == ALPHA_NOISE));
    free(x);
}

/* R[h,p,g]: the last pseudo-head, or the mean of all, of the head itself. */
static void check_collapse(const struct model_config *c) {
    int64_t n, P = c->num_pseudo_heads, H = c->num_attention_heads;
    int64_t G = c->iha_collapse == COLLAPSE_FULL ? H : 1;
    float *x = initial(c, "layers.0.attn.collapse", 1, &n);
    for (int64_t i = 0; i < n; i++) {
        int64_t g = i % G, p = i / G % P, h = i / G / P;
        float weight = c->init_collapse == COLLAPSE_MEAN ? 1 / (float)P : p == P - 1;
        assert_true(x[i] == (G == 1 || g == h ? weight : 0));
    }
    free(x);
}

static void mixing_is_initially_the_identity(void **state) {
    (void)state;
    for (int how = 0; how < 4; how++) {
        struct model_config c = small_config();
        c.num_pseudo_heads = 3;
        c.init_alpha = how & 1 ? ALPHA_NOISE : ALPHA_IDENTITY;
        c.init_collapse = how & 1 ? COLLAPSE_MEAN : COLLAPSE_LAST;
        c.iha_collapse = how & 2 ? COLLAPSE_PER_HEAD : COLLAPSE_FULL;
        check_alpha(&c, "layers.0.attn.alpha_q");
        check_alpha(&c, "layers.0.attn.alpha_k");
        check_alpha(&c, "layers.0.attn.alpha_v");
        check_collapse(&c);
    }
}

static void noise_of_alpha_has_its_deviation(void **state) {
    (void)state;
    struct model_config c = small_config();
    c.init_alpha = ALPHA_NOISE;
    int64_t n, H = c.num_attention_heads, count = 0;
    double sum = 0, squares = 0;
    for (uint64_t seed = 1; seed <= 4000; seed++) {
        float *x = initial(&c, "layers.0.attn.alpha_k", seed, &n);
        for (int64_t i = 0; i < n; i++) {
            double off = (double)x[i] - (i / H % H == i % H);
            sum += off;
            squares += off * off;
        }
        count += n;
        free(x);
    }
    /* The sample's own deviations: s/sqrt(n) of the mean, s/sqrt(2n) of s. */
    assert_true(fabs(sum / (double)count) < 5 * 0.02 / sqrt((double)count));
    assert_true(fabs(sqrt(squares / (double)count) - 0.02) < 5 * 0.02 / sqrt(2 * (double)count));
}

static void initial_values_depend_on_seed_and_name_only(void **state) {
    (void)state;
    struct model_config c = plain_config(), deeper = c;
    deeper.norm = NORM_LAYERNORM;
    deeper.bias = true;
    int64_t n;
    float *a = initial(&c, "layers.0.mlp.up.weight", 1, &n),
          *b = initial(&c, "layers.0.mlp.up.weight", 1, &n);
    float *moved = initial(&deeper, "layers.0.mlp.up.weight", 1, &n);
    float *seed = initial(&c, "layers.0.mlp.up.weight", 2, &n);
    float *layer = initial(&c, "layers.1.mlp.up.weight", 1, &n);
    size_t bytes = (size_t)n * sizeof *a;
    assert_memory_equal(a, b, bytes);
    assert_memory_equal(a, moved, bytes); /* whatever the offset in the buffer */
    assert_memory_not_equal(a, seed, bytes);
    assert_memory_not_equal(a, layer, bytes);
    float *all[] = {a, b, moved, seed, layer};
    for (size_t i = 0; i < COUNT(all); i++)
        free(all[i]);
}

/* ---- memory ---- */

static size_t allocated[16];
static int allocation_count;

/* From the heap, of the exact size, so that a sanitizer finds a write past its end. */
static void *counting_alloc(struct device *dev, size_t bytes, struct error *e) {
    (void)dev;
    (void)e;
    assert_true(allocation_count < (int)COUNT(allocated));
    allocated[allocation_count++] = bytes;
    void *data = NULL;
    assert_int_equal(posix_memalign(&data, 64, bytes + !bytes), 0); /* aligned_alloc needs multiples of 64 */
    return memset(data, 0, bytes);
}

static void counting_release(struct device *dev, void *data) {
    (void)dev;
    free(data);
}

/* Remove one allocation of this size from the list. */
static void expect_allocated(size_t bytes) {
    for (int i = 0; i < allocation_count; i++)
        if (allocated[i] == bytes) {
            allocated[i] = allocated[--allocation_count];
            return;
        }
    fail_msg("%zu bytes are planned but not allocated", bytes);
}

/* The model allocates exactly what is planned, and runs a step in it. */
static struct memory_plan check_memory(const struct model_config *c, struct pass_shape shape) {
    struct memory_plan plan;
    struct error e = {0};
    struct model m;
    struct kernels counting = *kernels_cpu();
    struct model_options options = {.shape = shape, .weight_decay = 0.1, .mix_lr_scale = 1};
    int32_t tokens[ROWS], targets[ROWS];
    counting.alloc = counting_alloc;
    counting.release = counting_release;
    fixture_tokens(tokens, ROWS, VOCAB, 1);
    fixture_tokens(targets, ROWS, VOCAB, 2);
    allocation_count = 0;
    assert_int_equal(model_memory(c, &counting, fixture_device(), &shape, 1, 0, DTYPE_F32, &plan, &e), 0);
    assert_int_equal(allocation_count, 0);
    assert_int_equal(model_create(&m, c, &counting, fixture_device(), &options, &e), 0);
    model_initialize(&m, 1, &e);
    if (shape.training) {
        fixture_loss(&m, tokens, targets, 0.01);
        model_update(&m, &(struct update_hyper){0.9, 0.95, 1e-8, 1, 0, 100, 0});
    } else
        fixture_eval(&m, tokens, targets, 0.01);
    size_t planned[] = {plan.parameters,  plan.gradients, plan.optimizer,
                        plan.activations, plan.workspace, sizeof(struct step_state)};
    for (size_t i = 0; i < COUNT(planned); i++)
        if (planned[i] > 0)
            expect_allocated(planned[i]);
    assert_int_equal(allocation_count, 0);
    model_free(&m);
    return plan;
}

static void memory_matches_the_plan(void **state) {
    (void)state;
    struct model_config configs[] = {plain_config(), other_config()};
    for (size_t i = 0; i < COUNT(configs); i++) {
        struct pass_shape shape = {BATCH, TOKENS, RECOMPUTE_NONE, true, false, false, false};
        struct memory_plan none = check_memory(&configs[i], shape);
        shape.recompute = RECOMPUTE_LIGHT;
        struct memory_plan light = check_memory(&configs[i], shape);
        shape.recompute = RECOMPUTE_FULL;
        struct memory_plan full = check_memory(&configs[i], shape);
        shape.training = false;
        struct memory_plan evaluation = check_memory(&configs[i], shape);
        assert_true(none.activations > light.activations && light.activations > full.activations);
        assert_true(full.activations > evaluation.activations);
        assert_int_equal(evaluation.gradients + evaluation.optimizer, 0);
    }
}

/* By hand: every tensor rounded up to 64 elements; two moments; the master weights are the parameters. */
static void memory_of_a_small_model(void **state) {
    (void)state;
    struct model_config c = counted_config(LAYER_IHA_LOCAL); /* no positions: RoPE's table is no parameter */
    c.tie_word_embeddings = true;
    /* embed 80, as 128 rows of 8, norms 8, qkv 192, alphas 8 each, collapse 8, out 64, up and down 128 */
    int64_t elements = 1024 + 64 + 192 + 3 * 64 + 64 + 64 + 64 + 128 + 128 + 64;
    struct pass_shape shape = {2, 4, RECOMPUTE_NONE, true, false, false, false};
    struct memory_plan plan;
    struct error e = {0};
    c.rope_theta = 100;
    c.max_position_embeddings = 4;
    assert_int_equal(model_memory(&c, kernels_cpu(), fixture_device(), &shape, 1, 0, DTYPE_F32, &plan, &e),
                     0);
    assert_int_equal(plan.parameters, 4 * elements);
    assert_int_equal(plan.gradients, 4 * elements);
    assert_int_equal(plan.optimizer, 8 * elements);
}

/* Each of a machine's ranks may use an equal part of what is free. */
static void free_memory_is_divided_among_local_ranks(void **state) {
    (void)state;
    const struct kernels *k = kernels_cpu();
    struct comm comm = *comm_single();
    struct error e = {0};
    comm.local_ranks = 4;
    struct device_options options = {.threads = 1, .precision = DEVICE_FP32, .comm = &comm};
    struct device *dev = k->open(&options, &e);
    assert_non_null(dev);
    double part = (double)k->memory_available(dev), all = (double)k->memory_available(NULL);
    assert_true(fabs(4 * part / all - 1) < 0.2); /* other processes allocate and free meanwhile */
    k->close(dev);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(free_memory_is_divided_among_local_ranks),
        cmocka_unit_test(names_and_shapes),
        cmocka_unit_test(names_and_shapes_of_a_tied_rmsnorm_model),
        cmocka_unit_test(every_parameter_is_within_its_unit),
        cmocka_unit_test(rounding_indices_are_offsets_without_ranks_and_padded_rows),
        cmocka_unit_test(the_classifiers_table_is_padded),
        cmocka_unit_test(matrices_are_initially_normal),
        cmocka_unit_test(mixing_is_initially_the_identity),
        cmocka_unit_test(noise_of_alpha_has_its_deviation),
        cmocka_unit_test(initial_values_depend_on_seed_and_name_only),
        cmocka_unit_test(memory_matches_the_plan),
        cmocka_unit_test(memory_of_a_small_model),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

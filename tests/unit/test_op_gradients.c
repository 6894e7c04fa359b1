/* Every operation's backward against central differences, in double. The loss is a fixed random weighting of
 * the outputs; for each input, norm of the error over norm of the gradient is under 1e-6. */
#define FIXTURE_THREADS 2
#include "tests/lib/model_fixture.h"

enum { MAX_INPUTS = 6 };

/* An operation under test: inputs that may be varied, where backward leaves their gradients, and two calls.
 */
struct op_test {
    const char *name;
    int inputs;
    double *x[MAX_INPUTS], *g[MAX_INPUTS];
    int64_t n[MAX_INPUTS];
    const char *names[MAX_INPUTS];
    int64_t outputs;
    double *weights, *out; /* d(loss)/d(out), and out */
    void *saved;
};

static const struct kernels *K;
static struct device *DEV;
static uint64_t SEED = 3;

static double *noise(int64_t n) {
    double *x = calloc((size_t)n, sizeof *x);
    for (int64_t i = 0; i < n; i++)
        x[i] = fixture_noise(&SEED);
    return x;
}

static tensor d(double *x, int64_t s0, int64_t s1, int64_t s2, int64_t s3, int64_t s4) {
    return tensor_of(x, DTYPE_F64, s0, s1, s2, s3, s4);
}

static double *add_input(struct op_test *t, const char *name, int64_t n) {
    t->names[t->inputs] = name;
    t->n[t->inputs] = n;
    t->g[t->inputs] = calloc((size_t)n, sizeof(double));
    return t->x[t->inputs++] = noise(n);
}

static void add_output(struct op_test *t, int64_t n) {
    t->outputs = n;
    t->out = calloc((size_t)n, sizeof(double));
    t->weights = noise(n);
}

static void plan(struct op_test *t, struct op_spec spec) {
    static void *workspace;
    static size_t workspace_bytes;
    struct error e = {0};
    struct op_cost cost;
    assert_int_equal(K->plan(DEV, &spec, &cost, &e), 0);
    if (cost.workspace > workspace_bytes) {
        K->release(DEV, workspace);
        workspace = K->alloc(DEV, cost.workspace, &e);
        workspace_bytes = cost.workspace;
        K->set_workspace(DEV, workspace, workspace_bytes);
    }
    t->saved = calloc(1, cost.saved + 1);
}

static double weighted(const struct op_test *t) {
    double sum = 0;
    for (int64_t i = 0; i < t->outputs; i++)
        sum += t->weights[i] * t->out[i];
    return sum;
}

typedef double loss_function(struct op_test *t, const void *spec);

/* The gradients must already be in t->g. */
static void compare(struct op_test *t, const void *spec, loss_function *loss) {
    for (int k = 0; k < t->inputs; k++) {
        double error = 0, norm = 0;
        for (int64_t i = 0; i < t->n[k]; i++) {
            double h = 1e-5, kept = t->x[k][i];
            t->x[k][i] = kept + h;
            double up = loss(t, spec);
            t->x[k][i] = kept - h;
            double down = loss(t, spec);
            t->x[k][i] = kept;
            double numeric = (up - down) / (2 * h);
            error += (numeric - t->g[k][i]) * (numeric - t->g[k][i]);
            norm += numeric * numeric;
        }
        if (!(sqrt(error) < 1e-6 * sqrt(norm)))
            fail_msg("%s: gradient of %s: error %.3g, norm %.3g", t->name, t->names[k], sqrt(error),
                     sqrt(norm));
    }
    for (int k = 0; k < t->inputs; k++) {
        free(t->x[k]);
        free(t->g[k]);
    }
    free(t->out);
    free(t->weights);
    free(t->saved);
}

/* ---- embed ---- */

static int32_t TOKENS[] = {3, 0, 3, 6, 1, 3};

static double embed_loss(struct op_test *t, const void *spec) {
    const struct embed_spec *s = spec;
    K->embed(DEV, s, tensor_of(TOKENS, DTYPE_I32, 2, 3, 0, 0, 0), d(t->x[0], 7, 5, 0, 0, 0),
             d(t->x[1], 4, 5, 0, 0, 0), 0, d(t->out, 6, 5, 0, 0, 0));
    return weighted(t);
}

static void embed(void **state) {
    (void)state;
    struct op_test t = {.name = "embed"};
    struct embed_spec s = {2, 3, 7, 5};
    add_input(&t, "W", 35);
    add_input(&t, "pos", 20);
    add_output(&t, 30);
    K->embed_backward(DEV, &s, tensor_of(TOKENS, DTYPE_I32, 2, 3, 0, 0, 0), d(t.weights, 6, 5, 0, 0, 0),
                      d(t.g[0], 7, 5, 0, 0, 0), d(t.g[1], 4, 5, 0, 0, 0));
    compare(&t, &s, embed_loss);
}

/* ---- residual_norm ---- */

/* Outputs: y, then the sum, which the residual path reads as well. */
static double norm_loss(struct op_test *t, const void *spec) {
    const struct norm_spec *s = spec;
    int64_t N = s->rows, C = s->hidden;
    K->residual_norm(DEV, s, d(t->x[0], N, C, 0, 0, 0), d(t->x[1], N, C, 0, 0, 0), d(t->x[2], C, 0, 0, 0, 0),
                     t->inputs > 3 ? d(t->x[3], C, 0, 0, 0, 0) : tensor_none(),
                     d(t->out + N * C, N, C, 0, 0, 0), d(t->out, N, C, 0, 0, 0), t->saved);
    return weighted(t);
}

static void check_norm(enum norm_type type, bool bias, bool accumulate) {
    enum { N = 5, C = 19 };
    struct op_test t = {.name = type == NORM_TYPE_LAYER ? "layernorm" : "rmsnorm"};
    struct norm_spec s = {type, 1e-3, N, C};
    add_input(&t, "x", N * C);
    add_input(&t, "delta", N * C);
    add_input(&t, "w", C);
    if (bias)
        add_input(&t, "b", C);
    add_output(&t, 2 * N * C);
    plan(&t, (struct op_spec){.kind = OP_NORM, .norm = s});
    norm_loss(&t, &s);
    memcpy(t.g[0], t.weights + N * C, N * C * sizeof(double));
    for (int i = 0; accumulate && i < C; i++)
        t.g[2][i] = 10;
    K->residual_norm_backward(DEV, &s, d(t.weights, N, C, 0, 0, 0), d(t.out + N * C, N, C, 0, 0, 0),
                              d(t.x[2], C, 0, 0, 0, 0), t.saved, d(t.g[0], N, C, 0, 0, 0),
                              d(t.g[2], C, 0, 0, 0, 0), bias ? d(t.g[3], C, 0, 0, 0, 0) : tensor_none(),
                              accumulate);
    for (int i = 0; accumulate && i < C; i++)
        t.g[2][i] -= 10;
    memcpy(t.g[1], t.g[0], N * C * sizeof(double));
    compare(&t, &s, norm_loss);
}

static void residual_norm(void **state) {
    (void)state;
    check_norm(NORM_TYPE_RMS, false, false);
    check_norm(NORM_TYPE_RMS, false, true);
    check_norm(NORM_TYPE_LAYER, false, false);
    check_norm(NORM_TYPE_LAYER, true, false);
}

/* ---- linear
 * -------------------------------------------------------------------------------------------------- */

static double linear_loss(struct op_test *t, const void *spec) {
    const struct linear_spec *s = spec;
    K->linear(DEV, s, d(t->x[0], s->rows, s->in, 0, 0, 0), d(t->x[1], s->out, s->in, 0, 0, 0),
              d(t->x[2], s->out, 0, 0, 0, 0), d(t->out, s->rows, s->out, 0, 0, 0));
    return weighted(t);
}

static void check_linear(bool add) {
    struct op_test t = {.name = add ? "linear, accumulating" : "linear"};
    struct linear_spec s = {6, 5, 7};
    add_input(&t, "x", 30);
    add_input(&t, "W", 35);
    add_input(&t, "bias", 7);
    add_output(&t, 42);
    for (int k = 0; add && k < 3; k++)
        for (int64_t i = 0; i < t.n[k]; i++)
            t.g[k][i] = 2;
    K->linear_backward(DEV, &s, d(t.weights, 6, 7, 0, 0, 0), d(t.x[0], 6, 5, 0, 0, 0),
                       d(t.x[1], 7, 5, 0, 0, 0), d(t.g[0], 6, 5, 0, 0, 0), add, d(t.g[1], 7, 5, 0, 0, 0),
                       d(t.g[2], 7, 0, 0, 0, 0), add);
    for (int k = 0; add && k < 3; k++)
        for (int64_t i = 0; i < t.n[k]; i++)
            t.g[k][i] -= 2;
    compare(&t, &s, linear_loss);
}

static void linear(void **state) {
    (void)state;
    check_linear(false);
    check_linear(true);
}

/* ---- qkv_mix
 * -------------------------------------------------------------------------------------------------- */

static double *ROPE;

static tensor alpha(const struct qkv_mix_spec *s, double *x) {
    return s->mixed ? d(x, s->pseudo, s->heads, s->heads, 0, 0) : tensor_none();
}

static tensor rope_rows(const struct qkv_mix_spec *s) {
    return d(ROPE, s->tokens * s->pseudo, 2, s->head_dim / 2, 0, 0);
}

static double mix_loss(struct op_test *t, const void *spec) {
    const struct qkv_mix_spec *s = spec;
    int64_t B = s->batch, S = s->tokens * s->pseudo, H = s->heads, D = s->head_dim, n = B * S * H * D;
    K->qkv_mix(DEV, s, d(t->x[0], B, s->tokens, 3, H, D), alpha(s, t->x[1]), alpha(s, t->x[2]),
               alpha(s, t->x[3]), rope_rows(s), 0, d(t->out, B, S, H, D, 0), d(t->out + n, B, S, H, D, 0),
               d(t->out + 2 * n, B, S, H, D, 0));
    return weighted(t);
}

static void check_mix(struct qkv_mix_spec s) {
    struct op_test t = {.name = s.mixed ? "qkv_mix" : "qkv_mix (rope alone)"};
    int64_t B = s.batch, S = s.tokens * s.pseudo, H = s.heads, D = s.head_dim, n = B * S * H * D;
    ROPE = noise(S * D);
    K->rope_table(DEV, rope_rows(&s), 100);
    add_input(&t, "qkv", B * s.tokens * 3 * H * D);
    for (int i = 0; s.mixed && i < 3; i++)
        add_input(&t, "alpha", s.pseudo * H * H);
    add_output(&t, 3 * n);
    plan(&t, (struct op_spec){.kind = OP_QKV_MIX, .qkv_mix = s});
    K->qkv_mix_backward(DEV, &s, d(t.weights, B, S, H, D, 0), d(t.weights + n, B, S, H, D, 0),
                        d(t.weights + 2 * n, B, S, H, D, 0), d(t.x[0], B, s.tokens, 3, H, D),
                        alpha(&s, t.x[1]), alpha(&s, t.x[2]), alpha(&s, t.x[3]), rope_rows(&s),
                        d(t.g[0], B, s.tokens, 3, H, D), alpha(&s, t.g[1]), alpha(&s, t.g[2]),
                        alpha(&s, t.g[3]), false);
    compare(&t, &s, mix_loss);
    free(ROPE);
}

static void qkv_mix(void **state) {
    (void)state;
    check_mix((struct qkv_mix_spec){2, 5, 3, 6, 2, true, true, true});
    check_mix(
        (struct qkv_mix_spec){1, 20, 5, 10, 3, true, true, false}); /* more tokens than one backward block */
    check_mix((struct qkv_mix_spec){2, 3, 2, 8, 4, true, false, true});
    check_mix((struct qkv_mix_spec){2, 5, 3, 6, 1, false, true, true});
    check_mix((struct qkv_mix_spec){1, 4, 4, 16, 1, true, true, true});
}

/* ---- attention
 * ---------------------------------------------------------------------------------------------------- */

static double attention_loss(struct op_test *t, const void *spec) {
    const struct attention_spec *s = spec;
    int64_t B = s->batch, S = s->length, H = s->heads, D = s->head_dim;
    K->attention(DEV, s, d(t->x[0], B, S, H, D, 0), d(t->x[1], B, S, H, D, 0), d(t->x[2], B, S, H, D, 0),
                 d(t->out, B, S, H, D, 0), t->saved);
    return weighted(t);
}

static void check_attention(struct attention_spec s) {
    struct op_test t = {.name = "attention"};
    int64_t B = s.batch, S = s.length, H = s.heads, D = s.head_dim, n = B * S * H * D;
    add_input(&t, "q", n);
    add_input(&t, "k", n);
    add_input(&t, "v", n);
    add_output(&t, n);
    plan(&t, (struct op_spec){.kind = OP_ATTENTION, .attention = s});
    attention_loss(&t, &s);
    K->attention_backward(DEV, &s, d(t.x[0], B, S, H, D, 0), d(t.x[1], B, S, H, D, 0),
                          d(t.x[2], B, S, H, D, 0), d(t.out, B, S, H, D, 0), d(t.weights, B, S, H, D, 0),
                          t.saved, d(t.g[0], B, S, H, D, 0), d(t.g[1], B, S, H, D, 0),
                          d(t.g[2], B, S, H, D, 0));
    compare(&t, &s, attention_loss);
}

static void attention(void **state) {
    (void)state;
    check_attention((struct attention_spec){2, 7, 2, 4, 1, true, false, 0, 0.7});
    check_attention((struct attention_spec){1, 9, 2, 5, 3, true, true, 0, 0.7});
    check_attention((struct attention_spec){1, 9, 1, 6, 3, true, true, 4, 0.7});
    check_attention((struct attention_spec){1, 70, 1, 3, 1, true, false, 9, 0.7}); /* two tiles */
    check_attention((struct attention_spec){1, 67, 1, 3, 2, false, false, 0, 0.7});
}

/* ---- collapse
 * ------------------------------------------------------------------------------------------------------ */

static tensor collapse_r(const struct collapse_spec *s, double *r) {
    return d(r, s->heads, s->pseudo, s->per_head ? 0 : s->heads, 0, 0);
}

static double collapse_loss(struct op_test *t, const void *spec) {
    const struct collapse_spec *s = spec;
    int64_t B = s->batch, T = s->tokens, H = s->heads, D = s->head_dim;
    K->collapse(DEV, s, d(t->x[0], B, T * s->pseudo, H, D, 0), collapse_r(s, t->x[1]),
                d(t->out, B, T, H, D, 0));
    return weighted(t);
}

static void check_collapse(struct collapse_spec s) {
    struct op_test t = {.name = s.per_head ? "collapse per head" : "collapse"};
    int64_t B = s.batch, T = s.tokens, H = s.heads, D = s.head_dim, S = T * s.pseudo;
    add_input(&t, "o", B * S * H * D);
    add_input(&t, "R", H * s.pseudo * (s.per_head ? 1 : H));
    add_output(&t, B * T * H * D);
    plan(&t, (struct op_spec){.kind = OP_COLLAPSE, .collapse = s});
    K->collapse_backward(DEV, &s, d(t.weights, B, T, H, D, 0), d(t.x[0], B, S, H, D, 0),
                         collapse_r(&s, t.x[1]), d(t.g[0], B, S, H, D, 0), collapse_r(&s, t.g[1]), false);
    compare(&t, &s, collapse_loss);
}

static void collapse(void **state) {
    (void)state;
    check_collapse((struct collapse_spec){2, 5, 3, 6, 2, false});
    check_collapse((struct collapse_spec){1, 19, 5, 9, 3, false});
    check_collapse((struct collapse_spec){2, 5, 3, 6, 2, true});
}

/* ---- mlp_act
 * ---------------------------------------------------------------------------------------------------------
 */

static double act_loss(struct op_test *t, const void *spec) {
    const struct act_spec *s = spec;
    K->mlp_act(DEV, s, d(t->x[0], s->rows, s->hidden, 0, 0, 0),
               t->inputs > 1 ? d(t->x[1], s->rows, s->hidden, 0, 0, 0) : tensor_none(),
               d(t->out, s->rows, s->hidden, 0, 0, 0));
    return weighted(t);
}

static void mlp_act(void **state) {
    (void)state;
    for (int type = ACT_GELU_TANH; type <= ACT_SWIGLU; type++) {
        struct op_test t = {.name = "mlp_act"};
        struct act_spec s = {(enum act_type)type, 4, 21};
        add_input(&t, "u", 84);
        if (type == ACT_SWIGLU)
            add_input(&t, "gate", 84);
        add_output(&t, 84);
        for (int k = 0; k < t.inputs; k++)
            for (int i = 0; i < 84; i++)
                t.x[k][i] *= 3; /* into the bends of the curve */
        tensor gate = t.inputs > 1 ? d(t.x[1], 4, 21, 0, 0, 0) : tensor_none();
        tensor dgate = t.inputs > 1 ? d(t.g[1], 4, 21, 0, 0, 0) : tensor_none();
        K->mlp_act_backward(DEV, &s, d(t.weights, 4, 21, 0, 0, 0), d(t.x[0], 4, 21, 0, 0, 0), gate,
                            d(t.g[0], 4, 21, 0, 0, 0), dgate);
        compare(&t, &s, act_loss);
    }
}

/* ---- classifier
 * -------------------------------------------------------------------------------------------------------- */

static int32_t TARGETS[] = {2, -1, 8, 0, 2};

static double classifier_loss(struct op_test *t, const void *spec) {
    const struct classifier_spec *s = spec;
    struct step_state state = {0};
    K->classifier(DEV, s, d(t->x[0], 5, 6, 0, 0, 0), d(t->x[1], 9, 6, 0, 0, 0),
                  tensor_of(TARGETS, DTYPE_I32, 5, 0, 0, 0, 0), 0.37, &state, tensor_none(), tensor_none(),
                  false);
    return state.loss;
}

static void classifier(void **state) {
    (void)state;
    struct op_test t = {.name = "classifier"};
    struct classifier_spec s = {5, 6, 9};
    struct step_state step = {0};
    add_input(&t, "h", 30);
    add_input(&t, "W", 54);
    add_output(&t, 1);
    plan(&t, (struct op_spec){.kind = OP_CLASSIFIER, .classifier = s});
    K->classifier(DEV, &s, d(t.x[0], 5, 6, 0, 0, 0), d(t.x[1], 9, 6, 0, 0, 0),
                  tensor_of(TARGETS, DTYPE_I32, 5, 0, 0, 0, 0), 0.37, &step, d(t.g[0], 5, 6, 0, 0, 0),
                  d(t.g[1], 9, 6, 0, 0, 0), false);
    compare(&t, &s, classifier_loss);
}

int main(void) {
    K = kernels_cpu();
    DEV = fixture_device();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(embed),   cmocka_unit_test(residual_norm), cmocka_unit_test(linear),
        cmocka_unit_test(qkv_mix), cmocka_unit_test(attention),     cmocka_unit_test(collapse),
        cmocka_unit_test(mlp_act), cmocka_unit_test(classifier),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

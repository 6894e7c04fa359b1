/* Every operation's backward against central differences, in double: the cases of tests/lib/op_cases.h
 * that are small enough. The loss is a fixed random weighting of the outputs; for each input, norm of the
 * error over norm of the gradient is under 1e-6. */
#define FIXTURE_THREADS 2
#include "tests/lib/model_fixture.h"
#include "tests/lib/op_operands.h"

/* One case with its operands in double. */
struct gradient_check {
    const struct op_case *c;
    struct op_operand x[OP_OPERANDS];
    tensor t[OP_OPERANDS];
    double *before[OP_OPERANDS]; /* what backward is given and may write over */
    void *saved, *workspace;
};

static const struct kernels *K;
static uint64_t SEED = 3;

static tensor filled(const struct op_case *c, const struct op_operand *x) {
    const int64_t *s = x->shape;
    tensor t = tensor_of(NULL, x->type == TYPE_IDS ? DTYPE_I32 : DTYPE_F64, s[0], s[1], s[2], s[3], s[4]);
    int64_t n = tensor_count(t), zeros = s[0] > 0 ? n / s[0] * x->zero_rows : 0;
    t.data = calloc((size_t)n, dtype_bytes(t.dtype));
    bool given =
        x->touched & FORWARD_READS || (x->touched & BACKWARD_READS && !(x->touched & FORWARD_WRITES));
    for (int64_t i = 0; i < n; i++)
        if (x->type == TYPE_IDS)
            ((int32_t *)t.data)[i] = op_id(c, x, i, fixture_noise(&SEED));
        else
            ((double *)t.data)[i] =
                given ? x->offset + (x->scale > 0 ? x->scale : 1) * fixture_noise(&SEED) : (double)NAN;
    for (int64_t i = n - zeros; i < n && zeros > 0; i++)
        ((double *)t.data)[i] = 0;
    if (x->type == TYPE_ROPE)
        K->rope_table(fixture_device(), &(const struct rope_spec){.theta = 100}, t);
    return t;
}

static void open_check(struct gradient_check *g, const struct op_case *c) {
    struct error e = {0};
    struct op_cost cost;
    struct op_spec spec = op_spec_of(c);
    *g = (struct gradient_check){.c = c};
    op_operands(c, g->x);
    for (int i = 0; i < OP_OPERANDS; i++)
        if (g->x[i].name) {
            g->t[i] = filled(c, &g->x[i]);
            size_t bytes = (size_t)tensor_count(g->t[i]) * dtype_bytes(g->t[i].dtype);
            g->before[i] = malloc(bytes);
            memcpy(g->before[i], g->t[i].data, bytes);
        }
    assert_int_equal(K->plan(fixture_device(), &spec, &cost, &e), 0);
    g->workspace = K->alloc(fixture_device(), cost.workspace, &e);
    g->saved = calloc(1, cost.saved + 1);
    K->set_workspace(fixture_device(), g->workspace, cost.workspace);
}

static void close_check(struct gradient_check *g) {
    for (int i = 0; i < OP_OPERANDS; i++) {
        free(g->t[i].data);
        free(g->before[i]);
    }
    free(g->saved);
    K->set_workspace(fixture_device(), NULL, 0);
    K->release(fixture_device(), g->workspace);
}

/* Outputs weighted by their gradients, and what the classifier sums. */
static double loss(struct gradient_check *g) {
    struct step_state state = {0};
    op_forward(K, fixture_device(), g->c, g->t, g->saved, &state);
    double sum = state.loss;
    for (int i = 0; i < OP_OPERANDS; i++) {
        int output = g->x[i].gradient_of_output;
        for (int64_t j = 0; output && j < tensor_count(g->t[i]); j++)
            sum += g->before[i][j] * ((double *)g->t[output - 1].data)[j];
    }
    return sum;
}

/* gradient: the operand that holds the gradient of `input`. */
static void compare(struct gradient_check *g, int input, int gradient) {
    const struct op_operand *x = &g->x[gradient];
    bool added = x->touched & BACKWARD_READS && !x->gradient_of_output;
    double error = 0, norm = 0, *values = g->t[input].data;
    for (int64_t i = 0; i < tensor_count(g->t[input]); i++) {
        double h = 1e-5, kept = values[i];
        values[i] = kept + h;
        double up = loss(g);
        values[i] = kept - h;
        double down = loss(g);
        values[i] = kept;
        double numeric = (up - down) / (2 * h);
        double off = ((double *)g->t[gradient].data)[i] - (added ? g->before[gradient][i] : 0) - numeric;
        error += off * off;
        norm += numeric * numeric;
    }
    if (!(sqrt(error) < 1e-6 * sqrt(norm)))
        fail_msg("%s: %s: error %.3g, norm %.3g", op_describe(g->c), x->name, sqrt(error), sqrt(norm));
}

static void check(const struct op_case *c, void *context) {
    struct gradient_check g;
    struct step_state state = {0};
    int compared = 0;
    (void)context;
    open_check(&g, c);
    op_forward(K, fixture_device(), c, g.t, g.saved, &state);
    op_backward(K, fixture_device(), c, g.t, g.saved, &state);
    for (int i = 0; i < OP_OPERANDS; i++)
        for (int k = 0; k < 2; k++)
            if (g.x[i].name && g.x[i].gradient_of[k]) {
                compare(&g, g.x[i].gradient_of[k] - 1, i);
                compared++;
            }
    assert_true(compared > 0);
    close_check(&g);
}

static void gradients(void **state) {
    assert_true(op_cases_run(*(enum op_kind *)*state, GRADIENT, check, NULL) > 0);
}

int main(void) {
    static enum op_kind kinds[] = {OP_EMBED,    OP_NORM,    OP_LINEAR,     OP_QKV_MIX, OP_ATTENTION,
                                   OP_COLLAPSE, OP_ACT,     OP_CLASSIFIER, OP_FOLD,    OP_DIFF_COMBINE,
                                   OP_QK_NORM,  OP_TALKING, OP_SIMPLICIAL};
    K = kernels_cpu();
    const struct CMUnitTest tests[] = {
        {"embed", gradients, NULL, NULL, &kinds[0]},
        {"residual_norm", gradients, NULL, NULL, &kinds[1]},
        {"linear", gradients, NULL, NULL, &kinds[2]},
        {"qkv_mix", gradients, NULL, NULL, &kinds[3]},
        {"attention", gradients, NULL, NULL, &kinds[4]},
        {"collapse", gradients, NULL, NULL, &kinds[5]},
        {"mlp_act", gradients, NULL, NULL, &kinds[6]},
        {"classifier", gradients, NULL, NULL, &kinds[7]},
        {"fold", gradients, NULL, NULL, &kinds[8]},
        {"diff_combine", gradients, NULL, NULL, &kinds[9]},
        {"qk_norm", gradients, NULL, NULL, &kinds[10]},
        {"talking", gradients, NULL, NULL, &kinds[11]},
        {"simplicial", gradients, NULL, NULL, &kinds[12]},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* Properties of interleaved head attention that must hold exactly (arXiv 2602.21371, and what follows from
 * it), in double: T = 12 tokens, H = 4 heads, P = 3 pseudo-heads unless said otherwise. */
#define FIXTURE_THREADS 1
#include "tests/lib/model_fixture.h"

enum { MAX_T = 12, MAX_H = 4, MAX_P = 3, MAX_D = 8, MOST = MAX_T * MAX_P * MAX_H * MAX_D };
static const double EXACT = 1e-12, DIFFERENT = 1e-3;

/* One attention layer without its projections: mix, attend, collapse. */
struct layer {
    int64_t T, H, P, d;
    bool causal, token_mask, rope, rope_virtual;
    int64_t window;
    double scale;
    double alpha_q[MAX_P * MAX_H * MAX_H], alpha_k[MAX_P * MAX_H * MAX_H], alpha_v[MAX_P * MAX_H * MAX_H];
    double r[MAX_H * MAX_P * MAX_H];
};

static tensor d(double *x, int64_t s0, int64_t s1, int64_t s2, int64_t s3, int64_t s4) {
    return tensor_of(x, DTYPE_F64, s0, s1, s2, s3, s4);
}

/* out [T,H,d] from qkv [T,3,H,d]. */
static void run_layer(const struct layer *l, double *qkv, double *out) {
    const struct kernels *k = kernels_cpu();
    struct device *dev = fixture_device();
    static double q[MOST], key[MOST], v[MOST], o[MOST], saved[MOST], table[MAX_T * MAX_P * MAX_D];
    static char workspace[16 << 20];
    int64_t T = l->T, H = l->H, P = l->P, S = T * P, D = l->d;
    struct qkv_mix_spec mix = {1, T, H, D, P, true, l->rope, l->rope_virtual, 0};
    struct attention_spec attention = {1,         S,        H,     D, P, l->causal, l->token_mask,
                                       l->window, l->scale, false, 0, false};
    struct collapse_spec collapse = {1, T, H, D, P, false};
    struct layer copy = *l; /* tensors point to mutable memory */
    tensor rope = d(table, S, 2, D / 2, 0, 0), tq = d(q, 1, S, H, D, 0), tk = d(key, 1, S, H, D, 0);
    tensor tv = d(v, 1, S, H, D, 0), to = d(o, 1, S, H, D, 0);
    k->set_workspace(dev, workspace, sizeof workspace);
    k->rope_table(dev, &(const struct rope_spec){.theta = 100}, rope);
    k->qkv_mix(dev, &mix, d(qkv, 1, T, 3 * H, D, 0), d(copy.alpha_q, P, H, H, 0, 0),
               d(copy.alpha_k, P, H, H, 0, 0), d(copy.alpha_v, P, H, H, 0, 0), rope, tensor_none(), 0, tq, tk,
               tv);
    k->attention(dev, &attention, tq, tk, tv, tensor_none(), to, saved);
    k->collapse(dev, &collapse, to, d(copy.r, H, P, H, 0, 0), d(out, 1, T, H, D, 0));
}

static void set_identity(double *alpha, int64_t P, int64_t H) {
    for (int64_t p = 0; p < P; p++)
        for (int64_t h = 0; h < H; h++)
            for (int64_t m = 0; m < H; m++)
                alpha[(p * H + h) * H + m] = h == m;
}

enum collapse_kind { LAST, MEAN };

static struct layer iha(enum collapse_kind collapse) {
    struct layer l = {.T = 12, .H = 4, .P = 3, .d = 8, .causal = true, .scale = 0.5};
    set_identity(l.alpha_q, l.P, l.H);
    set_identity(l.alpha_k, l.P, l.H);
    set_identity(l.alpha_v, l.P, l.H);
    for (int64_t h = 0; h < l.H; h++)
        for (int64_t p = 0; p < l.P; p++)
            l.r[(h * l.P + p) * l.H + h] = collapse == MEAN ? 1.0 / (double)l.P : p == l.P - 1;
    return l;
}

static struct layer mha(void) {
    struct layer l = iha(LAST);
    l.P = 1;
    l.r[0] = 0;
    memset(l.r, 0, sizeof l.r);
    for (int64_t h = 0; h < l.H; h++)
        l.r[h * l.H + h] = 1;
    return l;
}

static void random_qkv(const struct layer *l, double *qkv) {
    uint64_t seed = 11;
    for (int64_t i = 0; i < l->T * 3 * l->H * l->d; i++)
        qkv[i] = 2 * fixture_noise(&seed);
}

/* Largest difference between two layers on the same input. */
static double difference(const struct layer *a, const struct layer *b) {
    static double qkv[3 * MOST], out_a[MOST], out_b[MOST];
    double largest = 0;
    random_qkv(a, qkv);
    run_layer(a, qkv, out_a);
    run_layer(b, qkv, out_b);
    for (int64_t i = 0; i < a->T * a->H * a->d; i++)
        largest = fmax(largest, fabs(out_a[i] - out_b[i]));
    return largest;
}

#define EXACT_MATCH(a, b) assert_true(difference(&(a), &(b)) < EXACT)
#define NO_MATCH(a, b) assert_true(difference(&(a), &(b)) > DIFFERENT)

static void with_the_flat_mask_only_collapse_last_equals_mha(void **state) {
    (void)state;
    struct layer plain = mha(), last = iha(LAST), mean = iha(MEAN);
    EXACT_MATCH(last, plain);
    NO_MATCH(mean, plain);
}

static void with_the_token_mask_every_collapse_equals_mha(void **state) {
    (void)state;
    struct layer plain = mha(), last = iha(LAST), mean = iha(MEAN);
    last.token_mask = mean.token_mask = true;
    EXACT_MATCH(last, plain);
    EXACT_MATCH(mean, plain);
}

static void token_rope_equals_mha_and_virtual_rope_does_not(void **state) {
    (void)state;
    for (int token_mask = 0; token_mask < 2; token_mask++) {
        struct layer plain = mha(), token_rope = iha(LAST);
        plain.rope = token_rope.rope = true;
        token_rope.token_mask = token_mask;
        struct layer virtual = token_rope;
        virtual.rope_virtual = true;
        EXACT_MATCH(token_rope, plain);
        NO_MATCH(virtual, plain);
    }
}

static void windows_of_whole_tokens_equal_mha(void **state) {
    (void)state;
    for (int64_t window = 1; window <= 13; window++) {
        struct layer plain = mha(), last = iha(LAST);
        plain.window = (window + 2) / 3;
        last.window = window;
        if (window % 3 == 0 || window < 3) /* part of the query's own token is copies of one value */
            EXACT_MATCH(last, plain);
        else
            NO_MATCH(last, plain);
    }
}

/* All tokens equal: attention returns their value whatever the scores, so MHA is linear in the token. */
static double departure_from_linear(const struct layer *l) {
    static double qkv[3 * MOST], doubled[3 * MOST], out[MOST], out2[MOST];
    int64_t width = 3 * l->H * l->d;
    double largest = 0;
    random_qkv(l, qkv);
    for (int64_t i = 0; i < l->T * width; i++) {
        qkv[i] = qkv[i % width];
        doubled[i] = 2 * qkv[i];
    }
    run_layer(l, qkv, out);
    run_layer(l, doubled, out2);
    for (int64_t i = 0; i < l->T * l->H * l->d; i++)
        largest = fmax(largest, fabs(out2[i] - 2 * out[i]));
    return largest;
}

static void on_equal_tokens_mha_is_linear_and_iha_is_not(void **state) {
    (void)state;
    struct layer plain = mha(), two = iha(LAST);
    uint64_t seed = 5;
    two.P = 2;
    memset(two.r, 0, sizeof two.r);
    for (int64_t h = 0; h < two.H; h++)
        two.r[(h * 2 + 1) * two.H + h] = 1;
    for (int i = 0; i < 2 * 16; i++) {
        two.alpha_q[i] += fixture_noise(&seed);
        two.alpha_k[i] += fixture_noise(&seed);
        two.alpha_v[i] += fixture_noise(&seed);
    }
    assert_true(departure_from_linear(&plain) < EXACT);
    assert_true(departure_from_linear(&two) > DIFFERENT);
}

/* The construction of App. B.3, with H = P and N = H*H tokens of one number each: every head's first pseudo-query
 * attends to one position of each pseudo-key, and out [N,H,N] holds in coordinate m < H of head h the tokens
 * shifted by h*H + m. */
static void cyclic_shifts(int N, int H, const double *x, double *out) {
    static double qkv[3 * MOST];
    struct layer l = {.T = N, .H = H, .P = H, .d = N, .scale = 1000}; /* temperature to zero */
    memset(qkv, 0, sizeof qkv);
    for (int i = 0; i < N; i++)
        for (int m = 0; m < H; m++) {
            double *q = qkv + ((i * 3 + 0) * H + m) * N, *k = qkv + ((i * 3 + 1) * H + m) * N;
            double *v = qkv + ((i * 3 + 2) * H + m) * N;
            q[(i + m * H) % N] = 1;  /* e_i shifted by (m-1)H, m counted from 1 */
            k[(i - m + N) % N] = 1;  /* e_i shifted back by m-1 */
            v[m] = (double)H * x[i]; /* H x into coordinate m */
        }
    for (int p = 0; p < H; p++)
        for (int h = 0; h < H; h++)
            for (int m = 0; m < H; m++) {
                l.alpha_q[(p * H + h) * H + m] = m == h && p == 0;
                l.alpha_k[(p * H + h) * H + m] = l.alpha_v[(p * H + h) * H + m] = m == p;
            }
    for (int h = 0; h < H; h++)
        l.r[(h * H + 0) * H + h] = 1;
    run_layer(&l, qkv, out);
}

static void cpm3_worked_example(void **state) {
    (void)state;
    enum { N = 4, H = 2 };
    double x[N] = {1, 2, 3, 4}, out[N * H * N];
    cyclic_shifts(N, H, x, out);
    for (int i = 0; i < N; i++)
        for (int h = 0; h < H; h++)
            for (int m = 0; m < H; m++)
                assert_true(fabs(out[(i * H + h) * N + m] - x[(i + h * H + m) % N]) < 1e-9);
}

/* From the shifts that a token holds follow its count of pairs, the target of CPM-3. */
static void cpm3_counts_follow_from_the_shifts(void **state) {
    (void)state;
    enum { N = 9, H = 3, M = 5, G = 11 };
    double x[N], out[N * H * N];
    uint64_t seed = 3;
    for (int i = 0; i < N; i++)
        x[i] = floor(M * (0.5 + 0.499 * fixture_noise(&seed)));
    cyclic_shifts(N, H, x, out);
    for (int i = 0; i < N; i++) {
        int count = 0, want = 0;
        for (int a = 0; a < N; a++)
            for (int b = 0; b < N; b++) {
                double first = out[(i * H + a / H) * N + a % H], second = out[(i * H + b / H) * N + b % H];
                count += lround(x[i] + G * first + second) % M == 0;
                want += lround(x[i] + G * x[a] + x[b]) % M == 0;
            }
        assert_int_equal(count, want);
    }
}

/* A filter of N coefficients, sum over k of c[k] S^k x with S the cyclic shift, needs H = sqrt(N) heads: the
 * output projection gives coordinate m of head h the weight c[h*H + m]. */
static void polynomial_filters_take_as_many_heads_as_the_root_of_their_order(void **state) {
    (void)state;
    enum { N = 9, H = 3 };
    double x[N], c[N], out[N * H * N];
    uint64_t seed = 7;
    for (int i = 0; i < N; i++) {
        x[i] = fixture_noise(&seed);
        c[i] = fixture_noise(&seed);
    }
    cyclic_shifts(N, H, x, out);
    for (int i = 0; i < N; i++) {
        double filtered = 0, want = 0;
        for (int k = 0; k < N; k++) {
            filtered += c[k] * out[(i * H + k / H) * N + k % H];
            want += c[k] * x[(i + k) % N];
        }
        assert_true(fabs(filtered - want) < 1e-9);
    }
}

/* Two layers of one type. */
static struct model_config facts_config(enum layer_type type, enum position_embedding positions) {
    return (struct model_config){.vocab_size = 13,
                                 .hidden_size = 16,
                                 .num_hidden_layers = 2,
                                 .num_attention_heads = 4,
                                 .head_dim = 4,
                                 .intermediate_size = 24,
                                 .max_position_embeddings = 12,
                                 .position_embedding = positions,
                                 .rope_theta = 100,
                                 .norm_eps = 1e-5,
                                 .tie_word_embeddings = true,
                                 .causal = true,
                                 .layer_types = {type, type},
                                 .local_window = 5,
                                 .num_pseudo_heads = 3,
                                 .iha_window = 15,
                                 .iha_rope = IHA_ROPE_TOKEN};
}

/* The loss of a model whose layers are all of one type. An IHA model starts with alpha = identity and
 * collapse = last; its other weights are those of the MHA model. */
static double model_loss(enum layer_type type, enum position_embedding positions) {
    struct model_config c = facts_config(type, positions);
    struct model m;
    struct error e = {0};
    int32_t tokens[12], targets[12];
    fixture_tokens(tokens, 12, 13, 1);
    fixture_tokens(targets, 12, 13, 2);
    fixture_model(&m, &c, (struct pass_shape){1, 12, RECOMPUTE_NONE, true, false, false, false});
    assert_int_equal(model_initialize(&m, 5, &e), 0);
    for (int i = 0; i < m.params.count; i++) { /* initial weights are small: attention is almost uniform */
        double *values = model_param(&m, i).data;
        for (int64_t j = 0; m.params.list[i].class == PARAM_MATRIX && j < m.params.list[i].count; j++)
            values[j] *= 20;
    }
    double loss = fixture_loss(&m, tokens, targets, 1.0 / 12);
    model_free(&m);
    return loss;
}

static void an_iha_model_with_identity_mixing_equals_its_mha_model(void **state) {
    (void)state;
    enum position_embedding positions[] = {POSITION_NONE, POSITION_LEARNED, POSITION_ROPE};
    for (int i = 0; i < 3; i++) {
        double global = model_loss(LAYER_MHA_GLOBAL, positions[i]),
               local = model_loss(LAYER_MHA_LOCAL, positions[i]);
        assert_true(fabs(global - local) > 1e-6);
        assert_true(fabs(global - model_loss(LAYER_IHA_GLOBAL, positions[i])) < EXACT);
        assert_true(fabs(local - model_loss(LAYER_IHA_LOCAL, positions[i])) < EXACT);
    }
}

/* The loss of a model of one folded layer, and of the IHA layer with P = 1 that applies the same alphas to the heads of
 * each token and collapses by the identity, before and after `steps` optimizer steps. */
static double mixed_loss(enum layer_type type, bool bias, int steps) {
    struct model_config c = facts_config(type, POSITION_ROPE);
    c.num_hidden_layers = c.num_pseudo_heads = 1;
    c.bias = bias;
    c.init_alpha = ALPHA_NOISE;
    struct model m;
    struct error e = {0};
    int32_t tokens[12], targets[12];
    fixture_tokens(tokens, 12, 13, 1);
    fixture_tokens(targets, 12, 13, 2);
    fixture_model(&m, &c, (struct pass_shape){1, 12, RECOMPUTE_NONE, true, false, false, false});
    assert_int_equal(model_initialize(&m, 5, &e), 0);
    for (int i = 0; i < m.params.count; i++) {
        double *values = model_param(&m, i).data;
        for (int64_t j = 0; j < m.params.list[i].count; j++)
            if (m.params.list[i].class == PARAM_MATRIX)
                values[j] *= 20;
            else if (m.params.list[i].init == INIT_ALPHA)
                values[j] +=
                    j % m.params.list[i].shape[m.params.list[i].ndim - 1] == 1; /* far from the identity */
    }
    for (int step = 0; step < steps; step++) { /* plain gradient descent, but for collapse */
        fixture_loss(&m, tokens, targets, 1.0 / 12);
        for (int i = 0; i < m.params.count; i++) {
            double *values = model_param(&m, i).data, *gradient = model_gradient(&m, i).data;
            for (int64_t j = 0; m.params.list[i].init != INIT_COLLAPSE && j < m.params.list[i].count; j++)
                values[j] -= 0.1 * gradient[j];
        }
    }
    double loss = fixture_loss(&m, tokens, targets, 1.0 / 12);
    model_free(&m);
    return loss;
}

static void a_folded_layer_equals_mixing_the_heads_of_each_token(void **state) {
    (void)state;
    for (int bias = 0; bias < 2; bias++) {
        double before = mixed_loss(LAYER_FOLDED_GLOBAL, bias, 0),
               after = mixed_loss(LAYER_FOLDED_GLOBAL, bias, 3);
        assert_true(fabs(before - after) > 1e-3);
        assert_true(fabs(before - mixed_loss(LAYER_IHA_GLOBAL, bias, 0)) < EXACT);
        assert_true(fabs(after - mixed_loss(LAYER_IHA_GLOBAL, bias, 3)) < EXACT);
    }
}

static void a_folded_model_with_the_identity_equals_its_mha_model(void **state) {
    (void)state;
    assert_true(fabs(model_loss(LAYER_MHA_GLOBAL, POSITION_ROPE) -
                     model_loss(LAYER_FOLDED_GLOBAL, POSITION_ROPE)) < EXACT);
    assert_true(fabs(model_loss(LAYER_MHA_LOCAL, POSITION_ROPE) -
                     model_loss(LAYER_FOLDED_LOCAL, POSITION_ROPE)) < EXACT);
}

static void talking_heads_with_the_identity_equal_mha(void **state) {
    (void)state;
    enum position_embedding positions[] = {POSITION_NONE, POSITION_ROPE};
    for (int i = 0; i < 2; i++) {
        assert_true(fabs(model_loss(LAYER_MHA_GLOBAL, positions[i]) -
                         model_loss(LAYER_TALKING_GLOBAL, positions[i])) < EXACT);
        assert_true(fabs(model_loss(LAYER_MHA_LOCAL, positions[i]) -
                         model_loss(LAYER_TALKING_LOCAL, positions[i])) < EXACT);
    }
}

/* out [wide]: attention of query s over keys [0, s], of one head whose vectors are `step` apart. */
static void plain_attention(const double *q, const double *k, const double *v, int64_t step, int64_t s,
                            int64_t d, int64_t wide, double *out) {
    double weights[12], sum = 0;
    for (int64_t key = 0; key <= s; key++) {
        double score = 0;
        for (int64_t c = 0; c < d; c++)
            score += q[s * step + c] * k[key * step + c];
        sum += weights[key] = exp(score / sqrt((double)d));
    }
    for (int64_t c = 0; c < wide; c++) {
        out[c] = 0;
        for (int64_t key = 0; key <= s; key++)
            out[c] += weights[key] / sum * v[key * step + c];
    }
}

/* With lambda = 0 the first map alone is left, before the norm: attention of H/2 heads with q, k of d and v of 2d. */
static void a_differential_layer_without_lambda_equals_attention_of_half_the_heads(void **state) {
    (void)state;
    enum { T = 12, H = 4, D = 4 };
    struct model_config c = facts_config(LAYER_DIFF_GLOBAL, POSITION_NONE);
    struct model m;
    struct error e = {0};
    int32_t tokens[T], targets[T];
    fixture_tokens(tokens, T, 13, 1);
    fixture_tokens(targets, T, 13, 2);
    fixture_model(&m, &c, (struct pass_shape){1, T, RECOMPUTE_NONE, true, false, false, false});
    assert_int_equal(model_initialize(&m, 5, &e), 0);
    const struct layer_params *p = &m.params.layers[0];
    const double initial = 0.8 - 0.6;
    for (int i = 0; i < 4; i++) /* exp(0) - exp(d x) + initial = 0 */
        for (int64_t j = 0; j < D; j++)
            ((double *)model_param(&m, p->lambda[i]).data)[j] = i < 2 ? 0 : i == 2 ? log(1 + initial) / D : 1;
    double *qkv_weight = model_param(&m, p->qkv).data, *w = model_param(&m, p->diff_norm).data;
    for (int64_t j = 0; j < m.params.list[p->qkv].count; j++)
        qkv_weight[j] *= 20;
    for (int64_t j = 0; j < 2 * D; j++)
        w[j] = 1 + 0.1 * (double)j;
    fixture_loss(&m, tokens, targets, 1.0 / T);
    const double *qkv = m.layers[0].qkv.data, *o = m.layers[0].o.data;
    for (int64_t s = 0; s < T; s++)
        for (int64_t pair = 0; pair < H / 2; pair++) {
            double want[2 * D], squares = 0;
            plain_attention(qkv + 2 * pair * D, qkv + (H + 2 * pair) * D, qkv + (2 * H + 2 * pair) * D,
                            3 * H * D, s, D, 2 * D, want);
            for (int64_t i = 0; i < 2 * D; i++)
                squares += want[i] * want[i];
            for (int64_t i = 0; i < 2 * D; i++) {
                double normed = (1 - initial) * w[i] * want[i] / sqrt(squares / (2 * D) + c.norm_eps);
                double before = ((double *)m.layers[0].o_pseudo.data)[(s * 2 * H + 2 * pair) * D + i];
                assert_true(fabs(before - want[i]) < EXACT);
                assert_true(fabs(o[(s * H + 2 * pair) * D + i] - normed) < EXACT);
            }
        }
    model_free(&m);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(talking_heads_with_the_identity_equal_mha),
        cmocka_unit_test(with_the_flat_mask_only_collapse_last_equals_mha),
        cmocka_unit_test(with_the_token_mask_every_collapse_equals_mha),
        cmocka_unit_test(token_rope_equals_mha_and_virtual_rope_does_not),
        cmocka_unit_test(windows_of_whole_tokens_equal_mha),
        cmocka_unit_test(on_equal_tokens_mha_is_linear_and_iha_is_not),
        cmocka_unit_test(cpm3_worked_example),
        cmocka_unit_test(cpm3_counts_follow_from_the_shifts),
        cmocka_unit_test(polynomial_filters_take_as_many_heads_as_the_root_of_their_order),
        cmocka_unit_test(an_iha_model_with_identity_mixing_equals_its_mha_model),
        cmocka_unit_test(a_folded_layer_equals_mixing_the_heads_of_each_token),
        cmocka_unit_test(a_folded_model_with_the_identity_equals_its_mha_model),
        cmocka_unit_test(a_differential_layer_without_lambda_equals_attention_of_half_the_heads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

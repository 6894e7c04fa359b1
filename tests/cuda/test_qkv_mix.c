/* qkv_mix of the CUDA backend against the CPU backend, forward and backward. */
#include "tests/cuda/qkv_mix_check.h"

#include <unistd.h>

/* The values of q, k and v, or of their gradients, which are the operands from `first` on, as heads of one row. */
static double *packed_values(const struct op_run *r, const struct backend *b, int first) {
    const struct qkv_mix_spec *s = &r->spec.qkv_mix;
    int64_t N = s->batch * s->tokens, row = mix_row_heads(s) * s->head_dim, at = 0;
    double *packed = (double *)malloc((size_t)(N * row) * sizeof *packed);
    for (int w = 0; w < 3; w++) {
        int64_t width = mix_heads_of(s, w) * s->head_dim;
        double *values = values_on(b, r->x[first + w]);
        for (int64_t n = 0; n < N; n++)
            memcpy(packed + n * row + at, values + n * width, (size_t)width * sizeof *packed);
        free(values);
        at += width;
    }
    return packed;
}

static void expect_values(const struct backend *b, struct operand x, double *expected) {
    double *values = values_on(b, x);
    for (int64_t i = 0; i < tensor_count(on(x, b)); i++)
        assert_true(values[i] == expected[i]);
    free(values);
    free(expected);
}

/* Without alphas, as the model calls it: q, k and v are the heads of qkv, before and after. The bits are those of the
 * rotation from and to tensors of their own, which has been run. */
static void check_in_place(struct op_run *r) {
    const struct qkv_mix_spec *s = &r->spec.qkv_mix;
    int64_t H = s->heads, G = mix_kv_heads(s);
    EACH(r->k, b) {
        tensor none = tensor_none(), table = on(r->x[TABLE], b), positions = on(r->x[POSITIONS_OF], b);
        tensor x = on(r->x[QKV], b), dx = on(r->x[DQKV], b);
        b->k->qkv_mix(b->dev, s, x, none, none, none, table, positions, r->c->first, tensor_part(x, 2, 0, H),
                      tensor_part(x, 2, H, G), tensor_part(x, 2, H + G, G));
        expect_values(b, r->x[QKV], packed_values(r, b, OUT));
        double *expected = values_on(b, r->x[DQKV]), *gradients = packed_values(r, b, DOUT);
        b->k->upload(b->dev, dx, gradients, DTYPE_F64);
        free(gradients);
        b->k->qkv_mix_backward(b->dev, s, tensor_part(dx, 2, 0, H), tensor_part(dx, 2, H, G),
                               tensor_part(dx, 2, H + G, G), none, none, none, none, table, positions, dx,
                               none, none, none, false);
        expect_values(b, r->x[DQKV], expected);
    }
}

static void check(enum device_precision precision, const struct op_case *c) {
    struct op_run r;
    run_open(&r, precision, c);
    run_mix(&r, precision == DEVICE_BF16);
    run_expect_close(&r);
    run_expect_same(&r);
    if (!c->spec.qkv_mix.mixed)
        check_in_place(&r);
    done(r.k);
}

/* Alphas are read 16 bytes at a time, and a model's may begin anywhere. */
static void alphas_at_any_address(void **state) {
    (void)state;
    static const struct op_case cases[] = {{COMPARE, MIX_CASE(1, 3, 12, 64, 2, true, true, true)},
                                           {COMPARE, MIX_CASE(1, 2, 3, 32, 5, true, true, true)},
                                           {COMPARE, MIX_CASE(1, 2, 5, 16, 1, true, true, true)},
                                           {COMPARE, MIX_CASE(1, 1, 1, 16, 1, true, true, true)}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check_at_any_address(&cases[i], ALPHA, 3);
}

/* More rows than registers hold are taken in groups: so many launches of tensor-core kernels, two for each group and
 * slice of tokens. On a GPU with little memory there are several slices. */
static void groups_of_rows(void **state) {
    (void)state;
    static const struct op_case mix = {COMPARE, MIX_CASE(1, 37, 24, 16, 24, true, true, true)},
                                wide = {COMPARE, MIX_CASE(1, 3, 64, 16, 18, true, true, true)};
    static const struct {
        const struct op_case *c;
        size_t memory;
        int launches;
    } expected[] = {{&mix, 0, 4}, {&mix, (size_t)64 << 20, 3 * 4}, {&wide, 0, 10}};
    size_t kept = emulator_gpu.memory;
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++) {
        struct op_run r;
        if (expected[i].memory)
            emulator_gpu.memory = expected[i].memory;
        check(DEVICE_BF16, expected[i].c);
        run_open(&r, DEVICE_BF16, expected[i].c);
        run_forward(&r, r.k->each, NULL);
        int64_t before = emulator_launches();
        run_backward(&r, r.k->each, NULL);
        assert_true(emulator_on_gpu() || emulator_launches() - before == expected[i].launches);
        done(r.k);
        emulator_gpu.memory = kept;
    }
}

/* What a plan prints. */
static char *planned(enum device_precision precision, const struct op_case *c) {
    static char text[512];
    struct backends *k = backends(precision);
    struct op_cost cost;
    struct op_spec spec = op_spec_of(c);
    FILE *out = tmpfile();
    fflush(stderr);
    int kept = dup(STDERR_FILENO);
    dup2(fileno(out), STDERR_FILENO);
    int status = k->each[CUDA].k->plan(k->each[CUDA].dev, &spec, &cost, NULL);
    fflush(stderr);
    dup2(kept, STDERR_FILENO);
    close(kept);
    assert_int_equal(status, 0);
    rewind(out);
    text[fread(text, 1, sizeof text - 1, out)] = 0;
    fclose(out);
    done(k);
    return text;
}

static void plain_kernels_are_announced(void **state) {
    (void)state;
    static const struct op_case plain[] = {{COMPARE, MIX_CASE(1, 3, 66, 16, 2, true, true, true)},
                                           {COMPARE, MIX_CASE(1, 3, 4, 24, 2, true, true, true)},
                                           {COMPARE, COLLAPSE_CASE(1, 3, 66, 16, 2, false)},
                                           {COMPARE, COLLAPSE_CASE(1, 3, 4, 24, 2, true)}},
                                fast[] = {{COMPARE, MIX_CASE(1, 3, 24, 128, 24, true, true, true)},
                                          {COMPARE, MIX_CASE(1, 3, 64, 16, 64, true, true, true, 4)},
                                          {COMPARE, MIX_CASE(1, 3, 16, 64, 400, true, true, true)},
                                          {COMPARE, MIX_CASE(1, 3, 3, 6, 1, false, true, true)},
                                          {COMPARE, COLLAPSE_CASE(1, 3, 24, 128, 24, false)},
                                          {COMPARE, COLLAPSE_CASE(1, 3, 64, 16, 64, false)},
                                          {COMPARE, COLLAPSE_CASE(1, 3, 16, 64, 400, false)}};
    for (size_t i = 0; i < sizeof plain / sizeof *plain; i++) {
        assert_non_null(strstr(planned(DEVICE_BF16, &plain[i]), "without tensor cores"));
        assert_string_equal(planned(DEVICE_BF16, &plain[i]), ""); /* once */
        assert_string_equal(planned(DEVICE_FP32, &plain[i]), "");
    }
    for (size_t i = 0; i < sizeof plain / sizeof *plain; i++) /* nor again after others */
        assert_string_equal(planned(DEVICE_BF16, &plain[i]), "");
    for (size_t i = 0; i < sizeof fast / sizeof *fast; i++)
        assert_string_equal(planned(DEVICE_BF16, &fast[i]), "");
}

static void next_tokens_are_prefetched(void **state) {
    (void)state;
    if (emulator_on_gpu())
        skip();
    enum { B = 2, T = 4000, P = 2, H = 4, D = 16, TOKEN = 3 * H * D * 2 };
    static const struct op_case c = {COMPARE, MIX_CASE(B, T, H, D, P, true, true, true)};
    struct op_run r;
    run_open(&r, DEVICE_BF16, &c);
    int64_t before = emulator_prefetched;
    run_forward(&r, r.k->each, NULL);
    expect_prefetched(&r, before, B * T, TOKEN); /* qkv */
    before = emulator_prefetched;
    run_backward(&r, r.k->each, NULL);
    expect_prefetched(&r, before, B * T, (P + 1) * TOKEN); /* dq, dk and dv, and qkv */
    done(r.k);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        EVERY_CASE("mix_fp32", OP_QKV_MIX, DEVICE_FP32, check),
        EVERY_CASE("mix_bf16", OP_QKV_MIX, DEVICE_BF16, check),
        cmocka_unit_test(alphas_at_any_address),
        cmocka_unit_test(groups_of_rows),
        cmocka_unit_test(next_tokens_are_prefetched),
        cmocka_unit_test(plain_kernels_are_announced),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* residual_norm of the CUDA backend, forward, again and backward, in the harness of tests/cuda/emulator/. */
#include "tests/cuda/fixture.h"

static const struct norm_case {
    int64_t rows, hidden;
} CASES[] = {{1, 5}, {3, 8}, {9, 24}, {11, 130}, {7, 768}, {2, 1032}, {3, 2056}};

static void check(enum device_precision precision, enum norm_type type, bool bias, bool delta_present,
                  bool accumulate, struct norm_case c) {
    struct backends *k = backends(precision);
    int64_t N = c.rows, C = c.hidden;
    enum dtype t = k->compute;
    struct norm_spec s = {type, 1e-5, N, C};
    struct operand x = scaled_input(k, t, 2, 0.5, N, C, 0, 0, 0);
    struct operand delta = delta_present ? input(k, t, N, C, 0, 0, 0) : absent();
    struct operand w = scaled_input(k, t, 0.5, 1, C, 0, 0, 0, 0);
    struct operand b = bias ? input(k, t, C, 0, 0, 0, 0) : absent();
    struct operand sum = delta_present ? output(k, t, N, C, 0, 0, 0) : x;
    struct operand y = output(k, t, N, C, 0, 0, 0), again = output(k, t, N, C, 0, 0, 0);
    struct operand dy = input(k, t, N, C, 0, 0, 0), dx = input(k, t, N, C, 0, 0, 0);
    struct operand dw = accumulate ? input(k, DTYPE_F32, C, 0, 0, 0, 0) : output(k, DTYPE_F32, C, 0, 0, 0, 0);
    struct operand db = !bias        ? absent()
                        : accumulate ? input(k, DTYPE_F32, C, 0, 0, 0, 0)
                                     : output(k, DTYPE_F32, C, 0, 0, 0, 0);
    plan(k, (struct op_spec){.kind = OP_NORM, .norm = s});
    EACH(k, p) {
        p->k->residual_norm(p->dev, &s, on(x, p), on(delta, p), on(w, p), on(b, p), on(sum, p), on(y, p),
                            p->saved);
        if (p->which == PLAIN && delta_present && t == DTYPE_BF16) {
            /* The plain computation in bf16 stores the sum, and normalizes what it stored. */
            round_plain(k, sum);
            p->k->residual_norm(p->dev, &s, on(sum, p), tensor_none(), on(w, p), on(b, p), tensor_none(),
                                on(y, p), p->saved);
        }
        p->k->residual_norm_recompute(p->dev, &s, on(sum, p), on(w, p), on(b, p), on(again, p), p->saved);
        p->k->residual_norm_backward(p->dev, &s, on(dy, p), on(sum, p), on(w, p), p->saved, on(dx, p),
                                     on(dw, p), on(db, p), accumulate);
    }
    if (delta_present)
        expect_close("residual_norm", "sum", k, sum);
    expect_close("residual_norm", "y", k, y);
    double *first = values_on(&k->each[CUDA], y), *second = values_on(&k->each[CUDA], again);
    assert_memory_equal(first, second, (size_t)(N * C) * sizeof *first);
    free(first);
    free(second);
    expect_close("residual_norm_backward", "dx", k, dx);
    expect_close("residual_norm_backward", "dw", k, dw);
    if (bias)
        expect_close("residual_norm_backward", "db", k, db);
    done(k);
}

static void check_all(enum device_precision precision) {
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++)
        for (int choice = 0; choice < 8; choice++) {
            enum norm_type type = choice & 1 ? NORM_TYPE_LAYER : NORM_TYPE_RMS;
            emulator_seed(i + (unsigned)choice * 3);
            check(precision, type, choice & 1, choice & 2, choice & 4, CASES[i]);
        }
    /* Rows whose sums take all of the shared memory that a block has unasked. */
    check(precision, NORM_TYPE_LAYER, true, false, false,
          (struct norm_case){2, precision == DEVICE_BF16 ? 12288 : 8192});
    check(precision, NORM_TYPE_LAYER, false, true, false, CASES[4]);
}

static void norm_fp32(void **state) {
    (void)state;
    check_all(DEVICE_FP32);
}

static void norm_bf16(void **state) {
    (void)state;
    check_all(DEVICE_BF16);
}

/* More rows than the blocks of backward take at once. */
static void many_rows(void **state) {
    (void)state;
    check(DEVICE_BF16, NORM_TYPE_LAYER, true, true, true, (struct norm_case){301, 64});
    check(DEVICE_FP32, NORM_TYPE_RMS, false, true, false, (struct norm_case){203, 1028});
}

/* In place: the sum over x. */
static void sum_over_x(void **state) {
    (void)state;
    struct backends *k = backends(DEVICE_FP32);
    struct norm_spec s = {NORM_TYPE_RMS, 1e-5, 5, 40};
    struct operand x = input(k, DTYPE_F32, 5, 40, 0, 0, 0), delta = input(k, DTYPE_F32, 5, 40, 0, 0, 0);
    struct operand w = input(k, DTYPE_F32, 40, 0, 0, 0, 0), y = output(k, DTYPE_F32, 5, 40, 0, 0, 0);
    plan(k, (struct op_spec){.kind = OP_NORM, .norm = s});
    EACH(k, p)
    p->k->residual_norm(p->dev, &s, on(x, p), on(delta, p), on(w, p), tensor_none(), on(x, p), on(y, p),
                        p->saved);
    expect_close("residual_norm", "sum", k, x);
    expect_close("residual_norm", "y", k, y);
    done(k);
}

static void too_wide(void **state) {
    (void)state;
    struct backends *k = backends(DEVICE_FP32);
    struct backend *b = &k->each[CUDA];
    struct error e = {0};
    struct op_cost cost;
    struct op_spec spec = {.kind = OP_NORM, .norm = {NORM_TYPE_RMS, 1e-5, 2, 8193}};
    assert_int_equal(b->k->plan(b->dev, &spec, &cost, &e), -1);
    assert_int_equal(e.exit_code, EXIT_USER);
    done(k);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(norm_fp32),  cmocka_unit_test(norm_bf16), cmocka_unit_test(many_rows),
        cmocka_unit_test(sum_over_x), cmocka_unit_test(too_wide),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

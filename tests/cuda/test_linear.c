/* linear of the CUDA backend against the CPU backend, forward and backward. */
#include "tests/cuda/op_run.h"

enum { Y = 3 };

/* y row by row, where there is a gap between the rows; and the gaps are left alone. */
static void expect_close_rows(struct op_run *r) {
    int64_t out = r->spec.linear.out, stride = out + r->c->gap;
    double *y[BACKENDS];
    EACH(r->k, b)
    y[b->which] = values_on(b, r->rows[Y]);
    for (int64_t n = 0; n < r->spec.linear.rows; n++) {
        expect_close_values("linear", "y", r->k->compute, y[CUDA] + n * stride, y[PLAIN] + n * stride,
                            y[EXACT] + n * stride, out);
        for (int64_t i = out; i < stride; i++)
            assert_true(isnan(y[CUDA][n * stride + i]));
    }
    for (int i = 0; i < BACKENDS; i++)
        free(y[i]);
}

static void check(enum device_precision precision, const struct op_case *c) {
    struct op_run r;
    run_open(&r, precision, c);
    run_both(&r);
    for (int draw = 1; draw < run_draws(&r); draw++) {
        run_collect(&r);
        run_draw(&r);
        run_both(&r);
    }
    run_expect_close(&r);
    if (c->gap > 0)
        expect_close_rows(&r);
    done(r.k);
}

/* Without `deterministic` candidates are timed, in memory that is given back. */
static void timed_choice(void **state) {
    (void)state;
    const struct kernels *k = kernels_cuda();
    struct device_options options = {.precision = DEVICE_BF16};
    struct device *dev = k->open(&options, NULL);
    struct op_spec spec = {.kind = OP_LINEAR, .linear = {64, 16, 32}};
    struct op_cost cost;
    int before = emulator_allocations();
    assert_int_equal(k->plan(dev, &spec, &cost, NULL), 0);
    assert_int_equal(emulator_allocations(), before);
    assert_int_equal(cost.workspace, 32 << 20);
    assert_int_equal(k->plan(dev, &spec, &cost, NULL), 0);
    k->close(dev);
    assert_int_equal(emulator_allocations(), 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        EVERY_CASE("linear_fp32", OP_LINEAR, DEVICE_FP32, check),
        EVERY_CASE("linear_bf16", OP_LINEAR, DEVICE_BF16, check),
        cmocka_unit_test(timed_choice),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* linear of the CUDA backend, forward and backward, in the harness of tests/cuda/emulator/. */
#include "tests/cuda/fixture.h"

static const struct linear_case {
    int64_t rows, in, out;
} CASES[] = {{1, 1, 1}, {3, 5, 7}, {16, 8, 24}, {33, 40, 129}, {70, 24, 264}, {301, 16, 8}, {1000, 4, 8}};

/* A view of the first `cols` columns of wider rows. */
static struct operand columns(struct operand x, int64_t cols) {
    for (int i = 0; i < BACKENDS; i++)
        x.on[i].shape[1] = cols;
    return x;
}

/* gap: how much longer than its columns every row of x, y and their gradients is. */
static void check(enum device_precision precision, struct linear_case c, bool bias, bool accumulate,
                  int64_t gap) {
    struct backends *k = backends(precision);
    enum dtype t = k->compute;
    struct linear_spec s = {c.rows, c.in, c.out};
    struct operand x = columns(input(k, t, c.rows, c.in + gap, 0, 0, 0), c.in);
    struct operand w = input(k, t, c.out, c.in, 0, 0, 0),
                   b = bias ? input(k, t, c.out, 0, 0, 0, 0) : absent();
    struct operand y_rows = output(k, t, c.rows, c.out + gap, 0, 0, 0), y = columns(y_rows, c.out);
    struct operand dy = columns(input(k, t, c.rows, c.out + gap, 0, 0, 0), c.out);
    struct operand dx = input(k, t, c.rows, c.in, 0, 0, 0);
    struct operand dw =
        accumulate ? input(k, DTYPE_F32, c.out, c.in, 0, 0, 0) : output(k, DTYPE_F32, c.out, c.in, 0, 0, 0);
    struct operand db = !bias        ? absent()
                        : accumulate ? input(k, DTYPE_F32, c.out, 0, 0, 0, 0)
                                     : output(k, DTYPE_F32, c.out, 0, 0, 0, 0);
    plan(k, (struct op_spec){.kind = OP_LINEAR, .linear = s});
    EACH(k, p) {
        p->k->linear(p->dev, &s, on(x, p), on(w, p), on(b, p), on(y, p));
        p->k->linear_backward(p->dev, &s, on(dy, p), on(x, p), on(w, p), on(dx, p), accumulate, on(dw, p),
                              on(db, p), accumulate);
    }
    if (gap == 0)
        expect_close("linear", "y", k, y);
    expect_close("linear_backward", "dx", k, dx);
    expect_close("linear_backward", "dW", k, dw);
    if (bias)
        expect_close("linear_backward", "dbias", k, db);
    if (gap > 0) { /* row by row, and what lies between the rows is left alone */
        double *rows[BACKENDS];
        int64_t stride = c.out + gap;
        EACH(k, p)
        rows[p->which] = values_on(p, y_rows);
        for (int64_t n = 0; n < c.rows; n++) {
            expect_close_values("linear", "y", t, rows[CUDA] + n * stride, rows[PLAIN] + n * stride,
                                rows[EXACT] + n * stride, c.out);
            for (int64_t i = c.out; i < stride; i++)
                assert_true(isnan(rows[CUDA][n * stride + i]));
        }
        for (int i = 0; i < BACKENDS; i++)
            free(rows[i]);
    }
    done(k);
}

static void check_all(enum device_precision precision) {
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++)
        for (int choice = 0; choice < 4; choice++) {
            emulator_seed(i + (unsigned)choice);
            check(precision, CASES[i], choice & 1, choice & 2, 0);
        }
    check(precision, CASES[4], true, true, 8);
    check(precision, CASES[3], true, false, 3);
}

static void linear_fp32(void **state) {
    (void)state;
    check_all(DEVICE_FP32);
}

static void linear_bf16(void **state) {
    (void)state;
    check_all(DEVICE_BF16);
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
        cmocka_unit_test(linear_fp32),
        cmocka_unit_test(linear_bf16),
        cmocka_unit_test(timed_choice),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

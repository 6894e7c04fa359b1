/* residual_norm of the CUDA backend against the CPU backend: forward, recomputed, and backward. */
#include "tests/cuda/op_run.h"

enum { X, DELTA_X, W, B, SUM, Y };

static void check(enum device_precision precision, const struct op_case *c) {
    struct op_run r;
    run_open(&r, precision, c);
    const struct norm_spec *s = &r.spec.norm;
    bool delta = c->options & DELTA;
    struct operand sum = r.x[delta ? SUM : X], again = output(r.k, r.k->compute, s->rows, s->hidden, 0, 0, 0);
    EACH(r.k, b) {
        run_forward(&r, b, NULL);
        if (b->which == PLAIN && delta && precision == DEVICE_BF16) {
            /* The plain computation in bf16 stores the sum, and normalizes what it stored. */
            round_plain(r.k, sum);
            b->k->residual_norm(b->dev, s, on(sum, b), tensor_none(), on(r.x[W], b), on(r.x[B], b),
                                tensor_none(), on(r.x[Y], b), b->saved);
        }
        b->k->residual_norm_recompute(b->dev, s, on(sum, b), on(r.x[W], b), on(r.x[B], b), on(again, b),
                                      b->saved);
        run_backward(&r, b, NULL);
    }
    run_expect_close(&r);
    struct backend *cuda = &r.k->each[CUDA];
    double *first = values_on(cuda, r.x[Y]), *second = values_on(cuda, again);
    assert_memory_equal(first, second, (size_t)(s->rows * s->hidden) * sizeof *first);
    free(first);
    free(second);
    run_expect_same(&r);
    done(r.k);
}

/* Rows whose sums take more shared memory than a block has unless it asks for more. */
static void widest_rows(void **state) {
    (void)state;
    static const struct op_case fp32 = {COMPARE, NORM_CASE(NORM_TYPE_LAYER, 1e-5, 2, 8192), BIAS | SUMS},
                                bf16 = {COMPARE, NORM_CASE(NORM_TYPE_LAYER, 1e-5, 2, 12288), BIAS | SUMS};
    check(DEVICE_FP32, &fp32);
    check(DEVICE_BF16, &bf16);
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

/* Forward, backward, and one sum of the partial gradients, of w alone or of w and b. */
static void launches(void **state) {
    (void)state;
    for (unsigned options = 0; options <= BIAS; options += BIAS) {
        struct op_case c = {COMPARE, NORM_CASE(NORM_TYPE_LAYER, 1e-5, 9, 24), options};
        struct op_run r;
        run_open(&r, DEVICE_BF16, &c);
        int64_t before = emulator_launches();
        run_forward(&r, r.k->each, NULL);
        run_backward(&r, r.k->each, NULL);
        assert_true(emulator_on_gpu() || emulator_launches() - before == 3);
        done(r.k);
    }
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
        EVERY_CASE("norm_fp32", OP_NORM, DEVICE_FP32, check),
        EVERY_CASE("norm_bf16", OP_NORM, DEVICE_BF16, check),
        cmocka_unit_test(widest_rows),
        cmocka_unit_test(sum_over_x),
        cmocka_unit_test(launches),
        cmocka_unit_test(too_wide),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

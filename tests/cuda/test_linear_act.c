/* linear_act and act_linear_backward of the CUDA backend against the CPU backend: the product and the
 * activation one after the other, and in one, where that is faster and right. */
#include "tests/cuda/fixture.h"

#include <stdlib.h>
#include <unistd.h>

/* Of a product that applies GELU, and of one that does not. */
static double fused_seconds, apart_seconds;
static int fused_products;

static double seconds_of(const char *kernel, int candidate) {
    bool fused = strstr(kernel, "with GELU") != NULL;
    fused_products += fused;
    return fused ? fused_seconds : candidate > 0 ? apart_seconds : 1e-6;
}

struct shape {
    int64_t rows, in, out;
    bool bias;
};

struct run {
    struct backends *k;
    struct shape s;
    struct operand x, w, bias, u, act;
};

static struct op_spec spec_of(const struct shape *s) {
    return (struct op_spec){.kind = OP_LINEAR,
                            .no_bias = !s->bias,
                            .gelu_after = true,
                            .gelu_before = true,
                            .linear = {s->rows, s->in, s->out}};
}

/* A device of the backend under test that chooses by time. */
static void choose_by_time(struct backends *k, enum device_precision precision, const char *plan_file) {
    struct backend *b = &k->each[CUDA];
    struct device_options options = {.threads = 1, .precision = precision, .plan_file = plan_file};
    struct error e = {0};
    b->k->close(b->dev);
    b->dev = b->k->open(&options, &e);
    if (!b->dev)
        fail_msg("%s", e.text);
}

static void open_run(struct run *r, enum device_precision precision, struct shape s, bool timed,
                     const char *plan_file) {
    struct backends *k = backends(precision);
    *r = (struct run){.k = k, .s = s};
    if (timed)
        choose_by_time(k, precision, plan_file);
    emulator_seconds = timed ? seconds_of : NULL;
    plan(k, spec_of(&s));
    enum dtype t = k->compute;
    /* u in about [-4, 4], where GELU is neither 0 nor linear */
    r->x = scaled_input(k, t, 4 / sqrt((double)s.in), 0, s.rows, s.in, 0, 0, 0);
    r->w = scaled_input(k, t, 1, 0, s.out, s.in, 0, 0, 0);
    r->bias = s.bias ? input(k, t, s.out, 0, 0, 0, 0) : absent();
    r->u = output(k, t, s.rows, s.out, 0, 0, 0);
    r->act = output(k, t, s.rows, s.out, 0, 0, 0);
}

static void forward(struct run *r, enum act_type type) {
    struct linear_spec s = {r->s.rows, r->s.in, r->s.out};
    EACH(r->k, b)
    b->k->linear_act(b->dev, &s, type, on(r->x, b), on(r->w, b), on(r->bias, b), on(r->u, b), on(r->act, b));
}

/* The layer with the activation in front of it, of the transposed shape, so that u is as wide as in forward. */
static void backward(struct run *r, enum act_type type, bool accumulate) {
    struct linear_spec s = {r->s.rows, r->s.out, r->s.in};
    struct backends *k = r->k;
    enum dtype t = k->compute;
    struct op_spec plans = spec_of(&r->s);
    plans.linear = s;
    plan(k, plans);
    struct operand w = input(k, t, s.out, s.in, 0, 0, 0), dy = input(k, t, s.rows, s.out, 0, 0, 0),
                   act = input(k, t, s.rows, s.in, 0, 0, 0), du = output(k, t, s.rows, s.in, 0, 0, 0),
                   u = scaled_input(k, t, 4, 0, s.rows, s.in, 0, 0, 0);
    struct operand dw = input(k, DTYPE_F32, s.out, s.in, 0, 0, 0),
                   dbias = r->s.bias ? input(k, DTYPE_F32, s.out, 0, 0, 0, 0) : absent();
    EACH(k, b)
    b->k->act_linear_backward(b->dev, &s, type, on(dy, b), tensor_none(), on(act, b), on(w, b), on(u, b),
                              on(du, b), on(dw, b), on(dbias, b), accumulate);
    expect_close("act_linear_backward", "du", k, du);
    expect_close("act_linear_backward", "dW", k, dw);
    if (r->s.bias)
        expect_close("act_linear_backward", "dbias", k, dbias);
}

static void close_run(struct run *r) {
    emulator_seconds = NULL;
    done(r->k);
}

/* Both operations; how many of the three products applied GELU. plan_file: where choices are kept. */
static int run_both(enum device_precision precision, enum act_type type, struct shape s, bool timed,
                    const char *plan_file) {
    struct run r;
    open_run(&r, precision, s, timed, plan_file);
    fused_products = 0;
    forward(&r, type);
    expect_close("linear_act", "act", r.k, r.act); /* waits */
    expect_close("linear_act", "u", r.k, r.u);
    int launched = fused_products;
    struct op_spec plans = spec_of(&s);
    plans.linear = (struct linear_spec){s.rows, s.out, s.in};
    plan(r.k, plans); /* so that timing is not counted below */
    if (plan_file) {
        struct error e;
        assert_int_equal(r.k->each[CUDA].k->check_libraries(r.k->each[CUDA].dev, &e), 0); /* saves it */
    }
    fused_products = 0;
    backward(&r, type, false);
    backward(&r, type, true);
    launched += fused_products;
    close_run(&r);
    return launched;
}

static const struct shape SHAPES[] = {{7, 24, 40, true}, {70, 40, 24, false}, {130, 64, 256, true}};
enum { SHAPE_COUNT = sizeof SHAPES / sizeof *SHAPES };

static void one_after_the_other(void **state) {
    (void)state;
    for (int i = 0; i < SHAPE_COUNT; i++)
        for (enum act_type type = ACT_GELU_TANH; type <= ACT_RELU2; type++)
            for (enum device_precision p = DEVICE_FP32; p <= DEVICE_BF16; p++)
                assert_int_equal(run_both(p, type, SHAPES[i], false, NULL), 0);
}

/* In bf16, with GELU, in rows that cuBLASLt can write u to; and the next start chooses the same without
 * timing. */
static void in_one_where_that_is_faster(void **state) {
    (void)state;
    if (emulator_on_gpu())
        skip();
    char path[] = "/tmp/iha-plans-XXXXXX";
    int file = mkstemp(path);
    unlink(path);
    apart_seconds = 1;
    for (int faster = 1; faster >= 0; faster--) {
        fused_seconds = faster ? 0.5 : 2;
        for (int i = 0; i < SHAPE_COUNT; i++)
            assert_int_equal(run_both(DEVICE_BF16, ACT_GELU_TANH, SHAPES[i], true, NULL), faster ? 3 : 0);
    }
    for (int first = 1; first >= 0; first--) {
        fused_seconds = first ? 0.5 : 2;
        assert_int_equal(run_both(DEVICE_BF16, ACT_GELU_TANH, SHAPES[2], true, path), 3);
    }
    unlink(path);
    const struct shape odd = {9, 16, 20, true}; /* u's rows are no multiple of 8 */
    fused_seconds = 0.5;
    assert_int_equal(run_both(DEVICE_BF16, ACT_GELU_TANH, odd, true, NULL), 0);
    assert_int_equal(run_both(DEVICE_BF16, ACT_RELU2, SHAPES[0], true, NULL), 0);
    assert_int_equal(run_both(DEVICE_FP32, ACT_GELU_TANH, SHAPES[0], true, NULL), 0);
    emulator_no_gelu = true;
    assert_int_equal(run_both(DEVICE_BF16, ACT_GELU_TANH, SHAPES[0], true, NULL), 0);
    emulator_no_gelu = false;
    close(file);
}

/* IHA_GELU chooses without timing, also on a GPU. */
static void as_the_environment_says(void **state) {
    (void)state;
    apart_seconds = fused_seconds = 1;
    for (int fused = 0; fused < 2; fused++) {
        setenv("IHA_GELU", fused ? "fused" : "apart", 1);
        for (int i = 0; i < SHAPE_COUNT; i++) {
            int products = run_both(DEVICE_BF16, ACT_GELU_TANH, SHAPES[i], true, NULL);
            assert_true(emulator_on_gpu() || products == 3 * fused);
        }
    }
    setenv("IHA_GELU", "both", 1);
    struct op_spec spec = spec_of(&SHAPES[0]);
    struct device_options options = {.precision = DEVICE_BF16};
    struct op_cost cost;
    struct error e;
    struct device *dev = kernels_cuda()->open(&options, &e);
    assert_int_equal(kernels_cuda()->plan(dev, &spec, &cost, &e), -1);
    assert_string_equal(e.text, "IHA_GELU=both: the environment variable takes fused or apart");
    kernels_cuda()->close(dev);
    unsetenv("IHA_GELU");
}

/* Wrong ones are found before the first step, and a kernel computes GELU instead: wrong act or u forward,
 * wrong du. */
static void wrong_ones_are_replaced(void **state) {
    (void)state;
    if (emulator_on_gpu())
        skip();
    static const enum emulator_fault faults[] = {PRODUCTS_RIGHT, PRODUCTS_WRONG_AUX, PRODUCTS_WRONG_GELU,
                                                 PRODUCTS_UNWRITTEN_GELU};
    apart_seconds = 1;
    fused_seconds = 0.5;
    for (int i = 0; i < 4; i++) {
        struct shape s = {64, 40, 24, i % 2 == 0};
        struct run r;
        struct error e;
        open_run(&r, DEVICE_BF16, s, true, NULL);
        struct backend *b = &r.k->each[CUDA];
        struct op_spec plans = spec_of(&s);
        plans.linear = (struct linear_spec){s.rows, s.out, s.in};
        plan(r.k, plans);
        emulator_products = (struct emulator_products){faults[i], 8, 3, -1, 0, 0};
        assert_int_equal(b->k->check_libraries(b->dev, &e), 0);
        fused_products = 0;
        emulator_products = (struct emulator_products){PRODUCTS_RIGHT, 0, 1, -1, 0, 0};
        forward(&r, ACT_GELU_TANH);
        expect_close("linear_act", "act", r.k, r.act);
        bool replaced = faults[i] != PRODUCTS_RIGHT;
        assert_int_equal(fused_products, replaced ? 0 : 1);
        fused_products = 0;
        backward(&r, ACT_GELU_TANH, true);
        assert_int_equal(fused_products, replaced && faults[i] != PRODUCTS_WRONG_AUX ? 0 : 1);
        close_run(&r);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_after_the_other),
        cmocka_unit_test(in_one_where_that_is_faster),
        cmocka_unit_test(as_the_environment_says),
        cmocka_unit_test(wrong_ones_are_replaced),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

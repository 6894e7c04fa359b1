/* linear of the CUDA backend against the CPU backend, forward and backward. */
#include "tests/cuda/op_run.h"

#include <stdlib.h>
#include <unistd.h>

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
    assert_true(cost.workspace >= 32 << 20);
    assert_int_equal(k->plan(dev, &spec, &cost, NULL), 0);
    k->close(dev);
    assert_int_equal(emulator_allocations(), 0);
}

/* ---- dbias beside dW ---- */

static double sums_seconds; /* of a kernel that sums columns */
static int sums_launched;

static double seconds_of(const char *kernel, int candidate) {
    bool sums = candidate == 0 && strstr(kernel, "sum_columns");
    sums_launched += sums;
    return sums ? sums_seconds : 1e-3;
}

enum { ROWS = 70, IN = 24, OUT = 40 };

/* dW and dbias of two passes, the second added to the first; *launched: kernels that sum columns in them. */
static void gradients(struct device *dev, float *dw, float *dbias, int *launched) {
    static float values[ROWS * OUT];
    const struct kernels *k = kernels_cuda();
    struct linear_spec s = {ROWS, IN, OUT};
    char *memory = k->alloc(dev, 1 << 16, NULL);
    tensor dy = tensor_of(memory, DTYPE_BF16, ROWS, OUT, 0, 0, 0);
    tensor x = tensor_of(memory + 8192, DTYPE_BF16, ROWS, IN, 0, 0, 0);
    tensor w = tensor_of(memory + 16384, DTYPE_F32, OUT, IN, 0, 0, 0);
    tensor b = tensor_of(memory + 32768, DTYPE_F32, OUT, 0, 0, 0, 0);
    for (int i = 0; i < ROWS * OUT; i++)
        values[i] = (float)((i * 37 % 101) - 50) / 64; /* exact in bf16 */
    k->upload(dev, dy, values, DTYPE_F32);
    k->upload(dev, x, values, DTYPE_F32);
    sums_launched = 0;
    emulator_seconds = seconds_of;
    for (int pass = 0; pass < 2; pass++)
        k->linear_backward(dev, &s, dy, tensor_none(), x, tensor_none(), tensor_none(), false, w, b,
                           pass > 0);
    k->download(dev, w, dw, DTYPE_F32);
    k->download(dev, b, dbias, DTYPE_F32);
    emulator_seconds = NULL;
    *launched = sums_launched;
    k->release(dev, memory);
}

/* Two layers of one shape; the second is not timed again. Returns the bytes of the workspace. */
static size_t plan_timed(struct device *dev, double seconds) {
    struct op_spec spec = {.kind = OP_LINEAR, .linear = {ROWS, IN, OUT}};
    struct op_cost cost, again;
    sums_seconds = seconds;
    emulator_seconds = seconds_of;
    assert_int_equal(kernels_cuda()->plan(dev, &spec, &cost, NULL), 0);
    int before = emulator_products.calls;
    assert_int_equal(kernels_cuda()->plan(dev, &spec, &again, NULL), 0);
    assert_int_equal(emulator_products.calls, before);
    assert_int_equal(again.workspace, cost.workspace);
    emulator_seconds = NULL;
    return cost.workspace;
}

static void check_dbias(double seconds, bool together, const char *plan_file) {
    static float dw[2][OUT * IN], dbias[2][OUT];
    const struct kernels *k = kernels_cuda();
    for (int timed = 0; timed < 2; timed++) {
        struct error e;
        struct device_options options = {
            .precision = DEVICE_BF16, .deterministic = !timed, .plan_file = timed ? plan_file : NULL};
        struct device *dev = k->open(&options, NULL);
        size_t bytes = plan_timed(dev, seconds);
        assert_int_equal(bytes, (32 << 20) + (timed && together ? 256 : 0));
        void *workspace = k->alloc(dev, bytes, NULL);
        int launched;
        k->set_workspace(dev, workspace, bytes);
        assert_int_equal(k->check_libraries(dev, &e), 0);
        gradients(dev, dw[timed], dbias[timed], &launched);
        assert_int_equal(launched, timed && together ? 0 : 2);
        if (timed &&
            together) { /* sums are checked before the first step, and a kernel replaces wrong ones */
            struct device *wrong = k->open(&options, NULL);
            plan_timed(wrong, seconds);
            k->set_workspace(wrong, workspace, bytes);
            emulator_products = (struct emulator_products){PRODUCTS_WRONG_SUM, OUT - 1, 1, -1, 0, 0};
            assert_int_equal(k->check_libraries(wrong, &e), 0);
            gradients(wrong, dw[timed], dbias[timed], &launched);
            assert_int_equal(launched, 2);
            emulator_products = (struct emulator_products){PRODUCTS_RIGHT, 0, 1, -1, 0, 0};
            k->close(wrong);
        }
        k->release(dev, workspace);
        k->close(dev);
    }
    for (int i = 0; i < OUT * IN; i++)
        assert_true(dw[0][i] == dw[1][i]);
    for (int i = 0; i < OUT; i++) {
        double sum = 0;
        for (int row = 0; row < ROWS; row++)
            sum += ((row * OUT + i) * 37 % 101 - 50) / 64.0;
        assert_true(dbias[0][i] == (float)(2 * sum) && dbias[1][i] == (float)(2 * sum)); /* exact sums */
    }
    assert_int_equal(emulator_allocations(), 0);
}

/* What a model without gradients or biases never calls is not planned. */
static void what_is_never_called_is_not_planned(void **state) {
    (void)state;
    if (emulator_on_gpu())
        skip();
    char path[] = "/tmp/iha-plans-XXXXXX";
    close(mkstemp(path));
    static const struct {
        bool no_bias, no_backward;
        int shapes; /* y, y with bias, dx, dW, dW with dbias */
    } expected[] = {{true, true, 1}, {false, true, 2}, {true, false, 3}, {false, false, 5}};
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++) {
        struct device_options options = {.precision = DEVICE_BF16, .plan_file = path};
        struct op_spec spec = {.kind = OP_LINEAR,
                               .no_bias = expected[i].no_bias,
                               .no_backward = expected[i].no_backward,
                               .linear = {ROWS, IN, OUT}};
        struct op_cost cost;
        struct error e;
        unlink(path);
        struct device *dev = kernels_cuda()->open(&options, NULL);
        assert_int_equal(kernels_cuda()->plan(dev, &spec, &cost, NULL), 0);
        void *workspace = kernels_cuda()->alloc(dev, 64 << 20, NULL);
        kernels_cuda()->set_workspace(dev, workspace, 64 << 20);
        assert_int_equal(kernels_cuda()->check_libraries(dev, &e), 0);
        kernels_cuda()->release(dev, workspace);
        kernels_cuda()->close(dev);
        FILE *f = fopen(path, "r");
        char line[4096];
        int shapes = 0;
        while (fgets(line, sizeof line, f))
            shapes += strncmp(line, "matmul ", 7) == 0;
        fclose(f);
        assert_int_equal(shapes, expected[i].shapes);
    }
    unlink(path);
}

/* Where that is faster, cuBLASLt sums the columns of dy beside dW; the next start does the same. */
static void dbias_where_it_is_faster(void **state) {
    (void)state;
    if (emulator_on_gpu())
        skip();
    char path[] = "/tmp/iha-plans-XXXXXX";
    int file = mkstemp(path);
    check_dbias(1, true, NULL);
    check_dbias(0, false, NULL);
    unlink(path);
    check_dbias(1, true, path);
    check_dbias(0, true, path);
    emulator_no_sums = true;
    check_dbias(1, false, NULL);
    emulator_no_sums = false;
    unlink(path);
    close(file);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        EVERY_CASE("linear_fp32", OP_LINEAR, DEVICE_FP32, check),
        EVERY_CASE("linear_bf16", OP_LINEAR, DEVICE_BF16, check),
        cmocka_unit_test(timed_choice),
        cmocka_unit_test(dbias_where_it_is_faster),
        cmocka_unit_test(what_is_never_called_is_not_planned),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

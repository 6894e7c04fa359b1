/* The check of the library's matrix products at the start: products that leave a part unwritten or have a
 * wrong value in one thread's part end the run; right ones pass, whatever their shape. This program
 * replaces dnnl_sgemm by one that computes wrong results on request. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <oneapi/dnnl/dnnl.h>
#include <string.h>

#include "kernels/kernels.h"

static struct {
    enum { RIGHT, UNWRITTEN, WRONG } fault;
    int part, parts; /* of the rows, or of the columns */
    bool columns;
    bool only_added; /* the fault shows only where the product is added to what is there */
    int call;        /* of the three products of a linear layer, the one that is wrong */
    int calls;       /* so far */
} product;

static bool in_part(int64_t index, int64_t count) {
    return index >= count * product.part / product.parts &&
           index < count * (product.part + 1) / product.parts;
}

dnnl_status_t dnnl_sgemm(char ta, char tb, dnnl_dim_t m, dnnl_dim_t n, dnnl_dim_t k, float alpha,
                         const float *a, dnnl_dim_t lda, const float *b, dnnl_dim_t ldb, float beta, float *c,
                         dnnl_dim_t ldc) {
    /* Each of the three is asked for twice, the second time to be added to. */
    bool faulty = product.calls++ / 2 % 3 == product.call && product.fault != RIGHT &&
                  (beta != 0) >= product.only_added;
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            bool here = faulty && (product.columns ? in_part(j, n) : in_part(i, m));
            float sum = 0;
            for (int64_t l = 0; l < k; l++)
                sum += a[ta == 'T' ? l * lda + i : i * lda + l] * b[tb == 'T' ? j * ldb + l : l * ldb + j];
            if (!here || product.fault == WRONG)
                c[i * ldc + j] = alpha * sum + (beta != 0 ? beta * c[i * ldc + j] : 0) + (here ? 1 : 0);
        }
    return dnnl_success;
}

/* The status of checking one linear layer, or classifier, of that shape. */
static int check(int64_t rows, int64_t in, int64_t out, bool classifier, struct error *e) {
    const struct kernels *k = kernels_cpu();
    struct device_options options = {.threads = 2, .precision = DEVICE_FP32};
    struct device *dev = k->open(&options, e);
    struct op_spec linear = {.kind = OP_LINEAR, .linear = {rows, in, out}};
    struct op_spec head = {.kind = OP_CLASSIFIER, .classifier = {rows, in, out}};
    struct op_cost cost;
    assert_non_null(dev);
    assert_int_equal(k->plan(dev, classifier ? &head : &linear, &cost, e), 0);
    product.calls = 0;
    int status = k->check_libraries(dev, e);
    if (status == 0)
        assert_int_equal(k->check_libraries(dev, e), 0); /* nothing is checked twice */
    if (status == 0)
        assert_int_equal(product.calls, 6);
    k->close(dev);
    return status;
}

static const int64_t SHAPES[][3] = {{1, 8, 8},    {1, 48, 130},  {7, 1, 1},
                                    {64, 40, 24}, {300, 33, 65}, {1000, 16, 257}};
enum { SHAPE_COUNT = sizeof SHAPES / sizeof *SHAPES };

static void right_products_pass(void **state) {
    (void)state;
    struct error e;
    product.fault = RIGHT;
    for (int i = 0; i < SHAPE_COUNT; i++)
        for (int classifier = 0; classifier < 2; classifier++)
            assert_int_equal(check(SHAPES[i][0], SHAPES[i][1], SHAPES[i][2], classifier, &e), 0);
}

/* Each half, quarter and eighth of the rows or columns, in each of the three products. */
static void wrong_parts_are_found(void **state) {
    (void)state;
    for (product.fault = UNWRITTEN; product.fault <= WRONG; product.fault++)
        for (int columns = 0; columns < 2; columns++)
            for (product.parts = 2; product.parts <= 8; product.parts *= 2)
                for (product.part = 0; product.part < product.parts; product.part++)
                    for (product.call = 0; product.call < 3; product.call++)
                        for (int only_added = 0; only_added < 2; only_added++) {
                            product.only_added = only_added;
                            struct error e;
                            product.columns = columns;
                            assert_int_equal(check(64, 40, 24, columns, &e), -1);
                            assert_int_equal(e.exit_code, EXIT_RUN);
                            assert_non_null(strstr(e.text, "oneDNN computes wrong matrix products"));
                        }
    product.fault = RIGHT;
    product.only_added = false;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(right_products_pass),
        cmocka_unit_test(wrong_parts_are_found),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

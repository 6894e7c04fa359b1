/* The check of the library's matrix products at the start: products that leave a part unwritten or have a
 * wrong value in one thread's part end the run; right ones pass, whatever their shape. This program
 * replaces dnnl_sgemm by one that computes wrong results on request, and for bf16 spoils what
 * dnnl_primitive_execute has computed. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <dlfcn.h>
#include <math.h>
#include <oneapi/dnnl/dnnl.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/kernels.h"

static struct {
    enum { RIGHT, UNWRITTEN, WRONG } fault;
    int part, parts; /* of the rows, or of the columns */
    bool columns;
    bool only_added; /* the fault shows only where the product is added to what is there */
    int call;        /* of the three products of a linear layer, the one that is wrong */
    int calls;       /* so far */
    int64_t rows, in, out;
} product;

/* Each of the three products is asked for twice, the second time to be added to. */
static bool next_is_faulty(void) {
    int call = product.calls++;
    return call / 2 % 3 == product.call && product.fault != RIGHT && call % 2 >= product.only_added;
}

static bool in_part(int64_t index, int64_t count) {
    return index >= count * product.part / product.parts &&
           index < count * (product.part + 1) / product.parts;
}

dnnl_status_t dnnl_sgemm(char ta, char tb, dnnl_dim_t m, dnnl_dim_t n, dnnl_dim_t k, float alpha,
                         const float *a, dnnl_dim_t lda, const float *b, dnnl_dim_t ldb, float beta, float *c,
                         dnnl_dim_t ldc) {
    bool faulty = next_is_faulty();
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

/* Where a part of C [m,n] is: that of the fault. before: C as it was. */
static void spoil(void *c, const void *before, int64_t m, int64_t n, bool reals) {
    for (int64_t i = 0; i < m * n; i++) {
        if (!(product.columns ? in_part(i % n, n) : in_part(i / n, m)))
            continue;
        float *x = (float *)c + i;
        uint16_t *half = (uint16_t *)c + i;
        if (product.fault == UNWRITTEN && reals)
            *x = ((const float *)before)[i];
        else if (product.fault == UNWRITTEN)
            *half = ((const uint16_t *)before)[i];
        else if (reals)
            *x += 1;
        else
            *half ^= 1; /* the last bit */
    }
}

dnnl_status_t dnnl_primitive_execute(const_dnnl_primitive_t primitive, dnnl_stream_t stream, int count,
                                     const dnnl_exec_arg_t *arguments) {
    static dnnl_status_t (*execute)(const_dnnl_primitive_t, dnnl_stream_t, int, const dnnl_exec_arg_t *);
    static float before[1 << 20];
    if (!execute)
        *(void **)&execute = dlsym(RTLD_NEXT, "dnnl_primitive_execute");
    int which = product.calls / 2 % 3;
    bool faulty = next_is_faulty(), reals = which == 2;
    int64_t m = which == 2 ? product.out : product.rows, n = which == 0 ? product.out : product.in;
    void *c = NULL;
    for (int i = 0; i < count; i++)
        if (arguments[i].arg == DNNL_ARG_DST)
            dnnl_memory_get_data_handle(arguments[i].memory, &c);
    memcpy(before, c, (size_t)(m * n) * (reals ? sizeof(float) : sizeof(uint16_t)));
    dnnl_status_t status = execute(primitive, stream, count, arguments);
    dnnl_stream_wait(stream);
    if (faulty)
        spoil(c, before, m, n, reals);
    return status;
}

static enum device_precision precision;

/* The status of checking one linear layer, or classifier, of that shape. */
static int check(int64_t rows, int64_t in, int64_t out, bool classifier, struct error *e) {
    const struct kernels *k = precision == DEVICE_BF16 ? kernels_cpu_bf16() : kernels_cpu();
    struct device_options options = {.threads = 2, .precision = precision};
    struct device *dev = k->open(&options, e);
    struct op_spec linear = {.kind = OP_LINEAR, .linear = {rows, in, out}};
    struct op_spec head = {.kind = OP_CLASSIFIER, .classifier = {rows, in, out}};
    struct op_cost cost;
    assert_non_null(dev);
    assert_int_equal(k->plan(dev, classifier ? &head : &linear, &cost, e), 0);
    void *workspace = k->alloc(dev, cost.workspace, e);
    k->set_workspace(dev, workspace, cost.workspace);
    product.calls = 0;
    product.rows = rows < 256 ? rows : 256; /* no more are checked */
    product.in = in;
    product.out = out;
    int status = k->check_libraries(dev, e);
    if (status == 0)
        assert_int_equal(k->check_libraries(dev, e), 0); /* nothing is checked twice */
    if (status == 0)
        assert_int_equal(product.calls, 6);
    for (size_t i = 0; i < cost.workspace && status == 0; i++)
        assert_int_equal(((const char *)workspace)[i], 0); /* it may be memory that must begin with zeros */
    k->release(dev, workspace);
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

static void right_bf16_products_pass(void **state) {
    precision = DEVICE_BF16;
    right_products_pass(state);
}

/* By conversion, the fp32 sums are in scratch memory, where an unwritten part may hold the product of before. */
static void wrong_parts_of_bf16_are_found(void **state) {
    precision = DEVICE_BF16;
    if (!cpu_multiplies_bf16())
        skip();
    wrong_parts_are_found(state);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(right_products_pass),
        cmocka_unit_test(wrong_parts_are_found),
        cmocka_unit_test(right_bf16_products_pass),
        cmocka_unit_test(wrong_parts_of_bf16_are_found),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* Muon's operations on the CPU: the orthogonalized matrix against Newton-Schulz iterations in double that are written
 * another way, by the error of the same in float; momentum and update against their equations; a skipped step. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "tests/lib/model_fixture.h"

static tensor flat(float *x, int64_t n) {
    return tensor_of(x, DTYPE_F32, n, 0, 0, 0, 0);
}

static void *zeros(int64_t count, size_t each) {
    void *p = calloc((size_t)count, each);
    assert_non_null(p);
    return p;
}

/* ---- the reference: tall matrices are transposed, and (a I + b A + c A^2) X is a sum of three products ---- */

#define REFERENCE(name, type)                                                                                \
    static void name##_product(const type *a, const type *b, type *out, int64_t m, int64_t n, int64_t k) {   \
        for (int64_t i = 0; i < m; i++)                                                                      \
            for (int64_t j = 0; j < n; j++) {                                                                \
                type sum = 0;                                                                                \
                for (int64_t l = 0; l < k; l++)                                                              \
                    sum += a[i * k + l] * b[l * n + j];                                                      \
                out[i * n + j] = sum;                                                                        \
            }                                                                                                \
    }                                                                                                        \
    static void name##_transpose(const type *a, type *out, int64_t rows, int64_t cols) {                     \
        for (int64_t i = 0; i < rows; i++)                                                                   \
            for (int64_t j = 0; j < cols; j++)                                                               \
                out[j * rows + i] = a[i * cols + j];                                                         \
    }                                                                                                        \
    static void name(const float *matrix, double *result, int64_t rows, int64_t cols) {                      \
        int64_t n = rows * cols, r = rows < cols ? rows : cols, c = n / r;                                   \
        type *x = zeros(n, sizeof *x), *y = zeros(n, sizeof *x), *z = zeros(n, sizeof *x);                   \
        type *square = zeros(r * r, sizeof *x);                                                              \
        double norm = 0;                                                                                     \
        for (int64_t i = 0; i < n; i++)                                                                      \
            norm += (double)matrix[i] * (double)matrix[i];                                                   \
        for (int64_t i = 0; i < n; i++)                                                                      \
            y[i] = (type)(norm > 0 ? (double)matrix[i] / sqrt(norm) : 0);                                    \
        rows > cols ? name##_transpose(y, x, rows, cols) : (void)memcpy(x, y, (size_t)n * sizeof *x);        \
        for (int step = 0; step < 5; step++) {                                                               \
            name##_transpose(x, y, r, c);                                                                    \
            name##_product(x, y, square, r, r, c);                                                           \
            name##_product(square, x, y, r, c, r);                                                           \
            name##_product(square, y, z, r, c, r);                                                           \
            for (int64_t i = 0; i < n; i++)                                                                  \
                x[i] = (type)3.4445 * x[i] + (type)-4.7750 * y[i] + (type)2.0315 * z[i];                     \
        }                                                                                                    \
        rows > cols ? name##_transpose(x, y, r, c) : (void)memcpy(y, x, (size_t)n * sizeof *x);              \
        for (int64_t i = 0; i < n; i++)                                                                      \
            result[i] = (double)y[i];                                                                        \
        free(x), free(y), free(z), free(square);                                                             \
    }
REFERENCE(in_double, double)
REFERENCE(in_float, float)

static void orthogonalize(float *x, int64_t rows, int64_t cols, int skip) {
    struct device *dev = fixture_device();
    struct op_spec spec = {.kind = OP_ORTHOGONALIZE, .orthogonalize = {rows, cols}};
    struct step_state state = {.skip = skip};
    struct op_cost cost;
    struct error e;
    assert_int_equal(kernels_cpu()->plan(dev, &spec, &cost, &e), 0);
    void *workspace = malloc(cost.workspace);
    assert_non_null(workspace);
    kernels_cpu()->set_workspace(dev, workspace, cost.workspace);
    kernels_cpu()->orthogonalize(dev, &spec.orthogonalize, tensor_of(x, DTYPE_F32, rows, cols, 0, 0, 0),
                                 &state);
    kernels_cpu()->set_workspace(dev, NULL, 0);
    free(workspace);
}

static double error_of(const double *exact, const double *x, int64_t n) {
    double sum = 0, norm = 0;
    for (int64_t i = 0; i < n; i++) {
        sum += (x[i] - exact[i]) * (x[i] - exact[i]);
        norm += exact[i] * exact[i];
    }
    return sqrt(sum / norm);
}

/* Errors of one matrix, and of the plain computation in float. rank: of the matrix; 0: full. */
static void errors_of_matrix(int64_t rows, int64_t cols, double scale, int64_t rank, uint64_t seed, double *error,
                             double *plain_error) {
    int64_t n = rows * cols;
    float *x = zeros(n, sizeof *x);
    double *exact = zeros(n, sizeof *exact), *plain = zeros(n, sizeof *plain),
           *found = zeros(n, sizeof *found);
    for (int64_t i = 0; i < n; i++) {
        int64_t row = i / cols;
        x[i] = rank > 0 && row >= rank ? x[i % cols + (row % rank) * cols]
                                       : (float)(scale * fixture_noise(&seed));
    }
    in_double(x, exact, rows, cols);
    in_float(x, plain, rows, cols);
    orthogonalize(x, rows, cols, 0);
    for (int64_t i = 0; i < n; i++)
        found[i] = (double)x[i];
    *error = error_of(exact, found, n);
    *plain_error = error_of(exact, plain, n);
    free(x), free(exact), free(plain), free(found);
}

/* The error of one small matrix is a matter of chance: root mean squares over many decide. */
static void check_matrix(int64_t rows, int64_t cols, double scale, int64_t rank) {
    int matrices = rows * cols < 4096 ? 40 : 1;
    double sum = 0, plain_sum = 0;
    for (int i = 0; i < matrices; i++) {
        double error, plain;
        errors_of_matrix(rows, cols, scale, rank, (uint64_t)(rows * 1000 + cols + i * 1000000), &error, &plain);
        sum += error * error;
        plain_sum += plain * plain;
    }
    double error = sqrt(sum / matrices), limit = 2 * sqrt(plain_sum / matrices);
    if (!(error <= (limit > 2e-7 ? limit : 2e-7)))
        fail_msg("%lld x %lld: error %.3g, limit %.3g", (long long)rows, (long long)cols, error, limit);
}

static void matrices_are_orthogonalized(void **state) {
    (void)state;
    static const int64_t shapes[][2] = {{1, 1},   {1, 9},   {9, 1},   {3, 5},     {5, 3},
                                        {32, 32}, {33, 90}, {90, 33}, {210, 230}, {230, 210}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        check_matrix(shapes[i][0], shapes[i][1], 1, 0);
    check_matrix(12, 20, 1, 5);
    check_matrix(12, 20, 1e-30, 0); /* its squares are below the smallest float */
    check_matrix(12, 20, 1e30, 0);
}

static void a_zero_matrix_stays_zero_and_a_skipped_step_changes_nothing(void **state) {
    (void)state;
    float x[6] = {0}, y[6] = {1, 2, 3, -4, 5, NAN}, before[6];
    orthogonalize(x, 2, 3, 0);
    for (int i = 0; i < 6; i++)
        assert_true(x[i] == 0);
    memcpy(before, y, sizeof y);
    orthogonalize(y, 2, 3, STEP_NOT_FINITE);
    assert_memory_equal(y, before, sizeof y);
}

/* ---- momentum and update ---- */

enum { N = 300 };
static const struct param_group GROUPS[] = {{10, 100, 2, 0.1f, 1.5f, 0}, {120, 250, 0.5f, 0, 3, 0}};

static bool in_group(int i, const struct param_group **g) {
    *g = i < 120 ? &GROUPS[0] : &GROUPS[1];
    return i >= (*g)->begin && i < (*g)->end;
}

static void momentum_and_update_follow_their_equations(void **state) {
    (void)state;
    struct device *dev = fixture_device();
    float p[N], g[N], m[N], p0[N], g0[N], m0[N];
    uint64_t seed = 5;
    for (int i = 0; i < N; i++) {
        p0[i] = p[i] = (float)fixture_noise(&seed);
        g0[i] = g[i] = (float)fixture_noise(&seed);
        m0[i] = m[i] = (float)fixture_noise(&seed);
    }
    for (int skip = 1; skip >= 0; skip--) {
        struct step_state s = {.lr = 0.25, .factor = 0.5, .skip = skip};
        kernels_cpu()->muon_momentum(dev, 0.9, GROUPS, 2, flat(g, N), flat(m, N), &s);
        kernels_cpu()->muon_update(dev, GROUPS, 2, flat(p, N), tensor_none(), flat(g, N), &s);
        if (skip) {
            assert_memory_equal(p, p0, sizeof p);
            assert_memory_equal(g, g0, sizeof g);
            assert_memory_equal(m, m0, sizeof m);
        }
    }
    for (int i = 0; i < N; i++) {
        const struct param_group *group;
        bool inside = in_group(i, &group);
        double gradient = 0.5 * (double)g0[i], moment = 0.9 * (double)m0[i] + gradient;
        double direction = gradient + 0.9 * moment, lr = 0.25 * (double)group->lr_scale;
        double weight = (double)p0[i] - lr * ((double)group->muon_scale * direction +
                                              (double)group->weight_decay * (double)p0[i]);
        assert_true(fabs((double)m[i] - (inside ? moment : (double)m0[i])) < 1e-6);
        assert_true(fabs((double)g[i] - (inside ? direction : (double)g0[i])) < 1e-6);
        assert_true(fabs((double)p[i] - (inside ? weight : (double)p0[i])) < 2e-6);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(matrices_are_orthogonalized),
        cmocka_unit_test(a_zero_matrix_stays_zero_and_a_skipped_step_changes_nothing),
        cmocka_unit_test(momentum_and_update_follow_their_equations),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

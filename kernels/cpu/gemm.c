/* Matrix products in fp32, by oneDNN, which chooses the best kernel for the processor at run time; in double,
 * which oneDNN does not have and only gradient tests use, by plain loops. bf16: gemm_bf16.c. */
#include "kernels/cpu/cpu.h"

#ifndef KERNELS_DOUBLE

#include <oneapi/dnnl/dnnl.h>
#include <stdio.h>
#include <stdlib.h>

void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, const real *a, int64_t lda,
          const real *b, int64_t ldb, real beta, real *c, int64_t ldc) {
    dnnl_status_t status = dnnl_sgemm(transpose_a ? 'T' : 'N', transpose_b ? 'T' : 'N', m, n, k, 1.0f, a, lda,
                                      b, ldb, beta, c, ldc);
    if (status != dnnl_success) {
        fprintf(stderr, "gemm: oneDNN failed for %lld x %lld x %lld (status %d)\n", (long long)m,
                (long long)n, (long long)k, (int)status);
        abort();
    }
}

#else

void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, const real *a, int64_t lda,
          const real *b, int64_t ldb, real beta, real *c, int64_t ldc) {
#pragma omp parallel for if (m * n * k > 100000)
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            real sum = 0;
            for (int64_t l = 0; l < k; l++)
                sum +=
                    a[transpose_a ? l * lda + i : i * lda + l] * b[transpose_b ? j * ldb + l : l * ldb + j];
            c[i * ldc + j] = sum + (beta != 0 ? beta * c[i * ldc + j] : 0);
        }
}

#endif

static void add_bias(const struct gemm *g, const real *bias, real *c) {
#pragma omp parallel for
    for (int64_t i = 0; i < g->m; i++)
#pragma omp simd
        for (int64_t j = 0; j < g->n; j++)
            c[i * g->ldc + j] += bias[j];
}

int cpu_gemm_plan(struct device *dev, const struct gemm *g, bool to_real, size_t *workspace,
                  struct error *e) {
    (void)dev, (void)g, (void)to_real, (void)workspace, (void)e;
    return 0;
}

void cpu_gemm(struct device *dev, const struct gemm *g, const elem *a, const elem *b, const elem *bias,
              elem *c, size_t used) {
    (void)dev, (void)used;
    gemm(g->transpose_a, g->transpose_b, g->m, g->n, g->k, a, g->lda, b, g->ldb, g->accumulate, c, g->ldc);
    if (g->bias)
        add_bias(g, bias, c);
}

void cpu_gemm_real(struct device *dev, const struct gemm *g, const elem *a, const elem *b, real *c,
                   size_t used) {
    cpu_gemm(dev, g, a, b, NULL, c, used);
}

int cpu_gemm_build(struct device *dev, const struct gemm *g, bool to_real, struct error *e) {
    (void)dev, (void)g, (void)to_real, (void)e;
    return 0;
}

void cpu_gemm_end_check(struct device *dev) {
    (void)dev;
}

void cpu_gemm_free(struct device *dev) {
    (void)dev;
}

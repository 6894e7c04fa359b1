/* Matrix products. In float by oneDNN, which chooses the best kernel for the processor at run time. In
 * double, which oneDNN does not have and only gradient tests use, by plain loops. */
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
        fprintf(stderr, "gemm: oneDNN failed for %lld x %lld x %lld (status %d)\n", (long long)m, (long long)n,
                (long long)k, (int)status);
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

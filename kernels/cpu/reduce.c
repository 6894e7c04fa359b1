/* The sum of partial gradients that threads have computed; see cpu.h. */
#include "kernels/cpu/cpu.h"

void sum_partials(const real *partials, int parts, int64_t stride, int64_t n, real *out, bool accumulate) {
#pragma omp parallel for schedule(static) if (parts * n > 32768)
    for (int64_t i = 0; i < n; i++) {
        real sum = accumulate ? out[i] : 0;
        for (int p = 0; p < parts; p++)
            sum += partials[p * stride + i];
        out[i] = sum;
    }
}

/* Sums whose order does not depend on which block runs when: what blocks computed apart is added up here. */
#include "kernels/cuda/cuda.cuh"

enum { COLUMNS = 32, LANES = 16 };

/* Block (COLUMNS, LANES): each lane adds every LANES-th share, then the lanes are added in order.
 * Bytes: 4 n parts. */
static __global__ void __launch_bounds__(COLUMNS *LANES)
    sum_shares(const float *shares, int parts, int64_t n, float *out, bool accumulate) {
    __shared__ float lanes[LANES][COLUMNS];
    int64_t i = (int64_t)blockIdx.x * COLUMNS + threadIdx.x;
    float sum = 0;
    if (i < n) {
#pragma unroll 4
        for (int p = (int)threadIdx.y; p < parts; p += LANES)
            sum += shares[p * n + i];
    }
    lanes[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || i >= n)
        return;
    for (int lane = 1; lane < LANES; lane++)
        sum += lanes[lane][threadIdx.x];
    out[i] = accumulate ? out[i] + sum : sum;
}

void sum_parts(struct device *dev, const float *shares, int parts, int64_t n, float *out, bool accumulate) {
    launch<sum_shares>(dev, ceil_div(n, COLUMNS), dim3(COLUMNS, LANES), 0, shares, parts, n, out, accumulate);
}

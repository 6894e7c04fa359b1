/* Adds up partial sums that blocks have written, in an order that does not depend on how blocks are
 * scheduled. This replaces float atomics, whose order, and so whose rounding, differs from run to run. */
#include "kernels/cuda/cuda.cuh"

enum { COLUMNS = 32, LANES = 16 };

struct sums {
    struct partial_sum of[MAX_PARTIAL_SUMS];
};

/* Grid: (blocks along n, sums). Block (COLUMNS, LANES): each lane adds every LANES-th part, then the lanes are added in
 * order. A warp has COLUMNS neighbouring elements of one part, which it loads coalesced. Bytes: 4 n parts a sum. */
static __global__ void __launch_bounds__(COLUMNS *LANES)
    sum_parts(const float *partials, int parts, int64_t n, struct sums sums) {
    wait_for_previous();
    __shared__ float lanes[LANES][COLUMNS];
    int64_t i = (int64_t)blockIdx.x * COLUMNS + threadIdx.x;
    float sum = 0;
    partials += blockIdx.y * parts * n;
    if (i < n) {
#pragma unroll 4
        for (int p = (int)threadIdx.y; p < parts; p += LANES)
            sum += partials[p * n + i];
    }
    lanes[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || i >= n)
        return;
    for (int lane = 1; lane < LANES; lane++)
        sum += lanes[lane][threadIdx.x];
    struct partial_sum to = sums.of[0];
#pragma unroll
    for (unsigned k = 1; k < MAX_PARTIAL_SUMS; k++) /* no indexing, which would copy the argument to memory */
        if (blockIdx.y == k)
            to = sums.of[k];
    to.out[i] = to.accumulate ? to.out[i] + sum : sum;
}

void sum_partials(struct device *dev, const float *partials, int parts, int64_t n,
                  std::initializer_list<struct partial_sum> sums) {
    struct sums all = {};
    unsigned count = 0;
    for (const struct partial_sum &sum : sums)
        if (sum.out)
            all.of[count++] = sum;
    launch<sum_parts>(dev, dim3((unsigned)ceil_div(n, COLUMNS), count), dim3(COLUMNS, LANES), 0, partials,
                      parts, n, all);
}

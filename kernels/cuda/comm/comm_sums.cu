/* Kernels of reduce_scatter and all_reduce: sums in rank order, and rounding to bf16. */
#include "kernels/cuda/comm/comm_sums.h"

#include "kernels/cuda/cuda.cuh"

enum { THREADS = 256 };

/* Grid: n / (THREADS V) blocks, V elements per thread; n is a multiple of V. A thread sums its elements
 * over all ranks in registers, so each value is read once. */
template <typename T, int V>
static __global__ void __launch_bounds__(THREADS)
    add_ranks(const float *own, const T *others, int rank, int ranks, int64_t n, float *out,
              bool accumulate) {
    wait_for_previous();
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * V;
    if (i >= n)
        return;
    float sum[V], x[V];
    if (rank == 0)
        load(own + i, sum);
    else
        load(others + i, sum);
#pragma unroll 4
    for (int r = 1; r < ranks; r++) {
        if (r == rank)
            load(own + i, x);
        else
            load(others + r * n + i, x);
#pragma unroll
        for (int j = 0; j < V; j++)
            sum[j] += x[j];
    }
    if (accumulate) {
        load(out + i, x);
#pragma unroll
        for (int j = 0; j < V; j++)
            sum[j] = x[j] + sum[j];
    }
    store(out + i, sum);
}

void comm_add_in_rank_order(cudaStream_t stream, const float *own, const void *others, enum dtype dtype,
                            int rank, int ranks, int64_t n, float *out, bool accumulate) {
    by_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        /* Row r of `others` starts at r n, so it is aligned only if n is a multiple of the width. */
        by_width<T>(n, aligned16({own, others, out}), [&](auto width) {
            constexpr int V = decltype(width)::value;
            launch_on<add_ranks<T, V>>(stream, ceil_div(n, THREADS * V), THREADS, 0, own, (const T *)others,
                                       rank, ranks, n, out, accumulate);
        });
    });
}

/* Grid: n / (THREADS V) blocks, V elements per thread; the last thread adds the remainder one by one. */
template <int V>
static __global__ void __launch_bounds__(THREADS) add_kernel(const float *x, int64_t n, float *out) {
    wait_for_previous();
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * V;
    float a[V], b[V];
    if (i + V > n) {
        for (; i < n; i++)
            out[i] += x[i];
        return;
    }
    load(x + i, a);
    load(out + i, b);
#pragma unroll
    for (int j = 0; j < V; j++)
        b[j] += a[j];
    store(out + i, b);
}

void comm_add_to(cudaStream_t stream, const float *x, int64_t n, float *out) {
    by_width<float>(0, aligned16({x, out}), [&](auto width) {
        constexpr int V = decltype(width)::value;
        launch_on<add_kernel<V>>(stream, ceil_div(n, THREADS * V), THREADS, 0, x, n, out);
    });
}

/* The same grid and remainder. */
template <int V>
static __global__ void __launch_bounds__(THREADS) round_kernel(const float *from, int64_t n, bf16 *to) {
    wait_for_previous();
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * V;
    float x[V];
    if (i + V > n) {
        for (; i < n; i++)
            to[i] = __float2bfloat16_rn(from[i]);
        return;
    }
    load(from + i, x);
    store(to + i, x);
}

void comm_round_to_bf16(cudaStream_t stream, const float *from, int64_t n, void *to) {
    by_width<bf16>(0, aligned16({from, to}), [&](auto width) {
        constexpr int V = decltype(width)::value;
        launch_on<round_kernel<V>>(stream, ceil_div(n, THREADS * V), THREADS, 0, from, n, (bf16 *)to);
    });
}

static __global__ void sum_doubles_kernel(const double *all, int ranks, int count, double *values) {
    wait_for_previous();
    int i = (int)threadIdx.x;
    double sum = all[i];
    for (int r = 1; r < ranks; r++)
        sum += all[r * count + i];
    values[i] = sum;
}

void comm_sum_doubles(cudaStream_t stream, const double *all, int ranks, int count, double *values) {
    launch_on<sum_doubles_kernel>(stream, 1, count, 0, all, ranks, count, values);
}

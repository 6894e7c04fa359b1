/* What the checks of libraries share (check_matmul.cu, attention/check_attention.cu): reproducible values, which timing.cu
 * uses as well, and a search for parts of a result that were not written. */
#ifndef IHA_KERNELS_CUDA_CHECK_VALUES_CUH
#define IHA_KERNELS_CUDA_CHECK_VALUES_CUH

#include "kernels/cuda/cuda.cuh"

enum { CHECK_THREADS = 256 };

/* The index of the first wrong element, in device memory. */
typedef unsigned long long wrong_index;
constexpr wrong_index NONE_WRONG = ~0ull;

/* A number of 32 random bits for each index, without a pattern that a wrong stride would repeat. */
static __host__ __device__ inline uint32_t random_bits(uint32_t seed, int64_t index) {
    uint32_t h = ((uint32_t)index + (uint32_t)(index >> 32) * 40503u + seed * 668265263u) * 2654435761u;
    h = (h ^ h >> 15) * 2246822519u;
    return (h ^ h >> 13) * 3266489917u;
}

/* Blocks for n elements, each thread taking several: no more than keep the GPU busy. */
static inline unsigned check_blocks(const struct device *dev, int64_t n) {
    return (unsigned)min64(ceil_div(n, CHECK_THREADS), (int64_t)dev->sm_count * 8);
}

/* *found = the first index in x [rows, cols] that is NaN, if that is less. Bytes moved: the matrix. */
template <typename T>
static __global__ void __launch_bounds__(CHECK_THREADS)
    find_nan(const T *x, int64_t rows, int64_t cols, int64_t stride, wrong_index *found) {
    wait_for_previous();
    int64_t i = (int64_t)blockIdx.x * CHECK_THREADS + threadIdx.x;
    for (; i < rows * cols; i += (int64_t)gridDim.x * CHECK_THREADS) {
        float value = to_float(x[i / cols * stride + i % cols]);
        if (value != value)
            atomicMin(found, (wrong_index)i);
    }
}

#endif

/* Head mixing without tensor cores: for fp32, and for bf16 shapes that the tensor-core kernels do not support
 * (more than 64 heads, a head_dim that is not a multiple of 16). For checking and unusual sizes; nothing here is
 * tuned, and plans say so (announce_plain). Notation as in head_mix.cuh; a thread works on the columns c and
 * c + ceil(d/2), which RoPE pairs. */
#ifndef IHA_KERNELS_CUDA_HEAD_MIX_PLAIN_CUH
#define IHA_KERNELS_CUDA_HEAD_MIX_PLAIN_CUH

#include <stdio.h>

#include <set>
#include <utility>

#include "kernels/cuda/head_mix_outer.cuh"

enum { PLAIN_THREADS = 256, PLAIN_BLOCKS_PER_SM = 4 };

/* Tell the user, once for a shape, that bf16 does without tensor cores. */
static inline void announce_plain(const char *op, int64_t heads, int64_t head_dim) {
    static std::set<std::pair<int64_t, int64_t>> announced;
    if (!announced.insert({heads, head_dim}).second)
        return;
    fprintf(stderr,
            "%s of %lld heads of %lld: without tensor cores, which makes it many times slower; they take up "
            "to 64 heads, "
            "and a head_dim that is a multiple of 16\n",
            op, (long long)heads, (long long)head_dim);
}

template <typename T>
__device__ __forceinline__ float weight(const T *m, const struct head_rows &o, int i, int j) {
    int64_t offset = weight_offset(o, i, j);
    return offset >= 0 ? to_float(m[offset]) : 0;
}

/* big[n,i,:] = rotate(sum_j M[i,j] small[n,j,:]); the tokens of small are `stride` apart. */
template <typename T>
static __global__ void __launch_bounds__(PLAIN_THREADS)
    plain_expand(const T *small, int64_t stride, const T *m, struct head_rows o, struct rope_rows rope,
                 T *big, int64_t count, int d) {
    wait_for_previous();
    int I = o.heads * o.pseudo, half = (d + 1) / 2;
    for (int64_t e = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; e < count * I * half;
         e += (int64_t)gridDim.x * blockDim.x) {
        int c = (int)(e % half), i = (int)(e / half % I);
        int64_t n = e / half / I;
        bool two = c + half < d;
        float a = 0, b = 0;
        for (int j = 0; j < o.heads; j++) {
            const T *x = small + n * stride + j * d + c;
            float w = weight(m, o, i, j);
            a += w * to_float(x[0]);
            b += two ? w * to_float(x[half]) : 0;
        }
        if (rope.table) {
            const float *row = rope_token(rope, (int)n, o.pseudo, d) + i / o.heads * rope_step(rope, d);
            float x = a, y = b;
            a = x * row[c] - y * row[half + c];
            b = y * row[c] + x * row[half + c];
        }
        T *out = big + (n * I + i) * d + c;
        out[0] = from_float<T>(a);
        if (two)
            out[half] = from_float<T>(b);
    }
}

/* small[n,j,:] = sum_i M[i,j] big[n,i,:] */
template <typename T>
static __global__ void __launch_bounds__(PLAIN_THREADS)
    plain_contract(const T *big, const T *m, struct head_rows o, T *small, int64_t count, int d) {
    wait_for_previous();
    int I = o.heads * o.pseudo;
    for (int64_t e = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; e < count * o.heads * d;
         e += (int64_t)gridDim.x * blockDim.x) {
        int j = (int)(e / d % o.heads);
        const T *x = big + e / d / o.heads * I * d + e % d;
        float sum = 0;
        for (int i = 0; i < I; i++)
            sum += weight(m, o, i, j) * to_float(x[(int64_t)i * d]);
        small[e] = from_float<T>(sum);
    }
}

/* Both gradients. Rows of big, rotated back where there is a table, and of small are in shared memory, a
 * token and `pairs` pairs of columns at a time: dsmall = contract (NULL: not computed), and the block's part
 * of the outer product, partial [gridDim.x][gridDim.y][I,H]. The tokens of small and dsmall are `stride`
 * apart. */
template <typename T> struct plain_backward_job {
    struct {
        const T *big, *small, *m;
        T *dsmall;
        struct rope_rows rope;
    } of[3];
    struct head_rows o;
    float *partial;
    int64_t count, stride;
    int d, pairs;
};

/* Floats from one row in shared memory to the next: odd, so that a column's rows are in different banks. */
static __host__ __device__ constexpr int plain_row(int pairs) {
    return 2 * pairs + 1;
}

template <typename T>
static __global__ void __launch_bounds__(PLAIN_THREADS) plain_backward(struct plain_backward_job<T> job) {
    wait_for_previous();
    const auto &it = job.of[blockIdx.y];
    const struct head_rows &o = job.o;
    int I = o.heads * o.pseudo, H = o.heads, d = job.d, half = (d + 1) / 2, row = plain_row(job.pairs);
    float *big = dynamic_shared<float>(), *small = big + I * row;
    float *partial = job.partial + ((int64_t)blockIdx.x * gridDim.y + blockIdx.y) * I * H;
    for (int e = threadIdx.x; e < I * H; e += blockDim.x)
        partial[e] = 0;
    for (int64_t n = blockIdx.x; n < job.count; n += gridDim.x)
        for (int first = 0; first < half; first += job.pairs) {
            int pairs = min(job.pairs, half - first);
            __syncthreads(); /* all threads have read the previous rows */
            for (int e = threadIdx.x; e < (I + H) * pairs; e += blockDim.x) {
                int i = e / pairs, k = e % pairs, c = first + k;
                const T *x =
                    i < I ? it.big + (n * I + i) * d + c : it.small + n * job.stride + (i - I) * d + c;
                float a = to_float(x[0]), b = c + half < d ? to_float(x[half]) : 0;
                if (i < I && it.rope.table) {
                    const float *angles =
                        rope_token(it.rope, (int)n, o.pseudo, d) + i / H * rope_step(it.rope, d);
                    float cosine = angles[c], sine = angles[half + c], a0 = a;
                    a = a0 * cosine + b * sine;
                    b = b * cosine - a0 * sine;
                }
                big[i * row + k] = a;
                big[i * row + job.pairs + k] = b;
            }
            __syncthreads();
            for (int e = threadIdx.x; it.dsmall && e < H * pairs; e += blockDim.x) {
                int j = e / pairs, k = e % pairs, c = first + k;
                float a = 0, b = 0;
                for (int i = 0; i < I; i++) {
                    float w = weight(it.m, o, i, j);
                    a += w * big[i * row + k];
                    b += w * big[i * row + job.pairs + k];
                }
                T *out = it.dsmall + n * job.stride + j * d + c;
                out[0] = from_float<T>(a);
                if (c + half < d)
                    out[half] = from_float<T>(b);
            }
            for (int e = threadIdx.x; e < I * H; e += blockDim.x) {
                const float *x = big + e / H * row, *y = small + e % H * row;
                float sum = 0;
                for (int k = 0; k < pairs; k++)
                    sum += x[k] * y[k] + x[job.pairs + k] * y[job.pairs + k];
                partial[e] += sum;
            }
        }
}

static inline int plain_blocks(const struct device *dev, int64_t items) {
    int64_t most = (int64_t)dev->sm_count * PLAIN_BLOCKS_PER_SM;
    return (int)(items < most ? items : most);
}

/* Bytes of workspace for the outer products of `tensors` tensors. */
static inline size_t plain_workspace(const struct device *dev, const struct head_rows &o, int64_t count,
                                     int tensors) {
    return (size_t)plain_blocks(dev, count) * tensors * o.heads * o.pseudo * o.heads * sizeof(float);
}

/* Both gradients; job.of and job.count are set. */
template <typename T>
void launch_plain_backward(struct device *dev, struct plain_backward_job<T> job, int tensors,
                           struct head_gradients to, bool accumulate, const char *op) {
    int64_t rows = (int64_t)job.o.heads * (job.o.pseudo + 1), half = (job.d + 1) / 2;
    int blocks = plain_blocks(dev, job.count), elements = job.o.heads * job.o.heads * job.o.pseudo;
    job.pairs = (int)(half < 32 ? half : 32);
    while (job.pairs > 1 && rows * plain_row(job.pairs) * sizeof(float) > 48 << 10)
        job.pairs /= 2;
    job.partial = (float *)cuda_workspace(dev, plain_workspace(dev, job.o, job.count, tensors), op);
    launch<plain_backward<T>>(dev, dim3(blocks, tensors), PLAIN_THREADS,
                              rows * plain_row(job.pairs) * sizeof(float), job);
    launch<sum_outer<0, 0>>(dev, dim3(ceil_div(elements, 32), tensors), 32 * SUM_SLICES, 0, job.partial,
                            blocks, elements, job.o, outer_tiles(), to, accumulate);
}

#endif

/* residual_norm: the residual addition and the norm that follows it, with a whole row in registers.
 *
 * A row of C elements is computed by one warp (eight rows a block) or, if it is longer, by a whole block;
 * each thread holds up to K words of V elements of it, so that every element is read from memory once. What
 * is normalized is the sum as it is stored, rounded, so that residual_norm_recompute gives the same bits.
 * saved: mean (0 for rmsnorm) and rstd of each row. */
#include "kernels/cuda/cuda.cuh"

/* Threads of a block. Backward needs up to 128 registers a thread for its sums: 512 threads use up an SM's
 * 65,536. */
enum { MAX_FORWARD = 1024, MAX_BACKWARD = 512 };
enum { ROWS = 8 }; /* of a block with a warp per row */

/* Words of V elements that a thread holds: 64 bytes of bf16, or 16 elements. */
template <int V> constexpr int WORDS = V == 1 ? 16 : 4;
/* Floats of shared memory for a thread's sums of dx: odd, so that the threads of a warp use different banks. */
template <int V> constexpr int DX_SUMS_PITCH = V *WORDS<V> + 1;

/* The sum over the blockDim.x threads of a row, bit-identical in each. All threads of the block call it. */
static __device__ __forceinline__ float2 row_sums(float2 x) {
    x.x = warp_sum(x.x);
    x.y = warp_sum(x.y);
    if (blockDim.x > 32) {
        __shared__ float2 part[32];
        __syncthreads(); /* all threads have read `part` of the previous call */
        if (threadIdx.x % 32 == 0)
            part[threadIdx.x / 32] = x;
        __syncthreads();
        x = part[0];
        for (unsigned i = 1; i < blockDim.x / 32; i++) {
            x.x += part[i].x;
            x.y += part[i].y;
        }
    }
    return x;
}

static __device__ __forceinline__ float row_sum(float x) {
    return row_sums(float2{x, 0}).x;
}

/* y = (x - mean) rstd w (+ b) of V elements from column c. */
template <typename T, int V>
static __device__ __forceinline__ void normalize(const float (&x)[V], float2 stats, const T *w, const T *b,
                                                 int c, T *y) {
    float weight[V], bias[V], out[V];
    load(w + c, weight);
    if (b)
        load(b + c, bias);
#pragma unroll
    for (int j = 0; j < V; j++) {
        out[j] = (x[j] - stats.x) * stats.y * weight[j];
        if (b)
            out[j] += bias[j];
    }
    store(y + c, out);
}

/* x, delta, sum, y [rows, C]. Two passes over the registers, first the mean, then the squared deviations:
 * this is more accurate than E[x^2] - E[x]^2. All loads are issued before the first is used. Bytes moved: 4
 * rows C elements with delta, 2 rows C without. */
template <typename T, int V>
static __global__ void __launch_bounds__(MAX_FORWARD)
    norm_forward(const T *x, const T *delta, const T *w, const T *b, T *sum, T *y, float2 *stats,
                 int64_t rows, int C, float eps, bool layer) {
    wait_for_previous();
    constexpr int K = WORDS<V>;
    int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    int end = row < rows ? C : 0; /* threads without a row stay for the barriers */
    int first = (int)threadIdx.x * V, step = (int)blockDim.x * V;
    x += row * C;
    word_of<V, T> kept[K];
#pragma unroll
    for (int k = 0; k < K; k++)
        if (first + k * step < end)
            kept[k] = load_word<V>(x + first + k * step);
    float total = 0, squares = 0, values[V];
    if (delta) {
        delta += row * C;
        sum += row * C;
        word_of<V, T> more[K];
#pragma unroll
        for (int k = 0; k < K; k++)
            if (first + k * step < end)
                more[k] = load_word<V>(delta + first + k * step);
#pragma unroll
        for (int k = 0; k < K; k++)
            if (first + k * step < end) {
                float other[V];
                unpack<V, T>(kept[k], values);
                unpack<V, T>(more[k], other);
#pragma unroll
                for (int j = 0; j < V; j++)
                    values[j] += other[j];
                kept[k] = pack<V, T>(values);
                store_word<V>(sum + first + k * step, kept[k]);
            }
    }
    float mean = 0;
    if (layer) {
#pragma unroll
        for (int k = 0; k < K; k++)
            if (first + k * step < end) {
                unpack<V, T>(kept[k], values);
#pragma unroll
                for (int j = 0; j < V; j++)
                    total += values[j];
            }
        mean = row_sum(total) / (float)C;
    }
#pragma unroll
    for (int k = 0; k < K; k++)
        if (first + k * step < end) {
            unpack<V, T>(kept[k], values);
#pragma unroll
            for (int j = 0; j < V; j++)
                squares += (values[j] - mean) * (values[j] - mean);
        }
    float2 st = {mean, 1 / sqrtf(row_sum(squares) / (float)C + eps)};
    if (threadIdx.x == 0 && end > 0)
        stats[row] = st;
    y += row * C;
#pragma unroll
    for (int k = 0; k < K; k++)
        if (first + k * step < end) {
            unpack<V, T>(kept[k], values);
            normalize<T, V>(values, st, w, b, first + k * step, y);
        }
}

/* Bytes moved: 2 rows C elements. */
template <typename T, int V>
static __global__ void __launch_bounds__(MAX_FORWARD)
    norm_recompute(const T *sum, const T *w, const T *b, T *y, const float2 *stats, int64_t rows, int C) {
    wait_for_previous();
    int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows)
        return;
    float2 st = stats[row];
    float values[V];
#pragma unroll 4
    for (int c = (int)threadIdx.x * V; c < C; c += (int)blockDim.x * V) {
        load(sum + row * C + c, values);
        normalize<T, V>(values, st, w, b, c, y + row * C);
    }
}

/* Write the block's partial sum of a gradient [C]: what the threads of its rows accumulated, added in the
 * order of the rows, in C floats of shared memory if there are several. */
template <int V>
static __device__ __forceinline__ void store_partial(const float (&sums)[WORDS<V>][V], int C,
                                                     float *partial) {
    float *block_sums = dynamic_shared<float>();
    int first = (int)threadIdx.x * V, step = (int)blockDim.x * V;
    if (blockDim.y == 1) {
#pragma unroll
        for (int k = 0; k < WORDS<V>; k++)
            if (first + k * step < C)
                store<V>(partial + first + k * step, sums[k]);
        return;
    }
    for (unsigned y = 0; y < blockDim.y; y++) {
        if (threadIdx.y == y) {
#pragma unroll
            for (int k = 0; k < WORDS<V>; k++)
                if (first + k * step < C)
#pragma unroll
                    for (int j = 0; j < V; j++) {
                        int c = first + k * step + j;
                        block_sums[c] = y > 0 ? block_sums[c] + sums[k][j] : sums[k][j];
                    }
        }
        __syncthreads();
    }
    for (int c = (int)(threadIdx.y * blockDim.x + threadIdx.x); c < C; c += (int)(blockDim.x * blockDim.y))
        partial[c] = block_sums[c];
    __syncthreads(); /* the shared memory is used again by the next call */
}

/* With g = dy w and xhat = (x - mean) rstd:  dx (+)= rstd (g - mean(g) - xhat mean(g xhat)), where rmsnorm has
 * no mean(g). Partial sums of dw = sum over rows of dy xhat, db = sum of dy, and of dx where wanted, [gridDim.x, C]
 * each: a thread keeps the same columns for all its rows, so it adds them up in registers, those of dx in shared
 * memory since there are no registers left, and writes them once. Bytes moved: 4 rows C elements, 3 where dx is
 * not added to.
 * Dynamic shared memory: C floats where a block has several rows, and for the sums of dx DX_SUMS_PITCH a thread. */
template <typename T, int V, bool BIAS>
static __global__ void __launch_bounds__(MAX_BACKWARD)
    norm_backward(const T *dy, const T *x, const T *w, const float2 *stats, T *dx, bool add_dx,
                  float *dw_partials, float *db_partials, float *dx_partials, int64_t rows, int C,
                  bool layer) {
    wait_for_previous();
    constexpr int K = WORDS<V>;
#if defined __CUDA_ARCH__ && __CUDA_ARCH__ < 900
    constexpr int WITH_BIAS = 0;
#else
    constexpr int WITH_BIAS = 2;
#endif
    /* Words of dx that are loaded before the sums, about as many as registers hold; the rest are loaded after them. */
    constexpr int EARLY = V == 1 ? 0 : BIAS && sizeof(T) == 2 ? WITH_BIAS : K;
    int first = (int)threadIdx.x * V, step = (int)blockDim.x * V;
    float dw[K][V] = {}, db[BIAS ? K : 1][V] = {};
    float *dx_sums = dynamic_shared<float>() + (blockDim.y > 1 ? C : 0) +
                     DX_SUMS_PITCH<V> * (threadIdx.y * blockDim.x + threadIdx.x);
    if (dx_partials)
        for (int i = 0; i < K * V; i++)
            dx_sums[i] = 0;
    for (int64_t base = (int64_t)blockIdx.x * blockDim.y; base < rows;
         base += (int64_t)gridDim.x * blockDim.y) {
        int64_t row = base + threadIdx.y, at = row * C + first;
        int end = row < rows ? C : 0;
        float2 st = row < rows ? stats[row] : float2{0, 0};
        word_of<V, T> kept_dy[K], kept_x[K], kept_dx[EARLY > 0 ? EARLY : 1] = {};
#pragma unroll
        for (int k = 0; k < K; k++)
            if (first + k * step < end) {
                kept_dy[k] = load_word<V>(dy + at + k * step);
                kept_x[k] = load_word<V>(x + at + k * step);
                if (add_dx && k < EARLY)
                    kept_dx[k < EARLY ? k : 0] = load_word<V>(dx + at + k * step);
            }
        float2 sums = {0, 0};
        float d[V], values[V], weight[V];
#pragma unroll
        for (int k = 0; k < K; k++)
            if (first + k * step < end) {
                unpack<V, T>(kept_dy[k], d);
                unpack<V, T>(kept_x[k], values);
                load(w + first + k * step, weight);
#pragma unroll
                for (int j = 0; j < V; j++) {
                    float xhat = (values[j] - st.x) * st.y, g = d[j] * weight[j];
                    sums.x += g;
                    sums.y += g * xhat;
                    dw[k][j] += d[j] * xhat;
                    if (BIAS)
                        db[BIAS ? k : 0][j] += d[j];
                }
            }
        sums = row_sums(sums);
        float mean_g = layer ? sums.x / (float)C : 0, mean_gx = sums.y / (float)C;
#pragma unroll
        for (int k = 0; k < K; k++)
            if (first + k * step < end) {
                float out[V] = {};
                if (k < EARLY)
                    unpack<V, T>(kept_dx[k < EARLY ? k : 0], out);
                else if (add_dx)
                    load(dx + at + k * step, out);
                unpack<V, T>(kept_dy[k], d);
                unpack<V, T>(kept_x[k], values);
                load(w + first + k * step, weight);
#pragma unroll
                for (int j = 0; j < V; j++) {
                    float xhat = (values[j] - st.x) * st.y;
                    out[j] += st.y * (d[j] * weight[j] - mean_g - xhat * mean_gx);
                }
                store(dx + at + k * step, out);
                if (dx_partials) {
#pragma unroll
                    for (int j = 0; j < V; j++)
                        dx_sums[k * V + j] += out[j];
                }
            }
    }
    store_partial<V>(dw, C, dw_partials + (int64_t)blockIdx.x * C);
    if constexpr (BIAS)
        store_partial<V>(db, C, db_partials + (int64_t)blockIdx.x * C);
    if (dx_partials) {
#pragma unroll
        for (int i = 0; i < K * V; i++)
            dw[i / V][i % V] = dx_sums[i];
        store_partial<V>(dw, C, dx_partials + (int64_t)blockIdx.x * C);
    }
}

/* ---- launches ---- */

/* Threads (x along a row, y rows) when a thread holds `elements` of a row. */
static dim3 block_of(int64_t C, int elements) {
    unsigned threads = 32;
    while (threads * elements < C)
        threads *= 2;
    return threads == 32 ? dim3(32, ROWS) : dim3(threads, 1);
}

/* Blocks of backward: only as many as run at once, since each leaves a partial sum to be added. */
static int64_t backward_blocks(const struct device *dev, const struct norm_spec *s, dim3 block) {
    int64_t resident = (int64_t)dev->sm_count * (MAX_BACKWARD / (block.x * block.y));
    return min64(ceil_div(s->rows, block.y), resident);
}

static size_t partials_bytes(const struct device *dev, const struct norm_spec *s, int elements) {
    return (size_t)(MAX_PARTIAL_SUMS * backward_blocks(dev, s, block_of(s->hidden, elements)) * s->hidden) *
           sizeof(float);
}

int cuda_norm_plan(struct device *dev, const struct norm_spec *s, struct op_cost *cost, struct error *e) {
    bool wide = dev->precision == DEVICE_BF16 && s->hidden % VECTOR<bf16> == 0;
    int elements = wide ? 32 : 16;
    if (s->hidden > MAX_BACKWARD * elements)
        return fail_user(
            e, "model.hidden_size = %lld: norms on the GPU go up to %d (bf16, a multiple of 8) or %d",
            (long long)s->hidden, MAX_BACKWARD * 32, MAX_BACKWARD * 16);
    cost->saved = (size_t)s->rows * sizeof(float2);
    /* With unaligned addresses the call falls back to 16 elements a thread: provide for both. */
    size_t bytes = partials_bytes(dev, s, 16), wide_bytes = partials_bytes(dev, s, 32);
    cost->workspace = wide_bytes > bytes ? wide_bytes : bytes;
    return 0;
}

static void check(struct device *dev, const struct norm_spec *s, const char *op, const char *what, tensor t) {
    check_shape(op, what, t, cuda_compute(dev), s->rows, s->hidden);
    check_contiguous(op, what, t);
}

void cuda_residual_norm(struct device *dev, const struct norm_spec *s, tensor x, tensor delta, tensor w,
                        tensor b, tensor sum, tensor y, void *saved) {
    int64_t C = s->hidden;
    check(dev, s, "residual_norm", "x", x);
    check(dev, s, "residual_norm", "y", y);
    check_shape("residual_norm", "w", w, cuda_compute(dev), C);
    if (b.data)
        check_shape("residual_norm", "b", b, cuda_compute(dev), C);
    if (delta.data) {
        check(dev, s, "residual_norm", "delta", delta);
        check(dev, s, "residual_norm", "sum", sum);
    }
    by_dtype(x.dtype, [&](auto number) {
        using T = decltype(number);
        bool aligned = aligned16({x.data, delta.data, w.data, b.data, sum.data, y.data});
        by_width<T>(C, aligned, [&](auto width) {
            constexpr int V = decltype(width)::value;
            dim3 block = block_of(C, V * WORDS<V>);
            launch<norm_forward<T, V>>(dev, ceil_div(s->rows, block.y), block, 0, (const T *)x.data,
                                       (const T *)delta.data, (const T *)w.data, (const T *)b.data,
                                       (T *)sum.data, (T *)y.data, (float2 *)saved, s->rows, (int)C,
                                       (float)s->eps, s->type == NORM_TYPE_LAYER);
        });
    });
}

void cuda_residual_norm_recompute(struct device *dev, const struct norm_spec *s, tensor sum, tensor w,
                                  tensor b, tensor y, const void *saved) {
    check(dev, s, "residual_norm_recompute", "sum", sum);
    check(dev, s, "residual_norm_recompute", "y", y);
    by_dtype(y.dtype, [&](auto number) {
        using T = decltype(number);
        by_width<T>(s->hidden, aligned16({sum.data, w.data, b.data, y.data}), [&](auto width) {
            constexpr int V = decltype(width)::value;
            dim3 block = block_of(s->hidden, V * WORDS<V>);
            launch<norm_recompute<T, V>>(dev, ceil_div(s->rows, block.y), block, 0, (const T *)sum.data,
                                         (const T *)w.data, (const T *)b.data, (T *)y.data,
                                         (const float2 *)saved, s->rows, (int)s->hidden);
        });
    });
}

void cuda_residual_norm_backward(struct device *dev, const struct norm_spec *s, tensor dy, tensor sum,
                                 tensor w, const void *saved, tensor dx, bool add_dx, tensor dw, tensor db,
                                 tensor dx_sums, bool accumulate) {
    int64_t C = s->hidden;
    check(dev, s, "residual_norm_backward", "dy", dy);
    check(dev, s, "residual_norm_backward", "sum", sum);
    check(dev, s, "residual_norm_backward", "dx", dx);
    check_shape("residual_norm_backward", "w", w, cuda_compute(dev), C);
    check_shape("residual_norm_backward", "dw", dw, DTYPE_F32, C);
    if (db.data)
        check_shape("residual_norm_backward", "db", db, DTYPE_F32, C);
    if (dx_sums.data)
        check_shape("residual_norm_backward", "dx_sums", dx_sums, DTYPE_F32, C);
    by_dtype(dx.dtype, [&](auto number) {
        using T = decltype(number);
        by_width<T>(C, aligned16({dy.data, sum.data, w.data, dx.data}), [&](auto width) {
            constexpr int V = decltype(width)::value;
            dim3 block = block_of(C, V * WORDS<V>);
            int64_t blocks = backward_blocks(dev, s, block);
            size_t bytes = partials_bytes(dev, s, V * WORDS<V>);
            float *partials = (float *)cuda_workspace(dev, bytes, "residual_norm_backward");
            float *of_db = partials + blocks * C, *of_dx = db.data ? of_db + blocks * C : of_db;
            int64_t shared =
                (block.y > 1 ? C : 0) + (dx_sums.data ? block.x * block.y * DX_SUMS_PITCH<V> : 0);
            auto run = [&](auto bias) {
                launch<norm_backward<T, V, decltype(bias)::value>>(
                    dev, blocks, block, (size_t)shared * sizeof(float), (const T *)dy.data,
                    (const T *)sum.data, (const T *)w.data, (const float2 *)saved, (T *)dx.data, add_dx,
                    partials, of_db, dx_sums.data ? of_dx : NULL, s->rows, (int)C,
                    s->type == NORM_TYPE_LAYER);
            };
            if (db.data)
                run(std::true_type());
            else
                run(std::false_type());
            sum_partials(dev, partials, (int)blocks, C,
                         {{(float *)dw.data, accumulate},
                          {(float *)db.data, accumulate},
                          {(float *)dx_sums.data, false}});
        });
    });
}

/* classifier: the vocabulary projection, softmax, loss and all gradients, in chunks of rows, so that the
 * logits of a whole batch are never in memory at once.
 *
 * A matrix product writes a chunk's logits in the type of the activations. One kernel then computes each
 * row's loss and replaces the row by its gradient, in place. Two products compute dh and add to dW, in fp32.
 * The losses of all rows are kept in the workspace and added up at the end, in double, in a fixed order.
 *
 * The products are over all rows of W in memory, which are whole tiles, where those past the vocabulary are zero. Their
 * logits are not read, and their gradient is zero. */
#include "kernels/cuda/cuda.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/logits_chunk.h"

enum { THREADS = 1024, SUM_THREADS = 1024 };

/* Exponentials. Where results are rounded to bf16 they are powers of 2, which take one instruction, and log2(e) is
 * multiplied in together with the subtraction of the maximum. scaled: x in the units of the exponent. */
constexpr float LOG2_E_FLOAT = (float)LOG2_E;
template <typename T> constexpr bool POWERS_OF_2 = sizeof(T) == 2;

template <typename T> static __device__ __forceinline__ float scaled(float x) {
    return POWERS_OF_2<T> ? x * LOG2_E_FLOAT : x;
}

template <typename T> static __device__ __forceinline__ double unscaled(float x) {
    return POWERS_OF_2<T> ? (double)x * (1 / (double)LOG2_E_FLOAT) : (double)x;
}

template <typename T> static __device__ __forceinline__ float exponential_of_scaled(float x) {
    if constexpr (POWERS_OF_2<T>)
        return exp2_fast(x);
    else
        return expf(x);
}

/* exp(x - max), by the scaled maximum. */
template <typename T> static __device__ __forceinline__ float exponential(float x, float scaled_max) {
    return exponential_of_scaled<T>(POWERS_OF_2<T> ? fmaf(x, LOG2_E_FLOAT, -scaled_max) : x - scaled_max);
}

/* Of a part of a row: the scaled maximum, and the sum of exponentials relative to it. The same bits for (b, a). */
template <typename T> static __device__ __forceinline__ float2 merge(float2 a, float2 b) {
    float max = fmaxf(a.x, b.x);
    /* The comparisons also keep -inf on both sides from becoming exp(-inf + inf) = NaN. */
    return {max, (a.x == max ? a.y : a.y * exponential_of_scaled<T>(a.x - max)) +
                     (b.x == max ? b.y : b.y * exponential_of_scaled<T>(b.x - max))};
}

template <typename T> static __device__ __forceinline__ float2 merge_warp(float2 mine) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        float2 other = {__shfl_xor_sync(0xffffffff, mine.x, offset),
                        __shfl_xor_sync(0xffffffff, mine.y, offset)};
        mine = merge<T>(mine, other);
    }
    return mine;
}

/* Call use(i, word) for each of the thread's words of V elements, with the next two loads in flight. `whole`, a
 * multiple of V, ends the words; the elements behind them are one for each of the first threads. */
template <typename T, int V, typename F>
static __device__ __forceinline__ void for_each_word(const T *x, int whole, F use) {
    int i = (int)threadIdx.x * V, step = THREADS * V;
    word_of<V, T> next[2] = {};
#pragma unroll
    for (int k = 0; k < 2; k++)
        if (i + k * step < whole)
            next[k] = load_word<V>(x + i + k * step);
    for (; i < whole; i += step) {
        word_of<V, T> now = next[0];
        next[0] = next[1];
        if (i + 2 * step < whole)
            next[1] = load_word<V>(x + i + 2 * step);
        use(i, now);
    }
}

/* One row of logits x [vocab]: its scaled maximum and the sum of exp(x - max), bit-identical in all threads. One pass
 * over the row: the sum so far is rescaled whenever the maximum grows. */
template <typename T, int V> static __device__ __forceinline__ float2 maximum_and_sum(const T *x, int vocab) {
    static_assert(THREADS / 32 == 32, "a warp merges what all warps have found");
    __shared__ float2 warps[THREADS / 32];
    int whole = vocab / V * V, last = whole + (int)threadIdx.x;
    float2 mine = {-INFINITY, 0};
    if (last < vocab)
        mine = {scaled<T>(to_float(x[last])), 1};
    for_each_word<T, V>(x, whole, [&](int, word_of<V, T> word) {
        float values[V];
        unpack<V, T>(word, values);
        float max = values[0];
#pragma unroll
        for (int j = 1; j < V; j++)
            max = fmaxf(max, values[j]);
        max = scaled<T>(max);
        if (max > mine.x) {
            mine.y *= exponential_of_scaled<T>(mine.x - max);
            mine.x = max;
        }
#pragma unroll
        for (int j = 0; j < V; j++)
            mine.y += exponential<T>(values[j], mine.x);
    });
    mine = merge_warp<T>(mine);
    __syncthreads(); /* all threads have read `warps` of the row before */
    if (threadIdx.x % 32 == 0)
        warps[threadIdx.x / 32] = mine;
    __syncthreads();
    return merge_warp<T>(warps[threadIdx.x % 32]);
}

/* Whether no logit before the target's is as large; for the whole block. Ties are common in bf16. */
template <typename T>
static __device__ __forceinline__ bool first_of_equal(const T *x, int target, float max) {
    bool earlier = false;
    for (int i = (int)threadIdx.x; i < target; i += THREADS)
        earlier |= to_float(x[i]) == max;
    return !__syncthreads_or(earlier);
}

/* x = scale (softmax - onehot). The thread that has written the target's element writes it again. */
template <typename T, int V>
static __device__ __forceinline__ void row_gradient(T *x, int vocab, int target, float picked, float2 row,
                                                    float scale) {
    int whole = vocab / V * V, last = whole + (int)threadIdx.x;
    float factor = scale / row.y;
    for_each_word<T, V>(x, whole, [&](int i, word_of<V, T> word) {
        float values[V];
        unpack<V, T>(word, values);
#pragma unroll
        for (int j = 0; j < V; j++)
            values[j] = factor * exponential<T>(values[j], row.x);
        store(x + i, values);
    });
    if (last < vocab)
        x[last] = from_float<T>(factor * exponential<T>(to_float(x[last]), row.x));
    int writer = target < whole ? target / V % THREADS : target - whole;
    if ((int)threadIdx.x == writer)
        x[target] = from_float<T>(factor * exponential<T>(picked, row.x) - scale);
}

template <typename T, int V> static __device__ __forceinline__ void clear_row(T *x, int vocab) {
    const float zeros[V] = {};
    int whole = vocab / V * V, last = whole + (int)threadIdx.x;
    for (int i = (int)threadIdx.x * V; i < whole; i += THREADS * V)
        store(x + i, zeros);
    if (last < vocab)
        x[last] = from_float<T>(0);
}

/* What pads the vocabulary has no gradient. */
template <typename T> static __device__ __forceinline__ void clear_padding(T *x, int vocab, int padded) {
    for (int i = vocab + (int)threadIdx.x; i < padded; i += THREADS)
        x[i] = from_float<T>(0);
}

/* Block b has rows b, b + gridDim.x, ...: loss[n] = -log softmax(x[n])[target], correct[n] (NULL: not wanted) =
 * whether x[n][target] is the first of the largest logits, and x[n] becomes scale (softmax - onehot) if GRADIENT.
 * Rows without a target (< 0) have no loss and no gradient, and are not correct. From vocab to padded x is not read, and
 * the gradient is zero.
 *
 * Bytes moved: rows vocab elements to read and as many to write; the second pass reads from the L2. So that it can, an
 * SM has one row at a time: all rows that are being computed are 34 MB on an H200 with 128,256 tokens in bf16. */
template <typename T, int V, bool GRADIENT>
static __global__ void __launch_bounds__(THREADS, 1)
    row_loss(T *logits, int64_t stride, int vocab, int padded, int rows, const int32_t *targets, float scale,
             double *losses, int32_t *correct) {
    wait_for_previous();
    for (int n = (int)blockIdx.x; n < rows;
         n += (int)gridDim.x) { /* the branches are the same in all threads */
        T *x = logits + n * stride;
        int target = targets[n];
        if (GRADIENT)
            clear_padding(x, vocab, padded);
        if (target < 0) {
            if (threadIdx.x == 0) {
                losses[n] = 0;
                if (correct)
                    correct[n] = 0;
            }
            if (GRADIENT)
                clear_row<T, V>(x, vocab);
            continue;
        }
        float picked = to_float(x[target]); /* before x is overwritten: maximum_and_sum() has a barrier */
        float2 row = maximum_and_sum<T, V>(x, vocab);
        if (threadIdx.x == 0)
            losses[n] = log((double)row.y) + unscaled<T>(row.x) - (double)picked;
        if (correct) {
            bool right = scaled<T>(picked) == row.x && first_of_equal(x, target, picked);
            if (threadIdx.x == 0)
                correct[n] = right;
        }
        if (GRADIENT)
            row_gradient<T, V>(x, vocab, target, picked, row, scale);
    }
}

/* state->loss += scale * sum of losses [rows]; state->targets += targets that count. One block. */
static __global__ void __launch_bounds__(SUM_THREADS)
    add_losses(const double *losses, const int32_t *targets, int64_t rows, double scale,
               struct step_state *state) {
    wait_for_previous();
    double sum = 0, count = 0;
    for (int64_t n = threadIdx.x; n < rows; n += SUM_THREADS)
        sum += losses[n];
    for (int64_t n = threadIdx.x; n < rows; n += SUM_THREADS)
        count += targets[n] >= 0;
    sum = block_sum<SUM_THREADS>(sum);
    count = block_sum<SUM_THREADS>(count);
    if (threadIdx.x == 0) {
        state->loss += scale * sum;
        state->targets += count;
    }
}

/* ---- the operation ---- */

/* The workspace: scratch of the products, losses, logits. */
struct layout {
    int64_t chunk;  /* rows */
    int64_t stride; /* elements from one row of logits to the next: whole cache lines */
    size_t losses_offset, logits_offset, bytes;
};

static struct layout workspace_layout(const struct device *dev, const struct classifier_spec *s) {
    struct layout l;
    int64_t element = (int64_t)dtype_bytes(cuda_compute(dev));
    l.stride = round_up(classifier_padded(s), 64);
    l.chunk = logits_chunk_rows(s->rows, l.stride * element, (int64_t)dev->memory);
    l.losses_offset = MATMUL_WORKSPACE;
    l.logits_offset = l.losses_offset + (size_t)round_up(s->rows * (int64_t)sizeof(double), 256);
    l.bytes = l.logits_offset + (size_t)(l.chunk * l.stride * element);
    return l;
}

static struct matmul logits_shape(const struct classifier_spec *s, enum dtype t, int64_t rows, int64_t ldh,
                                  int64_t stride) {
    return (struct matmul){false, true, rows, classifier_padded(s), s->hidden, ldh, s->hidden, stride,
                           t,     t,    false};
}

static struct matmul dh_shape(const struct classifier_spec *s, enum dtype t, int64_t rows, int64_t stride,
                              int64_t ldh) {
    return (struct matmul){false, false, rows, s->hidden, classifier_padded(s), stride, s->hidden,
                           ldh,   t,     t,    false};
}

static struct matmul dw_shape(const struct classifier_spec *s, enum dtype t, int64_t rows, int64_t stride,
                              int64_t ldh) {
    return (struct matmul){true,      false, classifier_padded(s), s->hidden, rows, stride, ldh, s->hidden, t,
                           DTYPE_F32, false};
}

int cuda_classifier_plan(struct device *dev, const struct classifier_spec *s, struct op_cost *cost,
                         struct error *e) {
    (void)e;
    struct layout l = workspace_layout(dev, s);
    enum dtype t = cuda_compute(dev);
    const int64_t sizes[] = {l.chunk, s->rows % l.chunk};
    for (int i = 0; i < 2 && sizes[i] > 0; i++) {
        plan_matmul(dev, logits_shape(s, t, sizes[i], s->hidden, l.stride));
        plan_matmul(dev, dh_shape(s, t, sizes[i], l.stride, s->hidden));
        plan_matmul(dev, dw_shape(s, t, sizes[i], l.stride, s->hidden), true);
    }
    cost->workspace = l.bytes;
    return 0;
}

static void launch_row_loss(struct device *dev, const struct classifier_spec *s, enum dtype t, void *logits,
                            int64_t stride, int64_t rows, const int32_t *targets, double scale, bool gradient,
                            double *losses, int32_t *correct) {
    by_dtype(t, [&](auto number) {
        using T = decltype(number);
        constexpr int V = VECTOR<T>; /* rows are aligned */
        unsigned blocks = (unsigned)min64(rows, dev->sm_count);
        if (gradient)
            launch<row_loss<T, V, true>>(dev, blocks, THREADS, 0, (T *)logits, stride, (int)s->vocab,
                                         (int)classifier_padded(s), (int)rows, targets, (float)scale, losses,
                                         correct);
        else
            launch<row_loss<T, V, false>>(dev, blocks, THREADS, 0, (T *)logits, stride, (int)s->vocab,
                                          (int)classifier_padded(s), (int)rows, targets, (float)scale, losses,
                                          correct);
    });
}

void cuda_classifier(struct device *dev, const struct classifier_spec *s, tensor h, tensor w, tensor targets,
                     double scale, struct step_state *state, tensor correct, tensor dh, tensor dw,
                     bool accumulate) {
    enum dtype t = cuda_compute(dev);
    check_shape("classifier", "h", h, t, s->rows, s->hidden);
    check_shape("classifier", "W", w, t, classifier_padded(s), s->hidden);
    check_contiguous("classifier", "W", w);
    check_shape("classifier", "targets", targets, DTYPE_I32, s->rows);
    if (correct.data)
        check_shape("classifier", "correct", correct, DTYPE_I32, s->rows);
    if (dh.data) {
        check_shape("classifier", "dh", dh, t, s->rows, s->hidden);
        check_shape("classifier", "dW", dw, DTYPE_F32, classifier_padded(s), s->hidden);
        check_contiguous("classifier", "dW", dw);
    }
    struct layout l = workspace_layout(dev, s);
    char *workspace = (char *)cuda_workspace(dev, l.bytes, "classifier");
    double *losses = (double *)(workspace + l.losses_offset);
    void *logits = workspace + l.logits_offset;
    for (int64_t begin = 0; begin < s->rows; begin += l.chunk) {
        int64_t rows = min64(l.chunk, s->rows - begin);
        void *x = tensor_rows(h, begin, rows).data;
        run_matmul(dev, logits_shape(s, t, rows, h.stride[0], l.stride), x, w.data, NULL, false, logits);
        launch_row_loss(dev, s, t, logits, l.stride, rows, (const int32_t *)targets.data + begin, scale,
                        dh.data != NULL, losses + begin,
                        correct.data ? (int32_t *)correct.data + begin : NULL);
        if (!dh.data)
            continue;
        run_matmul(dev, dh_shape(s, t, rows, l.stride, dh.stride[0]), logits, w.data, NULL, false,
                   tensor_rows(dh, begin, rows).data);
        run_matmul(dev, dw_shape(s, t, rows, l.stride, h.stride[0]), logits, x, NULL, accumulate || begin > 0,
                   dw.data);
    }
    launch<add_losses>(dev, 1, SUM_THREADS, 0, losses, (const int32_t *)targets.data, s->rows, scale, state);
}

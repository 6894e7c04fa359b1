/* classifier: the vocabulary projection, softmax, loss and all gradients, in chunks of rows, so that the
 * logits of a whole batch are never in memory at once.
 *
 * A matrix product writes a chunk's logits in the type of the activations. One kernel then computes each
 * row's loss and replaces the row by its gradient, in place. Two products compute dh and add to dW, in fp32.
 * The losses of all rows are kept in the workspace and added up at the end, in double, in a fixed order. */
#include "kernels/cuda/cuda.cuh"

/* Every chunk reads and writes dW once more, so chunks should be long: at 4096 rows that takes about 5% of
 * the product's time. A chunk's logits may take 1/128 of the GPU's memory, up to MAX_LOGITS_BYTES. */
constexpr int64_t MAX_LOGITS_BYTES = (int64_t)512 << 20, MIN_ROWS = 128, ROW_STEP = 128;
enum { THREADS = 512, SUM_THREADS = 1024 };

/* Fast where the result is rounded to bf16. */
template <typename T> static __device__ __forceinline__ float exponential(float x) {
    if constexpr (sizeof(T) == 2)
        return __expf(x);
    else
        return expf(x);
}

/* The larger maximum, and both sums of exponentials relative to it. */
static __device__ __forceinline__ float2 merge(float2 a, float2 b) {
    float max = fmaxf(a.x, b.x);
    /* The comparisons also keep -inf on both sides from becoming exp(-inf + inf) = NaN. */
    return {max, (a.x == max ? a.y : a.y * expf(a.x - max)) + (b.x == max ? b.y : b.y * expf(b.x - max))};
}

/* Call use(i, word) for each of the thread's words of V elements, with the next two loads in flight. */
template <typename T, int V, typename F>
static __device__ __forceinline__ void for_each_word(const T *x, int vocab, F use) {
    int i = (int)threadIdx.x * V, step = THREADS * V;
    word_of<V, T> next[2] = {};
#pragma unroll
    for (int k = 0; k < 2; k++)
        if (i + k * step < vocab)
            next[k] = load_word<V>(x + i + k * step);
    for (; i < vocab; i += step) {
        word_of<V, T> now = next[0];
        next[0] = next[1];
        if (i + 2 * step < vocab)
            next[1] = load_word<V>(x + i + 2 * step);
        use(i, now);
    }
}

/* One row of logits x [vocab] per block: its maximum and the sum of exp(x - max), bit-identical in all
 * threads. One pass over the row: the sum so far is rescaled whenever the maximum grows. */
template <typename T, int V> static __device__ __forceinline__ float2 maximum_and_sum(const T *x, int vocab) {
    float2 mine = {-INFINITY, 0};
    for_each_word<T, V>(x, vocab, [&](int i, word_of<V, T> word) {
        float values[V], max = mine.x;
        unpack<V, T>(word, values);
#pragma unroll
        for (int j = 0; j < V; j++) {
            values[j] = i + j < vocab ? values[j] : -INFINITY; /* the row is padded to whole vectors */
            max = fmaxf(max, values[j]);
        }
        if (max > mine.x) {
            mine.y *= exponential<T>(mine.x - max);
            mine.x = max;
        }
#pragma unroll
        for (int j = 0; j < V; j++)
            mine.y += exponential<T>(values[j] - mine.x);
    });
    __shared__ float2 warps[THREADS / 32];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        float2 other = {__shfl_xor_sync(0xffffffff, mine.x, offset),
                        __shfl_xor_sync(0xffffffff, mine.y, offset)};
        mine = merge(mine, other);
    }
    if (threadIdx.x % 32 == 0)
        warps[threadIdx.x / 32] = mine;
    __syncthreads();
    mine = warps[0];
    for (int i = 1; i < THREADS / 32; i++)
        mine = merge(mine, warps[i]);
    return mine;
}

/* Whether no logit before the target's is as large; for the whole block. Ties are common in bf16. */
template <typename T>
static __device__ __forceinline__ bool first_of_equal(const T *x, int target, float max) {
    bool earlier = false;
    for (int i = (int)threadIdx.x; i < target; i += THREADS)
        earlier |= to_float(x[i]) == max;
    return !__syncthreads_or(earlier);
}

/* Block n: loss[n] = -log softmax(x[n])[target], correct[n] (NULL: not wanted) = whether x[n][target] is the
 * first of the largest logits, and x[n] becomes scale (softmax - onehot) if GRADIENT. Rows without a target
 * (< 0) have no loss and no gradient, and are not correct.
 * Bytes moved: rows vocab elements to read and as many to write; the second pass reads from the L2. */
template <typename T, int V, bool GRADIENT>
static __global__ void __launch_bounds__(THREADS)
    row_loss(T *logits, int64_t stride, int vocab, const int32_t *targets, float scale, double *losses,
             int32_t *correct) {
    T *x = logits + (int64_t)blockIdx.x * stride;
    int target = targets[blockIdx.x];
    float2 row = {0, 1};
    float picked = 0;
    if (target >= 0) {
        picked = to_float(x[target]); /* before x is overwritten: maximum_and_sum() has a barrier */
        row = maximum_and_sum<T, V>(x, vocab);
    }
    if (threadIdx.x == 0)
        losses[blockIdx.x] = target >= 0 ? log((double)row.y) + (double)row.x - (double)picked : 0;
    if (correct) { /* the branches are the same in all threads */
        bool right = target >= 0 && picked == row.x && first_of_equal(x, target, row.x);
        if (threadIdx.x == 0)
            correct[blockIdx.x] = right;
    }
    if constexpr (GRADIENT) {
        float factor = target >= 0 ? scale / row.y : 0;
        for_each_word<T, V>(x, vocab, [&](int i, word_of<V, T> word) {
            float values[V];
            unpack<V, T>(word, values);
#pragma unroll
            for (int j = 0; j < V; j++) {
                float gradient = factor * exponential<T>(values[j] - row.x);
                values[j] = target < 0 ? 0 : i + j == target ? gradient - scale : gradient;
            }
            store(x + i, values);
        });
    }
}

/* state->loss += scale * sum of losses [rows]; state->targets += targets that count. One block. */
static __global__ void __launch_bounds__(SUM_THREADS)
    add_losses(const double *losses, const int32_t *targets, int64_t rows, double scale,
               struct step_state *state) {
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
    l.stride = round_up(s->vocab, 64);
    int64_t max_rows = min64(MAX_LOGITS_BYTES, (int64_t)dev->memory / 128) / (l.stride * element);
    max_rows = max_rows < MIN_ROWS ? MIN_ROWS : max_rows;
    /* Chunks of about equal size, so that the last one is not much smaller. */
    l.chunk = min64(s->rows, round_up(ceil_div(s->rows, ceil_div(s->rows, max_rows)), ROW_STEP));
    l.losses_offset = MATMUL_WORKSPACE;
    l.logits_offset = l.losses_offset + (size_t)round_up(s->rows * (int64_t)sizeof(double), 256);
    l.bytes = l.logits_offset + (size_t)(l.chunk * l.stride * element);
    return l;
}

static struct matmul logits_shape(const struct classifier_spec *s, enum dtype t, int64_t rows, int64_t ldh,
                                  int64_t stride) {
    return (struct matmul){false, true, rows, s->vocab, s->hidden, ldh, s->hidden, stride, t, t, false};
}

static struct matmul dh_shape(const struct classifier_spec *s, enum dtype t, int64_t rows, int64_t stride,
                              int64_t ldh) {
    return (struct matmul){false, false, rows, s->hidden, s->vocab, stride, s->hidden, ldh, t, t, false};
}

static struct matmul dw_shape(const struct classifier_spec *s, enum dtype t, int64_t rows, int64_t stride,
                              int64_t ldh) {
    return (struct matmul){true, false,     s->vocab, s->hidden, rows, stride,
                           ldh,  s->hidden, t,        DTYPE_F32, false};
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
        plan_matmul(dev, dw_shape(s, t, sizes[i], l.stride, s->hidden));
    }
    cost->workspace = l.bytes;
    return 0;
}

static void launch_row_loss(struct device *dev, const struct classifier_spec *s, enum dtype t, void *logits,
                            int64_t stride, int64_t rows, const int32_t *targets, double scale, bool gradient,
                            double *losses, int32_t *correct) {
    by_dtype(t, [&](auto number) {
        using T = decltype(number);
        constexpr int V = VECTOR<T>; /* rows are padded and aligned */
        if (gradient)
            launch<row_loss<T, V, true>>(dev, rows, THREADS, 0, (T *)logits, stride, (int)s->vocab, targets,
                                         (float)scale, losses, correct);
        else
            launch<row_loss<T, V, false>>(dev, rows, THREADS, 0, (T *)logits, stride, (int)s->vocab, targets,
                                          (float)scale, losses, correct);
    });
}

void cuda_classifier(struct device *dev, const struct classifier_spec *s, tensor h, tensor w, tensor targets,
                     double scale, struct step_state *state, tensor correct, tensor dh, tensor dw,
                     bool accumulate) {
    enum dtype t = cuda_compute(dev);
    check_shape("classifier", "h", h, t, s->rows, s->hidden);
    check_shape("classifier", "W", w, t, s->vocab, s->hidden);
    check_contiguous("classifier", "W", w);
    check_shape("classifier", "targets", targets, DTYPE_I32, s->rows);
    if (correct.data)
        check_shape("classifier", "correct", correct, DTYPE_I32, s->rows);
    if (dh.data) {
        check_shape("classifier", "dh", dh, t, s->rows, s->hidden);
        check_shape("classifier", "dW", dw, DTYPE_F32, s->vocab, s->hidden);
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

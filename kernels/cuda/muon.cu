/* Muon: momentum, Newton-Schulz iterations by cuBLASLt in the device's precision, and the update. As in optimizer.cu,
 * kernels read the learning rate, the factor on gradients and the decision to skip a step from the step state. */
#include "kernels/cuda/store_rounded.cuh"

/* ---- momentum and update: flat ranges, one launch per group ---- */

enum { THREADS = 256, MAX_BLOCKS = 4096 };

static int64_t blocks_for(int64_t elements, int width) {
    return min64(ceil_div(elements, (int64_t)THREADS * width), MAX_BLOCKS);
}

/* g' = factor g; m = mu m + g'; g = g' + mu m. Bytes: 16 n. */
template <int V>
static __global__ void __launch_bounds__(THREADS)
    momentum_step(float *g, float *m, int64_t n, float mu, const struct step_state *state) {
    wait_for_previous();
    float factor = (float)state->factor;
    if (state->skip)
        return;
    for (int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * V; i < n;
         i += (int64_t)gridDim.x * THREADS * V) {
        float gradient[V], moment[V];
        load(g + i, gradient);
        load(m + i, moment);
#pragma unroll
        for (int j = 0; j < V; j++) {
            float scaled = factor * gradient[j];
            moment[j] = mu * moment[j] + scaled;
            gradient[j] = scaled + mu * moment[j];
        }
        store(g + i, gradient);
        store(m + i, moment);
    }
}

/* p -= lr (scale o + decay p). Bytes: 12 n, and 2 n for bf16 parameters. */
template <typename T, int V>
static __global__ void __launch_bounds__(THREADS)
    apply_update(float *master, T *p, const float *o, int64_t n, struct param_group group,
                 const struct step_state *state) {
    wait_for_previous();
    float lr = (float)(state->lr * (double)group.lr_scale);
    float decay = lr * group.weight_decay, scale = lr * group.muon_scale;
    uint32_t updates = (uint32_t)state->history.updates;
    if (state->skip)
        return;
    for (int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * V; i < n;
         i += (int64_t)gridDim.x * THREADS * V) {
        float param[V], direction[V];
        load(master + i, param);
        load(o + i, direction);
#pragma unroll
        for (int j = 0; j < V; j++)
            param[j] -= scale * direction[j] + decay * param[j];
        store(master + i, param);
        if (p)
            store_rounded(p + i, param, updates, group.rounding_index + i);
    }
}

/* Call f with the vector width that the group's addresses and length allow. */
template <typename F> static void by_group_width(const struct param_group &group, bool aligned, F f) {
    if (aligned && group.begin % 4 == 0 && group.end % 4 == 0)
        f(std::integral_constant<int, 4>());
    else
        f(std::integral_constant<int, 1>());
}

void cuda_muon_momentum(struct device *dev, double momentum, const struct param_group *groups, int count,
                        tensor g, tensor m, const struct step_state *state) {
    int64_t n = tensor_count(g);
    check_shape("muon_momentum", "g", g, DTYPE_F32, n);
    check_shape("muon_momentum", "m", m, DTYPE_F32, n);
    for (int i = 0; i < count; i++) {
        int64_t begin = groups[i].begin, length = groups[i].end - begin;
        by_group_width(groups[i], aligned16({g.data, m.data}), [&](auto width) {
            constexpr int V = decltype(width)::value;
            launch<momentum_step<V>>(dev, blocks_for(length, V), THREADS, 0, (float *)g.data + begin,
                                     (float *)m.data + begin, length, (float)momentum, state);
        });
    }
}

void cuda_muon_update(struct device *dev, const struct param_group *groups, int count, tensor master,
                      tensor p, tensor o, const struct step_state *state) {
    int64_t n = tensor_count(master);
    check_shape("muon_update", "master", master, DTYPE_F32, n);
    check_shape("muon_update", "o", o, DTYPE_F32, n);
    if (p.data)
        check_shape("muon_update", "p", p, cuda_compute(dev), n);
    bool aligned = aligned16({master.data, p.data, o.data});
    for (int i = 0; i < count; i++) {
        int64_t begin = groups[i].begin, length = groups[i].end - begin;
        by_dtype(p.data ? p.dtype : DTYPE_F32, [&](auto number) {
            using T = decltype(number);
            by_group_width(groups[i], aligned, [&](auto width) {
                constexpr int V = decltype(width)::value;
                launch<apply_update<T, V>>(dev, blocks_for(length, V), THREADS, 0,
                                           (float *)master.data + begin,
                                           p.data ? (T *)p.data + begin : (T *)NULL,
                                           (const float *)o.data + begin, length, groups[i], state);
            });
        });
    }
}

/* ---- Newton-Schulz ---- */

enum { ITERATIONS = 5 };
static const float A1 = 3.4445f, A3 = -4.7750f, A5 = 2.0315f;

/* The products of an iteration, with the smaller side as the Gram matrix's. T: the device's compute type. */
struct products {
    struct matmul gram, square, step;
    int64_t side;
};

static struct products products_of(const struct device *dev, const struct orthogonalize_spec *s) {
    enum dtype t = cuda_compute(dev);
    int64_t R = s->rows, C = s->cols, side = min64(R, C);
    struct products p = {};
    p.side = side;
    if (R > C) { /* X^T X, and X times a polynomial of it */
        p.gram = {true, false, C, C, R, C, C, C, t, t, false};
        p.step = {false, false, R, C, C, C, C, C, t, t, false};
    } else {
        p.gram = {false, true, R, R, C, C, C, R, t, t, false};
        p.step = {false, false, R, C, R, R, C, C, t, t, false};
    }
    p.square = {false, false, side, side, side, side, side, side, t, t, false};
    return p;
}

static size_t matrix_bytes(const struct device *dev, int64_t elements) {
    return (size_t)round_up(elements * (int64_t)dtype_bytes(cuda_compute(dev)), 256);
}

static size_t iteration_bytes(const struct device *dev, const struct orthogonalize_spec *s) {
    int64_t side = min64(s->rows, s->cols);
    return MATMUL_WORKSPACE + 2 * matrix_bytes(dev, s->rows * s->cols) + 2 * matrix_bytes(dev, side * side);
}

int cuda_orthogonalize_plan(struct device *dev, const struct orthogonalize_spec *s, struct op_cost *cost,
                            struct error *e) {
    (void)e;
    struct products p = products_of(dev, s);
    plan_matmul(dev, p.gram);
    plan_matmul(dev, p.square);
    plan_matmul(dev, p.step, true);
    *cost = (struct op_cost){0, iteration_bytes(dev, s)};
    return 0;
}

/* partial[block] = the sum of its elements' squares, in double: squares of small gradients are no floats. Bytes: 4 n. */
static __global__ void __launch_bounds__(THREADS)
    squares_of_blocks(const float *x, int64_t n, double *partial) {
    wait_for_previous();
    double sum = 0;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS)
        sum += (double)x[i] * (double)x[i];
    sum = block_sum<THREADS>(sum);
    if (threadIdx.x == 0)
        partial[blockIdx.x] = sum;
}

/* One block: *scale = 1 / the norm; 0 for zeros. */
static __global__ void __launch_bounds__(THREADS)
    inverse_norm(const double *partial, int parts, double *scale) {
    wait_for_previous();
    double sum = 0;
    for (int i = (int)threadIdx.x; i < parts; i += THREADS)
        sum += partial[i];
    sum = block_sum<THREADS>(sum);
    if (threadIdx.x == 0)
        *scale = sum > 0 ? 1 / sqrt(sum) : 0;
}

/* out = scale x, rounded to T. Bytes: 4 n, and T. */
template <typename T>
static __global__ void __launch_bounds__(THREADS)
    normalize(const float *x, int64_t n, const double *scale, T *out) {
    wait_for_previous();
    double by = *scale;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS)
        out[i] = from_float<T>((float)(by * (double)x[i]));
}

/* out = a x + b out where `sum`, otherwise a x. */
template <typename T, bool sum>
static __global__ void __launch_bounds__(THREADS) scale_add(const T *x, int64_t n, float a, float b, T *out) {
    wait_for_previous();
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS)
        out[i] = from_float<T>(a * to_float(x[i]) + (sum ? b * to_float(out[i]) : 0));
}

template <typename T>
static __global__ void __launch_bounds__(THREADS)
    write_back(const T *x, int64_t n, float *out, const struct step_state *state) {
    wait_for_previous();
    if (state->skip)
        return;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS)
        out[i] = to_float(x[i]);
}

static_assert(MAX_BLOCKS * sizeof(double) <= SCRATCH_BYTES / 2, "half the scratch holds the blocks' sums");

/* In a step that is skipped everything is computed, since the host does not know, and not written. */
template <typename T>
static void iterate(struct device *dev, const struct orthogonalize_spec *s, float *x,
                    const struct step_state *state) {
    struct products p = products_of(dev, s);
    int64_t n = s->rows * s->cols, squared = p.side * p.side;
    char *at = (char *)cuda_workspace(dev, iteration_bytes(dev, s), "orthogonalize") + MATMUL_WORKSPACE;
    T *now = (T *)at, *next = (T *)(at + matrix_bytes(dev, n)), *gram = (T *)(at + 2 * matrix_bytes(dev, n));
    T *poly = (T *)(at + 2 * matrix_bytes(dev, n) + matrix_bytes(dev, squared));
    double *partial = (double *)dev->scratch, *scale = (double *)(dev->scratch + SCRATCH_BYTES / 2);
    int64_t blocks = blocks_for(n, 4), few = blocks_for(squared, 4);
    launch<squares_of_blocks>(dev, blocks, THREADS, 0, x, n, partial);
    launch<inverse_norm>(dev, 1, THREADS, 0, partial, (int)blocks, scale);
    launch<normalize<T>>(dev, blocks, THREADS, 0, x, n, scale, now);
    for (int i = 0; i < ITERATIONS; i++) {
        run_matmul(dev, p.gram, now, now, NULL, false, gram);
        run_matmul(dev, p.square, gram, gram, NULL, false, poly);
        launch<scale_add<T, true>>(dev, few, THREADS, 0, gram, squared, A3, A5, poly);
        launch<scale_add<T, false>>(dev, blocks, THREADS, 0, now, n, A1, 0.0f, next);
        if (s->rows > s->cols)
            run_matmul(dev, p.step, now, poly, NULL, true, next);
        else
            run_matmul(dev, p.step, poly, now, NULL, true, next);
        T *done = next;
        next = now;
        now = done;
    }
    launch<write_back<T>>(dev, blocks, THREADS, 0, now, n, x, state);
}

void cuda_orthogonalize(struct device *dev, const struct orthogonalize_spec *s, tensor x,
                        const struct step_state *state) {
    check_shape("orthogonalize", "x", x, DTYPE_F32, s->rows, s->cols);
    check_contiguous("orthogonalize", "x", x);
    by_dtype(cuda_compute(dev),
             [&](auto number) { iterate<decltype(number)>(dev, s, (float *)x.data, state); });
}

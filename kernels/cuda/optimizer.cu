/* The optimizer: the step state on the device, the gradient's sum of squares, and AdamW over flat ranges.
 * Kernels read the learning rate, the factor on gradients and the decision to skip a step from the step state, so the
 * host does not have to wait for them. */
#include "kernels/cuda/store_rounded.cuh"

/* ---- the step state: one thread ---- */

static __global__ void begin_step(struct step_state *state, int64_t step, double lr) {
    wait_for_previous();
    state->step = step;
    state->lr = lr;
    state->loss = 0;
    state->targets = 0;
    state->sumsq = 0;
    state->skip = 0;
}

static __global__ void decide_step(struct step_state *state, double tokens, double grad_clip,
                                   double skip_zscore) {
    wait_for_previous();
    step_decision(state, tokens, grad_clip, skip_zscore);
}

static __global__ void write_step(struct step_state *state, struct step_state value) {
    wait_for_previous();
    *state = value;
}

void cuda_step_begin(struct device *dev, struct step_state *state, int64_t step, double lr) {
    launch<begin_step>(dev, 1, 1, 0, state, step, lr);
}

void cuda_step_decide(struct device *dev, struct step_state *state, double tokens, double grad_clip,
                      double skip_zscore) {
    launch<decide_step>(dev, 1, 1, 0, state, tokens, grad_clip, skip_zscore);
}

void cuda_step_read(struct device *dev, const struct step_state *state, struct step_state *host) {
    cuda_read(dev, state, host, sizeof *host);
}

void cuda_step_write(struct device *dev, struct step_state *state, const struct step_state *host) {
    launch<write_step>(dev, 1, 1, 0, state, *host);
}

void cuda_step_post(struct device *dev, const struct step_state *state) {
    struct posted_step *p = &dev->posted[dev->posts++ % POSTED_STEPS];
    cuda_check(cudaMemcpyAsync(p->state, state, sizeof *state, cudaMemcpyDeviceToHost, dev->stream));
    cuda_check(cudaEventRecord(p->done, dev->stream));
}

void cuda_step_collect(struct device *dev, struct step_state *host) {
    struct posted_step *p = &dev->posted[dev->collects++ % POSTED_STEPS];
    cuda_host_wait(dev, p->done);
    *host = *p->state;
}

/* ---- the gradient's sum of squares ---- */

enum { SUM_THREADS = 256, SUM_UNROLL = 4, MAX_SUM_BLOCKS = 4096 };
static_assert(MAX_SUM_BLOCKS * sizeof(double) <= SCRATCH_BYTES / 2,
              "half the scratch holds the blocks' sums");

template <int V> static __device__ __forceinline__ double squares(const float (&x)[V]) {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < V; j++)
        sum += x[j] * x[j];
    return (double)sum;
}

/* partial[block] = the sum of its elements' squares: over V elements in fp32, these sums in double, since a
 * float would lose the small ones among millions. Bytes: 4 n. */
template <int V>
static __global__ void __launch_bounds__(SUM_THREADS)
    sumsq_blocks(const float *x, int64_t n, double *partial) {
    wait_for_previous();
    double sum = 0;
    int64_t step = (int64_t)gridDim.x * SUM_THREADS * V;
    int64_t i = ((int64_t)blockIdx.x * SUM_THREADS + threadIdx.x) * V;
    for (; i + (SUM_UNROLL - 1) * step + V <= n; i += SUM_UNROLL * step) {
        float values[SUM_UNROLL][V]; /* loads in flight at once */
#pragma unroll
        for (int k = 0; k < SUM_UNROLL; k++)
            load(x + i + k * step, values[k]);
#pragma unroll
        for (int k = 0; k < SUM_UNROLL; k++)
            sum += squares(values[k]);
    }
    for (; i + V <= n; i += step) {
        float values[V];
        load(x + i, values);
        sum += squares(values);
    }
    for (; i < n && i + V > n; i++)
        sum += (double)(x[i] * x[i]);
    sum = block_sum<SUM_THREADS>(sum);
    if (threadIdx.x == 0)
        partial[blockIdx.x] = sum;
}

static __global__ void __launch_bounds__(SUM_THREADS)
    sumsq_total(const double *partial, int parts, struct step_state *state) {
    wait_for_previous();
    double sum = 0;
    for (int i = (int)threadIdx.x; i < parts; i += SUM_THREADS)
        sum += partial[i];
    sum = block_sum<SUM_THREADS>(sum);
    if (threadIdx.x == 0)
        state->sumsq += sum;
}

void cuda_sumsq(struct device *dev, tensor g, struct step_state *state) {
    check_contiguous("sumsq", "g", g);
    check_shape("sumsq", "g", g, DTYPE_F32, g.shape[0], g.shape[1], g.shape[2], g.shape[3], g.shape[4]);
    int64_t n = tensor_count(g);
    int64_t blocks = min64(ceil_div(n, SUM_THREADS * 4), min64((int64_t)dev->sm_count * 8, MAX_SUM_BLOCKS));
    double *partial = (double *)dev->scratch;
    if (aligned16({g.data}))
        launch<sumsq_blocks<4>>(dev, blocks, SUM_THREADS, 0, (const float *)g.data, n, partial);
    else
        launch<sumsq_blocks<1>>(dev, blocks, SUM_THREADS, 0, (const float *)g.data, n, partial);
    launch<sumsq_total>(dev, 1, SUM_THREADS, 0, partial, (int)blocks, state);
}

/* ---- AdamW ---- */

enum { ADAM_THREADS = 256, ADAM_UNROLL = 4, ADAM_TILE = ADAM_THREADS * ADAM_UNROLL * 4, MAX_GROUPS = 96 };

/* Groups are passed as a kernel argument, so that no copy to the device is needed; more than MAX_GROUPS take
 * several launches. 96 groups are 3.75 KiB of the 4 KiB that arguments may take. */
struct group_table {
    int count;
    struct {
        int64_t begin, end, first_tile, rounding_index;
        float lr_scale, weight_decay;
    } group[MAX_GROUPS];
};

/* What all elements of a step share, from prepare_adamw(); bias_correction is 1 / (1 - beta^t). */
struct adam_factors {
    float beta1, beta2, one_minus_beta1, one_minus_beta2, bias_correction1, bias_correction2, eps, factor, lr;
    int skip;
    uint32_t updates;
};

/* One thread. In double: 1 - beta2^t loses its digits in fp32 while t is small. */
static __global__ void prepare_adamw(struct adamw_hyper hyper, const struct step_state *state,
                                     struct adam_factors *f) {
    wait_for_previous();
    double t = (double)state->history.updates;
    f->beta1 = (float)hyper.beta1;
    f->beta2 = (float)hyper.beta2;
    f->one_minus_beta1 = (float)(1 - hyper.beta1);
    f->one_minus_beta2 = (float)(1 - hyper.beta2);
    f->bias_correction1 = (float)(1 / (1 - pow(hyper.beta1, t)));
    f->bias_correction2 = (float)(1 / (1 - pow(hyper.beta2, t)));
    f->eps = (float)hyper.eps;
    f->factor = (float)state->factor;
    f->lr = (float)state->lr;
    f->skip = state->skip;
    f->updates = (uint32_t)state->history.updates;
}

/* One element, in place. */
static __device__ __forceinline__ void update(const struct adam_factors &f, float lr, float decay, float g,
                                              float *param, float *m, float *v) {
    g *= f.factor;
    *m = f.beta1 * *m + f.one_minus_beta1 * g;
    *v = f.beta2 * *v + f.one_minus_beta2 * g * g;
    *param -= lr * (*m * f.bias_correction1) / (sqrtf(*v * f.bias_correction2) + f.eps) + decay * *param;
}

/* One block per tile of ADAM_TILE elements of one group. V = 4 when all groups' bounds and addresses are aligned.
 * __grid_constant__: the table is indexed where arguments lie, in constant memory, and not copied to each thread's local
 * memory. Bytes: 28 n, and 2 n for bf16 parameters. */
template <typename T, int V>
static __global__ void __launch_bounds__(ADAM_THREADS)
    adamw(const __grid_constant__ struct group_table groups, const struct adam_factors *factors,
          float *master, T *p, const float *g, float *m, float *v) {
    wait_for_previous();
    struct adam_factors f = *factors;
    if (f.skip)
        return;
    int low = 0, high = groups.count - 1; /* binary search for the tile's group */
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (groups.group[middle].first_tile <= blockIdx.x)
            low = middle;
        else
            high = middle - 1;
    }
    float lr = f.lr * groups.group[low].lr_scale, decay = lr * groups.group[low].weight_decay;
    int64_t begin = groups.group[low].begin + (blockIdx.x - groups.group[low].first_tile) * ADAM_TILE;
    int64_t end = min64(groups.group[low].end, begin + ADAM_TILE);
    int64_t first_index = groups.group[low].rounding_index - groups.group[low].begin;
#pragma unroll 2
    for (int64_t i = begin + threadIdx.x * V; i < end; i += ADAM_THREADS * V) {
        float param[V], first[V], second[V], gradient[V];
        load(master + i, param);
        load(g + i, gradient);
        load(m + i, first);
        load(v + i, second);
#pragma unroll
        for (int j = 0; j < V; j++)
            update(f, lr, decay, gradient[j], &param[j], &first[j], &second[j]);
        store(master + i, param);
        store(m + i, first);
        store(v + i, second);
        if (p)
            store_rounded(p + i, param, f.updates, first_index + i);
    }
}

void cuda_adamw(struct device *dev, const struct adamw_hyper *hyper, const struct param_group *groups,
                int count, tensor master, tensor p, tensor g, tensor m, tensor v,
                const struct step_state *state) {
    int64_t n = tensor_count(master);
    check_shape("adamw", "master", master, DTYPE_F32, n);
    check_shape("adamw", "g", g, DTYPE_F32, n);
    check_shape("adamw", "m", m, DTYPE_F32, n);
    check_shape("adamw", "v", v, DTYPE_F32, n);
    if (p.data)
        check_shape("adamw", "p", p, cuda_compute(dev), n);
    struct adam_factors *factors = (struct adam_factors *)(dev->scratch + SCRATCH_BYTES / 2);
    launch<prepare_adamw>(dev, 1, 1, 0, *hyper, state, factors);
    bool aligned = aligned16({master.data, p.data, g.data, m.data, v.data});
    for (int i = 0; i < count; i++)
        aligned &= groups[i].begin % 4 == 0 && groups[i].end % 4 == 0;
    for (int from = 0; from < count; from += MAX_GROUPS) {
        struct group_table table = {};
        int64_t tiles = 0;
        for (int i = from; i < count && i < from + MAX_GROUPS; i++) {
            if (groups[i].end <= groups[i].begin)
                continue;
            auto *to = &table.group[table.count++];
            to->begin = groups[i].begin;
            to->end = groups[i].end;
            to->first_tile = tiles;
            to->rounding_index = groups[i].rounding_index;
            to->lr_scale = groups[i].lr_scale;
            to->weight_decay = groups[i].weight_decay;
            tiles += ceil_div(groups[i].end - groups[i].begin, ADAM_TILE);
        }
        if (tiles == 0)
            continue;
        by_dtype(p.data ? p.dtype : DTYPE_F32, [&](auto number) {
            using T = decltype(number);
            if (aligned)
                launch<adamw<T, 4>>(dev, tiles, ADAM_THREADS, 0, table, factors, (float *)master.data,
                                    (T *)p.data, (const float *)g.data, (float *)m.data, (float *)v.data);
            else
                launch<adamw<T, 1>>(dev, tiles, ADAM_THREADS, 0, table, factors, (float *)master.data,
                                    (T *)p.data, (const float *)g.data, (float *)m.data, (float *)v.data);
        });
    }
}

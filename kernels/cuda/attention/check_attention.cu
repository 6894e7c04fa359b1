/* A check of the attention that a library computes, once for each planned shape, before the first step.
 *
 * The planned forward and backward run at their full shape, because cuDNN's graphs are built for one shape
 * and building another takes about a second. All their results are searched for parts that were not written.
 * The first COMPARED_HEADS heads of the first sequence (where several query heads share a head of keys, those of the
 * first one) are compared with the built-in kernels: of a causal mask the first tokens only, enough to cross the
 * window's edge and several tiles. To cut the gradients off there too, d_o is zero from there on, and in all other
 * sequences.
 *
 * The rule is flash-attention's: against the built-in kernels in fp32 on the same numbers, the library's
 * error may be FACTOR times that of the built-in kernels in bf16, by norm and by the largest element.
 *
 * Work: one forward and backward of this shape; 16 B S H d bytes written and read once or twice; and the
 * built-in kernels over at most COMPARED_HEADS heads of one sequence, in bf16 and fp32. */
#include "kernels/cuda/attention/attention_bf16.h"
#include "kernels/cuda/attention/check_attention.h"
#include "kernels/cuda/check_values.cuh"

#include <math.h>
#include <stdio.h>

enum { COMPARED_HEADS = 2, COMPARED_TILES = 320 /* tokens beyond the window: two and a half tiles of 128 */ };
enum { MAX_BLOCKS = 128 };
constexpr double FACTOR = 3, ROUNDINGS = 4 * 0x1p-9; /* as in tests/cuda/fixture.h */

/* ---- kernels ---- */

/* x [n] = reproducible noise in (-2, 2), exact in bf16, in the first `noisy` elements, then zero. */
static __global__ void __launch_bounds__(CHECK_THREADS)
    fill_noise(bf16 *x, int64_t n, int64_t noisy, uint32_t seed) {
    wait_for_previous();
    int64_t i = (int64_t)blockIdx.x * CHECK_THREADS + threadIdx.x;
    for (; i < n; i += (int64_t)gridDim.x * CHECK_THREADS)
        x[i] = from_float<bf16>(i < noisy ? ((float)(random_bits(seed, i) >> 24) - 127.5f) / 64 : 0);
}

/* A [tokens, heads, d] view of the first sequence, and how many elements it has. */
struct rows_view {
    const bf16 *data;
    int64_t token_stride, head_stride;
};

struct compared_size {
    int64_t tokens, heads, d;
    __host__ __device__ int64_t count() const {
        return tokens * heads * d;
    }
};

static __device__ inline float value_at(struct rows_view x, struct compared_size s, int64_t i) {
    int64_t token = i / (s.heads * s.d), head = i / s.d % s.heads;
    return to_float(x.data[token * x.token_stride + head * x.head_stride + i % s.d]);
}

/* copy [tokens, heads, d] = x, in fp32. */
static __global__ void __launch_bounds__(CHECK_THREADS)
    copy_to_fp32(struct rows_view x, struct compared_size s, float *copy) {
    wait_for_previous();
    int64_t i = (int64_t)blockIdx.x * CHECK_THREADS + threadIdx.x;
    for (; i < s.count(); i += (int64_t)gridDim.x * CHECK_THREADS)
        copy[i] = value_at(x, s, i);
}

/* Sums of squares and largest magnitudes: of the library's error, the plain kernels' error, the values. */
struct deviations {
    double library, plain, values;
    float library_largest, plain_largest;
};

/* A block's part of them. NaN counts as infinite. */
static __global__ void __launch_bounds__(CHECK_THREADS)
    measure(struct rows_view library, const bf16 *plain, const float *exact, struct compared_size s,
            struct deviations *parts) {
    wait_for_previous();
    double sums[3] = {};
    float largest[2] = {};
    int64_t i = (int64_t)blockIdx.x * CHECK_THREADS + threadIdx.x;
    for (; i < s.count(); i += (int64_t)gridDim.x * CHECK_THREADS) {
        float errors[2] = {fabsf(value_at(library, s, i) - exact[i]), fabsf(to_float(plain[i]) - exact[i])};
        for (int k = 0; k < 2; k++) {
            float error = errors[k] == errors[k] ? errors[k] : INFINITY;
            sums[k] += (double)error * error;
            largest[k] = fmaxf(largest[k], error);
        }
        sums[2] += (double)exact[i] * exact[i];
    }
    for (double &sum : sums)
        sum = block_sum<CHECK_THREADS>(sum);
    __shared__ float warps[2][CHECK_THREADS / 32];
    for (int k = 0; k < 2; k++) {
        largest[k] = warp_max(largest[k]);
        if (threadIdx.x % 32 == 0)
            warps[k][threadIdx.x / 32] = largest[k];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int k = 0; k < 2; k++)
            for (float x : warps[k])
                largest[k] = fmaxf(largest[k], x);
        parts[blockIdx.x] = {sums[0], sums[1], sums[2], largest[0], largest[1]};
    }
}

/* *found = the first element whose error is not below `limit`. */
static __global__ void __launch_bounds__(CHECK_THREADS)
    find_error(struct rows_view library, const float *exact, struct compared_size s, float limit,
               wrong_index *found) {
    wait_for_previous();
    int64_t i = (int64_t)blockIdx.x * CHECK_THREADS + threadIdx.x;
    for (; i < s.count(); i += (int64_t)gridDim.x * CHECK_THREADS)
        if (!(fabsf(value_at(library, s, i) - exact[i]) < limit))
            atomicMin(found, (wrong_index)i);
}

/* ---- memory ---- */

enum { Q, K, V, O, D_O, DQ, DK, DV, TENSORS };
static const char *const NAMES[TENSORS] = {"q", "k", "v", "o", "d_o", "dq", "dk", "dv"};

struct attention_check {
    struct device *dev;
    const struct attention_spec *spec; /* the planned one */
    struct attention_spec part;        /* what is compared */
    tensor library[TENSORS];           /* [B,S,H,d] */
    tensor plain[TENSORS];             /* [1,s,h,d]; inputs are views of the library's */
    tensor exact[TENSORS];             /* [1,s,h,d], fp32 */
    void *saved[3];                    /* of the library, plain and exact */
    size_t used;                       /* bytes of the workspace */
};

static char *take(struct attention_check *c, int64_t bytes) {
    char *at = c->dev->workspace + c->used;
    c->used += (size_t)round_up(bytes, 256);
    return at;
}

/* Bytes of one of the three, which has so many heads. */
static size_t bytes_of_heads(const struct attention_spec *s, int64_t heads) {
    return (size_t)round_up(s->batch * s->length * heads * s->head_dim * (int64_t)sizeof(bf16), 256);
}

size_t attention_qkv_bytes(const struct attention_spec *s) {
    return bytes_of_heads(s, s->heads) + 2 * bytes_of_heads(s, attention_kv_heads(s));
}

void attention_place_qkv(const struct attention_spec *s, char *data, tensor *q, tensor *k, tensor *v) {
    int64_t H = s->heads, G = attention_kv_heads(s);
    const int64_t heads[3] = {H, G, G}, first[3] = {0, H, H + G};
    tensor row = tensor_of(data, DTYPE_BF16, s->batch, s->length, H + 2 * G, s->head_dim, 0),
           *three[3] = {q, k, v};
    for (int i = 0; i < 3; i++) {
        *three[i] = s->packed ? tensor_part(row, 2, first[i], heads[i])
                              : tensor_of(data, DTYPE_BF16, s->batch, s->length, heads[i], s->head_dim, 0);
        data += bytes_of_heads(s, heads[i]);
    }
}

/* q, k, v or their gradients. */
static void place_three(struct attention_check *c, tensor *three) {
    attention_place_qkv(c->spec, take(c, (int64_t)attention_qkv_bytes(c->spec)), &three[0], &three[1],
                        &three[2]);
}

static bool of_keys(int what) {
    return what == K || what == V || what == DK || what == DV;
}

/* The compared heads of a tensor. */
static int64_t part_heads(const struct attention_spec *part, int what) {
    return of_keys(what) ? attention_kv_heads(part) : part->heads;
}

/* The compared part of a [B,S,H,d] tensor. */
static tensor part_of(tensor t, const struct attention_spec *part, int what) {
    t.shape[0] = 1;
    t.shape[1] = part->length;
    t.shape[2] = part_heads(part, what);
    return t;
}

static struct rows_view rows_of(tensor t) {
    return {(const bf16 *)t.data, t.stride[1], t.stride[2]};
}

/* The tensors one after another, after what the operations need. False: they do not fit. */
static bool place(struct attention_check *c, size_t op_workspace) {
    const struct attention_spec *s = c->spec;
    int64_t count = s->batch * s->length * s->heads * s->head_dim;
    int64_t statistics = c->part.heads * c->part.length * (int64_t)sizeof(float); /* the built-in kernels' */
    take(c, (int64_t)op_workspace > statistics ? (int64_t)op_workspace : statistics);
    place_three(c, &c->library[Q]);
    place_three(c, &c->library[DQ]);
    for (int i : {O, D_O})
        c->library[i] =
            tensor_of(take(c, count * 2), DTYPE_BF16, s->batch, s->length, s->heads, s->head_dim, 0);
    c->saved[0] = take(c, s->batch * s->heads * s->length * (int64_t)sizeof(float));
    c->saved[1] = take(c, statistics);
    c->saved[2] = take(c, statistics);
    for (int i = 0; i < TENSORS; i++) {
        int64_t heads = part_heads(&c->part, i), compared = c->part.length * heads * s->head_dim;
        bool input = i != O && i < DQ;
        c->plain[i] =
            input ? part_of(c->library[i], &c->part, i)
                  : tensor_of(take(c, compared * 2), DTYPE_BF16, 1, c->part.length, heads, s->head_dim, 0);
        c->exact[i] = tensor_of(take(c, compared * 4), DTYPE_F32, 1, c->part.length, heads, s->head_dim, 0);
    }
    return c->used <= c->dev->workspace_bytes;
}

/* ---- the check ---- */

static struct attention_spec compared_part(const struct attention_spec *s) {
    struct attention_spec part = *s;
    int64_t window = s->window > 0 && s->window < s->length ? s->window : 0;
    part.batch = 1;
    part.heads = attention_group(s) > 1 ? attention_group(s) : min64(s->heads, COMPARED_HEADS);
    part.kv_heads = attention_group(s) > 1 ? 1 : part.heads;
    part.length = s->causal ? min64(s->length, window + COMPARED_TILES) : s->length;
    return part;
}

static void fill(struct attention_check *c) {
    bool packed = c->spec->packed;
    struct device *dev = c->dev;
    int64_t row = c->spec->heads * c->spec->head_dim;
    /* Elements from a tensor's beginning to its end, or of packed ones to the last one's. */
    auto elements = [&](int i) {
        bool together = packed && i != O && i != D_O;
        return together ? c->spec->batch * c->spec->length * c->library[i].stride[1]
                        : tensor_count(c->library[i]);
    };
    auto noise = [&](void *x, int64_t n, int64_t noisy, uint32_t seed) {
        launch<fill_noise>(dev, check_blocks(dev, n), CHECK_THREADS, 0, (bf16 *)x, n, noisy, seed);
    };
    if (packed)
        noise(c->library[Q].data, elements(Q), elements(Q), 1);
    else
        for (int i : {Q, K, V})
            noise(c->library[i].data, elements(i), elements(i), 1 + (uint32_t)i);
    noise(c->library[D_O].data, elements(D_O), c->part.length * row, 9);
    for (int i : {O, DQ, DK, DV}) /* packed gradients: from each one's place to the end of its rows */
        if (i == O || !packed || i == DQ)
            cuda_check(
                cudaMemsetAsync(c->library[i].data, 0xff, (size_t)elements(i) * sizeof(bf16), dev->stream));
}

static int fail_attention(struct attention_check *c, int what, int64_t sequence, int64_t token, int64_t head,
                          int64_t i, double expected, struct error *e) {
    tensor t = c->library[what];
    double value;
    int64_t at = sequence * t.stride[0] + token * t.stride[1] + head * t.stride[2] + i;
    cuda_download(c->dev, tensor_of((bf16 *)t.data + at, DTYPE_BF16, 1, 0, 0, 0, 0), &value, DTYPE_F64);
    char instead[64] = "";
    if (expected == expected)
        snprintf(instead, sizeof instead, " instead of %g", expected);
    return fail_run(
        e,
        "cuDNN computes wrong attention on this GPU (%s): %s of %lld sequences of %lld tokens, %lld "
        "heads of %lld, window %lld, element [%lld,%lld,%lld,%lld] is %g%s; set the environment "
        "variable IHA_ATTENTION=own, or install another version of cuDNN",
        c->dev->name, NAMES[what], (long long)c->spec->batch, (long long)c->spec->length,
        (long long)c->spec->heads, (long long)c->spec->head_dim, (long long)c->spec->window,
        (long long)sequence, (long long)token, (long long)head, (long long)i,
        value == value ? value : (double)NAN, instead);
}

/* Everything was written. */
static int check_written(struct attention_check *c, int what, struct error *e) {
    struct device *dev = c->dev;
    wrong_index *found = (wrong_index *)dev->scratch, index;
    tensor t = c->library[what];
    const struct attention_spec *s = c->spec;
    int64_t heads = t.shape[2], row = heads * s->head_dim;
    cuda_check(cudaMemsetAsync(found, 0xff, sizeof *found, dev->stream));
    launch<find_nan<bf16>>(dev, check_blocks(dev, tensor_count(t)), CHECK_THREADS, 0, (const bf16 *)t.data,
                           s->batch * s->length, row, t.stride[1], found);
    cuda_read(dev, found, &index, sizeof index);
    if (index == NONE_WRONG)
        return 0;
    int64_t i = (int64_t)index, token = i / row;
    return fail_attention(c, what, token / s->length, token % s->length, i % row / s->head_dim,
                          i % s->head_dim, (double)NAN, e);
}

static struct deviations measured(struct attention_check *c, int what, struct compared_size size) {
    struct device *dev = c->dev;
    static_assert(MAX_BLOCKS * sizeof(struct deviations) <= SCRATCH_BYTES, "one for each block");
    struct deviations parts[MAX_BLOCKS], d = {};
    int64_t blocks = min64(check_blocks(dev, size.count()), MAX_BLOCKS);
    launch<measure>(dev, (unsigned)blocks, CHECK_THREADS, 0, rows_of(c->library[what]),
                    (const bf16 *)c->plain[what].data, (const float *)c->exact[what].data, size,
                    (struct deviations *)dev->scratch);
    cuda_read(dev, dev->scratch, parts, (size_t)blocks * sizeof *parts);
    for (int64_t i = 0; i < blocks; i++) {
        d.library += parts[i].library;
        d.plain += parts[i].plain;
        d.values += parts[i].values;
        d.library_largest = fmaxf(d.library_largest, parts[i].library_largest);
        d.plain_largest = fmaxf(d.plain_largest, parts[i].plain_largest);
    }
    return d;
}

/* The compared part is as close to fp32 as the built-in kernels are. */
static int compare(struct attention_check *c, int what, struct error *e) {
    struct device *dev = c->dev;
    struct compared_size size = {c->part.length, part_heads(&c->part, what), c->part.head_dim};
    struct deviations d = measured(c, what, size);
    double norm = sqrt(d.values);
    if (sqrt(d.library) <= FACTOR * sqrt(d.plain) + ROUNDINGS * norm &&
        d.library_largest <= FACTOR * d.plain_largest + ROUNDINGS * norm)
        return 0;
    wrong_index *found = (wrong_index *)dev->scratch, index;
    cuda_check(cudaMemsetAsync(found, 0xff, sizeof *found, dev->stream));
    launch<find_error>(dev, check_blocks(dev, size.count()), CHECK_THREADS, 0, rows_of(c->library[what]),
                       (const float *)c->exact[what].data, size, d.library_largest, found);
    cuda_read(dev, found, &index, sizeof index);
    int64_t i = index == NONE_WRONG ? 0 : (int64_t)index;
    float expected;
    cuda_read(dev, (const float *)c->exact[what].data + i, &expected, sizeof expected);
    return fail_attention(c, what, 0, i / (size.heads * size.d), i / size.d % size.heads, i % size.d,
                          (double)expected, e);
}

int check_attention(struct device *dev, const struct attention_spec *spec, size_t op_workspace, size_t *used,
                    struct error *e) {
    struct attention_check c = {dev, spec, compared_part(spec)};
    if (!place(&c, op_workspace))
        return 0;
    *used = c.used > *used ? c.used : *used;
    fill(&c);
    tensor *x = c.library;
    const tensor none = tensor_none(); /* cuDNN is not chosen for segments */
    cuda_attention(dev, spec, x[Q], x[K], x[V], none, x[O], c.saved[0]);
    cuda_attention_backward(dev, spec, x[Q], x[K], x[V], none, x[O], x[D_O], c.saved[0], x[DQ], x[DK], x[DV]);
    for (int i : {O, DQ, DK, DV})
        if (check_written(&c, i, e) != 0)
            return -1;
    tensor *y = c.plain, *z = c.exact;
    attention_builtin(dev, &c.part, y[Q], y[K], y[V], none, y[O], c.saved[1]);
    attention_builtin_backward(dev, &c.part, y[Q], y[K], y[V], none, y[O], y[D_O], c.saved[1], y[DQ], y[DK],
                               y[DV]);
    struct device fp32 = *dev; /* the same queue and memory */
    fp32.precision = DEVICE_FP32;
    for (int i : {Q, K, V, D_O}) {
        struct compared_size size = {c.part.length, part_heads(&c.part, i), c.part.head_dim};
        launch<copy_to_fp32>(dev, check_blocks(dev, size.count()), CHECK_THREADS, 0, rows_of(y[i]), size,
                             (float *)z[i].data);
    }
    attention_builtin(&fp32, &c.part, z[Q], z[K], z[V], none, z[O], c.saved[2]);
    attention_builtin_backward(&fp32, &c.part, z[Q], z[K], z[V], none, z[O], z[D_O], c.saved[2], z[DQ], z[DK],
                               z[DV]);
    for (int i : {O, DQ, DK, DV})
        if (compare(&c, i, e) != 0)
            return -1;
    return 0;
}

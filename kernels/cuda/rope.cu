/* Rotary position embedding: the table of angles, and the rotation of heads that are not mixed. */
#include "kernels/cuda/rope.cuh"

#include <math.h>

/* ---- the table ---- */

enum { TABLE_THREADS = 256, FREQUENCIES = 128 };

/* Of some of the table's columns, as an argument of the kernel. */
struct rope_frequencies {
    double of[FREQUENCIES];
    int64_t first, count; /* columns */
};

/* A thread fills one column of a position: 8 bytes. */
static __global__ void __launch_bounds__(TABLE_THREADS)
    fill_table(float *table, int64_t positions, int64_t half, struct rope_frequencies f) {
    wait_for_previous();
    int64_t e = (int64_t)blockIdx.x * TABLE_THREADS + threadIdx.x;
    if (e >= positions * f.count)
        return;
    int64_t position = e / f.count, i = e % f.count;
    double angle = (double)position * f.of[i];
    float *row = table + position * 2 * half + f.first + i;
    row[0] = (float)cos(angle);
    row[half] = (float)sin(angle);
}

/* table F32 [positions, 2, d/2]: cosines, then sines; fp32 whatever the precision of what is rotated.
 * Computed in double: the angles of late positions are large, so that rounding them to fp32 would rotate
 * noticeably wrong. */
void cuda_rope_table(struct device *dev, const struct rope_spec *s, tensor table) {
    int64_t positions = table.shape[0], half = table.shape[2];
    check_shape("rope_table", "table", table, DTYPE_F32, positions, 2, half);
    check_contiguous("rope_table", "table", table);
    for (int64_t first = 0; first < half; first += FREQUENCIES) {
        struct rope_frequencies f = {{}, first, min64(half - first, FREQUENCIES)};
        for (int64_t i = 0; i < f.count; i++)
            f.of[i] = rope_frequency(s, first + i, half);
        launch<fill_table>(dev, (unsigned)ceil_div(positions * f.count, TABLE_THREADS), TABLE_THREADS, 0,
                           (float *)table.data, positions, half, f);
    }
}

/* ---- rotation without mixing: P = 1 without alphas ---- */

enum { ROTATE_THREADS = 256 };

template <typename T> struct rotate_job {
    T *qkv;            /* [N,H+2G,d] */
    T *out[3];         /* [N,H,d] or [N,G,d] */
    int64_t stride[3]; /* between tokens of out */
    struct rope_rows rope;
    int64_t count;
    int heads, kv_heads, d;
    int row;    /* heads of a row of qkv: those of q, k and v */
    int active; /* of these, the first that are rotated or copied */
};

/* out = rotate(qkv), or BACK: qkv = rotate back(out). A thread has V columns of the first half of a head and
 * the columns of the second half that they are rotated with. Bytes moved: 2 N (H + 2 G) d elements, in place
 * 2 N (H + G) d. */
template <typename T, int V, bool BACK>
static __global__ void __launch_bounds__(ROTATE_THREADS) rotate_heads(struct rotate_job<T> job) {
    wait_for_previous();
    int d = job.d, half = (d + 1) / 2, vectors = (half + V - 1) / V;
    int64_t e = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (e >= job.count * job.active * vectors)
        return;
    int c = (int)(e % vectors) * V, at = (int)(e / vectors % job.active);
    int64_t n = e / vectors / job.active;
    int w = at < job.heads ? 0 : at < job.heads + job.kv_heads ? 1 : 2;
    int h = w == 0 ? at : (at - job.heads) % job.kv_heads;
    bool has_partner = V > 1 || c + half < d;
    T *packed = job.qkv + (n * job.row + at) * d + c;
    T *separate = w == 0 ? job.out[0] : w == 1 ? job.out[1] : job.out[2];
    separate += n * (w == 0 ? job.stride[0] : w == 1 ? job.stride[1] : job.stride[2]) + h * d + c;
    const T *from = BACK ? separate : packed;
    T *to = BACK ? packed : separate;
    float x[V], y[V] = {}, cosine[V], sine[V];
    load(from, x);
    if (has_partner)
        load(from + half, y);
    if (job.rope.table && w < 2) {
        const float *row = rope_token(job.rope, (int)n, 1, d) + c;
        load(row, cosine);
        load(row + half, sine);
#pragma unroll
        for (int k = 0; k < V; k++) {
            float a = x[k], b = y[k], s = BACK ? -sine[k] : sine[k];
            x[k] = a * cosine[k] - b * s;
            y[k] = b * cosine[k] + a * s;
        }
    }
    store(to, x);
    if (has_partner)
        store(to + half, y);
}

void rope_rotate(struct device *dev, const struct qkv_mix_spec *s, struct rope_rows rope, tensor qkv,
                 tensor q, tensor k, tensor v, bool back) {
    by_dtype(qkv.dtype, [&](auto number) {
        using T = decltype(number);
        constexpr int V = VECTOR<T>;
        struct rotate_job<T> job;
        job.qkv = (T *)qkv.data;
        const tensor out[3] = {q, k, v};
        bool wide = s->head_dim % (2 * V) == 0 && aligned16({qkv.data, q.data, k.data, v.data, rope.table});
        for (int w = 0; w < 3; w++) {
            job.out[w] = (T *)out[w].data;
            job.stride[w] = out[w].stride[1];
            wide &= job.stride[w] % V == 0;
        }
        job.rope = rope;
        job.count = s->batch * s->tokens;
        job.heads = (int)s->heads;
        job.kv_heads = (int)mix_kv_heads(s);
        job.d = (int)s->head_dim;
        job.row = (int)mix_row_heads(s);
        /* The model passes q, k and v as parts of qkv. Then v stays as it is, and has no threads. */
        bool in_place = v.data == tensor_part(qkv, 2, s->heads + mix_kv_heads(s), 1).data;
        job.active = in_place ? job.heads + job.kv_heads : job.row;
        int64_t half = (s->head_dim + 1) / 2, heads = job.count * job.active;
        int64_t blocks = ceil_div(heads * half, ROTATE_THREADS);
        int64_t vector_blocks = ceil_div(heads * half / V, ROTATE_THREADS);
        if (wide && back)
            launch<rotate_heads<T, V, true>>(dev, vector_blocks, ROTATE_THREADS, 0, job);
        else if (wide)
            launch<rotate_heads<T, V, false>>(dev, vector_blocks, ROTATE_THREADS, 0, job);
        else if (back)
            launch<rotate_heads<T, 1, true>>(dev, blocks, ROTATE_THREADS, 0, job);
        else
            launch<rotate_heads<T, 1, false>>(dev, blocks, ROTATE_THREADS, 0, job);
    });
}

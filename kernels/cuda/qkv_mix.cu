/* qkv_mix: pseudo-heads out of heads, interleaved into the virtual sequence, and rotated (paper: steps 2-4).
 *
 *   forward   q~[n,p,h,:] = rotate(sum_m alpha_q[p,h,m] q[n,m,:]), likewise k~, and v~ without rotation
 *   backward  u = rotate back(dq~[n,p,h,:]);  dq[n,m,:] = sum_{p,h} alpha_q[p,h,m] u[p,h,:];
 *             dalpha_q[p,h,m] (+)= sum_n <u[p,h,:], q[n,m,:]>;  likewise for k and v
 *
 * qkv [N,H+2G,d], q~ [N,P,H,d], k~, v~ [N,P,G,d], N = B T tokens; [N,P,H,d] is [B,S,H,d], so interleaving moves
 * nothing. Forward is one launch, the expand of head_mix.cuh (two where G < H); backward is in qkv_mix_backward.cu.
 * Without alphas (P = 1) both only rotate (rope.cu). Each element is read or written once: forward
 * (1 + P) (H + 2 G) d elements a token, backward (2 + P) (H + 2 G) d; and the table's angles, P d floats a token,
 * which the sequences of a batch and the heads of q and k share. */
#include "kernels/cuda/qkv_mix.cuh"

/* ---- forward ---- */

enum { MIX_WARPS = 8, MIX_BLOCKS_PER_SM = 2, MIX_SHARED = 96 << 10 };

struct mix_job {
    const bf16 *qkv, *alpha[3];
    bf16 *out[3];
    struct rope_rows rope;
    struct head_rows o;
    int count, d;   /* tokens */
    int64_t stride; /* of a row of qkv, which is at its first tensor */
    int tensors, rotated;
    int chunks; /* of a block */
};

/* Grid: (blocks that share the tokens, tensors, parts of the chunks). A warp takes a group of columns of one
 * token, loads its heads across, and computes and stores one tile of 16 pseudo-heads after another. Only
 * alpha is in shared memory, so warps do not wait for each other; 16 warps on an SM, and the next token
 * prefetched into the L2, hide the latency of loads. Shared memory: for each tile of alpha 16 rows of 16 KT +
 * 8 elements. */
template <int KT>
static __global__ void __launch_bounds__(32 * MIX_WARPS, KT == 4 ? 1 : 2) mix_tiles(struct mix_job job) {
    wait_for_previous();
    const struct head_rows &o = job.o;
    int w = blockIdx.y, d = job.d, half = d / 2;
    int begin = blockIdx.z * job.chunks, end = min(begin + job.chunks, o.chunks);
    bf16 *alpha = dynamic_shared<bf16>();
    stage_matrix<KT>(alpha,
                     w == 0   ? job.alpha[0]
                     : w == 1 ? job.alpha[1]
                              : job.alpha[2],
                     o, begin * o.tiles, (end - begin) * o.tiles);
    __syncthreads();
    bf16 *out = w == 0 ? job.out[0] : w == 1 ? job.out[1] : job.out[2];
    bool rotate = job.rope.table && w < job.rotated;
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, step = rope_step(job.rope, d);
    for (int n = blockIdx.x * MIX_WARPS + warp_number(); n < job.count; n += gridDim.x * MIX_WARPS) {
        const bf16 *in = job.qkv + n * job.stride + w * o.heads * d + g % 2 * half;
        bf16 *out_token = out + (int64_t)n * o.pseudo * o.heads * d;
        const float *angles = rotate ? rope_token(job.rope, n, o.pseudo, d) : NULL;
        int next = n + gridDim.x * MIX_WARPS;
        if (lane == 0 && blockIdx.z == 0 && next < job.count)
            prefetch_l2(job.qkv + next * job.stride + w * o.heads * d,
                        (uint32_t)(o.heads * d * sizeof(bf16)));
        for (int group = 0; group < half; group += GROUP) {
            int in_column = group + g / 2 * 8, column = group + t * 8;
            uint32_t b[KT][8][2];
            load_across(b, in + in_column, o.heads, d, in_column < half);
            for (int chunk = begin; chunk < end; chunk++) {
                int p = row_pseudo(o, chunk, g);
                bool present = p < o.pseudo && column < half; /* not padding */
                struct rotation angle;
                if (rotate && present)
                    load_rotation(angle, angles + p * step + column, half);
                for (int tile = 0; tile < o.tiles; tile++) {
                    float sum[8][4] = {};
#pragma unroll
                    for (int k = 0; k < KT; k++) {
                        uint32_t a[4];
                        load_matrix<KT>(a, alpha, (chunk - begin) * o.tiles + tile, k);
#pragma unroll
                        for (int j = 0; j < 8; j++)
                            mma_m16n8k16(sum[j], a, b[k][j]);
                    }
                    if (rotate && present) {
                        rotate_across(sum, 0, angle);
                        rotate_across(sum, 1, angle);
                    }
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        int h = row_head(o, tile, g + 8 * r);
                        bf16 *to = out_token + (p * o.heads + h) * d + column;
                        if (present && h < o.heads)
                            store_across(sum, r, to, half);
                    }
                }
            }
        }
    }
}

/* Chunks of rows whose weights fit into shared memory at once: up to MIX_SHARED, so that two blocks fit an SM
 * of Hopper. */
static int chunks_at_once(const struct device *dev, const struct head_rows &o, size_t row_bytes) {
    size_t limit = dev->shared_limit;
    if (limit > MIX_SHARED)
        limit = MIX_SHARED;
    size_t chunks = limit / (o.tiles * 16 * row_bytes);
    return (int)(chunks < (size_t)o.chunks ? chunks : (size_t)o.chunks);
}

template <int KT> static void launch_mix_tiles(struct device *dev, struct mix_job job) {
    size_t row_bytes = (KT * 16 + 8) * sizeof(bf16);
    job.chunks = chunks_at_once(dev, job.o, row_bytes);
    int parts = (int)ceil_div(job.o.chunks, job.chunks);
    int64_t blocks = ceil_div(job.count, MIX_WARPS);
    int64_t most = ceil_div((int64_t)dev->sm_count * MIX_BLOCKS_PER_SM, job.tensors * parts);
    launch<mix_tiles<KT>>(dev, dim3((unsigned)(blocks < most ? blocks : most), job.tensors, parts),
                          32 * MIX_WARPS, job.chunks * job.o.tiles * 16 * row_bytes, job);
}

/* ---- operations ---- */

int cuda_qkv_mix_plan(struct device *dev, const struct qkv_mix_spec *s, struct op_cost *cost,
                      struct error *e) {
    (void)e;
    if (s->mixed)
        cost->workspace = qkv_mix_backward_workspace(dev, s);
    return 0;
}

struct rope_rows check_qkv_mix(const struct device *dev, const char *op, const struct qkv_mix_spec *s,
                               tensor qkv, tensor q, tensor k, tensor v, tensor aq, tensor ak, tensor av,
                               tensor table, tensor positions, int64_t first) {
    int64_t B = s->batch, P = s->pseudo, d = s->head_dim;
    enum dtype type = cuda_compute(dev);
    const tensor outs[3] = {q, k, v}, alphas[3] = {aq, ak, av};
    const char *names[3] = {"q", "k", "v"}, *alpha_names[3] = {"alpha_q", "alpha_k", "alpha_v"};
    check_shape(op, "qkv", qkv, type, B, s->tokens, mix_row_heads(s), d);
    check_contiguous(op, "qkv", qkv);
    for (int i = 0; i < 3; i++) {
        int64_t H = mix_heads_of(s, i);
        check_shape(op, names[i], outs[i], type, B, s->tokens * (s->mixed ? P : 1), H, d);
        if (!s->mixed)
            check_token_rows(op, names[i], outs[i]);
        if (s->mixed) {
            check_contiguous(op, names[i], outs[i]);
            check_shape(op, alpha_names[i], alphas[i], type, P, H, H);
            check_contiguous(op, alpha_names[i], alphas[i]);
        }
    }
    struct rope_rows rope = {NULL, (int)s->tokens, first, s->rope_virtual, (const int32_t *)positions.data};
    if (positions.data) {
        check_shape(op, "positions", positions, DTYPE_I32, B, s->tokens);
        check_contiguous(op, "positions", positions);
    }
    if (s->rope) {
        int64_t positions = (first + s->tokens) * (s->rope_virtual ? P : 1);
        if (positions < table.shape[0])
            positions = table.shape[0];
        check_shape(op, "table", table, DTYPE_F32, positions, 2, (d + 1) / 2); /* no odd d */
        check_contiguous(op, "table", table);
        rope.table = (const float *)table.data;
    }
    return rope;
}

static void mix_part_forward(struct device *dev, const struct qkv_mix_spec *s, struct mix_part part,
                             struct rope_rows rope, tensor qkv, const tensor alpha[3], const tensor out[3]) {
    struct head_rows o = pseudo_order(BY_PSEUDO_HEAD, part.heads, s->pseudo);
    int64_t H = part.heads, d = s->head_dim, n = qkv_mix_tokens(s), stride = mix_row_heads(s) * d;
    if (tensor_core_shape(qkv.dtype, H, d) &&
        aligned16({qkv.data, out[0].data, out[1].data, out[2].data, rope.table})) {
        struct mix_job job = {};
        job.qkv = (const bf16 *)qkv.data + part.offset;
        for (int w = 0; w < part.tensors; w++) {
            job.alpha[w] = (const bf16 *)alpha[part.first + w].data;
            job.out[w] = (bf16 *)out[part.first + w].data;
        }
        job.rope = rope;
        job.o = o;
        job.count = (int)n;
        job.d = (int)d;
        job.stride = stride;
        job.tensors = part.tensors;
        job.rotated = part.rotated;
        by_head_tiles(H, [&](auto kt) { launch_mix_tiles<decltype(kt)::value>(dev, job); });
        return;
    }
    by_dtype(qkv.dtype, [&](auto number) {
        using T = decltype(number);
        for (int w = 0; w < part.tensors; w++) {
            struct rope_rows angles = rope;
            if (w >= part.rotated)
                angles.table = NULL;
            launch<plain_expand<T>>(dev, plain_blocks(dev, ceil_div(n * s->pseudo * H * d, PLAIN_THREADS)),
                                    PLAIN_THREADS, 0, (const T *)qkv.data + part.offset + w * H * d, stride,
                                    (const T *)alpha[part.first + w].data, o, angles,
                                    (T *)out[part.first + w].data, n, (int)d);
        }
    });
}

void cuda_qkv_mix(struct device *dev, const struct qkv_mix_spec *s, tensor qkv, tensor alpha_q,
                  tensor alpha_k, tensor alpha_v, tensor table, tensor positions, int64_t first, tensor q,
                  tensor k, tensor v) {
    struct rope_rows rope =
        check_qkv_mix(dev, "qkv_mix", s, qkv, q, k, v, alpha_q, alpha_k, alpha_v, table, positions, first);
    if (!s->mixed) {
        rope_rotate(dev, s, rope, qkv, q, k, v, false);
        return;
    }
    const tensor alpha[3] = {alpha_q, alpha_k, alpha_v}, out[3] = {q, k, v};
    struct mix_part parts[2];
    for (int i = 0, count = mix_parts(s, parts); i < count; i++)
        mix_part_forward(dev, s, parts[i], rope, qkv, alpha, out);
}

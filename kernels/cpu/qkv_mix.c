/* qkv_mix: mixes heads into pseudo-heads, interleaves these into the virtual sequence, and rotates q and k
 * (paper: steps 2-4).
 *
 * Virtual token t*P + p of head h is row p*H + h of token t, so [T, P*H, d] is [S, H, d] and interleaving
 * needs no copy. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/head_mix.h"
#include "kernels/cpu/rope.h"

/* The head of a row of qkv at which q, k or v begins. */
static int64_t first_head(const struct qkv_mix_spec *s, int w) {
    return w == 0 ? 0 : s->heads + (w - 1) * mix_kv_heads(s);
}

/* Pseudo-heads in all: rows of one token of q, k or v after mixing. k and v have at most as many as q. */
static int64_t rows_out(const struct qkv_mix_spec *s, int w) {
    return s->pseudo * mix_heads_of(s, w);
}

/* Whether elements have to be converted. */
static bool converts(void) {
    return sizeof(elem) < sizeof(real);
}

/* Reals from one alpha, or its partial gradient, to the next. */
static int64_t alpha_stride(const struct qkv_mix_spec *s) {
    return s->pseudo * s->heads * s->heads;
}

/* Reals of the three alphas, or of their partial gradients. */
static int64_t alpha_reals(const struct qkv_mix_spec *s) {
    return s->mixed ? round_up(3 * alpha_stride(s), 16) : 0;
}

/* Reals of a block of `rows` rows a token, in whole cache lines. */
static int64_t block_reals(const struct device *dev, const struct qkv_mix_spec *s, int64_t rows) {
    return round_up(mix_tokens(dev, s->batch * s->tokens, s->heads, s->head_dim) * rows * s->head_dim, 16);
}

/* Scratch of one thread in backward: partial sums of the three dalphas, and a block of gradients rotated
 * back. Where elements have to be converted, also a block of gradients of the results, of inputs, and of their
 * gradients. Whole cache lines, so that threads do not write to the same one. */
static int64_t thread_reals(const struct device *dev, const struct qkv_mix_spec *s) {
    int64_t H = s->heads, I = rows_out(s, 0);
    return alpha_reals(s) + block_reals(dev, s, I) +
           (converts() ? block_reals(dev, s, I) + 2 * block_reals(dev, s, H) : 0);
}

struct op_cost CPU(qkv_mix_plan)(const struct device *dev, const struct qkv_mix_spec *s) {
    int64_t reals = (converts() ? alpha_reals(s) : 0) + dev->threads * thread_reals(dev, s);
    return (struct op_cost){.workspace = (size_t)reals * sizeof(real)};
}

/* The three alphas as reals. *scratch moves past those that are converted, to the threads' parts. */
static void read_alphas(const struct qkv_mix_spec *s, tensor q, tensor k, tensor v, real **scratch,
                        const real *alpha[3]) {
    const elem *from[3] = {q.data, k.data, v.data};
    for (int w = 0; w < 3; w++)
        alpha[w] = read_elems(from[w], rows_out(s, w) * mix_heads_of(s, w), *scratch + w * alpha_stride(s));
    *scratch += converts() ? alpha_reals(s) : 0;
}

void CPU(rope_table)(struct device *dev, const struct rope_spec *s, tensor table) {
    (void)dev;
    int64_t half = table.shape[2];
    real *out = table.data;
#pragma omp parallel for
    for (int64_t position = 0; position < table.shape[0]; position++)
        for (int64_t i = 0; i < half; i++) {
            double angle = (double)position * rope_frequency(s, i, half);
            out[position * 2 * half + i] = (real)cos(angle);
            out[position * 2 * half + half + i] = (real)sin(angle);
        }
}

/* Rotate the `heads` rows of pseudo-head p of the token at position `token`; sign -1 rotates back. */
static void rotate_heads(const struct qkv_mix_spec *s, int64_t heads, const real *x, tensor table,
                         int64_t token, int64_t p, real sign, bool stream, real *out) {
    int64_t d = s->head_dim, position = s->rope_virtual ? token * s->pseudo + p : token;
    const real *row = (real *)table.data + position * d;
    for (int64_t h = 0; h < heads; h++)
        rope_rotate(x + h * d, row, d, sign, stream, out + h * d);
}

/* The position of token n of the batch. positions: [B,T] or NULL. */
static int64_t position_of(const struct qkv_mix_spec *s, const int32_t *positions, int64_t first, int64_t n) {
    return positions ? positions[n] : first + n % s->tokens;
}

static void check_mix(const char *op, const struct qkv_mix_spec *s, tensor qkv, tensor positions, tensor q,
                      tensor k, tensor v) {
    int64_t B = s->batch, S = s->tokens * s->pseudo, d = s->head_dim;
    check_elem(op, "qkv", qkv, B, s->tokens, mix_row_heads(s), d, 0);
    const char *names[3] = {"q", "k", "v"};
    tensor outs[3] = {q, k, v};
    for (int i = 0; i < 3; i++) {
        check_elem(op, names[i], outs[i], B, S, mix_heads_of(s, i), d, 0);
        if (s->mixed)
            check_contiguous(op, names[i], outs[i]);
        else
            check_token_rows(op, names[i], outs[i]);
    }
    check_contiguous(op, "qkv", qkv);
    if (positions.data)
        check_i32(op, "positions", positions, B, s->tokens);
}

/* Without alphas: parts = rotate(packed), or with `back` packed = rotate back(parts). parts: q, k and v, or the heads
 * of packed themselves. */
static void rotate_tokens(struct device *dev, const struct qkv_mix_spec *s, tensor packed,
                          const tensor parts[3], tensor table, const int32_t *positions, int64_t first,
                          bool back, const char *op) {
    int64_t d = s->head_dim, N = s->batch * s->tokens, row = mix_row_heads(s);
    int64_t stride = thread_reals(dev, s);
    real *scratch = cpu_workspace(dev, CPU(qkv_mix_plan)(dev, s).workspace, op);
#pragma omp parallel num_threads(dev->threads)
    {
        real *converted = scratch + omp_get_thread_num() * stride;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++)
            for (int w = 0; w < 3; w++) {
                int64_t H = mix_heads_of(s, w);
                elem *whole = (elem *)packed.data + (n * row + first_head(s, w)) * d;
                elem *part = (elem *)parts[w].data + n * parts[w].stride[1];
                elem *from = back ? part : whole, *to = back ? whole : part;
                if (!s->rope || w == 2) {
                    if (from != to)
                        memcpy(to, from, (size_t)(H * d) * sizeof(elem));
                    continue;
                }
                real *result = elems_buffer(to, converted);
                rotate_heads(s, H, read_elems(from, H * d, converted), table,
                             position_of(s, positions, first, n), 0, back ? -1 : 1, false, result);
                write_elems(to, H * d, result);
            }
    }
}

/* One token of q, k or v. A pseudo-head's rows are rotated while they are in the L1 cache. mixed: scratch [H,d]. */
static void mix_token(const struct qkv_mix_spec *s, int64_t H, const real *in, const real *alpha,
                      bool rotated, tensor table, int64_t position, bool stream, real *mixed, real *out) {
    int64_t P = s->pseudo, d = s->head_dim, bytes = H * d * (int64_t)sizeof(real);
    const char *next = (const char *)(in + mix_row_heads(s) * d);
    struct mix_memory memory = {.at = {next, next}};
    if (!rotated) {
        memory.stream = stream;
        memory.write = stream ? NULL : out + H * d;
        memory.bytes[0] = bytes;
        head_mix(P * H, H, d, alpha, H, 1, in, NULL, out, &memory);
    } else {
        for (int64_t p = 0; p < P; p++) {
            real *to = out + p * H * d;
            memory.write = stream ? NULL : to;
            memory.at[0] = next + bytes / P * p;
            memory.bytes[0] = bytes / P;
            head_mix(H, H, d, alpha + p * H * H, H, 1, in, NULL, mixed, &memory);
            rotate_heads(s, H, mixed, table, position, p, 1, stream, to);
        }
    }
}

void CPU(qkv_mix)(struct device *dev, const struct qkv_mix_spec *s, tensor qkv, tensor alpha_q,
                  tensor alpha_k, tensor alpha_v, tensor table, tensor positions, int64_t first, tensor q,
                  tensor k, tensor v) {
    check_mix("qkv_mix", s, qkv, positions, q, k, v);
    if (!s->mixed) {
        rotate_tokens(dev, s, qkv, (tensor[]){q, k, v}, table, positions.data, first, false, "qkv_mix");
        return;
    }
    int64_t d = s->head_dim, N = s->batch * s->tokens, row = mix_row_heads(s), I = s->pseudo * row;
    elem *out[3] = {q.data, k.data, v.data};
    bool stream = !converts() && mix_streams(q.data, N * I * d, d) && mix_streams(k.data, N * I * d, d) &&
                  mix_streams(v.data, N * I * d, d);
    int64_t stride = thread_reals(dev, s);
    const real *alpha[3];
    real *scratch = cpu_workspace(dev, CPU(qkv_mix_plan)(dev, s).workspace, "qkv_mix");
    read_alphas(s, alpha_q, alpha_k, alpha_v, &scratch, alpha);
#pragma omp parallel num_threads(dev->threads)
    {
        real *mixed = scratch + omp_get_thread_num() * stride,
             *converted = mixed + block_reals(dev, s, rows_out(s, 0));
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++)
            for (int w = 0; w < 3; w++) {
                int64_t H = mix_heads_of(s, w), count = rows_out(s, w) * d;
                elem *from = (elem *)qkv.data + (n * row + first_head(s, w)) * d, *to = out[w] + n * count;
                real *result = elems_buffer(to, converted + H * d);
                mix_token(s, H, read_elems(from, H * d, converted), alpha[w], s->rope && w < 2, table,
                          position_of(s, positions.data, first, n), stream, mixed, result);
                write_elems(to, count, result);
            }
        vstream_end();
    }
}

/* `count` tokens from n of one of q, k, v: rotate the gradient back, then both gradients of the mixing. next: the
 * gradients of the block after this one, which are brought into the cache, half of them by each product. in_stride:
 * between tokens of in and din. */
static void mix_backward_block(const struct qkv_mix_spec *s, int64_t H, int64_t n, int64_t count,
                               const real *dout, const real *next, const real *in, const real *alpha,
                               bool rotated, tensor table, const int32_t *positions, bool stream,
                               real *unrotated, int64_t in_stride, real *din, real *dalpha) {
    int64_t d = s->head_dim, I = s->pseudo * H;
    int64_t bytes = I * d * (int64_t)sizeof(real), half = bytes / 2;
    for (int64_t t = 0; t < count; t++) {
        const real *from = dout + t * I * d;
        real *to = din + t * in_stride;
        struct mix_memory memory = {
            .stream = stream,
            .write = stream || converts() ? NULL : to + in_stride,
            .at = {(const char *)(next + t * I * d), (const char *)(in + t * in_stride)},
            .bytes = {half, H * d * (int64_t)sizeof(real)}};
        if (rotated) {
            from = unrotated + t * I * d;
            for (int64_t p = 0; p < s->pseudo; p++)
                rotate_heads(s, H, dout + (t * I + p * H) * d, table, position_of(s, positions, 0, n + t), p,
                             -1, false, unrotated + (t * I + p * H) * d);
        }
        head_mix(H, I, d, alpha, 1, H, from, NULL, to, &memory);
    }
    head_outer(I, H, d, count, rotated ? unrotated : dout, I * d, in, in_stride, dalpha,
               (const char *)next + half, bytes, bytes - half);
}

/* The same where elements have to be converted, into `converted`. */
static void mix_backward_converted(const struct device *dev, const struct qkv_mix_spec *s, int64_t H,
                                   int64_t n, int64_t count, const elem *dout, const elem *in,
                                   const real *alpha, bool rotated, tensor table, const int32_t *positions,
                                   real *unrotated, real *converted, elem *din, real *dalpha) {
    int64_t d = s->head_dim, I = s->pseudo * H, stride = mix_row_heads(s) * d;
    real *x = converted + block_reals(dev, s, I), *dx = x + block_reals(dev, s, H);
    const real *g = read_elems(dout, count * I * d, converted);
    for (int64_t t = 0; t < count; t++)
        read_elems(in + t * stride, H * d, x + t * H * d);
    mix_backward_block(s, H, n, count, g, g, x, alpha, rotated, table, positions, false, unrotated, H * d, dx,
                       dalpha);
    for (int64_t t = 0; t < count; t++)
        write_elems(din + t * stride, H * d, dx + t * H * d);
}

void CPU(qkv_mix_backward)(struct device *dev, const struct qkv_mix_spec *s, tensor dq, tensor dk, tensor dv,
                           tensor qkv, tensor alpha_q, tensor alpha_k, tensor alpha_v, tensor table,
                           tensor positions, tensor dqkv, tensor dalpha_q, tensor dalpha_k, tensor dalpha_v,
                           bool accumulate) {
    check_mix("qkv_mix_backward", s, s->mixed ? qkv : dqkv, positions, dq, dk, dv);
    if (!s->mixed) {
        rotate_tokens(dev, s, dqkv, (tensor[]){dq, dk, dv}, table, positions.data, 0, true,
                      "qkv_mix_backward");
        return;
    }
    int64_t d = s->head_dim, N = s->batch * s->tokens, row = mix_row_heads(s), matrix = alpha_stride(s);
    int64_t stride = thread_reals(dev, s), block = mix_tokens(dev, N, s->heads, d);
    real *scratch = cpu_workspace(dev, CPU(qkv_mix_plan)(dev, s).workspace, "qkv_mix_backward");
    bool stream = !converts() && mix_streams(dqkv.data, N * row * d, d);
    const real *alpha[3];
    const elem *dout[3] = {dq.data, dk.data, dv.data};
    read_alphas(s, alpha_q, alpha_k, alpha_v, &scratch, alpha);
#pragma omp parallel num_threads(dev->threads)
    {
        real *dalpha = scratch + omp_get_thread_num() * stride;
        real *unrotated = dalpha + alpha_reals(s),
             *converted = unrotated + block_reals(dev, s, rows_out(s, 0));
        memset(dalpha, 0, (size_t)(3 * matrix) * sizeof(real));
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n += block)
            for (int w = 0; w < 3; w++) {
                int64_t count = min64(block, N - n), at = (n * row + first_head(s, w)) * d,
                        H = mix_heads_of(s, w);
                int64_t ahead = w < 2 ? n : n + block;
                const elem *g = dout[w] + n * rows_out(s, w) * d;
                const elem *next = dout[(w + 1) % 3] + ahead * rows_out(s, (w + 1) % 3) * d;
                if (converts())
                    mix_backward_converted(dev, s, H, n, count, g, (elem *)qkv.data + at, alpha[w],
                                           s->rope && w < 2, table, positions.data, unrotated, converted,
                                           (elem *)dqkv.data + at, dalpha + w * matrix);
                else
                    mix_backward_block(s, H, n, count, (const real *)g, (const real *)next,
                                       (real *)qkv.data + at, alpha[w], s->rope && w < 2, table,
                                       positions.data, stream, unrotated, row * d, (real *)dqkv.data + at,
                                       dalpha + w * matrix);
            }
        vstream_end();
    }
    real *dalphas[3] = {dalpha_q.data, dalpha_k.data, dalpha_v.data};
    for (int w = 0; w < 3; w++)
        sum_partials(scratch + w * matrix, dev->threads, stride, rows_out(s, w) * mix_heads_of(s, w),
                     dalphas[w], accumulate);
}

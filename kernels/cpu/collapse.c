/* collapse: mixes pseudo-heads back into heads (paper: step 6), full (R [H,P,H]) or per head (R [H,P]). */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/head_mix.h"

/* Elements of R. */
static int64_t matrix_reals(const struct collapse_spec *s) {
    return s->heads * s->pseudo * (s->per_head ? 1 : s->heads);
}

/* A partial dR for each thread, in whole cache lines, so that threads do not write to the same one. */
struct op_cost collapse_plan(const struct device *dev, const struct collapse_spec *s) {
    return (struct op_cost){.workspace =
                                (size_t)dev->threads * (size_t)round_up(matrix_reals(s), 16) * sizeof(real)};
}

static void check_collapse(const char *op, const struct collapse_spec *s, tensor o, tensor r, tensor out) {
    check_real(op, "o", o, s->batch, s->tokens * s->pseudo, s->heads, s->head_dim, 0);
    check_contiguous(op, "o", o);
    check_contiguous(op, "R", r);
    check_contiguous(op, "out", out);
    if (tensor_count(r) != matrix_reals(s))
        check_real(op, "R", r, s->heads, s->pseudo, s->per_head ? 0 : s->heads, 0, 0);
}

/* out[h,:] = sum_p R[h,p] o[p,h,:], for one token. */
static void collapse_per_head(const struct collapse_spec *s, const real *o, const real *r, real *out) {
    int64_t H = s->heads, d = s->head_dim;
    for (int64_t h = 0; h < H; h++) {
        real *to = out + h * d;
        memset(to, 0, (size_t)d * sizeof(real));
        for (int64_t p = 0; p < s->pseudo; p++) {
            real weight = r[h * s->pseudo + p];
            const real *from = o + (p * H + h) * d;
#pragma omp simd
            for (int64_t c = 0; c < d; c++)
                to[c] += weight * from[c];
        }
    }
}

static void collapse_per_head_backward(const struct collapse_spec *s, const real *dout, const real *o,
                                       const real *r, real *d_o, real *dr) {
    int64_t H = s->heads, d = s->head_dim;
    for (int64_t h = 0; h < H; h++)
        for (int64_t p = 0; p < s->pseudo; p++) {
            real weight = r[h * s->pseudo + p], dot = 0;
            const real *g = dout + h * d, *from = o + (p * H + h) * d;
            real *to = d_o + (p * H + h) * d;
#pragma omp simd reduction(+ : dot)
            for (int64_t c = 0; c < d; c++) {
                dot += g[c] * from[c];
                to[c] = weight * g[c];
            }
            dr[h * s->pseudo + p] += dot;
        }
}

void cpu_collapse(struct device *dev, const struct collapse_spec *s, tensor o, tensor r, tensor out) {
    (void)dev;
    check_collapse("collapse", s, o, r, out);
    int64_t H = s->heads, d = s->head_dim, PH = s->pseudo * H, N = s->batch * s->tokens;
    bool stream = mix_streams(out.data, N * H * d, d);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++) {
            const real *from = (real *)o.data + n * PH * d, *next = from + PH * d;
            real *to = (real *)out.data + n * H * d;
            struct mix_memory memory = {.stream = stream,
                                        .write = stream ? NULL : to + H * d,
                                        .at = {(const char *)next, (const char *)next},
                                        .bytes = {PH * d * (int64_t)sizeof(real)}};
            if (s->per_head)
                collapse_per_head(s, from, r.data, to);
            else
                head_mix(H, PH, d, r.data, PH, 1, from, NULL, to, &memory);
        }
        vstream_end();
    }
}

static void collapse_backward_block(const struct collapse_spec *s, int64_t count, const real *dout,
                                    const real *o, const real *r, bool stream, real *d_o, real *dr) {
    int64_t H = s->heads, d = s->head_dim, PH = s->pseudo * H;
    for (int64_t t = 0; t < count; t++) {
        const real *next = dout + (t + 1) * H * d, *other = o + t * PH * d;
        real *to = d_o + t * PH * d;
        struct mix_memory memory = {.stream = stream,
                                    .write = stream ? NULL : to + H * d,
                                    .at = {(const char *)other, (const char *)next},
                                    .bytes = {PH * d * (int64_t)sizeof(real), H * d * (int64_t)sizeof(real)}};
        if (s->per_head)
            collapse_per_head_backward(s, dout + t * H * d, other, r, to, dr);
        else
            head_mix(PH, H, d, r, 1, PH, dout + t * H * d, NULL, to, &memory);
    }
    if (!s->per_head)
        head_outer(H, PH, d, count, dout, H * d, o, PH * d, dr, (const char *)dout, 0, 0);
}

void cpu_collapse_backward(struct device *dev, const struct collapse_spec *s, tensor dout, tensor o, tensor r,
                           tensor d_o, tensor dr, bool accumulate) {
    check_collapse("collapse_backward", s, o, r, dout);
    check_contiguous("collapse_backward", "do", d_o);
    int64_t H = s->heads, d = s->head_dim, PH = s->pseudo * H, N = s->batch * s->tokens;
    int64_t stride = round_up(matrix_reals(s), 16), block = mix_tokens(dev, N, H, d);
    size_t bytes = collapse_plan(dev, s).workspace;
    bool stream = mix_streams(d_o.data, N * PH * d, d);
    real *partials = cpu_workspace(dev, bytes, "collapse_backward");
#pragma omp parallel num_threads(dev->threads)
    {
        real *mine = partials + omp_get_thread_num() * stride;
        memset(mine, 0, (size_t)stride * sizeof(real));
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n += block)
            collapse_backward_block(s, min64(block, N - n), (real *)dout.data + n * H * d,
                                    (real *)o.data + n * PH * d, r.data, stream,
                                    (real *)d_o.data + n * PH * d, mine);
        vstream_end();
    }
    sum_partials(partials, dev->threads, stride, matrix_reals(s), dr.data, accumulate);
}

/* fold: mixes the heads of the rows of a qkv weight, so that the mixing of heads costs nothing per token. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/tile.h"

enum { FOLD_COLUMNS = 1024 }; /* columns of all heads that a thread takes at a time */

/* A partial gradient of the three alphas for each thread, in whole cache lines. */
struct op_cost fold_plan(const struct device *dev, const struct fold_spec *s) {
    int64_t reals = round_up(3 * s->heads * s->heads, 16);
    return (struct op_cost){.workspace = (size_t)dev->threads * (size_t)reals * sizeof(real)};
}

static void check_fold(const char *op, const struct fold_spec *s, tensor w, const tensor alpha[3],
                       tensor out) {
    check_real(op, "w", w, 3, s->heads, s->columns, 0, 0);
    check_contiguous(op, "w", w);
    check_real(op, "folded", out, 3, s->heads, s->columns, 0, 0);
    check_contiguous(op, "folded", out);
    for (int part = 0; part < 3; part++)
        check_real(op, "alpha", alpha[part], s->heads, s->heads, 0, 0, 0);
}

void cpu_fold(struct device *dev, const struct fold_spec *s, tensor w, tensor alpha_q, tensor alpha_k,
              tensor alpha_v, tensor folded) {
    const tensor alpha[3] = {alpha_q, alpha_k, alpha_v};
    int64_t H = s->heads, n = s->columns;
    (void)dev;
    check_fold("fold", s, w, alpha, folded);
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t part = 0; part < 3; part++)
        for (int64_t begin = 0; begin < n; begin += FOLD_COLUMNS)
            tile_gemm(H, min64(FOLD_COLUMNS, n - begin), H, alpha[part].data, H, 1,
                      (real *)w.data + part * H * n + begin, n, (real *)folded.data + part * H * n + begin, n,
                      false);
}

/* dalpha[h,m] += <dfolded[h,:], w[m,:]> over `count` columns of one part. */
static void fold_alpha_gradient(int64_t H, int64_t n, int64_t count, const real *dfolded, const real *w,
                                real *dalpha) {
    for (int64_t h = 0; h < H; h++)
        for (int64_t m = 0; m < H; m++) {
            real dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t c = 0; c < count; c++)
                dot += dfolded[h * n + c] * w[m * n + c];
            dalpha[h * H + m] += dot;
        }
}

void cpu_fold_backward(struct device *dev, const struct fold_spec *s, tensor dfolded, tensor w,
                       tensor alpha_q, tensor alpha_k, tensor alpha_v, tensor dw, tensor dalpha_q,
                       tensor dalpha_k, tensor dalpha_v, bool accumulate, bool accumulate_alpha) {
    const tensor alpha[3] = {alpha_q, alpha_k, alpha_v}, dalpha[3] = {dalpha_q, dalpha_k, dalpha_v};
    int64_t H = s->heads, n = s->columns, stride = round_up(3 * H * H, 16);
    check_fold("fold_backward", s, w, alpha, dfolded);
    check_fold("fold_backward", s, dw, dalpha, dfolded);
    size_t bytes = fold_plan(dev, s).workspace;
    real *partials = cpu_workspace(dev, bytes, "fold_backward");
    memset(partials, 0, bytes);
#pragma omp parallel num_threads(dev->threads)
    {
        real *mine = partials + omp_get_thread_num() * stride;
#pragma omp for schedule(static) collapse(2)
        for (int64_t part = 0; part < 3; part++)
            for (int64_t begin = 0; begin < n; begin += FOLD_COLUMNS) {
                int64_t at = part * H * n + begin, count = min64(FOLD_COLUMNS, n - begin);
                const real *from = (real *)dfolded.data + at;
                tile_gemm(H, count, H, alpha[part].data, 1, H, from, n, (real *)dw.data + at, n, accumulate);
                fold_alpha_gradient(H, n, count, from, (real *)w.data + at, mine + part * H * H);
            }
    }
    for (int part = 0; part < 3; part++)
        sum_partials(partials + part * H * H, dev->threads, stride, H * H, dalpha[part].data,
                     accumulate_alpha);
}

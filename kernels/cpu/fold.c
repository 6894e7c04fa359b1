/* fold: mixes the heads of the rows of a qkv weight, so that the mixing of heads costs nothing per token. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/tile.h"

enum { FOLD_COLUMNS = 1024 }; /* columns of all heads that a thread takes at a time */

static int64_t alpha_reals(const struct fold_spec *s) {
    return round_up(3 * s->heads * s->heads, 16);
}

/* Whether elements have to be converted. */
static bool converts(void) {
    return sizeof(elem) < sizeof(real);
}

/* Scratch of one thread: a partial gradient of the three alphas; where elements have to be converted, also columns
 * of the weight and of the result. In whole cache lines. */
static int64_t thread_reals(const struct fold_spec *s) {
    return alpha_reals(s) + (converts() ? 2 * s->heads * FOLD_COLUMNS : 0);
}

struct op_cost CPU(fold_plan)(const struct device *dev, const struct fold_spec *s) {
    int64_t reals = (converts() ? alpha_reals(s) : 0) + dev->threads * thread_reals(s);
    return (struct op_cost){.workspace = (size_t)reals * sizeof(real)};
}

/* The three alphas as reals. *scratch moves past those that are converted. */
static void read_alphas(const struct fold_spec *s, const tensor alpha[3], real **scratch,
                        const real *out[3]) {
    int64_t matrix = s->heads * s->heads;
    for (int part = 0; part < 3; part++)
        out[part] = read_elems(alpha[part].data, matrix, *scratch + part * matrix);
    *scratch += converts() ? alpha_reals(s) : 0;
}

/* `count` columns of a weight [H,n] as reals, *ld apart. */
static const real *read_columns(const elem *w, int64_t H, int64_t n, int64_t count, real *scratch,
                                int64_t *ld) {
    const real *first = read_elems(w, count, scratch);
    *ld = converts() ? FOLD_COLUMNS : n;
    for (int64_t h = 1; h < H && converts(); h++)
        read_elems(w + h * n, count, scratch + h * FOLD_COLUMNS);
    return first;
}

static void check_fold(const char *op, const struct fold_spec *s, tensor w, tensor folded) {
    check_elem(op, "w", w, 3, s->heads, s->columns, 0, 0);
    check_contiguous(op, "w", w);
    check_elem(op, "folded", folded, 3, s->heads, s->columns, 0, 0);
    check_contiguous(op, "folded", folded);
}

void CPU(fold)(struct device *dev, const struct fold_spec *s, tensor w, tensor alpha_q, tensor alpha_k,
               tensor alpha_v, tensor folded) {
    const tensor alphas[3] = {alpha_q, alpha_k, alpha_v};
    const real *alpha[3];
    int64_t H = s->heads, n = s->columns;
    check_fold("fold", s, w, folded);
    for (int part = 0; part < 3; part++)
        check_elem("fold", "alpha", alphas[part], H, H, 0, 0, 0);
    real *scratch = cpu_workspace(dev, CPU(fold_plan)(dev, s).workspace, "fold");
    read_alphas(s, alphas, &scratch, alpha);
#pragma omp parallel for schedule(static) collapse(2) num_threads(dev->threads)
    for (int64_t part = 0; part < 3; part++)
        for (int64_t begin = 0; begin < n; begin += FOLD_COLUMNS) {
            int64_t at = part * H * n + begin, count = min64(FOLD_COLUMNS, n - begin), ld;
            real *mine = scratch + omp_get_thread_num() * thread_reals(s) + alpha_reals(s);
            const real *from = read_columns((elem *)w.data + at, H, n, count, mine, &ld);
            elem *to = (elem *)folded.data + at;
            real *sums = elems_buffer(to, mine + H * FOLD_COLUMNS);
            tile_gemm(H, count, H, alpha[part], H, 1, from, ld, sums, ld, false);
            for (int64_t h = 0; h < H; h++)
                write_elems(to + h * n, count, sums + h * ld);
        }
}

/* dalpha[h,m] += <dfolded[h,:], w[m,:]> over `count` columns of one part. */
static void fold_alpha_gradient(int64_t H, int64_t n, int64_t count, const real *dfolded, const real *w,
                                int64_t ld, real *dalpha) {
    for (int64_t h = 0; h < H; h++)
        for (int64_t m = 0; m < H; m++) {
            real dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t c = 0; c < count; c++)
                dot += dfolded[h * n + c] * w[m * ld + c];
            dalpha[h * H + m] += dot;
        }
}

static void check_gradients(const struct fold_spec *s, tensor dfolded, tensor dw) {
    check_real("fold_backward", "dfolded", dfolded, 3, s->heads, s->columns, 0, 0);
    check_contiguous("fold_backward", "dfolded", dfolded);
    check_real("fold_backward", "dw", dw, 3, s->heads, s->columns, 0, 0);
    check_contiguous("fold_backward", "dw", dw);
}

void CPU(fold_backward)(struct device *dev, const struct fold_spec *s, tensor dfolded, tensor w,
                        tensor alpha_q, tensor alpha_k, tensor alpha_v, tensor dw, tensor dalpha_q,
                        tensor dalpha_k, tensor dalpha_v, bool accumulate, bool accumulate_alpha) {
    const tensor alphas[3] = {alpha_q, alpha_k, alpha_v}, dalpha[3] = {dalpha_q, dalpha_k, dalpha_v};
    const real *alpha[3];
    int64_t H = s->heads, n = s->columns, stride = thread_reals(s);
    check_fold("fold_backward", s, w, w);
    check_gradients(s, dfolded, dw);
    for (int part = 0; part < 3; part++) {
        check_elem("fold_backward", "alpha", alphas[part], H, H, 0, 0, 0);
        check_real("fold_backward", "dalpha", dalpha[part], H, H, 0, 0, 0);
    }
    real *scratch = cpu_workspace(dev, CPU(fold_plan)(dev, s).workspace, "fold_backward");
    read_alphas(s, alphas, &scratch, alpha);
#pragma omp parallel num_threads(dev->threads)
    {
        real *mine = scratch + omp_get_thread_num() * stride;
        memset(mine, 0, (size_t)alpha_reals(s) * sizeof(real));
#pragma omp for schedule(static) collapse(2)
        for (int64_t part = 0; part < 3; part++)
            for (int64_t begin = 0; begin < n; begin += FOLD_COLUMNS) {
                int64_t at = part * H * n + begin, count = min64(FOLD_COLUMNS, n - begin), ld;
                const real *from = (real *)dfolded.data + at;
                const real *weight =
                    read_columns((elem *)w.data + at, H, n, count, mine + alpha_reals(s), &ld);
                tile_gemm(H, count, H, alpha[part], 1, H, from, n, (real *)dw.data + at, n, accumulate);
                fold_alpha_gradient(H, n, count, from, weight, ld, mine + part * H * H);
            }
    }
    for (int part = 0; part < 3; part++)
        sum_partials(scratch + part * H * H, dev->threads, stride, H * H, dalpha[part].data,
                     accumulate_alpha);
}

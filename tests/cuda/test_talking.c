/* talking of the CUDA backend against the CPU backend, forward and backward. */
#include "tests/cuda/op_run.h"

enum { Q, K, V, LOGITS = 9, WEIGHTS, DLOGITS, DWEIGHTS, D_O = 4 };

/* x as the sum of two bf16, or as it is. */
static double kept(double x, bool rounded) {
    double high = round_to(DTYPE_BF16, x);
    return rounded ? high + round_to(DTYPE_BF16, x - high) : x;
}

static double dot(const double *x, const double *y, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += x[i] * y[i];
    return sum;
}

/* Adds `factor` times the gradients of logits and weights [2,H,H] that query i of sequence b has. rounded: scores, weights
 * and their gradients keep the 16 bits that the kernels keep of them in bf16; PyTorch, which stores them, keeps 8. */
static void add_gradients(const struct op_run *r, double *const x[OP_OPERANDS], int64_t b, int64_t i,
                          bool rounded, double factor, double *sums) {
    const struct attention_spec *s = &r->spec.attention;
    const int64_t H = s->heads, S = s->length, d = s->head_dim;
    const double *query = x[Q] + (b * S + i) * H * d, *d_o = x[D_O] + (b * S + i) * H * d;
    int64_t begin, end;
    attention_keys(s, i, S, &begin, &end);
    if (s->segmented) {
        int32_t from, to;
        segment_of_token(r->c->segments, b % s->batch, S, i, &from, &to);
        attention_segment_keys(s, i, from, to, &begin, &end);
    }
    double *a = (double *)calloc((size_t)(4 * H * S), sizeof *a), *w = a + H * S, *du = w + H * S,
           *dw = du + H * S;
    for (int64_t h = 0; h < H; h++)
        for (int64_t j = begin; j < end; j++) {
            a[h * S + j] = kept(dot(query + h * d, x[K] + ((b * S + j) * H + h) * d, d), rounded);
            du[h * S + j] = kept(dot(d_o + h * d, x[V] + ((b * S + j) * H + h) * d, d), rounded);
        }
    for (int64_t h = 0; h < H; h++) {
        double sum = 0, along = 0;
        for (int64_t j = begin; j < end; j++) {
            for (int64_t m = 0; m < H; m++) {
                w[h * S + j] += s->scale * x[LOGITS][h * H + m] * a[m * S + j];
                dw[h * S + j] += x[WEIGHTS][m * H + h] * du[m * S + j];
            }
            sum += exp(w[h * S + j]);
        }
        for (int64_t j = begin; j < end; j++) {
            w[h * S + j] = exp(w[h * S + j]) / sum;
            along += w[h * S + j] * dw[h * S + j];
        }
        for (int64_t j = begin; j < end; j++)
            dw[h * S + j] = kept(w[h * S + j] * (dw[h * S + j] - along), rounded);
        for (int64_t j = begin; j < end; j++)
            w[h * S + j] = kept(w[h * S + j], rounded);
    }
    for (int64_t h = 0; h < H; h++)
        for (int64_t m = 0; m < H; m++) {
            sums[h * H + m] += factor * s->scale * dot(dw + h * S + begin, a + m * S + begin, end - begin);
            sums[(H + h) * H + m] += factor * dot(du + h * S + begin, w + m * S + begin, end - begin);
        }
    free(a);
}

/* Adds to the plain backend's gradients of the two matrices what that rounding changes. */
static void round_matrices(const struct op_run *r) {
    const struct attention_spec *s = &r->spec.attention;
    const int64_t n = s->heads * s->heads;
    struct backend *plain = &r->k->each[PLAIN];
    double *x[OP_OPERANDS] = {NULL}, *sums = (double *)calloc((size_t)(2 * n), sizeof *sums);
    for (int i = 0; i < OP_OPERANDS; i++)
        x[i] = r->info[i].name ? values_on(plain, r->x[i]) : NULL;
    for (int64_t b = 0; b < s->batch; b++)
        for (int64_t i = 0; i < s->length; i++) {
            add_gradients(r, x, b, i, true, 1, sums);
            add_gradients(r, x, b, i, false, -1, sums);
        }
    for (int which = 0; which < 2; which++) {
        for (int64_t i = 0; i < n; i++)
            x[DLOGITS + which][i] += sums[which * n + i];
        plain->k->upload(plain->dev, on(r->x[DLOGITS + which], plain), x[DLOGITS + which], DTYPE_F64);
    }
    for (int i = 0; i < OP_OPERANDS; i++)
        free(x[i]);
    free(sums);
}

static void check(enum device_precision precision, const struct op_case *c) {
    struct op_run r;
    run_open(&r, precision, c);
    for (int draw = 0; draw < run_draws(&r); draw++) {
        if (draw > 0) {
            run_collect(&r);
            run_draw(&r);
        }
        run_both(&r);
        if (precision == DEVICE_BF16)
            round_matrices(&r);
    }
    run_expect_close(&r);
    run_expect_same(&r);
    done(r.k);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        EVERY_CASE("talking_fp32", OP_TALKING, DEVICE_FP32, check),
        EVERY_CASE("talking_bf16", OP_TALKING, DEVICE_BF16, check),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* Mixing and collapse in fp32: results stored past the caches have the bits of those that are not, weight gradients
 * are as exact as plain sums, and a second call gives the same bits. */
#define FIXTURE_THREADS 2
#include "kernels/cpu/cpu.h"
#include "tests/lib/model_fixture.h"

/* So many tokens that each operation's large result is past the size from which it is streamed; a piece is not. */
enum {
    TOKENS = 5501,
    PIECE = 1376,
    HEADS = 12,
    PSEUDO = 2,
    DIM = 64,
    ROW = HEADS * DIM,
    WIDE = PSEUDO * ROW
};
enum { WEIGHTS = PSEUDO * HEADS * HEADS };

static const struct kernels *K;

static float *noise(int64_t n, uint64_t seed) {
    float *x = malloc((size_t)n * sizeof *x);
    assert_non_null(x);
    for (int64_t i = 0; i < n; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        x[i] = (float)((double)(seed >> 33) / 1073741824.0 - 1);
    }
    return x;
}

/* Room for n floats at the start of a cache line, as results need to be streamed. */
static float *room(int64_t n) {
    float *x = aligned_alloc(64, (size_t)round_up(n * (int64_t)sizeof *x, 64));
    assert_non_null(x);
    return x;
}

static tensor f32(float *data, int64_t s0, int64_t s1, int64_t s2, int64_t s3, int64_t s4) {
    return tensor_of(data, DTYPE_F32, s0, s1, s2, s3, s4);
}

static void *give_workspace(const struct op_spec *spec) {
    struct op_cost cost;
    struct error e = {0};
    assert_int_equal(K->plan(fixture_device(), spec, &cost, &e), 0);
    void *data = K->alloc(fixture_device(), cost.workspace, &e);
    assert_non_null(data);
    K->set_workspace(fixture_device(), data, cost.workspace);
    return data;
}

struct mixing {
    float *qkv, *alpha[3], *table;
    float *out[3], *dqkv, *dalpha[3];
};

/* Forward and backward of `count` tokens from n on; the outputs serve as their own gradients. */
static void mix(const struct mixing *x, int64_t n, int64_t count) {
    struct op_spec spec = {.kind = OP_QKV_MIX, .qkv_mix = {1, count, HEADS, DIM, PSEUDO, true, true, false}};
    void *workspace = give_workspace(&spec);
    tensor qkv = f32(x->qkv + n * 3 * ROW, 1, count, 3 * HEADS, DIM, 0), a[3], da[3], out[3];
    tensor dqkv = f32(x->dqkv + n * 3 * ROW, 1, count, 3 * HEADS, DIM, 0);
    tensor table = f32(x->table, TOKENS, 2, DIM / 2, 0, 0);
    int32_t *at = malloc((size_t)count * sizeof *at);
    for (int64_t i = 0; i < count; i++)
        at[i] = (int32_t)(n + i);
    tensor positions = tensor_of(at, DTYPE_I32, 1, count, 0, 0, 0);
    for (int w = 0; w < 3; w++) {
        a[w] = f32(x->alpha[w], PSEUDO, HEADS, HEADS, 0, 0);
        da[w] = f32(x->dalpha[w], PSEUDO, HEADS, HEADS, 0, 0);
        out[w] = f32(x->out[w] + n * WIDE, 1, count * PSEUDO, HEADS, DIM, 0);
    }
    K->qkv_mix(fixture_device(), &spec.qkv_mix, qkv, a[0], a[1], a[2], table, positions, 0, out[0], out[1],
               out[2]);
    K->qkv_mix_backward(fixture_device(), &spec.qkv_mix, out[0], out[1], out[2], qkv, a[0], a[1], a[2], table,
                        positions, dqkv, da[0], da[1], da[2], false);
    free(at);
    K->release(fixture_device(), workspace);
}

static void mixing_open(struct mixing *x) {
    *x = (struct mixing){.qkv = noise(TOKENS * 3 * ROW, 1), .table = room(TOKENS * DIM)};
    K->rope_table(fixture_device(), &(const struct rope_spec){.theta = 100},
                  f32(x->table, TOKENS, 2, DIM / 2, 0, 0));
    for (int w = 0; w < 3; w++) {
        x->alpha[w] = noise(WEIGHTS, 2 + (uint64_t)w);
        x->dalpha[w] = room(WEIGHTS);
        x->out[w] = room(TOKENS * WIDE);
    }
    x->dqkv = room(TOKENS * 3 * ROW);
}

static void mixing_close(struct mixing *x) {
    free(x->qkv);
    free(x->table);
    free(x->dqkv);
    for (int w = 0; w < 3; w++) {
        free(x->alpha[w]);
        free(x->dalpha[w]);
        free(x->out[w]);
    }
}

/* dM of `count` tokens as plain sums in one type; in [J,d] are `stride` apart. */
#define PLAIN(type)                                                                                          \
    static void plain_##type(int64_t I, int64_t J, int64_t count, const float *dout, const float *in,        \
                             int64_t stride, type *dm) {                                                     \
        for (int64_t i = 0; i < I; i++)                                                                      \
            for (int64_t j = 0; j < J; j++) {                                                                \
                type sum = 0;                                                                                \
                for (int64_t t = 0; t < count; t++)                                                          \
                    for (int64_t c = 0; c < DIM; c++)                                                        \
                        sum += (type)dout[(t * I + i) * DIM + c] * (type)in[t * stride + j * DIM + c];       \
                dm[i * J + j] = sum;                                                                         \
            }                                                                                                \
    }
PLAIN(double)
PLAIN(float)

/* The gradient's error is at most twice that of plain sums in fp32. */
static void check_sums(int64_t I, int64_t J, int64_t count, const float *dout, const float *in,
                       int64_t stride, const float *found) {
    double exact[WEIGHTS], error = 0, plain_error = 0;
    float plain[WEIGHTS];
    plain_double(I, J, count, dout, in, stride, exact);
    plain_float(I, J, count, dout, in, stride, plain);
    for (int64_t i = 0; i < I * J; i++) {
        error += pow(found[i] - exact[i], 2);
        plain_error += pow(plain[i] - exact[i], 2);
    }
    if (!(sqrt(error) <= 2 * sqrt(plain_error)))
        fail_msg("error %.3g, of plain sums %.3g", sqrt(error), sqrt(plain_error));
}

static void mixing_streamed(void **state) {
    struct mixing whole, parts;
    (void)state;
    mixing_open(&whole);
    mixing_open(&parts);
    for (int64_t n = 0; n < TOKENS; n += PIECE)
        mix(&parts, n, min64(PIECE, TOKENS - n));
    mix(&whole, 0, TOKENS);
    for (int w = 0; w < 3; w++)
        assert_memory_equal(whole.out[w], parts.out[w], TOKENS * WIDE * sizeof(float));
    assert_memory_equal(whole.dqkv, parts.dqkv, TOKENS * 3 * ROW * sizeof(float));
    /* v is not rotated, so what backward is given is what the plain sums take. */
    mix(&parts, 0, 64);
    check_sums(PSEUDO * HEADS, HEADS, 64, parts.out[2], parts.qkv + 2 * ROW, 3 * ROW, parts.dalpha[2]);
    for (int w = 0; w < 3; w++)
        memcpy(parts.dalpha[w], whole.dalpha[w], WEIGHTS * sizeof(float));
    mix(&whole, 0, TOKENS);
    for (int w = 0; w < 3; w++)
        assert_memory_equal(whole.dalpha[w], parts.dalpha[w], WEIGHTS * sizeof(float));
    mixing_close(&whole);
    mixing_close(&parts);
}

struct collapsing {
    float *o, *r, *dout, *out, *d_o, *dr;
};

static void collapse(const struct collapsing *x, int64_t n, int64_t count) {
    struct op_spec spec = {.kind = OP_COLLAPSE, .collapse = {1, count, HEADS, DIM, PSEUDO, false}};
    void *workspace = give_workspace(&spec);
    tensor o = f32(x->o + n * WIDE, 1, count * PSEUDO, HEADS, DIM, 0),
           r = f32(x->r, HEADS, PSEUDO, HEADS, 0, 0);
    K->collapse(fixture_device(), &spec.collapse, o, r, f32(x->out + n * ROW, 1, count, HEADS, DIM, 0));
    K->collapse_backward(fixture_device(), &spec.collapse, f32(x->dout + n * ROW, 1, count, HEADS, DIM, 0), o,
                         r, f32(x->d_o + n * WIDE, 1, count * PSEUDO, HEADS, DIM, 0),
                         f32(x->dr, HEADS, PSEUDO, HEADS, 0, 0), false);
    K->release(fixture_device(), workspace);
}

static struct collapsing collapsing_open(void) {
    return (struct collapsing){noise(TOKENS * WIDE, 7), noise(WEIGHTS, 8),   noise(TOKENS * ROW, 9),
                               room(TOKENS * ROW),      room(TOKENS * WIDE), room(WEIGHTS)};
}

static void collapsing_close(struct collapsing *x) {
    float *all[] = {x->o, x->r, x->dout, x->out, x->d_o, x->dr};
    for (int i = 0; i < 6; i++)
        free(all[i]);
}

static void collapse_streamed(void **state) {
    struct collapsing whole = collapsing_open(), parts = collapsing_open();
    (void)state;
    for (int64_t n = 0; n < TOKENS; n += PIECE)
        collapse(&parts, n, min64(PIECE, TOKENS - n));
    collapse(&whole, 0, TOKENS);
    assert_memory_equal(whole.out, parts.out, TOKENS * ROW * sizeof(float));
    assert_memory_equal(whole.d_o, parts.d_o, TOKENS * WIDE * sizeof(float));
    collapse(&parts, 0, 64);
    check_sums(HEADS, PSEUDO * HEADS, 64, parts.dout, parts.o, WIDE, parts.dr);
    memcpy(parts.dr, whole.dr, WEIGHTS * sizeof(float));
    collapse(&whole, 0, TOKENS);
    assert_memory_equal(whole.dr, parts.dr, WEIGHTS * sizeof(float));
    collapsing_close(&whole);
    collapsing_close(&parts);
}

int main(void) {
    K = kernels_cpu();
    const struct CMUnitTest tests[] = {cmocka_unit_test(mixing_streamed),
                                       cmocka_unit_test(collapse_streamed)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}

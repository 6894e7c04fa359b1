/* attention_decode, talking_decode and simplicial_decode of the CUDA backend against the CPU backend: passes of every size
 * over ring caches that wrap, for every mask; and what the caches then hold. */
#include "tests/cuda/fixture.h"

enum { PASSES = 4 };

struct decode_case {
    int64_t batch, heads, head_dim, pseudo;
    int64_t tokens; /* a pass */
    bool token_mask;
    int64_t window;
    bool packed;
    int64_t start; /* tokens that are in the caches already */
    double magnitude;
    enum op_kind kind; /* OP_DECODE, OP_TALKING or OP_SIMPLICIAL */
};

static struct operand selected(struct operand x, int64_t index) {
    for (int i = 0; i < BACKENDS; i++)
        x.on[i] = tensor_select(x.on[i], 2, index);
    return x;
}

/* One pass's q, k, v: slices of one buffer, or apart. */
static void pass_inputs(struct backends *k, const struct decode_case *c, int64_t n, struct operand in[3]) {
    int64_t B = c->batch, H = c->heads, d = c->head_dim;
    if (c->packed) {
        struct operand all = scaled_input(k, k->compute, c->magnitude, 0, B, n, 3, H, d);
        for (int i = 0; i < 3; i++)
            in[i] = selected(all, i);
        return;
    }
    for (int i = 0; i < 3; i++)
        in[i] = scaled_input(k, k->compute, i < 2 ? c->magnitude : 1, 0, B, n, H, d, 0);
}

/* Caches are copied, so they agree to the bit; slots never written stay what they were. */
static void expect_equal(struct backends *k, struct operand cache) {
    double *cuda = values_on(&k->each[CUDA], cache), *exact = values_on(&k->each[EXACT], cache);
    assert_memory_equal(cuda, exact, (size_t)tensor_count(cache.on[EXACT]) * sizeof(double));
    free(cuda);
    free(exact);
}

static void check(enum device_precision precision, struct decode_case c) {
    static uint64_t seed;
    struct backends *k = backends(precision);
    int64_t n = c.tokens * c.pseudo, first = c.start * c.pseudo;
    int64_t capacity = c.window > 0 ? c.window + n : first + PASSES * n;
    struct attention_spec s = {
        c.batch, n, c.heads, c.head_dim, c.pseudo, true, c.token_mask, c.window, 1 / sqrt((double)c.head_dim),
        false,   0, false};
    struct operand cache_k =
        scaled_input(k, k->compute, c.magnitude, 0, c.batch, capacity, c.heads, c.head_dim, 0);
    struct operand cache_v = input(k, k->compute, c.batch, capacity, c.heads, c.head_dim, 0);
    struct operand cache_k2 = input(k, k->compute, c.batch, capacity, c.heads, c.head_dim, 0);
    struct operand cache_v2 = input(k, k->compute, c.batch, capacity, c.heads, c.head_dim, 0);
    struct operand logits = input(k, k->compute, c.heads, c.heads, 0, 0, 0);
    struct operand weights = input(k, k->compute, c.heads, c.heads, 0, 0, 0);
    emulator_seed(seed++ % 5);
    struct op_spec planned = {.kind = c.kind, .attention = s};
    if (c.kind == OP_SIMPLICIAL)
        planned.attention.length = capacity;
    plan(k, planned);
    for (int pass = 0; pass < PASSES; pass++, first += n) {
        struct operand in[3], more[3], o = output(k, k->compute, c.batch, n, c.heads, c.head_dim, 0);
        char what[128];
        pass_inputs(k, &c, n, in);
        pass_inputs(k, &c, n, more);
        EACH(k, b) {
            if (c.kind == OP_TALKING)
                b->k->talking_decode(b->dev, &s, on(in[0], b), on(in[1], b), on(in[2], b), on(logits, b),
                                     on(weights, b), on(cache_k, b), on(cache_v, b), first, on(o, b));
            else if (c.kind == OP_SIMPLICIAL)
                b->k->simplicial_decode(b->dev, &s, on(in[0], b), on(in[1], b), on(in[2], b), on(more[1], b),
                                        on(more[2], b), on(cache_k, b), on(cache_v, b), on(cache_k2, b),
                                        on(cache_v2, b), first, on(o, b));
            else
                b->k->attention_decode(b->dev, &s, on(in[0], b), on(in[1], b), on(in[2], b), on(cache_k, b),
                                       on(cache_v, b), first, on(o, b));
        }
        snprintf(what, sizeof what, "B %d H %d d %d P %d n %d token %d window %d packed %d first %d",
                 (int)c.batch, (int)c.heads, (int)c.head_dim, (int)c.pseudo, (int)n, c.token_mask,
                 (int)c.window, c.packed, (int)first);
        expect_close(what, "o", k, o);
    }
    expect_equal(k, cache_k);
    expect_equal(k, cache_v);
    expect_equal(k, cache_k2);
    expect_equal(k, cache_v2);
    done(k);
}

static void check_all(enum device_precision precision) {
    static const int64_t windows[] = {0, 1, 2, 7, 40, 300}, dims[] = {4, 8, 20, 33, 64, 72, 128, 200, 256};
    int turn = 0;
    for (size_t i = 0; i < sizeof windows / sizeof *windows; i++)
        for (int64_t P = 1; P <= 3; P++)
            for (int token = 0; token <= (P > 1); token++)
                for (int tokens = 1; tokens <= 5; tokens += 4, turn++)
                    check(precision, (struct decode_case){.batch = 1 + turn % 2,
                                                          .heads = 1 + turn % 3,
                                                          .head_dim = dims[turn % 9],
                                                          .pseudo = P,
                                                          .tokens = tokens,
                                                          .token_mask = token,
                                                          .window = windows[i],
                                                          .packed = turn % 4 < 2,
                                                          .start = turn % 3 ? 0 : 50,
                                                          .magnitude = turn % 5 ? 1 : 4,
                                                          .kind = OP_DECODE});
}

static void decode_bf16(void **state) {
    (void)state;
    check_all(DEVICE_BF16);
}

static void decode_fp32(void **state) {
    (void)state;
    check_all(DEVICE_FP32);
}

/* Enough keys for every group of lanes to have several. */
static void many_keys(void **state) {
    (void)state;
    for (int precision = DEVICE_FP32; precision <= DEVICE_BF16; precision++) {
        check((enum device_precision)precision,
              (struct decode_case){1, 2, 64, 1, 1, false, 0, false, 700, 3, OP_DECODE});
        check((enum device_precision)precision,
              (struct decode_case){1, 1, 128, 2, 1, true, 501, true, 700, 3, OP_DECODE});
    }
}

static void other_kinds(void **state) {
    (void)state;
    static const int64_t windows[] = {0, 1, 7, 20};
    for (int turn = 0; turn < 16; turn++) {
        struct decode_case c = {.batch = 1 + turn % 2,
                                .heads = turn % 3 ? 3 : 17,
                                .head_dim = turn % 4 == 3 ? 80
                                            : turn % 2    ? 16
                                                          : 12,
                                .pseudo = 1,
                                .tokens = turn % 4 < 2 ? 1 : 5,
                                .window = windows[turn / 4],
                                .packed = turn % 3 == 1,
                                .start = turn % 3 ? 0 : 30,
                                .magnitude = 1,
                                .kind = turn % 2 ? OP_TALKING : OP_SIMPLICIAL};
        check(DEVICE_FP32, c);
        check(DEVICE_BF16, c);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(other_kinds),
        cmocka_unit_test(decode_bf16),
        cmocka_unit_test(decode_fp32),
        cmocka_unit_test(many_keys),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* embed of the CUDA backend, forward and backward, in the harness of tests/cuda/emulator/. */
#include "tests/cuda/fixture.h"

enum { MAX_TOKENS = 700 };

enum choice { ANY, ONE /* token again and again */, FEW, EVERY /* once each */ };

static void choose(int32_t *tokens, int64_t n, int64_t vocab, enum choice choice) {
    for (int64_t i = 0; i < n; i++) {
        int64_t any = (int64_t)((fixture_noise() + 1) / 2 * (double)vocab);
        tokens[i] = (int32_t)(choice == ANY   ? any
                              : choice == ONE ? vocab - 1
                              : choice == FEW ? any % 3
                                              : i % vocab);
    }
}

static void check(enum device_precision precision, int64_t batch, int64_t tokens, int64_t vocab,
                  int64_t hidden, enum choice choice, bool positions) {
    struct backends *k = backends(precision);
    enum dtype t = k->compute;
    struct embed_spec s = {batch, tokens, vocab, hidden};
    int32_t chosen[MAX_TOKENS];
    choose(chosen, batch * tokens, vocab, choice);
    struct operand id = ids(k, chosen, batch, tokens), w = input(k, t, vocab, hidden, 0, 0, 0);
    struct operand pos = positions ? input(k, t, tokens + 3, hidden, 0, 0, 0) : absent();
    struct operand x = output(k, t, batch * tokens, hidden, 0, 0, 0);
    struct operand dx = input(k, t, batch * tokens, hidden, 0, 0, 0);
    struct operand dw = input(k, DTYPE_F32, vocab, hidden, 0, 0, 0);
    struct operand dpos = positions ? input(k, DTYPE_F32, tokens + 3, hidden, 0, 0, 0) : absent();
    plan(k, (struct op_spec){.kind = OP_EMBED, .embed = s});
    EACH(k, b) {
        b->k->embed(b->dev, &s, on(id, b), on(w, b), on(pos, b), positions ? 2 : 0, on(x, b));
        b->k->embed_backward(b->dev, &s, on(id, b), on(dx, b), on(dw, b), on(dpos, b));
    }
    expect_close("embed", "x", k, x);
    expect_close("embed_backward", "dW", k, dw);
    if (positions)
        expect_close("embed_backward", "dpos", k, dpos);
    done(k);
}

static void check_all(enum device_precision precision) {
    int seed = 0;
    for (int choice = ANY; choice <= EVERY; choice++)
        for (int positions = 0; positions < 2; positions++) {
            emulator_seed((uint64_t)seed++);
            check(precision, 1, 1, 5, 1, (enum choice)choice, positions);
            check(precision, 2, 3, 7, 5, (enum choice)choice, positions);
            check(precision, 3, 21, 1500, 24, (enum choice)choice, positions);
            check(precision, 5, 67, 33, 40, (enum choice)choice, positions);
        }
    check(precision, 1, 320, 4, 9, ONE, false); /* whole chunks, all one run */
    check(precision, 2, 350, 20, 16, FEW, true);
    check(precision, 1, 33, 3, 8, ONE, false);    /* one row crosses */
    check(precision, 1, 33, 70, 2056, ANY, true); /* more columns than a block takes */
}

static void embed_fp32(void **state) {
    (void)state;
    check_all(DEVICE_FP32);
}

static void embed_bf16(void **state) {
    (void)state;
    check_all(DEVICE_BF16);
}

/* The same bits whatever the order of threads and blocks. */
static void same_bits(void **state) {
    (void)state;
    enum { N = 600, C = 8, V = 6 };
    double *first = NULL;
    int32_t chosen[N];
    choose(chosen, N, V, ANY);
    for (uint64_t seed = 0; seed < 6; seed++) {
        struct backends *k = backends(DEVICE_BF16);
        struct backend *b = &k->each[CUDA];
        struct embed_spec s = {1, N, V, C};
        emulator_seed(seed);
        fixture_seed = 5;
        struct operand id = ids(k, chosen, 1, N), dx = input(k, DTYPE_BF16, N, C, 0, 0, 0);
        struct operand dw = input(k, DTYPE_F32, V, C, 0, 0, 0);
        plan(k, (struct op_spec){.kind = OP_EMBED, .embed = s});
        b->k->embed_backward(b->dev, &s, on(id, b), on(dx, b), on(dw, b), tensor_none());
        double *values = values_on(b, dw);
        if (first) {
            assert_memory_equal(first, values, V * C * sizeof *values);
            free(values);
        } else {
            first = values;
        }
        done(k);
    }
    free(first);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(embed_fp32),
        cmocka_unit_test(embed_bf16),
        cmocka_unit_test(same_bits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

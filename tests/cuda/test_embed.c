/* embed of the CUDA backend against the CPU backend, forward and backward. */
#include "tests/cuda/op_run.h"

static void check(enum device_precision precision, const struct op_case *c) {
    struct op_run r;
    run_open(&r, precision, c);
    run_both(&r);
    run_expect_close(&r);
    done(r.k);
}

/* The same bits whatever the order of threads and blocks. */
static void same_bits(void **state) {
    (void)state;
    enum { N = 600, C = 8, V = 6 };
    double *first[2] = {NULL};
    int32_t chosen[N], position[N];
    for (int i = 0; i < N; i++) {
        chosen[i] = (int32_t)((fixture_noise() + 1) / 2 * V);
        position[i] = i % 100 % 37; /* segments of 37 and fewer tokens */
    }
    for (uint64_t seed = 0; seed < 6; seed++) {
        struct backends *k = backends(DEVICE_BF16);
        struct backend *b = &k->each[CUDA];
        struct embed_spec s = {1, N, V, C};
        emulator_seed(seed);
        fixture_seed = 5;
        struct operand id = ids(k, chosen, 1, N), dx = input(k, DTYPE_BF16, N, C, 0, 0, 0);
        struct operand at = ids(k, position, 1, N),
                       table[] = {input(k, DTYPE_F32, V, C, 0, 0, 0), input(k, DTYPE_F32, N, C, 0, 0, 0)};
        plan(k, (struct op_spec){.kind = OP_EMBED, .embed = s});
        b->k->embed_backward(b->dev, &s, on(id, b), on(at, b), on(dx, b), on(table[0], b), on(table[1], b));
        for (int i = 0; i < 2; i++) {
            double *values = values_on(b, table[i]);
            if (first[i]) {
                assert_memory_equal(first[i], values, (size_t)tensor_count(on(table[i], b)) * sizeof *values);
                free(values);
            } else {
                first[i] = values;
            }
        }
        done(k);
    }
    free(first[0]);
    free(first[1]);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        EVERY_CASE("embed_fp32", OP_EMBED, DEVICE_FP32, check),
        EVERY_CASE("embed_bf16", OP_EMBED, DEVICE_BF16, check),
        cmocka_unit_test(same_bits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

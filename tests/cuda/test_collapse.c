/* collapse of the CUDA backend against the CPU backend, forward and backward. */
#include "tests/cuda/op_run.h"

enum { R = 1 };

/* R is read 16 bytes at a time, and a model's may begin anywhere. */
static void matrix_at_any_address(void **state) {
    (void)state;
    static const struct op_case cases[] = {{COMPARE, COLLAPSE_CASE(1, 3, 12, 64, 2, false)},
                                           {COMPARE, COLLAPSE_CASE(1, 2, 3, 32, 5, false)},
                                           {COMPARE, COLLAPSE_CASE(1, 2, 5, 16, 3, true)},
                                           {COMPARE, COLLAPSE_CASE(1, 1, 1, 16, 1, false)}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check_at_any_address(&cases[i], R, 1);
}

/* More rows than registers hold are taken in groups, of two launches each; forward is one launch, by tensor cores also
 * where R does not fit into shared memory. The plain backward is three launches. */
static void groups_of_rows(void **state) {
    (void)state;
    static const struct {
        struct op_case c;
        int launches;
    } expected[] = {{{COMPARE, COLLAPSE_CASE(1, 3, 20, 16, 20, false)}, 1 + 2},
                    {{COMPARE, COLLAPSE_CASE(1, 3, 24, 16, 24, false)}, 1 + 4},
                    {{COMPARE, COLLAPSE_CASE(1, 3, 64, 16, 26, false)}, 1 + 14},
                    {{COMPARE, COLLAPSE_CASE(1, 3, 4, 8, 2, false)}, 1 + 3}};
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++) {
        struct op_run r;
        run_open(&r, DEVICE_BF16, &expected[i].c);
        int64_t before = emulator_launches();
        run_forward(&r, r.k->each, NULL);
        run_backward(&r, r.k->each, NULL);
        assert_true(emulator_on_gpu() || emulator_launches() - before == expected[i].launches);
        done(r.k);
    }
}

static void next_tokens_are_prefetched(void **state) {
    (void)state;
    if (emulator_on_gpu())
        skip();
    enum { B = 2, T = 4000, P = 2, H = 4, D = 16, TOKEN = H * D * 2 };
    static const struct op_case c = {COMPARE, COLLAPSE_CASE(B, T, H, D, P, false)};
    struct op_run r;
    run_open(&r, DEVICE_BF16, &c);
    int64_t before = emulator_prefetched;
    run_forward(&r, r.k->each, NULL);
    expect_prefetched(&r, before, B * T, P * TOKEN); /* o */
    before = emulator_prefetched;
    run_backward(&r, r.k->each, NULL);
    expect_prefetched(&r, before, B * T, (P + 1) * TOKEN); /* o and dout */
    done(r.k);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        EVERY_CASE("collapse_fp32", OP_COLLAPSE, DEVICE_FP32, check_case),
        EVERY_CASE("collapse_bf16", OP_COLLAPSE, DEVICE_BF16, check_case),
        cmocka_unit_test(matrix_at_any_address),
        cmocka_unit_test(groups_of_rows),
        cmocka_unit_test(next_tokens_are_prefetched),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

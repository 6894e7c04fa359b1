/* The check of `make check-gpu` on models of real sizes (tests/lib/real_sizes.h), at sizes that the emulator can do: it
 * passes, replays graphs, and finds a mistake of either precision. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "tests/cuda/emulator/control.h"
#include "tests/lib/real_sizes.h"

/* Two heads of 64 or, with a prime vocabulary and P = 4, of 32. */
static struct size_case small_case(bool gpt2) {
    return real_size("small", 2, gpt2 ? 64 : 32, 64, gpt2 ? 2 : 4, LAYER_IHA_LOCAL, gpt2);
}

static struct size_verdict check(const struct size_case *c) {
    struct size_verdict v;
    struct error e = {0};
    if (size_check(c, kernels_cuda(), 1, &v, &e) != 0)
        fail_msg("%s", e.text);
    print_message("bf16 %.3f (%s), fp32 %.3f (%s), loss %.6f and %.6f\n", v.bf16, v.bf16_at, v.fp32,
                  v.fp32_at, v.loss[GPU_BF16], v.loss[GPU_FP32]);
    return v;
}

static void right_models_pass(void **state) {
    (void)state;
    for (int gpt2 = 0; gpt2 < 2; gpt2++) {
        struct size_case c = small_case(gpt2);
        int64_t launches = emulator_graph_launches();
        struct size_verdict v = check(&c);
        assert_true(v.bf16 <= 1 && v.fp32 <= 1);
        assert_true(emulator_on_gpu() || emulator_graph_launches() >= launches + 4);
    }
}

/* A window that is a token too short, in bf16 alone. */
static void a_wrong_mask_in_bf16_is_found(void **state) {
    (void)state;
    struct size_case c = small_case(true);
    c.config[GPU_BF16].iha_window -= c.config[GPU_BF16].num_pseudo_heads;
    struct size_verdict v = check(&c);
    assert_true(v.bf16 > 1 && v.fp32 <= 1);
}

/* What bf16 is judged against is itself judged; a mistake of both, which agree, is found too. */
static void a_wrong_rotation_in_fp32_is_found(void **state) {
    (void)state;
    for (int both = 0; both < 2; both++) {
        struct size_case c = small_case(false);
        c.config[GPU_FP32].rope_theta *= 2;
        if (both)
            c.config[GPU_BF16].rope_theta *= 2;
        struct size_verdict v = check(&c);
        assert_true(v.fp32 > 1 && (v.bf16 > 1) == !both);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(right_models_pass),
        cmocka_unit_test(a_wrong_mask_in_bf16_is_found),
        cmocka_unit_test(a_wrong_rotation_in_fp32_is_found),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

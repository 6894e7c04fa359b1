/* qk_norm of the CUDA backend against the CPU backend, forward and backward. */
#include "tests/cuda/op_run.h"

int main(void) {
    const struct CMUnitTest tests[] = {
        EVERY_CASE("qk_norm_fp32", OP_QK_NORM, DEVICE_FP32, check_case),
        EVERY_CASE("qk_norm_bf16", OP_QK_NORM, DEVICE_BF16, check_case),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

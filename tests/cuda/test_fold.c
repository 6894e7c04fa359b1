/* fold of the CUDA backend against the CPU backend, forward and backward. */
#include "tests/cuda/op_run.h"

int main(void) {
    const struct CMUnitTest tests[] = {
        EVERY_CASE("fold_fp32", OP_FOLD, DEVICE_FP32, check_case),
        EVERY_CASE("fold_bf16", OP_FOLD, DEVICE_BF16, check_case),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

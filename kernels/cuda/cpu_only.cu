/* Operations that have no kernels here. Planning one fails, so that none is called. */
#include <stdlib.h>

#include "kernels/cuda/cuda.h"

int cuda_cpu_only_plan(enum op_kind kind, struct error *e) {
    const char *type = kind == OP_TALKING ? "talking" : "simplicial";
    return fail_user(e,
                     "model.layer_pattern: %s_global and %s_local layers are computed on CPUs only; use "
                     "system.device = cpu, or other layers",
                     type, type);
}

void cuda_talking(struct device *, const struct attention_spec *, tensor, tensor, tensor, tensor, tensor,
                  tensor, tensor, void *) {
    abort();
}

void cuda_talking_backward(struct device *, const struct attention_spec *, tensor, tensor, tensor, tensor,
                           tensor, tensor, tensor, const void *, tensor, tensor, tensor, tensor, tensor,
                           bool) {
    abort();
}

void cuda_talking_decode(struct device *, const struct attention_spec *, tensor, tensor, tensor, tensor,
                         tensor, tensor, tensor, int64_t, tensor) {
    abort();
}

void cuda_simplicial(struct device *, const struct attention_spec *, tensor, tensor, tensor, tensor, tensor,
                     tensor, tensor, void *) {
    abort();
}

void cuda_simplicial_backward(struct device *, const struct attention_spec *, tensor, tensor, tensor, tensor,
                              tensor, tensor, tensor, tensor, const void *, tensor, tensor, tensor, tensor,
                              tensor) {
    abort();
}

void cuda_simplicial_decode(struct device *, const struct attention_spec *, tensor, tensor, tensor, tensor,
                            tensor, tensor, tensor, tensor, tensor, int64_t, tensor) {
    abort();
}

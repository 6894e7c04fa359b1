/* Muon on a GPU: not there yet, so that plan() refuses it before the first step. */
#include "kernels/cuda/cuda.h"

#include <stdlib.h>

int cuda_orthogonalize_plan(struct device *dev, const struct orthogonalize_spec *s, struct op_cost *cost,
                            struct error *e) {
    (void)dev, (void)s, (void)cost;
    return fail_user(e,
                     "train.optimizer = muon does not run on a GPU yet; use adamw, or system.device = cpu");
}

void cuda_muon_momentum(struct device *, double, const struct param_group *, int, tensor, tensor,
                        const struct step_state *) {
    abort();
}

void cuda_orthogonalize(struct device *, const struct orthogonalize_spec *, tensor,
                        const struct step_state *) {
    abort();
}

void cuda_muon_update(struct device *, const struct param_group *, int, int64_t, tensor, tensor, tensor,
                      const struct step_state *) {
    abort();
}

/* attention: which implementation serves a shape. There is one so far. */
#include "kernels/cuda/attention_own.h"

int cuda_attention_plan(struct device *dev, const struct attention_spec *s, struct op_cost *cost,
                        struct error *e) {
    return own_attention_plan(dev, s, cost, e);
}

void cuda_attention(struct device *dev, const struct attention_spec *s, tensor q, tensor k, tensor v,
                    tensor o, void *saved) {
    own_attention(dev, s, q, k, v, o, saved);
}

void cuda_attention_backward(struct device *dev, const struct attention_spec *s, tensor q, tensor k, tensor v,
                             tensor o, tensor d_o, const void *saved, tensor dq, tensor dk, tensor dv) {
    own_attention_backward(dev, s, q, k, v, o, d_o, saved, dq, dk, dv);
}

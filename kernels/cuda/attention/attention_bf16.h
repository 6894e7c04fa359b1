/* The built-in attention, for every mask and every supported device; attention.cu calls it. The bf16 kernels
 * are in attention_bf16.cu and attention_bf16_backward.cu; fp32 goes to attention_fp32.cu. */
#ifndef IHA_KERNELS_CUDA_ATTENTION_ATTENTION_BF16_H
#define IHA_KERNELS_CUDA_ATTENTION_ATTENTION_BF16_H

#include <initializer_list>

#include "kernels/cuda/cuda.h"

/* q, o and their gradients have the spec's heads; k, v and theirs have those of keys and values. */
static inline void check_attention_shapes(const char *op, enum dtype type, const struct attention_spec *s,
                                          std::initializer_list<tensor> of_queries,
                                          std::initializer_list<tensor> of_keys) {
    for (const tensor &t : of_queries)
        check_shape(op, "q, o or a gradient", t, type, s->batch, s->length, s->heads, s->head_dim);
    for (const tensor &t : of_keys)
        check_shape(op, "k, v or a gradient", t, type, s->batch, s->length, attention_kv_heads(s),
                    s->head_dim);
}

static inline void check_segments(const char *op, const struct attention_spec *s, tensor segments) {
    if (!s->segmented)
        return;
    check_shape(op, "segments", segments, DTYPE_I32, 2, s->batch, s->length / s->pseudo);
    check_contiguous(op, "segments", segments);
}

/* The largest head_dim there are kernels for. */
enum { ATTENTION_MAX_DIM = 256 };

/* As attention and attention_backward in kernels/ops.def, for scale > 0. Bit-identical from run to run. */
int attention_builtin_plan(struct device *, const struct attention_spec *, struct op_cost *, struct error *);
void attention_builtin(struct device *, const struct attention_spec *, tensor q, tensor k, tensor v,
                       tensor segments, tensor o, void *saved);
void attention_builtin_backward(struct device *, const struct attention_spec *, tensor q, tensor k, tensor v,
                                tensor segments, tensor o, tensor d_o, const void *saved, tensor dq,
                                tensor dk, tensor dv);

#endif

/* A GPT with MHA and IHA layers: parameters, activations, forward, backward, one optimizer step.
 *
 * The block is  x += attn(norm(x)); x += mlp(norm(x)).  The model asks kernels/ for everything it computes
 * and knows no device; where several ranks train it, parallel.c joins them through kernels/comm.h. All memory
 * is laid out before the first step, one allocation a family (parameters, gradients, optimizer, activations);
 * addresses never change. */
#ifndef IHA_MODEL_MODEL_H
#define IHA_MODEL_MODEL_H

#include "kernels/comm.h"
#include "kernels/kernels.h"
#include "model/config/config.h"
#include "model/params.h"
#include "model/partition.h"

/* What a training or evaluation pass holds at once. */
struct pass_shape {
    int64_t batch;  /* B: sequences */
    int64_t tokens; /* T */
    enum recompute recompute;
    bool training; /* false: no gradients, no optimizer, one layer's activations */
};

/* Bytes by family, as `info` announces and create allocates them. */
struct memory_plan {
    size_t parameters, gradients, optimizer, activations, workspace, messages;
    size_t saving; /* of host memory, when there is room: a copy that is saved while training goes on */
};

/* One layer's activations, kept from forward to backward unless recomputed. */
struct layer_buffers {
    tensor x_attn;   /* [N,C] the residual stream on entry */
    tensor y_attn;   /* [N,C] its norm */
    tensor qkv;      /* [B,T,3,H,d] */
    tensor q, k, v;  /* [B,S,H,d] as attention reads them; slices of qkv where nothing is mixed or rotated */
    tensor o_pseudo; /* [B,S,H,d] attention's output */
    tensor o;        /* [B,T,H,d] collapsed; the same memory as o_pseudo in MHA layers */
    tensor x_mlp;    /* [N,C] the residual stream between attention and MLP */
    tensor y_mlp;    /* [N,C] its norm */
    tensor up, gate; /* [N,F] */
    tensor act;      /* [N,F] */
    void *attn_norm_saved, *mlp_norm_saved, *attention_saved;
};

/* The specs of one layer's operations, which is all that tells layer types apart. */
struct layer_specs {
    struct qkv_mix_spec qkv_mix;
    struct attention_spec attention;
    struct collapse_spec collapse;
    bool iha;   /* mixes and collapses */
    bool mixes; /* qkv_mix runs: IHA, or MHA with RoPE */
    size_t attention_saved_bytes;
};

/* Gradients of activations; one set, since backward visits one layer at a time. */
struct gradient_buffers {
    tensor dx, dy;                   /* [N,C] residual stream, and through a norm */
    tensor dact, dgate;              /* [N,F]; dact becomes dup in place */
    tensor d_o, dqkv;                /* [B,T,H,d], [B,T,3,H,d] */
    void *d_o_pseudo, *dq, *dk, *dv; /* [B,S,H,d] for the S of the layer at hand */
};

struct model {
    struct model_config config;
    const struct kernels *k;
    struct device *dev;
    struct device_dtypes dtypes;
    struct params params;
    void *values;             /* parameters in the compute type, params.elements */
    void *master_weights;     /* the same in the master type; the same memory where the types agree */
    void *gradients;          /* NULL unless training; partition.h tells what lies where */
    void *moments;            /* first, then second, each partition.moment_elements */
    struct step_state *state; /* on the device */
    struct param_group *groups;
    int group_count;
    struct memory_plan plan;
    struct comm *comm;
    struct partition partition;
    enum dtype reduce_dtype; /* what gradients travel in */
    comm_event *reduced;     /* [bucket_count] each bucket's gradients, on their way; 0: nothing is */
    comm_event *gathered;    /* and its parameters */
    bool gathering;          /* some of them are */

    /* of the planned pass */
    struct pass_shape shape;
    void *activations, *workspace;
    size_t workspace_bytes, norm_saved_bytes;
    struct norm_spec norm_spec;
    struct act_spec act_spec;
    tensor tokens, targets; /* i32 [B,T] */
    tensor rope;            /* [positions, 2, d/2] */
    tensor delta;           /* [N,C] what a sublayer adds to the residual stream */
    tensor x_final, h;      /* [N,C] the last residual stream, and its norm */
    void *final_norm_saved;
    struct layer_buffers *layers;
    struct layer_specs *specs;
    struct gradient_buffers grad;
};

/* Allocate parameters (zero) and, for training, gradients and optimizer state; plan and allocate the buffers
 * of `shape`. lr_scale for alpha and collapse, and weight decay for matrices, go into the groups. Device
 * memory running out is found here: an EXIT_USER error with the figures. */
struct model_options {
    struct pass_shape shape;
    double weight_decay, mix_lr_scale;
    struct comm *comm; /* NULL: one rank */
    int zero_stage;
    enum dtype reduce_dtype; /* in which gradients travel between ranks; see comm.h */
};
int model_create(struct model *m, const struct model_config *config, const struct kernels *k,
                 struct device *dev, const struct model_options *options, struct error *e);
void model_free(struct model *m);

/* What model_create would allocate on one of `ranks` ranks, without allocating it. */
int model_memory(const struct model_config *config, const struct kernels *k, struct device *dev,
                 const struct pass_shape *shape, int ranks, int zero_stage, enum dtype reduce_dtype,
                 struct memory_plan *plan, struct error *e);
size_t memory_total(const struct memory_plan *plan);

/* Elements [offset, offset + count) of a flat buffer. */
static inline tensor flat_range(void *buffer, enum dtype dtype, int64_t offset, int64_t count) {
    return tensor_of((char *)buffer + (size_t)offset * dtype_bytes(dtype), dtype, count, 0, 0, 0, 0);
}

/* Views of one parameter, and of its gradient; absent for index -1. */
tensor model_param(const struct model *m, int index);
tensor model_gradient(const struct model *m, int index);

/* Called as backward finishes the gradients of a unit of params, from last to first. */
typedef void gradients_ready(void *context, int unit);

/* One pass over B*T tokens: forward, loss, backward. tokens, targets: host, [B,T]; a target < 0 does not
 * count. state.loss += scale * sum of nats; gradients are of that loss, added to what is there when
 * `accumulate`. `ready` may be NULL. */
void model_forward_backward(struct model *m, const int32_t *tokens, const int32_t *targets, double scale,
                            bool accumulate, gradients_ready *ready, void *context);

/* Forward and loss alone, into state.loss. */
void model_evaluate(struct model *m, const int32_t *tokens, const int32_t *targets, double scale);

/* Before anything but a pass reads parameters: those that are still on their way have come. On every rank. */
void model_await_params(struct model *m);

/* The passes' parts, shared between forward.c, backward.c and parallel.c. model_await: until a collective has
 * ended, if it has not yet. model_await_unit: until the parameters of one unit of the partition have come.
 * model_forward ends with m->h, the normed final residual stream. layer_recompute brings back what backward
 * of one layer reads, given m->shape.recompute: the same operations on the same inputs, so the same bits. */
void model_upload(struct model *m, const int32_t *tokens, const int32_t *targets);
void model_await(struct model *m, comm_event *event);
void model_await_unit(struct model *m, int unit);
void model_forward(struct model *m);
void model_backward(struct model *m, double scale, bool accumulate, gradients_ready *ready, void *context);
void layer_recompute(struct model *m, int layer);

/* One of a step's passes on every rank: as model_forward_backward, and what is complete is summed over ranks
 * while backward goes on. `scale` is that of one rank's pass: 1 / tokens of the whole step, the same in every
 * call, since the device may keep the pass as a graph. */
void model_train_pass(struct model *m, const int32_t *tokens, const int32_t *targets, double scale, int pass,
                      int passes);

struct update_hyper {
    double beta1, beta2, eps;
    double grad_clip;   /* 0: off */
    double skip_zscore; /* 0: off */
};

/* After all passes of a step (lr was given to step_begin): norm, clip, skip, AdamW on what this rank owns,
 * and the new parameters to every rank, where they arrive while the next forward pass is under way. */
void model_update(struct model *m, const struct update_hyper *h);

/* Which parameter's gradient spoiled the step just done: the first in backward order that is not finite, or,
 * where all are, the largest. An index into params.list. To be called on every rank. */
int model_worst_gradient(struct model *m, bool *finite);

#endif

/* A GPT with MHA and IHA layers: parameters, activations, forward, backward, one optimizer step.
 *
 * The block is  x += attn(norm(x)); x += mlp(norm(x)).  kernels/ computes every operation, and the model
 * does not depend on a device. parallel.c trains it on several ranks through kernels/comm.h. All memory is
 * allocated before the first step, one allocation per family (parameters, gradients, optimizer, activations);
 * addresses never change. */
#ifndef IHA_MODEL_MODEL_H
#define IHA_MODEL_MODEL_H

#include "kernels/comm.h"
#include "kernels/kernels.h"
#include "model/config/config.h"
#include "model/muon.h"
#include "model/params.h"
#include "model/partition.h"

/* The size of a training or evaluation pass. */
struct pass_shape {
    int64_t batch;  /* B: sequences */
    int64_t tokens; /* T */
    enum recompute recompute;
    bool training;          /* false: no gradients, no optimizer state, one layer's activations */
    bool segments;          /* batches bring segments, which attention does not cross */
    bool restart_positions; /* positions begin at 0 in each segment */
    bool muon;              /* training: hidden matrices are Muon's, the rest AdamW's (muon.h) */
};

/* The passes of a run. */
struct pass_shape pass_shape_of(const struct config *c, bool training);

/* The input of one pass, in host memory. */
struct batch {
    const int32_t *tokens;  /* [B,T] */
    const int32_t *targets; /* [B,T] the id to predict at each position; < 0: does not count */
    /* [B,T] the index in its sequence of the first token of each token's segment; read if the pass has
     * segments */
    const int32_t *segments;
};

/* Bytes by family: what model_create allocates and `info` prints. */
struct memory_plan {
    size_t parameters, gradients, optimizer, activations, workspace;
    size_t messages; /* staging buffers of the collectives */
    size_t snapshot; /* optional, host memory: a copy to write a checkpoint from while training continues */
};

/* One layer's activations. Backward reads them: they are kept, or recomputed (buffers.c). */
struct layer_buffers {
    tensor x_attn; /* [N,C] the residual stream on entry */
    tensor y_attn; /* [N,C] its norm */
    /* [3*H*d,C] and [3*H*d] the weight and bias of qkv with their heads mixed, in folded layers */
    tensor folded_weight, folded_bias;
    tensor qkv_raw; /* [B,T,H+2G,d] before qk_norm; without one qkv itself */
    tensor qkv;     /* [B,T,H+2G,d]; in simplicial layers [B,T,5H,d] */
    /* [B,S,H,d], of k and v [B,S,G,d]: attention's inputs; slices of qkv if nothing is mixed */
    tensor q, k, v;
    /* [B,S,H,d] attention's output; in differential layers [B,T,2,H,d], see differential.c */
    tensor o_pseudo;
    tensor o;     /* [B,T,H,d] collapsed; in MHA layers o_pseudo itself */
    tensor x_mlp; /* [N,C] the residual stream between attention and MLP */
    tensor y_mlp; /* [N,C] its norm */
    /* [N,F], with one_product columns of one [N,2F]; backward writes their gradients over them */
    tensor up, gate;
    tensor act; /* [N,F] */
    void *attn_norm_saved, *mlp_norm_saved, *attention_saved;
};

/* One layer's operations. Layer types differ in nothing else. */
struct layer_specs {
    struct qkv_mix_spec qkv_mix;
    struct attention_spec attention;
    struct collapse_spec collapse;
    struct attention_spec pair_attention;  /* differential layers: of every other head */
    struct diff_combine_spec diff_combine; /* and what follows */
    struct qk_norm_spec qk_norm;
    bool normed; /* qk_norm runs */
    bool iha;    /* heads are mixed, and collapse runs */
    bool diff;   /* differential */
    bool talking, simplicial;
    int64_t qkv_heads; /* layer_qkv_heads() */
    bool folded;       /* heads are mixed in the weight of qkv */
    bool mixes;        /* qkv_mix writes q, k and v apart from qkv: IHA */
    bool rotates;      /* qkv_mix rotates q and k in qkv: other layers with RoPE */
    /* swiglu's up and gate are one matrix product: their weights are neighbours in memory */
    bool one_product;
    size_t attention_saved_bytes;
};

/* The attention that the layer's calls are planned for. */
static inline enum op_kind attention_kind(const struct layer_specs *s) {
    return s->talking ? OP_TALKING : s->simplicial ? OP_SIMPLICIAL : OP_ATTENTION;
}

static inline const struct attention_spec *planned_attention(const struct layer_specs *s) {
    return s->diff ? &s->pair_attention : &s->attention;
}

/* Gradients of activations; one set for all layers, since backward works on one layer at a time. */
struct gradient_buffers {
    tensor dx, dy; /* [N,C] of the residual stream, and of a norm's output */
    /* Column sums of dx [C], of the type of parameters' gradients, if there are biases. They wait here, since with zero_stage = 2
     * the memory of the bias's gradient may still hold gradients of the unit before. */
    tensor dx_sums;
    tensor dact;                         /* [N,F]; without a gate it becomes the gradient of up, in place */
    tensor d_o, dqkv;                    /* [B,T,H,d], as the layer's qkv */
    tensor dfolded_weight, dfolded_bias; /* of a folded layer; the type of gradients of parameters */
    tensor dalpha_unused;                /* [P,H,H] of alphas that are the identity */
    void *d_o_pseudo, *dq, *dk, *dv;     /* [B,S,H,d] or [B,S,G,d], S that of the layer */
    tensor dqkv_other;                   /* [B,T,3H,d] of a differential layer's second half of the values */
};

/* Euclidean norms by part of the model; negative where it has none. Gradients are of the mean loss, before clipping. */
struct part_norms {
    double gradient[PARAM_PARTS], weight[PARAM_PARTS];
};

struct model {
    struct model_config config;
    const struct kernels *k;
    struct device *dev;
    struct device_dtypes dtypes;
    struct params params;
    void *values;         /* [params.elements] parameters, compute type */
    void *master_weights; /* parameters, master type: `values` itself where the types agree; otherwise
                               * behind the moments, and sharded like them */
    void *gradients;      /* [partition.gradient_elements] NULL unless training */
    void *moments;        /* [partition.moment_elements + second_elements] first moments, then second ones,
                               * master type */
    struct step_state *state; /* on the device */
    struct param_group *groups;
    int group_count;
    struct memory_plan plan;
    struct comm *comm;
    struct partition partition;
    struct muon_matrices muon;
    enum dtype reduce_dtype;   /* gradients are sent in this type */
    comm_event *reduce_events; /* [bucket_count] pending collective on a bucket's gradients; 0: none */
    comm_event *gather_events; /* [bucket_count] and the all-gather of its parameters */
    bool gather_pending;       /* some of gather_events are */
    struct part_norms *norms;  /* model_update fills it in, and waits for the queue; NULL: not wanted */

    /* the planned pass */
    struct pass_shape shape;
    bool scores; /* model_score is planned too */
    void *activations, *workspace;
    size_t workspace_bytes, norm_saved_bytes;
    struct norm_spec norm_spec;
    struct act_spec act_spec;
    tensor tokens, targets; /* i32 [B,T] */
    tensor segments;        /* i32 [2,B,T] each token's segment: its first token, and one past its last */
    tensor positions;       /* i32 [B,T]; absent: a token's index in its sequence */
    tensor correct;         /* i32 [B*T] of an evaluation: 1 where the target has the largest logit */
    int32_t *host_segments; /* [3,B,T] segments and positions, to be uploaded */
    tensor identity_alpha;  /* [P,H,H] in place of alphas that the model lacks (alpha_on) */
    tensor rope;            /* [positions, 2, d/2] */
    tensor delta;           /* [N,C] what the attention or MLP half adds to the residual stream */
    tensor x_final, h;      /* [N,C] the last residual stream, and its norm */
    void *final_norm_saved;
    struct layer_buffers *layers;
    struct layer_specs *specs;
    struct gradient_buffers grad;
};

struct model_options {
    struct pass_shape shape;
    double weight_decay; /* of matrices */
    double mix_lr_scale; /* factor on the learning rate of alpha and collapse */
    struct comm *comm;   /* NULL: one rank */
    int zero_stage;
    enum dtype reduce_dtype; /* gradients are sent between ranks in this type; see reserve in comm.h */
    double muon_lr_scale;    /* factor on the learning rate of Muon's matrices */
    bool scores;             /* model_score will be called */
};

/* Allocate parameters (zero) and, for training, gradients and optimizer state; plan and allocate the buffers
 * of `shape`. EXIT_USER: not enough memory; the message says how much each family needs. */
int model_create(struct model *m, const struct model_config *config, const struct kernels *k,
                 struct device *dev, const struct model_options *options, struct error *e);
void model_free(struct model *m);

/* What model_create would allocate on one of `ranks` ranks. Allocates nothing. */
int model_memory(const struct model_config *config, const struct kernels *k, struct device *dev,
                 const struct pass_shape *shape, int ranks, int zero_stage, enum dtype reduce_dtype,
                 struct memory_plan *plan, struct error *e);
size_t memory_total(const struct memory_plan *plan); /* without the snapshot */

/* Elements [offset, offset + count) of a flat buffer. */
static inline tensor flat_range(void *buffer, enum dtype dtype, int64_t offset, int64_t count) {
    return tensor_of((char *)buffer + (size_t)offset * dtype_bytes(dtype), dtype, count, 0, 0, 0, 0);
}

/* RoPE of a model with position_embedding = rope. */
struct rope_spec model_rope(const struct model_config *config);

/* Views of one parameter, and of its unsharded gradient; absent for index -1. */
tensor model_param(const struct model *m, int index);
tensor model_gradient(const struct model *m, int index);

/* What the classifier multiplies by, with its padded rows [padded,C], its gradient, and the operation on so many rows
 * of h. */
tensor model_classifier(const struct model *m);
tensor model_classifier_gradient(const struct model *m);
struct classifier_spec model_classifier_spec(const struct model *m, int64_t rows);

/* The same of an alpha of `layer`; where alpha_on leaves it out, the identity, and a gradient that is not used. */
tensor model_alpha(const struct model *m, int layer, int index);
tensor model_alpha_gradient(const struct model *m, int layer, int index);

/* Called when backward has finished the gradients of a unit (params.h), from last to first. */
typedef void gradients_ready(void *context, int unit);

/* One pass over B*T tokens: forward, loss, backward. state.loss += scale * sum of nats, state.targets += the
 * targets that count; gradients are of that loss, and with `accumulate` are added to those before. `ready`
 * may be NULL. */
void model_forward_backward(struct model *m, struct batch batch, double scale, bool accumulate,
                            gradients_ready *ready, void *context);

/* Forward and loss only: state.loss += scale * sum of nats, state.targets += the targets that count.
 * correct: host, [B,T], 1 where the target has the largest logit, otherwise 0; NULL: not wanted. */
void model_evaluate(struct model *m, struct batch batch, double scale, int32_t *correct);

/* nats[b] of the first `rows` sequences: the sum over their targets that count of -log p(target). nats: host. Changes
 * lr, step, loss, targets and sumsq of the step state. ignored: host, [T], all -1. Needs model_options.scores. */
void model_score(struct model *m, struct batch batch, const int32_t *ignored, int64_t rows, double *nats);

/* Forward up to the attention of one layer, whose buffers then hold its queries, keys and values. */
void model_forward_attention(struct model *m, struct batch batch, int layer);

/* Wait until the parameters of the last update are gathered. Whatever reads parameters, except a pass, calls
 * this first, on every rank. */
void model_await_params(struct model *m);

/* swiglu's two weights of `layer` as one [2F,C] where layer_specs.one_product, and their gradient. */
tensor model_up_and_gate(const struct model *m, int layer);
tensor model_up_and_gate_gradient(const struct model *m, int layer);

/* [N,F]: the left or right half (0, 1) of the columns of t [N,2F]. */
static inline tensor half_of_columns(tensor t, int half) {
    return tensor_part(t, 1, half * (t.shape[1] / 2), t.shape[1] / 2);
}

/* A weight or bias of qkv, or its gradient, as fold takes it: [3,H,columns]. */
static inline tensor qkv_by_heads(const struct model *m, tensor t) {
    int64_t H = m->config.num_attention_heads;
    return t.data ? tensor_of(t.data, t.dtype, 3, H, tensor_count(t) / (3 * H), 0, 0) : t;
}

/* qkv as qk_norm takes it: [N,H+2G,d]. */
static inline tensor qkv_rows(tensor qkv) {
    return tensor_of(qkv.data, qkv.dtype, qkv.shape[0] * qkv.shape[1], qkv.shape[2], qkv.shape[3], 0, 0);
}

/* q, k, v (0, 1, 2) of qkv [B,T,H+2G,d], or k', v' (3, 4) of a simplicial layer's, whose G is H. */
static inline tensor qkv_part(const struct model_config *c, tensor qkv, int which) {
    int64_t H = c->num_attention_heads, G = config_kv_heads(c);
    return tensor_part(qkv, 2, which == 0 ? 0 : H + (which - 1) * G, which == 0 ? H : G);
}

/* Of a folded layer: the weight and bias of qkv with their heads mixed. bias is absent where the model has none. */
void model_fold(const struct model *m, int layer, tensor weight, tensor bias);

/* Attention of a differential layer (differential.c), and the two attentions made one: o from o_pseudo. Backward:
 * dq, dk and dv [B,T,H,d] from grad.d_o; accumulate: gradients of parameters are added to. */
void differential_attention(struct model *m, int layer);
void differential_combine(struct model *m, int layer);
void differential_backward(struct model *m, int layer, tensor dq, tensor dk, tensor dv, bool accumulate);
/* The same for any number of tokens: pairs [B,T,2,H,d], o [B,T,H,d]. */
void differential_combine_of(const struct model *m, int layer, const struct diff_combine_spec *spec,
                             tensor pairs, tensor o);
/* Heads first, first + 2, ... of t [B,S,H,d]. */
tensor every_other_head(tensor t, int first);

/* Parts of a pass, for forward.c, backward.c and parallel.c. model_await: wait for a collective, if it is
 * pending. model_await_unit: wait until the parameters of one unit are gathered. model_forward ends with
 * m->h, the norm of the final residual stream. layer_recompute: compute again what m->shape.recompute did not
 * keep for the layer's backward, by the same operations on the same inputs, so with the same bits. */
void model_upload(struct model *m, struct batch batch);
void model_await(struct model *m, comm_event *event);
/* Around all_gathers that may start together: comm.h. */
void model_group_begin(struct model *m);
void model_group_end(struct model *m);
void model_await_unit(struct model *m, int unit);
void model_forward(struct model *m);
void model_backward(struct model *m, double scale, bool accumulate, gradients_ready *ready, void *context);
void layer_recompute(struct model *m, int layer);

/* Parts of an update, for muon.c: this rank's shard of a bucket's reduced gradients, in place or among the shards of
 * stage 2; a bucket's, and any range's, unsharded gradients; the weights of one of partition.updates; AdamW on one of
 * partition.updates, whose reduced gradients are g. */
struct update_hyper;
tensor model_gradient_shard(const struct model *m, int bucket);
tensor model_gradient_bucket(const struct model *m, int bucket);
tensor model_gradient_range(const struct model *m, int unit, int64_t begin, int64_t end);
struct shard_weights {
    tensor master, rounded; /* rounded: absent where the master is what forward reads */
};
struct shard_weights model_shard_weights(const struct model *m, const struct shard *s);
void model_update_shard(struct model *m, const struct shard *s, tensor g, const struct update_hyper *h);

/* One of a step's passes, on every rank: model_forward_backward, with finished gradients reduced over ranks
 * while backward continues. scale: 1 / tokens of the whole step, the same in every call, since the device may
 * keep the pass as a graph. */
void model_train_pass(struct model *m, struct batch batch, double scale, int pass, int passes);

struct update_hyper {
    double beta1, beta2, eps;
    double grad_clip;   /* 0: off */
    double skip_zscore; /* 0: off */
    double tokens;      /* of the whole step, all passes and ranks: 1 / the scale of its passes */
    double muon_momentum;
};

/* After all passes of a step (lr was given to step_begin): gradient norm, clipping, skipping, AdamW and Muon on
 * what this rank owns. The new parameters are then gathered by all ranks while the next forward pass runs. */
void model_update(struct model *m, const struct update_hyper *h);

/* After a bad step, the parameter with the worst gradient: the first in backward order that is not finite,
 * or, where all are finite, the one of the largest norm. An index into params.list. Called on every rank. */
int model_worst_gradient(struct model *m, bool *finite);

#endif

/* Every operation training needs, once, with its shapes; behind it kernels/cpu/ and kernels/cuda/.
 *
 * Operations are cut where a GPU would fuse them, each with its backward beside it. They know nothing of
 * transformers: they take views of memory and a `*_spec` that holds the sizes and choices they were planned
 * with. Manners that every backend keeps:
 *  - plan() is called once for each distinct spec, before the first use: it says how many bytes the operation
 *    saves for its backward and how much scratch it needs, and builds library plans. After that nothing
 *    allocates. What `saved` holds is the backend's own business.
 *  - An operation is asynchronous on the device's queue and returns nothing to the host. Loss, gradient norm,
 *    clip factor, skip flag, learning rate and step live in a `step_state` on the device.
 *  - Outputs are overwritten, except where `accumulate` says that a gradient is added to. Outputs never alias
 *    inputs unless the comment allows it.
 *  - A wrong shape is a bug of the caller: the operation prints what it was given and aborts.
 *
 * Letters: B batch, T tokens, N = B*T rows, C hidden, H heads, d head dim, P pseudo-heads, S = T*P virtual
 * tokens, V vocabulary. A tensor whose `data` is NULL is absent. */
#ifndef IHA_KERNELS_KERNELS_H
#define IHA_KERNELS_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/comm.h"
#include "kernels/error.h"
#include "kernels/step.h"
#include "kernels/tensor.h"
#include "kernels/trace.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- operation specs ---- */

struct embed_spec {
    int64_t batch, tokens, vocab, hidden;
};

enum norm_type { NORM_TYPE_RMS, NORM_TYPE_LAYER };
struct norm_spec {
    enum norm_type type;
    double eps;
    int64_t rows, hidden;
};

struct linear_spec {
    int64_t rows, in, out;
};

/* P = 1 without alphas is plain RoPE; without `rope` too, the operation is a copy (callers pass slices of the
 * packed qkv to attention instead). */
struct qkv_mix_spec {
    int64_t batch, tokens, heads, head_dim, pseudo;
    bool mixed;        /* alphas are given */
    bool rope;         /* rotate q and k ... */
    bool rope_virtual; /* ... at position t*P + p; otherwise at the token's own, t */
};

/* Virtual query s sees virtual key s' iff (not causal, or s' <= s, or with token_mask s'/P <= s/P) and
 * (window = 0 or s - s' < window). So the keys of a query are one interval: see attention_keys(). */
struct attention_spec {
    int64_t batch, length /* S */, heads, head_dim, pseudo;
    bool causal, token_mask;
    int64_t window; /* 0: none */
    double scale;
};

struct collapse_spec {
    int64_t batch, tokens, heads, head_dim, pseudo;
    bool per_head; /* R is [H,P] instead of [H,P,H] */
};

enum act_type { ACT_GELU_TANH, ACT_RELU2, ACT_SWIGLU };
struct act_spec {
    enum act_type type;
    int64_t rows, hidden /* F */;
};

struct classifier_spec {
    int64_t rows, hidden, vocab;
};

enum op_kind {
    OP_EMBED,
    OP_NORM,
    OP_LINEAR,
    OP_QKV_MIX,
    OP_ATTENTION,
    OP_COLLAPSE,
    OP_ACT,
    OP_CLASSIFIER,
    OP_DECODE, /* attention_decode; attention.length is the n of one pass */
};

struct op_spec {
    enum op_kind kind;
    union {
        struct embed_spec embed;
        struct norm_spec norm;
        struct linear_spec linear;
        struct qkv_mix_spec qkv_mix;
        struct attention_spec attention;
        struct collapse_spec collapse;
        struct act_spec act;
        struct classifier_spec classifier;
    };
};

struct op_cost {
    size_t saved;     /* bytes kept from forward to backward, one buffer per use of the operation */
    size_t workspace; /* bytes of scratch while it runs; shared by all operations */
};

/* ---- the optimizer's view ---- */

/* A run of parameters, in elements of the flat buffer, that share their hyper-parameters. */
struct param_group {
    int64_t begin, end;
    float lr_scale;     /* factor on the learning rate */
    float weight_decay; /* decoupled */
};

struct adamw_hyper {
    double beta1, beta2, eps;
};

/* ---- the table ---- */

struct device; /* opaque: a processor, its queue and its library handles */

enum device_precision { DEVICE_FP32, DEVICE_BF16 };
struct device_options {
    int threads; /* 0: all the process may use */
    enum device_precision precision;
    bool deterministic;
    bool graphs;       /* keep runs of operations as graphs, where the device can */
    struct comm *comm; /* NULL: alone; otherwise ranks on one machine share its processors */
};

/* The types a device works in. Parameters are read in `compute`; where `master` is finer, the optimizer keeps
 * a copy in it. */
struct device_dtypes {
    enum dtype compute;  /* activations and parameters */
    enum dtype gradient; /* of parameters */
    enum dtype master;   /* what the optimizer updates, and its moments */
};

/* What moves tensors between the devices of several ranks. */
enum comm_backend { COMM_BACKEND_AUTO, COMM_BACKEND_HOST /* through host memory */, COMM_BACKEND_NCCL };

struct kernels {
    const char *name; /* "cpu" or "cuda" */

    /* NULL and *e when the device, or the precision, cannot be had. */
    struct device *(*open)(const struct device_options *options, struct error *e);
    void (*close)(struct device *dev);
    /* A line for the user: processor, threads, libraries. */
    const char *(*describe)(struct device *dev);
    struct device_dtypes (*dtypes)(struct device *dev);
    /* Dense peak of the compute precision in FLOP/s, 0 when the device is not known. */
    double (*peak_flops)(struct device *dev);

    /* A communicator whose tensors are this device's, for the processes that `ranks` joins: `ranks` itself
     * where that is host memory. To be closed before both, where it is another. Called by all ranks at once.
     * NULL and *e: it cannot be had so. */
    struct comm *(*open_comm)(struct device *dev, struct comm *ranks, enum comm_backend how, struct error *e);
    /* Bytes of device memory that its reserve takes for buffers of so many elements. */
    size_t (*staging_bytes)(struct device *dev, int64_t elements, int ranks, enum dtype dtype,
                            enum dtype wire);

    /* Something to call now and then while this thread computes or waits, such as letting messages move.
     * NULL: nothing. */
    void (*set_progress_callback)(struct device *dev, void (*call)(void *context), void *context);

    /* Zeroed device memory, or NULL and an EXIT_USER error with the size. */
    void *(*alloc)(struct device *dev, size_t bytes, struct error *e);
    void (*release)(struct device *dev, void *data);
    /* Bytes that this rank may take of what is free, others sharing the device; 0: not known. The CPU's, of a
     * dev that is NULL: all that is free on the machine. */
    size_t (*memory_available)(struct device *dev);
    void (*zero)(struct device *dev, void *data, size_t bytes);
    void (*copy)(struct device *dev, void *to, const void *from, size_t bytes);
    /* Host to device and back, converting between dtypes; both tensors are contiguous and of one shape.
     * download waits for the queue. */
    void (*upload)(struct device *dev, tensor device_dst, const void *host, enum dtype host_dtype);
    void (*download)(struct device *dev, tensor device_src, void *host, enum dtype host_dtype);

    /* A run of operations that is the same every time, arguments included, may be kept as a graph and queued
     * at once. When replay says true it has been; otherwise queue the operations between begin and end, and
     * again while end says false: then they were not run. Inside nothing may read back or wait. id: below
     * GRAPHS. */
    bool (*graph_replay)(struct device *dev, int id);
    void (*graph_begin)(struct device *dev, int id);
    bool (*graph_end)(struct device *dev, int id);

    /* A range of work, from where the queue is now (trace.h). name: a literal; index: -1, or its number.
     * trace_end waits for the queue; the caller frees what it returns, NULL when there was no memory. */
    void (*range_begin)(struct device *dev, const char *name, int index);
    void (*range_end)(struct device *dev);
    void (*trace_begin)(struct device *dev);
    struct trace *(*trace_end)(struct device *dev);

    int (*plan)(struct device *dev, const struct op_spec *spec, struct op_cost *cost, struct error *e);
    void (*set_workspace)(struct device *dev, void *data, size_t bytes);
    /* Who computes attention of this planned shape, in a few words; and the bytes of its workspace that a
     * deterministic device needs and another would not. NULL: results never depend on anything but the
     * inputs, at no price. */
    const char *(*attention_backend)(struct device *dev, const struct attention_spec *spec,
                                     size_t *deterministic);

    /* x[b,t,:] = W[tokens[b,t],:] + pos[first + t,:]   tokens i32 [B,T], W [V,C], pos [positions,C] or
     * absent. first: position of tokens[b,0], for decoding. Backward adds: dW[token] += dx, dpos[t] += sum_b
     * dx. */
    void (*embed)(struct device *, const struct embed_spec *, tensor tokens, tensor w, tensor pos,
                  int64_t first, tensor x);
    void (*embed_backward)(struct device *, const struct embed_spec *, tensor tokens, tensor dx, tensor dw,
                           tensor dpos);

    /* sum = x + delta;  y = norm(sum) * w (+ b)        x, delta, sum, y [N,C]; w, b [C]
     * delta absent: sum is x, and `sum` is not written. sum may alias x.
     * rmsnorm: sum / sqrt(mean(sum^2) + eps); layernorm: (sum - mean) / sqrt(var + eps).
     * again: recompute y from `sum` and the saved statistics of an earlier call, bit for bit.
     * backward: dx [N,C] += d(loss)/d(sum) through y; it holds the residual path's gradient on entry and the
     * gradient of both x and delta on return. */
    void (*residual_norm)(struct device *, const struct norm_spec *, tensor x, tensor delta, tensor w,
                          tensor b, tensor sum, tensor y, void *saved);
    void (*residual_norm_recompute)(struct device *, const struct norm_spec *, tensor sum, tensor w, tensor b,
                                    tensor y, const void *saved);
    void (*residual_norm_backward)(struct device *, const struct norm_spec *, tensor dy, tensor sum, tensor w,
                                   const void *saved, tensor dx, tensor dw, tensor db, bool accumulate);

    /* y = x W^T (+ bias)       x [N,in], W [out,in], y [N,out]
     * backward: dx = dy W (or += with add_dx; absent: not wanted), dW (+)= dy^T x, dbias (+)= column sums of
     * dy. */
    void (*linear)(struct device *, const struct linear_spec *, tensor x, tensor w, tensor bias, tensor y);
    void (*linear_backward)(struct device *, const struct linear_spec *, tensor dy, tensor x, tensor w,
                            tensor dx, bool add_dx, tensor dw, tensor dbias, bool accumulate);

    /* cos, then sin, of position * theta^(-2i/d): table [positions, 2, d/2]. */
    void (*rope_table)(struct device *, tensor table, double theta);

    /* q~[b,t*P+p,h,:] = rotate(sum_m alpha_q[p,h,m] q[b,t,m,:]), likewise k~; v~ is not rotated.
     * qkv [B,T,3,H,d]; alphas [P,H,H] or absent; q~,k~,v~ [B,S,H,d]. first: the token position of t = 0.
     * backward reads qkv again: dqkv, and dalpha (+)= outer products. */
    void (*qkv_mix)(struct device *, const struct qkv_mix_spec *, tensor qkv, tensor alpha_q, tensor alpha_k,
                    tensor alpha_v, tensor table, int64_t first, tensor q, tensor k, tensor v);
    void (*qkv_mix_backward)(struct device *, const struct qkv_mix_spec *, tensor dq, tensor dk, tensor dv,
                             tensor qkv, tensor alpha_q, tensor alpha_k, tensor alpha_v, tensor table,
                             tensor dqkv, tensor dalpha_q, tensor dalpha_k, tensor dalpha_v, bool accumulate);

    /* o = softmax(scale q k^T over visible keys) v     q, k, v, o [B,S,H,d], any strides but d's.
     * dq, dk, dv may be slices of one packed buffer; saved holds the log-sum-exp. */
    void (*attention)(struct device *, const struct attention_spec *, tensor q, tensor k, tensor v, tensor o,
                      void *saved);
    void (*attention_backward)(struct device *, const struct attention_spec *, tensor q, tensor k, tensor v,
                               tensor o, tensor d_o, const void *saved, tensor dq, tensor dk, tensor dv);

    /* One decoding pass: append k, v [B,n,H,d] (virtual tokens first .. first+n-1) to the ring caches
     * [B,capacity,H,d] at s mod capacity, then attend q over what each query sees: o [B,n,H,d].
     * spec.length is n. The caller sees to it that capacity holds window + n keys (or all of them). */
    void (*attention_decode)(struct device *, const struct attention_spec *, tensor q, tensor k, tensor v,
                             tensor cache_k, tensor cache_v, int64_t first, tensor o);

    /* out[b,t,h,:] = sum_{p,g} R[h,p,g] o[b,t,p,g,:]   o [B,S,H,d], R [H,P,H]; per head: R [H,P], g = h. */
    void (*collapse)(struct device *, const struct collapse_spec *, tensor o, tensor r, tensor out);
    void (*collapse_backward)(struct device *, const struct collapse_spec *, tensor dout, tensor o, tensor r,
                              tensor d_o, tensor dr, bool accumulate);

    /* gelu_tanh, relu2: out = f(u).  swiglu: out = silu(gate) * u.   u, gate, out [N,F]
     * backward: du (may alias u or dout), dgate (may alias gate). */
    void (*mlp_act)(struct device *, const struct act_spec *, tensor u, tensor gate, tensor out);
    void (*mlp_act_backward)(struct device *, const struct act_spec *, tensor dout, tensor u, tensor gate,
                             tensor du, tensor dgate);

    /* state.loss += scale * sum over rows with target >= 0 of -log softmax(h W^T)[target]
     * h [N,C], W [V,C], targets i32 [N]. With dh present also the gradients: dh, dW (+)=. In chunks of rows:
     * the whole [N,V] array never exists. */
    void (*classifier)(struct device *, const struct classifier_spec *, tensor h, tensor w, tensor targets,
                       double scale, struct step_state *state, tensor dh, tensor dw, bool accumulate);

    /* The step state. begin: set lr and step, clear what is summed. decide: step_decision above. read: a
     * copy, when the queue has come so far. */
    void (*step_begin)(struct device *, struct step_state *, int64_t step, double lr);
    void (*sumsq)(struct device *, tensor g, struct step_state *);
    void (*step_decide)(struct device *, struct step_state *, double grad_clip, double skip_zscore);
    void (*step_read)(struct device *, const struct step_state *, struct step_state *host);
    void (*step_write)(struct device *, struct step_state *, const struct step_state *host);
    /* The same without stopping the queue: post a copy as of now; collect it later, oldest first, which waits
     * until the queue has come so far. The host may run so many steps ahead of what it has collected: */
    void (*step_post)(struct device *, const struct step_state *);
    void (*step_collect)(struct device *, struct step_state *host);
    int run_ahead;

    /* AdamW over flat ranges (Loshchilov & Hutter 2019, eq. 12): with g' = clip g, t = updates,
     * m = b1 m + (1-b1) g',  v = b2 v + (1-b2) g'^2,  p -= lr_g (m/(1-b1^t) / (sqrt(v/(1-b2^t)) + eps) + wd_g
     * p). master, p, g, m, v [n]; does nothing when the state says skip. p, absent where the master is what
     * is read, is the master rounded as rounding.h has it; `first` is the flat buffer's index of element 0.
     */
    void (*adamw)(struct device *, const struct adamw_hyper *, const struct param_group *groups, int count,
                  int64_t first, tensor master, tensor p, tensor g, tensor m, tensor v,
                  const struct step_state *);
};

enum { GRAPHS = 8 };

const struct kernels *kernels_cpu(void);
const struct kernels *kernels_cuda(void); /* NULL when built without CUDA */

/* The table whose operations are ranges too; one at a time. */
const struct kernels *kernels_traced(const struct kernels *k);

/* GPUs that can be used: 0 without a driver. */
int cuda_devices(void);

/* The keys [*begin, *end) that virtual query s sees among `length`. Never empty. */
static inline void attention_keys(const struct attention_spec *a, int64_t s, int64_t length, int64_t *begin,
                                  int64_t *end) {
    *end = !a->causal ? length : a->token_mask ? (s / a->pseudo + 1) * a->pseudo : s + 1;
    if (*end > length)
        *end = length;
    *begin = a->window > 0 && s - a->window + 1 > 0 ? s - a->window + 1 : 0;
}

#ifdef __cplusplus
}
#endif
#endif

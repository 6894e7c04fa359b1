/* The interface of a backend: a table of functions for its device and of operations on tensors. The backends
 * are kernels/cpu/, kernels/cuda/ and, to estimate speed and memory, kernels/estimate/.
 *
 * The operations themselves, with shapes and equations, are listed in kernels/ops.def. They are cut where a
 * GPU would fuse them, each with its backward beside it. They do not depend on a model: they take views of
 * memory and a `*_spec` that holds the sizes and choices they were planned with. Rules for every backend:
 *  - plan() is called once for each distinct spec, before the first use: it says how many bytes the operation
 *    saves for its backward and how much scratch it needs, and builds library plans. After that nothing
 *    allocates. The layout of `saved` is private to the backend.
 *  - An operation is asynchronous on the device's queue and returns nothing to the host. Loss, gradient norm,
 *    clip factor, skip flag, learning rate and step live in a `step_state` on the device.
 *  - Outputs are overwritten, except where `accumulate` says that a gradient is added to. Outputs never alias
 *    inputs unless the comment allows it.
 *  - A wrong shape is a bug in the caller: the operation prints the tensor and aborts.
 *
 * Letters: B batch, T tokens, N = B*T rows, C hidden, H heads, G heads of keys and values, d head dim, P
 * pseudo-heads, S = T*P virtual tokens, V vocabulary, F hidden of the MLP. A tensor whose `data` is NULL is absent. */
#ifndef IHA_KERNELS_KERNELS_H
#define IHA_KERNELS_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/comm.h"
#include "kernels/error.h"
#include "kernels/rope.h"
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

/* rows [H+2G,d] of q, k and v. */
struct qk_norm_spec {
    int64_t rows, heads, kv_heads, head_dim;
    double eps;
};

/* P = 1 without alphas is plain RoPE; without `rope` too, the operation is a copy. */
struct qkv_mix_spec {
    int64_t batch, tokens, heads, head_dim, pseudo;
    bool mixed;        /* alphas are given */
    bool rope;         /* rotate q and k ... */
    bool rope_virtual; /* ... at position t*P + p; otherwise at the token's own, t */
    int64_t kv_heads;  /* of k and v, which are mixed among themselves; 0: as many as of q */
};

/* Virtual query s sees virtual key s' iff (not causal, or s' <= s, or with token_mask s'/P <= s/P) and
 * (window = 0 or s - s' < window). So the keys of a query are one interval: see attention_keys(). */
struct attention_spec {
    int64_t batch, length /* S */, heads, head_dim, pseudo;
    bool causal, token_mask;
    int64_t window; /* 0: none */
    double scale;
    bool segmented; /* attention stays inside segments, which each call brings */
    /* Of k and v, a divisor of heads: query head h attends to h / (heads / kv_heads). 0: heads. */
    int64_t kv_heads;
    bool packed; /* q, k, v and their gradients are slices of [B,S,H+2G,d], not tensors of their own */
};

struct collapse_spec {
    int64_t batch, tokens, heads, head_dim, pseudo;
    bool per_head; /* R is [H,P] instead of [H,P,H] */
};

/* The weight of qkv, as q, k, v of `heads` heads, each of `columns` elements: head dim times inputs, or of the
 * bias head dim. */
struct fold_spec {
    int64_t heads, columns;
};

/* rows: tokens; pairs: of heads. */
struct diff_combine_spec {
    int64_t rows, pairs, head_dim /* d: values have 2d */;
    double lambda_init, eps;
};

enum act_type { ACT_GELU_TANH, ACT_RELU2, ACT_SWIGLU };
struct act_spec {
    enum act_type type;
    int64_t rows, hidden /* F */;
};

struct classifier_spec {
    int64_t rows, hidden, vocab;
    int64_t padded; /* rows of W and dW in memory, which products may include; 0: vocab */
};

struct orthogonalize_spec {
    int64_t rows, cols;
};

enum op_kind {
    OP_EMBED,
    OP_NORM,
    OP_LINEAR,
    OP_QKV_MIX,
    OP_ATTENTION,
    OP_TALKING, /* this and the next with `attention` below */
    OP_SIMPLICIAL,
    OP_COLLAPSE,
    OP_FOLD,
    OP_DIFF_COMBINE,
    OP_QK_NORM,
    OP_ACT,
    OP_CLASSIFIER,
    OP_DECODE, /* attention_decode; attention.length is the n of one pass */
    OP_ORTHOGONALIZE,
};

struct op_spec {
    enum op_kind kind;
    /* What a plan of `linear` may leave out, since it is never called; dy_sums: backward is always given them. */
    bool no_bias, no_backward, dy_sums;
    /* Also plan linear_act (gelu_after) or act_linear_backward (gelu_before), for gelu_tanh. */
    bool gelu_after, gelu_before;
    union {
        struct embed_spec embed;
        struct norm_spec norm;
        struct linear_spec linear;
        struct qkv_mix_spec qkv_mix;
        struct attention_spec attention;
        struct collapse_spec collapse;
        struct fold_spec fold;
        struct diff_combine_spec diff_combine;
        struct qk_norm_spec qk_norm;
        struct act_spec act;
        struct classifier_spec classifier;
        struct orthogonalize_spec orthogonalize;
    };
};

struct op_cost {
    size_t saved;     /* bytes kept from forward to backward, one buffer per use of the operation */
    size_t workspace; /* bytes of scratch while it runs; shared by all operations */
};

/* ---- the optimizer's parameters ---- */

/* A range of parameters, in elements of the flat buffer, with the same hyper-parameters. */
struct param_group {
    int64_t begin, end;
    float lr_scale;         /* factor on the learning rate */
    float weight_decay;     /* decoupled */
    float muon_scale;       /* of Muon's orthogonal update; 0: these parameters are AdamW's */
    int64_t rounding_index; /* of element `begin`; those of the others follow (rounding.h) */
};

struct adamw_hyper {
    double beta1, beta2, eps;
};

/* ---- the device ---- */

struct device; /* private to the backend: a processor or GPU, its queue and library handles */

enum device_precision { DEVICE_FP32, DEVICE_BF16 };
struct device_options {
    int threads; /* 0: all that the process may use */
    enum device_precision precision;
    bool deterministic;
    bool graphs;           /* capture repeated sequences of operations as graphs, where the device can */
    struct comm *comm;     /* ranks on the same machine share its processors; NULL: single process */
    const char *plan_file; /* where to keep what plan() chooses by timing; NULL: nowhere */
};

/* The types a device works in. Parameters are read in `compute`; where `master` is more precise, the
 * optimizer keeps a copy in it. */
struct device_dtypes {
    enum dtype compute;  /* activations and parameters */
    enum dtype gradient; /* of parameters */
    enum dtype master;   /* what the optimizer updates, and its moments */
};

/* How collectives on tensors are carried out. */
enum comm_backend { COMM_BACKEND_AUTO, COMM_BACKEND_HOST /* through host memory */, COMM_BACKEND_NCCL };

enum { GRAPHS = 8 };

/* ---- the operations' function types: op_embed, op_embed_backward, ... ---- */

#define OP(name, parameters, arguments) typedef void op_##name parameters;
#include "kernels/ops.def"

/* ---- the table ---- */

struct kernels {
    const char *name; /* "cpu", "cuda" or "estimate" */

    /* NULL and *e when the device or the precision is not available. */
    struct device *(*open)(const struct device_options *options, struct error *e);
    void (*close)(struct device *dev);
    /* A line for the user: processor, threads, libraries. */
    const char *(*describe)(struct device *dev);
    struct device_dtypes (*dtypes)(struct device *dev);
    /* Dense peak of the compute precision in FLOP/s, 0 when it is not known. */
    double (*peak_flops)(struct device *dev);

    /* A communicator between the processes of `ranks` for tensors on this device: `ranks` itself where that
     * is host memory. A new one is closed before the device and `ranks`. All ranks call this at the same
     * time. NULL and *e when `how` is not possible. */
    struct comm *(*open_comm)(struct device *dev, struct comm *ranks, enum comm_backend how, struct error *e);
    /* Bytes of device memory that the communicator's reserve() allocates for buffers of `elements`
     * elements. */
    size_t (*staging_bytes)(struct device *dev, int64_t elements, int ranks, enum dtype dtype,
                            enum dtype wire);

    /* A function to call now and then while this thread computes or waits, such as comm_ops.progress.
     * NULL: none. */
    void (*set_progress_callback)(struct device *dev, void (*call)(void *context), void *context);

    /* Zeroed device memory, or NULL and an EXIT_USER error with the size. */
    void *(*alloc)(struct device *dev, size_t bytes, struct error *e);
    void (*release)(struct device *dev, void *data);
    /* Free bytes that this rank may use, when other ranks share the device; 0: not known. On the CPU dev may
     * be NULL: all free memory of the machine. */
    size_t (*memory_available)(struct device *dev);
    void (*zero)(struct device *dev, void *data, size_t bytes);
    void (*copy)(struct device *dev, void *to, const void *from, size_t bytes);
    /* Host to device and back, converting between dtypes; both tensors are contiguous and of one shape.
     * download waits for the queue. */
    void (*upload)(struct device *dev, tensor device_dst, const void *host, enum dtype host_dtype);
    void (*download)(struct device *dev, tensor device_src, void *host, enum dtype host_dtype);

    /* A sequence of operations that is the same every time, arguments included, may be kept as a graph and
     * launched at once. id: below GRAPHS. replay returns true if it launched the graph. Otherwise queue the
     * operations between begin and end. If end returns false, they were not run: queue them once more.
     * Between begin and end nothing may read back or wait. */
    bool (*graph_replay)(struct device *dev, int id);
    void (*graph_begin)(struct device *dev, int id);
    bool (*graph_end)(struct device *dev, int id);

    /* A named range of work on the queue (trace.h). name: a literal; index: its number, or -1.
     * trace_end waits for the queue; the caller frees what it returns, NULL when out of memory. */
    void (*range_begin)(struct device *dev, const char *name, int index);
    void (*range_end)(struct device *dev);
    void (*trace_begin)(struct device *dev);
    struct trace *(*trace_end)(struct device *dev);

    int (*plan)(struct device *dev, const struct op_spec *spec, struct op_cost *cost, struct error *e);
    /* Compute what libraries were planned for and not checked yet on small inputs, and compare it with plain
     * computation: -1 and an EXIT_RUN error where one is wrong. The workspace is scratch memory, which holds
     * zeros afterwards; what does not fit into it is checked in part. NULL: no libraries. */
    int (*check_libraries)(struct device *dev, struct error *e);
    void (*set_workspace)(struct device *dev, void *data, size_t bytes);
    /* The library or kernels that compute attention of this planned shape, as a word or two for the user.
     * *deterministic: bytes of its workspace that are needed for deterministic results only. The member is
     * NULL in a backend whose results are always deterministic, at no extra cost. */
    const char *(*attention_backend)(struct device *dev, const struct attention_spec *spec,
                                     size_t *deterministic);

    /* Of parameters in a collective, at most: more take longer to start, fewer pay its latency more often. */
    int64_t message_elements;

    int run_ahead; /* steps that may be posted and not collected while another is queued; see step_post */

    /* The operations: op_embed *embed; op_embed_backward *embed_backward; ... */
#define OP(name, parameters, arguments) op_##name *name;
#include "kernels/ops.def"
};

const struct kernels *kernels_cpu(void);      /* in fp32 */
const struct kernels *kernels_cpu_bf16(void); /* in bf16, with fp32 sums, gradients and master weights */

/* Whether this processor multiplies matrices of bf16 faster than of fp32: it has AVX512-BF16 or AMX-BF16.
 * Where it has not, kernels_cpu_bf16() converts, which is slower than fp32. */
bool cpu_multiplies_bf16(void);

const struct kernels *kernels_cuda(void); /* NULL when built without CUDA */

/* A copy of the table whose operations are recorded as ranges of their name. Each call replaces the last
 * one's. */
const struct kernels *kernels_traced(const struct kernels *k);

/* The number of usable GPUs. *why (which may be NULL): if there are GPUs that cannot be used, what is wrong and what
 * to do; otherwise its text is empty, as it is without a driver. */
int cuda_devices(struct error *why);

static inline int64_t classifier_padded(const struct classifier_spec *s) {
    return s->padded ? s->padded : s->vocab;
}

static inline int64_t attention_kv_heads(const struct attention_spec *s) {
    return s->kv_heads ? s->kv_heads : s->heads;
}

/* Query heads of a head of k and v. */
static inline int64_t attention_group(const struct attention_spec *s) {
    return s->heads / attention_kv_heads(s);
}

static inline int64_t mix_kv_heads(const struct qkv_mix_spec *s) {
    return s->kv_heads ? s->kv_heads : s->heads;
}

/* Heads of q, k or v (which: 0, 1, 2), which come in this order in a row of qkv. */
static inline int64_t mix_heads_of(const struct qkv_mix_spec *s, int which) {
    return which == 0 ? s->heads : mix_kv_heads(s);
}

/* Heads of a row of qkv: those of q, k and v. */
static inline int64_t mix_row_heads(const struct qkv_mix_spec *s) {
    return s->heads + 2 * mix_kv_heads(s);
}

/* The keys [*begin, *end) that virtual query s sees among `length`, wherever segments end. Never empty. */
static inline void attention_keys(const struct attention_spec *a, int64_t s, int64_t length, int64_t *begin,
                                  int64_t *end) {
    *end = !a->causal ? length : a->token_mask ? (s / a->pseudo + 1) * a->pseudo : s + 1;
    if (*end > length)
        *end = length;
    *begin = a->window > 0 && s - a->window + 1 > 0 ? s - a->window + 1 : 0;
}

/* The same where the query's token is in the segment of tokens [first, last). */
static inline void attention_segment_keys(const struct attention_spec *a, int64_t s, int64_t first,
                                          int64_t last, int64_t *begin, int64_t *end) {
    attention_keys(a, s, last * a->pseudo, begin, end);
    if (*begin < first * a->pseudo)
        *begin = first * a->pseudo;
}

#ifdef __cplusplus
}
#endif
#endif

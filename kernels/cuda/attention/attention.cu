/* attention: chooses between cuDNN's fused kernels and the built-in ones for each shape.
 *
 * cuDNN computes bf16 without token masks and segments, where it is linked and supports the shape. Everything else, and
 * every build without cuDNN, runs the built-in kernels (attention_bf16.cu, attention_fp32.cu). The plan
 * chooses once per shape: the two save different things between forward and backward, so both directions must
 * use the same one.
 *
 * Where a narrow window masks much of cuDNN's tiles of 128 keys, both are timed and the faster one is taken, also by
 * the next start (plan_file.h).
 *
 * The environment variable IHA_ATTENTION overrides the choice, to compare the two: `own` never uses cuDNN;
 * `cudnn` makes a shape that cuDNN does not support an error. */
#include "kernels/cuda/attention/attention_bf16.h"
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/attention/attention_cudnn.h"
#include "kernels/cuda/attention/check_attention.h"
#include "kernels/cuda/timing.h"
#include "kernels/cudnn_scratch.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* One spec's choice. */
struct attention_choice {
    struct attention_spec spec;
    bool cudnn;
    bool checked; /* by check_attentions() */
    struct op_cost cost;
    struct attention_choice *next;
};

/* All of a device's. */
struct attention_plans {
    struct attention_cudnn *cudnn; /* NULL: not opened yet, or not available */
    struct attention_choice *first;
};

static bool same_spec(const struct attention_spec *a, const struct attention_spec *b) {
    return a->batch == b->batch && a->length == b->length && a->heads == b->heads &&
           a->head_dim == b->head_dim && a->pseudo == b->pseudo && a->causal == b->causal &&
           a->token_mask == b->token_mask && a->window == b->window && a->scale == b->scale &&
           a->segmented == b->segmented && a->packed == b->packed &&
           attention_kv_heads(a) == attention_kv_heads(b);
}

void attention_plans_free(struct attention_plans *p) {
    if (!p)
        return;
    if (p->cudnn)
        attention_cudnn_close(p->cudnn);
    while (p->first) {
        struct attention_choice *next = p->first->next;
        free(p->first);
        p->first = next;
    }
    free(p);
}

/* ---- by cuDNN ---- */

/* A window that covers the whole sequence is passed as none. `pseudo` only matters to token masks, which
 * cuDNN never gets (see excluded()). */
static struct attention_cudnn_shape cudnn_shape(const struct device *dev, const struct attention_spec *s) {
    return {
        s->batch,  s->length,          s->heads, s->head_dim,          s->window < s->length ? s->window : 0,
        s->causal, dev->deterministic, s->scale, attention_kv_heads(s)};
}

static struct attention_cudnn_strides strides_of(tensor t) {
    return {t.stride[0], t.stride[1], t.stride[2]};
}

/* Separate tensors, or q, k, v and their gradients packed as [B,S,H+2G,d]. */
static struct attention_cudnn_layout model_layout(const struct attention_spec *s) {
    int64_t d = s->head_dim, row = s->heads * d, kv_row = attention_kv_heads(s) * d, wide = row + 2 * kv_row;
    int64_t q_row = s->packed ? wide : row, k_row = s->packed ? wide : kv_row;
    struct attention_cudnn_strides o = {s->length * row, row, d}, q = {s->length * q_row, q_row, d},
                                   k = {s->length * k_row, k_row, d};
    return {q, k, k, o, o, q, k, k};
}

/* On Hopper, cuDNN 9.19 to 9.30 was reported to give NaN in dq when S mod 128 is 64 and a query's log-sum-exp
 * is below -88: half of its last tile of keys is masked (NVIDIA/cudnn-frontend, pull request 628). */
static bool nan_reported(const struct attention_spec *s) {
    struct cudaDeviceProp p;
    int device;
    cuda_check(cudaGetDevice(&device));
    cuda_check(cudaGetDeviceProperties(&p, device));
    return p.major == 9 && s->length % 128 == 64;
}

/* With cuDNN up to 9.15.0 the frontend pads backward when S is not a multiple of 128. It copies the lengths
 * from host memory that it then frees, so a replayed CUDA graph would read freed memory. */
static bool breaks_graphs(const struct device *dev, const struct attention_spec *s) {
    return dev->graphs && s->length % 128 != 0 && attention_cudnn_version() <= 91500;
}

/* Why cuDNN is not used, checked before it is asked; NULL: it may be. */
static const char *excluded(const struct device *dev, const struct attention_spec *s) {
    if (dev->precision != DEVICE_BF16)
        return "cuDNN computes in bf16, not in fp32";
    if (s->token_mask && s->causal && s->pseudo > 1)
        return "cuDNN has no token masks";
    /* cuDNN would take segments as a batch of sequences of different lengths. How many there are is a shape,
     * of its plans and of captured graphs, but differs from batch to batch. */
    if (s->segmented)
        return "cuDNN's plans need a fixed number of segments";
    if (!s->causal && s->window > 0 && s->window < s->length)
        return "windows need causal attention";
    if (s->head_dim % 8 != 0 || s->head_dim > 256)
        return "cuDNN needs head_dim to be a multiple of 8, at most 256";
    if (s->length == 1 || nan_reported(s))
        return "cuDNN was reported to give NaN for this length; a multiple of 128 is safe";
    if (breaks_graphs(dev, s))
        return "CUDA graphs need cuDNN 9.15.1 or later for a length that is not a multiple of 128; "
               "system.graph = off avoids that";
    if (dev->deterministic && cudnn_deterministic_bytes(s) > CUDNN_DETERMINISTIC_LIMIT)
        return "cuDNN needs memory proportional to the square of the length to be deterministic";
    return NULL;
}

/* Build the graphs that the model will run. 0, or -1 and why. */
static int plan_cudnn(struct device *dev, const struct attention_spec *s, struct op_cost *cost, char *why) {
    struct attention_plans *p = dev->attentions;
    const char *reason = excluded(dev, s);
    if (reason) {
        snprintf(why, ATTENTION_CUDNN_REASON, "%s", reason);
        return -1;
    }
    if (!p->cudnn && !(p->cudnn = attention_cudnn_open(dev->stream, why)))
        return -1;
    struct attention_cudnn_shape shape = cudnn_shape(dev, s);
    *cost = {(size_t)(s->batch * s->heads * s->length) * sizeof(float) /* log-sum-exp */, 0};
    struct attention_cudnn_layout layout = model_layout(s);
    for (int backward = 0; backward <= 1; backward++) {
        size_t bytes;
        if (attention_cudnn_plan(p->cudnn, &shape, &layout, backward, &bytes, why) != 0)
            return -1;
        cost->workspace = bytes > cost->workspace ? bytes : cost->workspace;
    }
    return 0;
}

[[noreturn]] static void cudnn_failed(const char *op, const char *why) {
    fprintf(stderr, "%s: cuDNN: %s; CUDNN_LOGLEVEL_DBG=3 shows more, IHA_ATTENTION=own runs without cuDNN\n",
            op, why);
    abort();
}

/* Workspace of one direction. Strides that were not planned for build their graph here, once. */
static void *scratch_for(struct device *dev, const struct attention_cudnn_shape *shape,
                         const struct attention_cudnn_layout *layout, bool backward, const char *op) {
    char why[ATTENTION_CUDNN_REASON];
    size_t bytes;
    if (attention_cudnn_plan(dev->attentions->cudnn, shape, layout, backward, &bytes, why) != 0)
        cudnn_failed(op, why);
    return cuda_workspace(dev, bytes, op);
}

/* ---- the choice ---- */

/* What IHA_ATTENTION says. */
enum preference { PREFER_CUDNN = -1, ONLY_BUILTIN, ONLY_CUDNN };

/* The built-in kernels have tiles of 64 keys. In wider windows what is masked is a small part. */
enum { NARROW_WINDOW = 512, NAME_BYTES = 256 };

static bool is_narrow(const struct attention_spec *s) {
    return s->window > 0 && s->window < s->length && s->window <= NARROW_WINDOW;
}

static void name_of(const struct attention_spec *s, char name[NAME_BYTES]) {
    snprintf(name, NAME_BYTES,
             "attention %lld x %lld, %lld heads of %lld, %lld of keys, window %lld, P %lld%s%s",
             (long long)s->batch, (long long)s->length, (long long)s->heads, (long long)s->head_dim,
             (long long)attention_kv_heads(s), (long long)s->window, (long long)s->pseudo,
             s->causal ? "" : ", not causal", s->packed ? ", packed" : "");
}

/* q, k, v and their gradients, o and its, as the model has them, and what is saved. */
struct timed_operands {
    tensor q, k, v, o, d_o, dq, dk, dv;
    char *saved;
};

/* Their bytes; memory: NULL to learn these. */
static size_t place_operands(const struct attention_spec *s, size_t saved, char *memory,
                             struct timed_operands *x) {
    size_t three = attention_qkv_bytes(s),
           one = (size_t)round_up(s->batch * s->length * s->heads * s->head_dim * (int64_t)sizeof(bf16), 256);
    tensor o = tensor_of(NULL, DTYPE_BF16, s->batch, s->length, s->heads, s->head_dim, 0);
    if (memory) {
        attention_place_qkv(s, memory, &x->q, &x->k, &x->v);
        attention_place_qkv(s, memory + three, &x->dq, &x->dk, &x->dv);
        x->o = x->d_o = o;
        x->o.data = memory + 2 * three;
        x->d_o.data = memory + 2 * three + one;
        x->saved = memory + 2 * three + 2 * one;
    }
    return 2 * three + 2 * one + saved;
}

/* Both directions by cuDNN; false: it does not run. */
static bool run_cudnn(struct device *dev, const struct attention_spec *s, const struct timed_operands *x) {
    char why[ATTENTION_CUDNN_REASON];
    struct attention_cudnn *cudnn = dev->attentions->cudnn;
    struct attention_cudnn_shape shape = cudnn_shape(dev, s);
    struct attention_cudnn_layout layout = model_layout(s);
    return attention_cudnn_forward(cudnn, &shape, &layout, x->q.data, x->k.data, x->v.data, x->o.data,
                                   x->saved, dev->workspace, why) == 0 &&
           attention_cudnn_backward(cudnn, &shape, &layout, x->q.data, x->k.data, x->v.data, x->o.data,
                                    x->d_o.data, x->saved, x->dq.data, x->dk.data, x->dv.data, dev->workspace,
                                    why) == 0;
}

enum { CUDNN, BUILTIN };

/* The faster one; -1: there is no memory to time them. own: the cost of the built-in kernels. */
static int faster_attention(struct device *dev, const struct attention_spec *s, struct op_cost cudnn,
                            struct op_cost own) {
    size_t saved = cudnn.saved > own.saved ? cudnn.saved : own.saved,
           workspace = cudnn.workspace > own.workspace ? cudnn.workspace : own.workspace;
    return time_fastest(dev, 2, place_operands(s, saved, NULL, NULL), workspace, [&](int i, char *memory) {
        struct timed_operands x;
        place_operands(s, saved, memory, &x);
        if (i == CUDNN)
            return run_cudnn(dev, s, &x);
        attention_builtin(dev, s, x.q, x.k, x.v, tensor_none(), x.o, x.saved);
        attention_builtin_backward(dev, s, x.q, x.k, x.v, tensor_none(), x.o, x.d_o, x.saved, x.dq, x.dk,
                                   x.dv);
        return true;
    });
}

/* Of a narrow window that cuDNN can serve, at c->cost: whether to take the built-in kernels. */
static bool prefers_builtin(struct device *dev, const struct attention_choice *c) {
    char name[NAME_BYTES];
    struct op_cost own = {0, 0};
    struct error e;
    name_of(&c->spec, name);
    return choose_once(dev, name, {"cuDNN", "built-in"}, [&]() -> int {
               bool planned = attention_builtin_plan(dev, &c->spec, &own, &e) == 0;
               return planned ? faster_attention(dev, &c->spec, c->cost, own) : CUDNN;
           }) == BUILTIN;
}

static int choose(struct device *dev, struct attention_choice *c, struct error *e) {
    char why[ATTENTION_CUDNN_REASON] = "this program was built without cuDNN";
    const struct attention_spec *s = &c->spec;
    int wanted;
    if (choice_of_environment("IHA_ATTENTION", {"own", "cudnn"}, &wanted, e) != 0)
        return -1;
    bool built = attention_cudnn_plan != NULL; /* a weak symbol */
    c->cudnn = built && wanted != ONLY_BUILTIN && plan_cudnn(dev, s, &c->cost, why) == 0;
    if (c->cudnn && wanted == PREFER_CUDNN && !dev->deterministic && is_narrow(s) &&
        prefers_builtin(dev, c)) {
        c->cudnn = false;
        snprintf(why, sizeof why, "they are faster than cuDNN in a window of %lld", (long long)s->window);
    }
    if (c->cudnn)
        return 0;
    if (wanted == ONLY_CUDNN)
        return fail_user(e, "IHA_ATTENTION=cudnn, but for %lld tokens of %lld heads of %lld: %s",
                         (long long)s->length, (long long)s->heads, (long long)s->head_dim, why);
    if (built && wanted == PREFER_CUDNN && dev->precision == DEVICE_BF16)
        fprintf(stderr, "attention over %lld tokens, %lld heads of %lld: by the built-in kernels; %s\n",
                (long long)s->length, (long long)s->heads, (long long)s->head_dim, why);
    c->cost = {0, 0};
    return attention_builtin_plan(dev, s, &c->cost, e);
}

static const struct attention_choice *find(const struct device *dev, const struct attention_spec *s) {
    const struct attention_choice *c = dev->attentions ? dev->attentions->first : NULL;
    while (c && !same_spec(&c->spec, s))
        c = c->next;
    return c;
}

int cuda_attention_plan(struct device *dev, const struct attention_spec *s, struct op_cost *cost,
                        struct error *e) {
    const struct attention_choice *known = find(dev, s);
    if (known) {
        *cost = known->cost;
        return 0;
    }
    if (!dev->attentions)
        dev->attentions = (struct attention_plans *)calloc(1, sizeof *dev->attentions);
    struct attention_choice *c = (struct attention_choice *)calloc(1, sizeof *c);
    if (!dev->attentions || !c) {
        free(c);
        return fail_user(e, "out of memory planning attention");
    }
    c->spec = *s;
    if (choose(dev, c, e) != 0) {
        free(c);
        return -1;
    }
    c->next = dev->attentions->first;
    dev->attentions->first = c;
    *cost = c->cost;
    return 0;
}

/* Whether the plan chose cuDNN. */
static bool uses_cudnn(const struct device *dev, const struct attention_spec *s, const char *op) {
    const struct attention_choice *c = find(dev, s);
    if (!c) {
        fprintf(stderr, "%s: this shape was not planned\n", op);
        abort();
    }
    return c->cudnn;
}

const char *cuda_attention_backend(struct device *dev, const struct attention_spec *s,
                                   size_t *deterministic) {
    bool cudnn = uses_cudnn(dev, s, "attention_backend");
    *deterministic = cudnn && dev->deterministic ? cudnn_deterministic_bytes(s) : 0;
    return cudnn ? "cuDNN" : "built-in kernels";
}

void cuda_attention(struct device *dev, const struct attention_spec *s, tensor q, tensor k, tensor v,
                    tensor segments, tensor o, void *saved) {
    check_segments("attention", s, segments);
    if (!uses_cudnn(dev, s, "attention"))
        return attention_builtin(dev, s, q, k, v, segments, o, saved);
    check_attention_shapes("attention", DTYPE_BF16, s, {q, o}, {k, v});
    char why[ATTENTION_CUDNN_REASON];
    struct attention_cudnn_shape shape = cudnn_shape(dev, s);
    struct attention_cudnn_layout layout = {strides_of(q), strides_of(k), strides_of(v), strides_of(o)};
    void *scratch = scratch_for(dev, &shape, &layout, false, "attention");
    if (attention_cudnn_forward(dev->attentions->cudnn, &shape, &layout, q.data, k.data, v.data, o.data,
                                saved, scratch, why) != 0)
        cudnn_failed("attention", why);
}

void cuda_attention_backward(struct device *dev, const struct attention_spec *s, tensor q, tensor k, tensor v,
                             tensor segments, tensor o, tensor d_o, const void *saved, tensor dq, tensor dk,
                             tensor dv) {
    check_segments("attention_backward", s, segments);
    if (!uses_cudnn(dev, s, "attention_backward"))
        return attention_builtin_backward(dev, s, q, k, v, segments, o, d_o, saved, dq, dk, dv);
    check_attention_shapes("attention_backward", DTYPE_BF16, s, {q, o, d_o, dq}, {k, v, dk, dv});
    char why[ATTENTION_CUDNN_REASON];
    struct attention_cudnn_shape shape = cudnn_shape(dev, s);
    struct attention_cudnn_layout layout = {strides_of(q),   strides_of(k),  strides_of(v),  strides_of(o),
                                            strides_of(d_o), strides_of(dq), strides_of(dk), strides_of(dv)};
    void *scratch = scratch_for(dev, &shape, &layout, true, "attention_backward");
    if (attention_cudnn_backward(dev->attentions->cudnn, &shape, &layout, q.data, k.data, v.data, o.data,
                                 d_o.data, saved, dq.data, dk.data, dv.data, scratch, why) != 0)
        cudnn_failed("attention_backward", why);
}

/* ---- the check at the start ---- */

int check_attentions(struct device *dev, struct error *e) {
    int status = 0;
    size_t used = 0;
    struct attention_choice *c = dev->attentions ? dev->attentions->first : NULL;
    for (; c && status == 0; c = c->next) {
        if (!c->cudnn || c->checked)
            continue;
        status = check_attention(dev, &c->spec, c->cost.workspace, &used, e);
        c->checked = true;
    }
    if (used > 0)
        cuda_check(cudaMemsetAsync(dev->workspace, 0, used, dev->stream));
    return status;
}

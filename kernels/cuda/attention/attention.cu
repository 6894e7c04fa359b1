/* attention: which implementation serves a shape, cuDNN's fused kernels or our own.
 *
 * cuDNN takes bf16 without token masks, where it is linked and supports the shape; everything else, and every
 * build without it, is served by attention_bf16.cu. The choice is made once, by the plan, since the two save
 * different things between forward and backward.
 *
 * The environment variable IHA_ATTENTION decides otherwise, to compare the two: `own` leaves cuDNN out;
 * `cudnn` makes a shape that it does not serve an error. */
#include "kernels/cuda/attention/attention_bf16.h"
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/attention/attention_cudnn.h"
#include "kernels/cudnn_scratch.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* One spec's choice. */
struct attention_choice {
    struct attention_spec spec;
    bool cudnn;
    struct op_cost cost;
    struct attention_choice *next;
};

/* All of a device's. */
struct attention_plans {
    struct cudnn_attention *cudnn; /* NULL: not opened, or not to be had */
    struct attention_choice *first;
};

static bool same_spec(const struct attention_spec *a, const struct attention_spec *b) {
    return a->batch == b->batch && a->length == b->length && a->heads == b->heads &&
           a->head_dim == b->head_dim && a->pseudo == b->pseudo && a->causal == b->causal &&
           a->token_mask == b->token_mask && a->window == b->window && a->scale == b->scale;
}

void attention_plans_free(struct attention_plans *p) {
    if (!p)
        return;
    if (p->cudnn)
        cudnn_attention_close(p->cudnn);
    while (p->first) {
        struct attention_choice *next = p->first->next;
        free(p->first);
        p->first = next;
    }
    free(p);
}

/* ---- cuDNN's side ---- */

/* A window that reaches over the whole sequence is none. With P = 1, or a mask over virtual tokens, the
 * spec's `pseudo` means nothing to attention. */
static struct cudnn_attention_shape cudnn_shape(const struct device *dev, const struct attention_spec *s) {
    return {s->batch,  s->length,          s->heads, s->head_dim, s->window < s->length ? s->window : 0,
            s->causal, dev->deterministic, s->scale};
}

static struct cudnn_attention_strides strides_of(tensor t) {
    return {t.stride[0], t.stride[1], t.stride[2]};
}

/* Where the model keeps them: apart from each other, or q, k and v, and their gradients, packed [B,S,3,H,d].
 */
static struct cudnn_attention_layout usual_layout(const struct attention_spec *s, bool packed) {
    int64_t d = s->head_dim, row = s->heads * d, wide = packed ? 3 * row : row;
    struct cudnn_attention_strides alone = {s->length * row, row, d}, q = {s->length * wide, wide, d};
    return {q, q, q, alone, alone, q, q, q};
}

/* On Hopper cuDNN 9.19 to 9.30 was reported to give NaN in dq when S mod 128 is 64 and a query's log-sum-exp
 * is below -88: its last tile of keys is masked by halves (NVIDIA/cudnn-frontend, pull request 628). */
static bool nan_reported(const struct attention_spec *s) {
    struct cudaDeviceProp p;
    int device;
    cuda_check(cudaGetDevice(&device));
    cuda_check(cudaGetDeviceProperties(&p, device));
    return p.major == 9 && s->length % 128 == 64;
}

/* For cuDNN up to 9.15.0 its frontend pads backward where S is no multiple of 128, with lengths that it
 * copies from memory it then frees: a graph would copy them again at every launch. */
static bool graph_breaks(const struct device *dev, const struct attention_spec *s) {
    return dev->graphs && s->length % 128 != 0 && cudnn_attention_version() <= 91500;
}

/* What rules cuDNN out before it is asked; NULL: nothing. */
static const char *excluded(const struct device *dev, const struct attention_spec *s) {
    if (dev->precision != DEVICE_BF16)
        return "cuDNN computes in bf16, not in fp32";
    if (s->token_mask && s->causal && s->pseudo > 1)
        return "cuDNN has no token masks";
    if (!s->causal && s->window > 0 && s->window < s->length)
        return "windows are causal";
    if (s->head_dim % 8 != 0 || s->head_dim > 256)
        return "cuDNN wants head_dim a multiple of 8, at most 256";
    if (s->length == 1 || nan_reported(s))
        return "cuDNN was reported to give NaN for this length; a multiple of 128 is safe";
    if (graph_breaks(dev, s))
        return "CUDA graphs want cuDNN 9.15.1 or later for a length that is no multiple of 128; "
               "system.graph = off goes without";
    if (dev->deterministic && cudnn_deterministic_bytes(s) > CUDNN_DETERMINISTIC_LIMIT)
        return "cuDNN wants memory by the square of the length to be deterministic";
    return NULL;
}

/* Build the graphs that the model will want. 0, or -1 and why. */
static int plan_cudnn(struct device *dev, const struct attention_spec *s, struct op_cost *cost, char *why) {
    struct attention_plans *p = dev->attentions;
    const char *not_served = excluded(dev, s);
    if (not_served) {
        snprintf(why, CUDNN_ATTENTION_REASON, "%s", not_served);
        return -1;
    }
    if (!p->cudnn && !(p->cudnn = cudnn_attention_open(dev->stream, why)))
        return -1;
    struct cudnn_attention_shape shape = cudnn_shape(dev, s);
    *cost = {(size_t)(s->batch * s->heads * s->length) * sizeof(float) /* log-sum-exp */, 0};
    for (int packed = 0; packed <= (s->pseudo == 1 ? 1 : 0); packed++) {
        struct cudnn_attention_layout layout = usual_layout(s, packed);
        for (int backward = 0; backward <= 1; backward++) {
            size_t bytes;
            if (cudnn_attention_plan(p->cudnn, &shape, &layout, backward, &bytes, why) != 0)
                return -1;
            cost->workspace = bytes > cost->workspace ? bytes : cost->workspace;
        }
    }
    return 0;
}

[[noreturn]] static void cudnn_failed(const char *op, const char *why) {
    fprintf(stderr, "%s: cuDNN: %s; CUDNN_LOGLEVEL_DBG=3 tells more, IHA_ATTENTION=own leaves cuDNN out\n",
            op, why);
    abort();
}

/* Scratch of one direction. Strides that no plan foresaw build their graph here, once. */
static void *scratch_for(struct device *dev, const struct cudnn_attention_shape *shape,
                         const struct cudnn_attention_layout *layout, bool backward, const char *op) {
    char why[CUDNN_ATTENTION_REASON];
    size_t bytes;
    if (cudnn_attention_plan(dev->attentions->cudnn, shape, layout, backward, &bytes, why) != 0)
        cudnn_failed(op, why);
    return cuda_workspace(dev, bytes, op);
}

/* ---- the choice ---- */

enum preference { PREFER_CUDNN, ONLY_CUDNN, ONLY_OWN };

static int preference(enum preference *out, struct error *e) {
    const char *value = getenv("IHA_ATTENTION");
    *out = PREFER_CUDNN;
    if (!value || !*value)
        return 0;
    if (strcmp(value, "own") == 0)
        *out = ONLY_OWN;
    else if (strcmp(value, "cudnn") == 0)
        *out = ONLY_CUDNN;
    else
        return fail_user(e, "IHA_ATTENTION=%s: the environment variable takes own or cudnn", value);
    return 0;
}

static int choose(struct device *dev, struct attention_choice *c, struct error *e) {
    char why[CUDNN_ATTENTION_REASON] = "this program was built without it";
    const struct attention_spec *s = &c->spec;
    enum preference wanted;
    if (preference(&wanted, e) != 0)
        return -1;
    bool built = cudnn_attention_plan != NULL;
    c->cudnn = built && wanted != ONLY_OWN && plan_cudnn(dev, s, &c->cost, why) == 0;
    if (c->cudnn)
        return 0;
    if (wanted == ONLY_CUDNN)
        return fail_user(e, "IHA_ATTENTION=cudnn, but for %lld tokens of %lld heads of %lld: %s",
                         (long long)s->length, (long long)s->heads, (long long)s->head_dim, why);
    if (built && wanted == PREFER_CUDNN && dev->precision == DEVICE_BF16)
        fprintf(stderr, "attention over %lld tokens, %lld heads of %lld: by own kernels; %s\n",
                (long long)s->length, (long long)s->heads, (long long)s->head_dim, why);
    c->cost = {0, 0};
    return own_attention_plan(dev, s, &c->cost, e);
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

/* Did the plan choose cuDNN? */
static bool by_cudnn(const struct device *dev, const struct attention_spec *s, const char *op) {
    const struct attention_choice *c = find(dev, s);
    if (!c) {
        fprintf(stderr, "%s: this shape was not planned\n", op);
        abort();
    }
    return c->cudnn;
}

const char *cuda_attention_backend(struct device *dev, const struct attention_spec *s,
                                   size_t *deterministic) {
    bool cudnn = by_cudnn(dev, s, "attention_backend");
    *deterministic = cudnn && dev->deterministic ? cudnn_deterministic_bytes(s) : 0;
    return cudnn ? "cuDNN" : "own kernels";
}

void cuda_attention(struct device *dev, const struct attention_spec *s, tensor q, tensor k, tensor v,
                    tensor o, void *saved) {
    if (!by_cudnn(dev, s, "attention"))
        return own_attention(dev, s, q, k, v, o, saved);
    for (const tensor &t : {q, k, v, o})
        check_shape("attention", "q, k, v or o", t, DTYPE_BF16, s->batch, s->length, s->heads, s->head_dim);
    char why[CUDNN_ATTENTION_REASON];
    struct cudnn_attention_shape shape = cudnn_shape(dev, s);
    struct cudnn_attention_layout layout = {strides_of(q), strides_of(k), strides_of(v), strides_of(o)};
    void *scratch = scratch_for(dev, &shape, &layout, false, "attention");
    if (cudnn_attention_forward(dev->attentions->cudnn, &shape, &layout, q.data, k.data, v.data, o.data,
                                saved, scratch, why) != 0)
        cudnn_failed("attention", why);
}

void cuda_attention_backward(struct device *dev, const struct attention_spec *s, tensor q, tensor k, tensor v,
                             tensor o, tensor d_o, const void *saved, tensor dq, tensor dk, tensor dv) {
    if (!by_cudnn(dev, s, "attention_backward"))
        return own_attention_backward(dev, s, q, k, v, o, d_o, saved, dq, dk, dv);
    for (const tensor &t : {q, k, v, o, d_o, dq, dk, dv})
        check_shape("attention_backward", "q, k, v, o or a gradient", t, DTYPE_BF16, s->batch, s->length,
                    s->heads, s->head_dim);
    char why[CUDNN_ATTENTION_REASON];
    struct cudnn_attention_shape shape = cudnn_shape(dev, s);
    struct cudnn_attention_layout layout = {strides_of(q),   strides_of(k),  strides_of(v),  strides_of(o),
                                            strides_of(d_o), strides_of(dq), strides_of(dk), strides_of(dv)};
    void *scratch = scratch_for(dev, &shape, &layout, true, "attention_backward");
    if (cudnn_attention_backward(dev->attentions->cudnn, &shape, &layout, q.data, k.data, v.data, o.data,
                                 d_o.data, saved, dq.data, dk.data, dv.data, scratch, why) != 0)
        cudnn_failed("attention_backward", why);
}

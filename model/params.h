/* The parameters of a model: every tensor's name, shape, place in the flat buffer, and how it starts and
 * decays.
 *
 * One flat buffer holds all of them, layer by layer; gradients, master_weights and moments have buffers of the same
 * layout, so a range of elements means the same everywhere. Names and shapes are those of a checkpoint. */
#ifndef IHA_MODEL_PARAMS_H
#define IHA_MODEL_PARAMS_H

#include "kernels/tensor.h"
#include "model/config/config.h"

enum param_class {
    PARAM_MATRIX, /* decays */
    PARAM_VECTOR, /* norms and biases: no decay */
    PARAM_MIX,    /* alpha and collapse: no decay, and their own factor on the learning rate */
};

enum param_init {
    INIT_NORMAL,        /* normal(0, 0.02) */
    INIT_NORMAL_OUTPUT, /* the same over sqrt(2L): projections that write to the residual stream */
    INIT_ONES,
    INIT_ZEROS,
    INIT_ALPHA,    /* per pseudo-head the identity, optionally with noise */
    INIT_COLLAPSE, /* select the last pseudo-head, or average them */
};

struct param {
    char name[48];
    int ndim;
    int64_t shape[3];
    int64_t offset, count; /* elements of the flat buffer */
    int64_t packed_offset; /* the same without padding: parameters before this one */
    int layer;             /* -1: not of a layer */
    int unit;              /* see struct params */
    enum param_class class;
    enum param_init init;
};

/* Indices into params.list; -1 where the model has no such tensor. */
struct layer_params {
    int attn_norm, attn_norm_bias, qkv, qkv_bias, alpha_q, alpha_k, alpha_v, collapse, out, out_bias;
    int mlp_norm, mlp_norm_bias, up, up_bias, gate, down, down_bias;
};

struct params {
    struct param *list;
    int count;
    int64_t elements;   /* of the flat buffer, with the padding that aligns tensors */
    int64_t num_params; /* parameters proper */
    /* Units, in the order of the buffer: 0 the embeddings, 1 + l layer l, and last the head (final norm, and
     * lm_head when untied). Backward finishes one after the other, from last to first. */
    int unit_count;       /* L + 2 */
    int64_t *unit_offset; /* [unit_count + 1]: unit u is elements [unit_offset[u], unit_offset[u+1]) */
    struct layer_params *layers;
    int embed, pos_embed, final_norm, final_norm_bias, lm_head; /* lm_head = embed when tied */
};

/* Units begin, and the buffer ends, at multiples of 64 * ranks elements, so that every rank's part of a unit
 * is of the same size and aligned (see partition.h). */
int params_create(struct params *p, const struct model_config *m, int ranks, struct error *e);
void params_free(struct params *p);

/* Initial values of one tensor, a function of (seed, name, index) alone: values [count]. */
void params_initial(const struct param *t, const struct model_config *m, uint64_t seed, float *values);

/* Printable shape, such as "[768, 768]". */
void param_shape_text(const struct param *t, char *out, size_t bytes);

#endif

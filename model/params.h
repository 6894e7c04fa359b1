/* The parameters of a model: every tensor's name, shape, offset in the flat buffer, initial values and class.
 *
 * One flat buffer holds all of them, layer by layer; gradients, master weights and moments are laid out in
 * the same way, or in shards of it (partition.h). Names and shapes are those of a checkpoint. */
#ifndef IHA_MODEL_PARAMS_H
#define IHA_MODEL_PARAMS_H

#include "kernels/tensor.h"
#include "model/config/config.h"

enum param_class {
    PARAM_MATRIX, /* weight decay */
    PARAM_VECTOR, /* norms and biases: no weight decay */
    PARAM_MIX,    /* alpha, collapse, lambda, talk: no weight decay, learning rate times mix_lr_scale */
};

/* The parts of a model that are counted and measured apart. Biases are with their matrix. */
enum param_part { PART_EMBEDDINGS, PART_ATTENTION, PART_MIX, PART_MLP, PART_NORMS, PART_HEAD, PARAM_PARTS };

enum param_init {
    INIT_NORMAL,        /* normal(0, 0.02) */
    INIT_NORMAL_OUTPUT, /* the same over sqrt(2L): projections that write to the residual stream */
    INIT_ONES,
    INIT_ZEROS,
    INIT_ALPHA,    /* the identity (alpha: for each pseudo-head), optionally with noise */
    INIT_LAMBDA,   /* normal(0, 0.1) */
    INIT_COLLAPSE, /* selects the last pseudo-head, or averages them */
};

struct param {
    char name[48];
    int ndim;
    int64_t shape[3];
    int64_t offset, count; /* elements of the flat buffer */
    int64_t packed_offset; /* offset without padding: how many parameters come before */
    /* Of the first element, in stochastic rounding (kernels/rounding.h): its offset if the model had one rank and
     * no padded rows, so that neither changes the bits. */
    int64_t rounding_index;
    /* Rows in memory: more than shape[0] in the table of the classifier, the others zero. */
    int64_t padded_rows;
    int layer; /* -1: of none */
    int unit;  /* see struct params */
    enum param_class class;
    enum param_init init;
};

/* Indices into params.list; -1 where the model has no such tensor. */
struct layer_params {
    int attn_norm, attn_norm_bias, qkv, qkv_bias, q_norm, k_norm, alpha_q, alpha_k, alpha_v, collapse, out,
        out_bias;
    int lambda[4]; /* q1, k1, q2, k2 of a differential layer */
    int diff_norm, talk_logits, talk_weights;
    int mlp_norm, mlp_norm_bias, up, up_bias, gate, down, down_bias;
};

struct params {
    struct param *list;
    int count;
    int64_t elements;   /* of the flat buffer, with the padding that aligns tensors and that of rows */
    int64_t num_params; /* without the padding */
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

enum param_part param_part_of(const struct param *t);

/* The part of a parameter in [begin, end) of the flat buffer; none where the result's begin >= end. */
struct element_range {
    int64_t begin, end;
};
struct element_range param_overlap(const struct param *t, int64_t begin, int64_t end);

/* Initial values of one tensor: values [count]. They depend on seed, name and index, not on the layout. */
void params_initial(const struct param *t, const struct model_config *m, uint64_t seed, float *values);

/* Printable shape, such as "[768, 768]". */
void param_shape_text(const struct param *t, char *out, size_t bytes);

#endif

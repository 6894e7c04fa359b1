/* Muon (Jordan 2024, kellerjordan.github.io/posts/muon), the optimizer of the hidden matrices: the q, k and v parts
 * of attn.qkv.weight (in simplicial layers also k' and v'), each as a matrix of its own, attn.out, mlp.up, mlp.gate and
 * mlp.down. AdamW updates everything else: embeddings, lm_head, norms, biases and mixing parameters. With the gradient g and the momentum mu,
 *
 *   m = mu m + g,  o = orthogonalize(g + mu m),  p -= lr (0.2 sqrt(max(rows, cols)) o + weight_decay p)
 *
 * The factor 0.2 sqrt(max) gives updates of the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that one
 * learning rate and one weight decay serve both.
 *
 * On several ranks momentum and parameters are sharded by equal ranges as for AdamW (partition.h), and only
 * orthogonalize() needs whole matrices. Each matrix has an owner: the directions of a unit are gathered where its
 * unsharded gradients were, each rank orthogonalizes the matrices it owns and clears everything else, and a
 * reduce-scatter, which adds zeros, brings each rank its shard of the results. */
#ifndef IHA_MODEL_MUON_H
#define IHA_MODEL_MUON_H

#include "model/params.h"

struct muon_matrix {
    int param;      /* index into params.list */
    int64_t offset; /* of the flat buffer */
    int64_t rows, cols;
    int unit;
    int owner; /* the rank that orthogonalizes it */
};

struct muon_matrices {
    struct muon_matrix *list; /* in the order of the flat buffer */
    int count;
};

struct model;
struct update_hyper;

/* Whether Muon, where it is on, updates this parameter. */
bool muon_updates(const struct param *p);

/* All matrices of the model, with their owners. EXIT_RUN when out of memory. */
int muon_list(struct muon_matrices *m, const struct params *p, int ranks, struct error *e);

/* Parameters of all matrices together. */
int64_t muon_elements(const struct muon_matrices *m);

/* The factor on a matrix's orthogonalized direction. */
float muon_scale(const struct muon_matrix *x);

/* The update of a model with Muon, after step_decide. Called on every rank. */
void muon_update_model(struct model *m, const struct update_hyper *h);

#endif

/* Attention of a differential layer (Ye et al. 2024, arXiv 2410.05258): heads 2i and 2i + 1 are a pair, whose queries
 * and keys give two maps of attention, and whose values are one head of 2d:
 *
 *   o[i] = (1 - lambda_init) w * rmsnorm((S1 - lambda S2) V[i])
 *
 * The operation `attention` has values as wide as keys, so that it runs four times, for each map and each half of
 * the values, over every other head; views with twice the stride choose them, and nothing is copied. The outputs
 * [B,T,2,H,d] hold S1 V and then S2 V of a token, as H/2 heads of 2d. The gradients of q and k come from the two halves
 * of the values, those of v from the two maps: each in two arrays, which are then added. */
#include "model/model.h"

tensor every_other_head(tensor t, int first) {
    t.data = (char *)t.data + (size_t)(first * t.stride[2]) * dtype_bytes(t.dtype);
    t.shape[2] /= 2;
    t.stride[2] *= 2;
    return t;
}

/* What one map's softmax saves; it does not depend on the values. */
static void *saved_of(const struct model *m, int layer, int map) {
    char *saved = m->layers[layer].attention_saved;
    return saved ? saved + (size_t)map * m->specs[layer].attention_saved_bytes : NULL;
}

void differential_attention(struct model *m, int layer) {
    const struct layer_buffers *b = &m->layers[layer];
    for (int map = 0; map < 2; map++)
        for (int half = 0; half < 2; half++)
            m->k->attention(m->dev, &m->specs[layer].pair_attention, every_other_head(b->q, map),
                            every_other_head(b->k, map), every_other_head(b->v, half), m->segments,
                            every_other_head(tensor_select(b->o_pseudo, 2, map), half),
                            saved_of(m, layer, map));
}

/* [rows,2,pairs,2d] and [rows,pairs,2d] as diff_combine takes them. */
static tensor pairs_as_rows(const struct diff_combine_spec *s, tensor t) {
    return tensor_of(t.data, t.dtype, s->rows, 2, s->pairs, 2 * s->head_dim, 0);
}

static tensor heads_as_rows(const struct diff_combine_spec *s, tensor t) {
    return tensor_of(t.data, t.dtype, s->rows, s->pairs, 2 * s->head_dim, 0, 0);
}

void differential_combine_of(const struct model *m, int layer, const struct diff_combine_spec *spec,
                             tensor pairs, tensor o) {
    const struct layer_params *p = &m->params.layers[layer];
    m->k->diff_combine(m->dev, spec, pairs_as_rows(spec, pairs), model_param(m, p->lambda[0]),
                       model_param(m, p->lambda[1]), model_param(m, p->lambda[2]),
                       model_param(m, p->lambda[3]), model_param(m, p->diff_norm), heads_as_rows(spec, o));
}

void differential_combine(struct model *m, int layer) {
    differential_combine_of(m, layer, &m->specs[layer].diff_combine, m->layers[layer].o_pseudo,
                            m->layers[layer].o);
}

void differential_backward(struct model *m, int layer, tensor dq, tensor dk, tensor dv, bool accumulate) {
    const struct layer_params *p = &m->params.layers[layer];
    const struct layer_buffers *b = &m->layers[layer];
    const struct layer_specs *s = &m->specs[layer];
    const struct gradient_buffers *g = &m->grad;
    const struct diff_combine_spec *spec = &s->diff_combine;
    tensor d_pairs = b->o_pseudo;
    d_pairs.data = g->d_o_pseudo;
    m->k->diff_combine_backward(
        m->dev, spec, heads_as_rows(spec, g->d_o), pairs_as_rows(spec, b->o_pseudo),
        model_param(m, p->lambda[0]), model_param(m, p->lambda[1]), model_param(m, p->lambda[2]),
        model_param(m, p->lambda[3]), model_param(m, p->diff_norm), pairs_as_rows(spec, d_pairs),
        model_gradient(m, p->lambda[0]), model_gradient(m, p->lambda[1]), model_gradient(m, p->lambda[2]),
        model_gradient(m, p->lambda[3]), model_gradient(m, p->diff_norm), accumulate);
    tensor gradients[2][3] = {{dq, dk, dv}};
    for (int part = 0; part < 3; part++)
        gradients[1][part] = qkv_part(&m->config, g->dqkv_other, part);
    for (int map = 0; map < 2; map++)
        for (int half = 0; half < 2; half++)
            m->k->attention_backward(m->dev, &s->pair_attention, every_other_head(b->q, map),
                                     every_other_head(b->k, map), every_other_head(b->v, half), m->segments,
                                     every_other_head(tensor_select(b->o_pseudo, 2, map), half),
                                     every_other_head(tensor_select(d_pairs, 2, map), half),
                                     saved_of(m, layer, map), every_other_head(gradients[half][0], map),
                                     every_other_head(gradients[half][1], map),
                                     every_other_head(gradients[map][2], half));
    for (int part = 0; part < 3; part++)
        m->k->add(m->dev, gradients[0][part], gradients[1][part]);
}

/* The step state, the gradient norm, and AdamW over flat ranges. */
#include "kernels/cpu/cpu.h"

void CPU(step_begin)(struct device *dev, struct step_state *state, int64_t step, double lr) {
    (void)dev;
    state->step = step;
    state->lr = lr;
    state->loss = 0;
    state->targets = 0;
    state->sumsq = 0;
    state->skip = 0;
}

/* Each thread sums a fixed range, and the ranges are added in order: the same number of threads gives the
 * same bits. Blocks are summed in vectors of float, and the blocks in double. */
void CPU(sumsq)(struct device *dev, tensor g, struct step_state *state) {
    check_contiguous("sumsq", "g", g);
    enum { MAX_PARTS = 1024, BLOCK = 4096 };
    double part[MAX_PARTS] = {0};
    int parts = dev->threads < MAX_PARTS ? dev->threads : MAX_PARTS;
    int64_t n = tensor_count(g), each = round_up((n + parts - 1) / parts, BLOCK);
    const real *x = g.data;
#pragma omp parallel for schedule(static)
    for (int p = 0; p < parts; p++)
        for (int64_t i = p * each; i < min64(n, (p + 1) * each); i += BLOCK) {
            int64_t end = min64(n, i + BLOCK);
            real sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = i; j < end; j++)
                sum += x[j] * x[j];
            part[p] += (double)sum;
        }
    for (int p = 0; p < parts; p++)
        state->sumsq += part[p];
}

void CPU(step_decide)(struct device *dev, struct step_state *state, double tokens, double grad_clip,
                      double skip_zscore) {
    (void)dev;
    step_decision(state, tokens, grad_clip, skip_zscore);
}

void CPU(step_read)(struct device *dev, const struct step_state *state, struct step_state *host) {
    (void)dev;
    *host = *state;
}

void CPU(step_write)(struct device *dev, struct step_state *state, const struct step_state *host) {
    (void)dev;
    *state = *host;
}

void CPU(step_post)(struct device *dev, const struct step_state *state) {
    dev->posted = *state;
}

void CPU(step_collect)(struct device *dev, struct step_state *host) {
    *host = dev->posted;
}

void CPU(adamw)(struct device *dev, const struct adamw_hyper *hyper, const struct param_group *groups,
                int count, tensor master, tensor p, tensor g, tensor m, tensor v,
                const struct step_state *state) {
    (void)dev;
    if (state->skip)
        return;
    double t = (double)state->history.updates;
    real b1 = (real)hyper->beta1, b2 = (real)hyper->beta2, eps = (real)hyper->eps,
         factor = (real)state->factor;
    real one_b1 = (real)(1 - hyper->beta1), one_b2 = (real)(1 - hyper->beta2);
    real correction1 = (real)(1 / (1 - pow(hyper->beta1, t))),
         correction2 = (real)(1 / (1 - pow(hyper->beta2, t)));
    real *param = master.data, *moment1 = m.data, *moment2 = v.data;
    elem *rounded = p.data;
    const real *grad = g.data;
    uint32_t updates = (uint32_t)state->history.updates;
    for (int i = 0; i < count; i++) {
        real lr = (real)(state->lr * (double)groups[i].lr_scale), decay = lr * (real)groups[i].weight_decay;
        int64_t first = groups[i].rounding_index - groups[i].begin;
#pragma omp parallel for simd schedule(static)
        for (int64_t j = groups[i].begin; j < groups[i].end; j++) {
            real gj = factor * grad[j];
            real mj = b1 * moment1[j] + one_b1 * gj;
            real vj = b2 * moment2[j] + one_b2 * gj * gj;
            moment1[j] = mj;
            moment2[j] = vj;
            param[j] -= lr * (mj * correction1) / (REAL_SQRT(vj * correction2) + eps) + decay * param[j];
            store_rounded(rounded, param[j], updates, first, j);
        }
    }
}

#include "model/info/estimate.h"

#include "model/flops.h"

double estimate_usable_memory(const struct gpu_spec *gpu) {
    return gpu->memory - gpu->reserved;
}

static enum dtype reduce_dtype_of(const struct config *c) {
    return c->system.reduce_dtype == REDUCE_BF16 ? DTYPE_BF16 : DTYPE_F32;
}

/* A step as the trainer does it, without data. */
static void run_step(struct model *m, const struct config *c, int64_t step, int64_t passes) {
    struct update_hyper hyper = {c->train.beta1,        c->train.beta2,       c->train.eps,
                                 c->train.grad_clip,    c->train.skip_zscore, (double)c->train.batch_tokens,
                                 c->train.muon_momentum};
    m->k->step_begin(m->dev, m->state, step, c->train.lr);
    const struct batch batch = {.segments = m->host_segments}; /* zeros: each sequence is one segment */
    for (int64_t pass = 0; pass < passes; pass++)
        model_train_pass(m, batch, 1.0 / (double)c->train.batch_tokens, (int)pass, (int)passes);
    model_update(m, &hyper);
}

static struct estimate_totals difference(struct estimate_totals after, const struct estimate_totals *before) {
    for (int i = 0; i < ESTIMATE_PARTS; i++) {
        after.seconds[i] -= before->seconds[i];
        after.flops[i] -= before->flops[i];
        after.bytes[i] -= before->bytes[i];
    }
    for (int i = 0; i < MESSAGES; i++) {
        after.messages[i] -= before->messages[i];
        after.message_bytes[i] -= before->message_bytes[i];
        after.exposed[i] -= before->exposed[i];
        after.moving[i] -= before->moving[i];
    }
    after.launches -= before->launches;
    after.now -= before->now;
    return after;
}

static void compute_rates(struct run_estimate *p, const struct config *c, const struct estimate_options *o) {
    struct flops f = flops_per_token(&c->model, c->train.seq_len);
    for (int i = 0; i < ESTIMATE_PARTS; i++)
        p->compute += p->step.seconds[i];
    p->tokens_per_second = (double)c->train.batch_tokens / p->step.now;
    p->mfu = (f.matmul + f.attention + f.mixing) * p->tokens_per_second / o->ranks / o->gpu->peak;
}

/* The second step is measured: the first starts with empty queues, all later ones are equal. */
static int run_estimated_steps(struct run_estimate *p, const struct config *c, struct device *dev,
                               struct error *e) {
    struct model m;
    struct model_options options = {.shape = pass_shape_of(c, true),
                                    .weight_decay = c->train.weight_decay,
                                    .mix_lr_scale = c->train.mix_lr_scale,
                                    .muon_lr_scale = config_muon_lr_scale(c),
                                    .comm = estimate_comm(dev),
                                    .zero_stage = (int)c->system.zero_stage,
                                    .reduce_dtype = reduce_dtype_of(c)};
    if (model_create(&m, &c->model, kernels_estimate(), dev, &options, e) != 0)
        return -1;
    p->memory = m.plan;
    run_step(&m, c, 0, p->passes);
    struct estimate_totals first = estimate_totals(dev);
    run_step(&m, c, 1, p->passes);
    p->step = difference(estimate_totals(dev), &first);
    model_free(&m);
    return 0;
}

int estimate_run(struct run_estimate *p, const struct config *c, const struct estimate_options *o,
                 struct error *e) {
    struct device *dev = estimate_open(o, e);
    if (!dev)
        return -1;
    *p = (struct run_estimate){.passes = c->train.batch_tokens /
                                         (c->train.micro_batch * c->train.seq_len * o->ranks)};
    int status = run_estimated_steps(p, c, dev, e);
    kernels_estimate()->close(dev);
    if (status == 0)
        compute_rates(p, c, o);
    return status;
}

/* ---- fitting into memory ---- */

int estimate_fits(const struct config *c, const struct estimate_options *o, struct memory_plan *plan,
                  struct error *e) {
    struct pass_shape shape = pass_shape_of(c, true);
    struct device *dev = estimate_open(o, e);
    if (!dev)
        return -1;
    int status = model_memory(&c->model, kernels_estimate(), dev, &shape, o->ranks, (int)c->system.zero_stage,
                              reduce_dtype_of(c), plan, e);
    kernels_estimate()->close(dev);
    return status != 0 ? -1 : (double)memory_total(plan) <= estimate_usable_memory(o->gpu);
}

/* Each function saves memory by one step of one setting; false if there is no further step. The new micro_batch
 * divides the old one, so that batch_tokens remains a multiple of it. */
static bool lower_micro_batch(struct config *c) {
    int64_t was = c->train.micro_batch, now = was / 2;
    while (now > 1 && was % now != 0)
        now--;
    c->train.micro_batch = now > 0 ? now : was;
    return now > 0;
}

static bool raise_recompute(struct config *c) {
    if (c->system.recompute == RECOMPUTE_FULL)
        return false;
    c->system.recompute++;
    return true;
}

static bool raise_zero_stage(struct config *c) {
    if (c->system.zero_stage == 2)
        return false;
    c->system.zero_stage++;
    return true;
}

int estimate_fit(const struct config *c, const struct estimate_options *o, int attempt,
                 struct config *changed, struct memory_plan *plan, struct error *e) {
    static bool (*const steps[])(struct config *) = {lower_micro_batch, raise_recompute, raise_zero_stage};
    int first = attempt < 3 ? attempt : 0, last = attempt < 3 ? attempt : 2;
    *changed = *c;
    for (int i = last; i >= first; i--)
        while (steps[i](changed)) {
            int fit = estimate_fits(changed, o, plan, e);
            if (fit != 0)
                return fit;
        }
    return 0;
}

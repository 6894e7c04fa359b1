/* What a training run would cost on GPUs that are not at hand: the model's own passes, update and messages,
 * run on a GPU that exists on paper only (kernels/estimate/). */
#ifndef IHA_MODEL_INFO_ESTIMATE_H
#define IHA_MODEL_INFO_ESTIMATE_H

#include "kernels/estimate/estimate.h"
#include "model/model.h"

struct run_estimate {
    int64_t passes;              /* of each rank in a step */
    struct estimate_totals step; /* one optimizer step, others before it: .now is the step's time in s */
    double compute;              /* s of it that something was computed; the rest waited for messages */
    double tokens_per_second;    /* all ranks */
    double mfu;                  /* part of the dense peak, FLOPs as flops.h counts them */
    struct memory_plan memory;   /* of one rank */
};

/* c: resolved for o->ranks ranks. EXIT_RUN when memory runs out. */
int estimate_run(struct run_estimate *p, const struct config *c, const struct estimate_options *o,
                 struct error *e);

/* Bytes that a run may use of a GPU's memory. */
double estimate_room(const struct gpu_spec *gpu);

/* Does *c fit, on o->ranks GPUs? 1, 0, or -1 and *e. */
int estimate_fits(const struct config *c, const struct estimate_options *o, struct memory_plan *plan,
                  struct error *e);

/* One change of *c that makes it fit: lower micro_batch, recompute more, share more, in the order of
 * `attempt` from 0; then all of them together. 1 when *changed fits, 0 when it does not, as far as it goes,
 * -1 and *e. */
enum { FIT_ATTEMPTS = 4 };
int estimate_fit(const struct config *c, const struct estimate_options *o, int attempt,
                 struct config *changed, struct memory_plan *plan, struct error *e);

#endif

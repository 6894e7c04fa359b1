/* The time and memory of a training run on GPUs that this machine need not have: the model's own passes, update
 * and communication, run on the estimate backend (kernels/estimate/), which only counts. */
#ifndef IHA_MODEL_INFO_ESTIMATE_H
#define IHA_MODEL_INFO_ESTIMATE_H

#include "kernels/estimate/estimate.h"
#include "model/model.h"

struct run_estimate {
    int64_t passes;              /* of each rank in a step */
    struct estimate_totals step; /* one optimizer step after the first: .now is its time in s */
    double compute;              /* s of the step spent computing; the rest waits for communication */
    double tokens_per_second;    /* all ranks */
    double mfu;                  /* part of the dense peak, FLOPs as flops.h counts them */
    struct memory_plan memory;   /* of one rank */
};

/* c: resolved for o->ranks ranks. EXIT_RUN when memory runs out. */
int estimate_run(struct run_estimate *p, const struct config *c, const struct estimate_options *o,
                 struct error *e);

/* Bytes of a GPU's memory that a run may use. */
double estimate_usable_memory(const struct gpu_spec *gpu);

/* 1 if *c fits into the memory of o->ranks GPUs, 0 if not, -1 and *e on errors. */
int estimate_fits(const struct config *c, const struct estimate_options *o, struct memory_plan *plan,
                  struct error *e);

/* Change one setting of *c until it fits: attempt 0 lowers micro_batch, 1 raises recompute, 2 raises
 * zero_stage, 3 does all three. 1 if *changed fits, 0 if it does not even at the end, -1 and *e on errors. */
enum { FIT_ATTEMPTS = 4 };
int estimate_fit(const struct config *c, const struct estimate_options *o, int attempt,
                 struct config *changed, struct memory_plan *plan, struct error *e);

#endif

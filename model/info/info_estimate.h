/* What `train_iha info CONFIG --gpus N ...` prints: the estimate of a training run on GPUs that this machine need
 * not have. */
#ifndef IHA_MODEL_INFO_INFO_ESTIMATE_H
#define IHA_MODEL_INFO_INFO_ESTIMATE_H

#include <stdio.h>

#include "kernels/estimate/hardware.h"
#include "model/config/config.h"

struct info_options {
    int gpus; /* 0: no estimate */
    const struct gpu_spec *gpu;
    const struct link_spec *link;
    bool launches; /* instead of the rest: every kernel of a step */
};

/* From --gpus (0: not given), --gpu, --link (names in gpu_names and link_names, or NULL) and --launches, with defaults
 * for what is not given. EXIT_USER for options that contradict each other. */
int info_options_set(struct info_options *o, int gpus, const char *gpu, const char *link, bool launches,
                     struct error *e);

/* The model's counts and the estimate, for a configuration resolved for o->gpus ranks. EXIT_USER if its [system]
 * asks for what cannot be estimated, EXIT_RUN when memory runs out. */
int info_print_estimate(FILE *out, const struct config *c, const struct info_options *o, struct error *e);

#endif

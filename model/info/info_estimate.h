/* `train_iha info CONFIG --gpus N ...`: planning a run on GPUs that are not at hand. */
#ifndef IHA_MODEL_INFO_INFO_ESTIMATE_H
#define IHA_MODEL_INFO_INFO_ESTIMATE_H

#include <stdio.h>

#include "kernels/estimate/hardware.h"
#include "model/config/config.h"

/* What stands on the command line beside the configuration. gpus = 0: nothing is to be planned. */
struct info_options {
    int gpus;
    const struct gpu_spec *gpu;
    const struct link_spec *link;
    int override_count;
    char **overrides; /* moved to the front of argv */
};

/* argv: what follows CONFIG. Errors: EXIT_USER. */
int info_parse(int argc, char **argv, struct info_options *o, struct error *e);

/* The model's counts and the run_estimate, for a configuration resolved for o->gpus ranks. EXIT_USER where its
 * [system] asks for what is not predicted, EXIT_RUN when memory runs out. */
int info_print_estimate(FILE *out, const struct config *c, const struct info_options *o, struct error *e);

#endif

/* What `train_iha info CONFIG --gpus N --launches` prints: every kernel of a training step, with its bytes and FLOPs
 * beside the time that they take at least. */
#ifndef IHA_MODEL_INFO_INFO_LAUNCHES_H
#define IHA_MODEL_INFO_INFO_LAUNCHES_H

#include <stdio.h>

#include "kernels/estimate/estimate.h"
#include "model/config/config.h"

/* Kernels that are alike: of one operation, in layers of one type, with the same bytes and FLOPs. */
struct launch_row {
    struct estimate_launch launch;
    enum layer_type type; /* where launch.layer >= 0 */
    int64_t count;
};

/* What is counted for one layer, or for everything outside of layers. */
enum launch_kind { LAUNCH_PRODUCT, LAUNCH_ATTENTION, LAUNCH_OTHER, LAUNCH_KINDS };
struct launch_sums {
    double bytes[LAUNCH_KINDS], flops[LAUNCH_KINDS], floor[LAUNCH_KINDS];
    int64_t count[LAUNCH_KINDS];
};

/* The kernels of the step that was run last. */
enum { LAUNCH_ROWS = 1024 };
struct launches {
    const struct model_config *model;
    struct launch_row rows[LAUNCH_ROWS];
    int count;
    bool full; /* more than LAUNCH_ROWS: the rest is in the sums alone */
    struct launch_sums layers[MAX_LAYERS], outside;
};

/* estimate_options.launched; context: a struct launches, whose model is set. */
void launches_add(void *context, const struct estimate_launch *launch);

/* options: without `launched`. */
int info_print_launches(FILE *out, const struct config *c, const struct estimate_options *options,
                        struct error *e);

#endif

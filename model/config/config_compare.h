/* Whether a model can start from another one's weights, and whether it then computes the same function. */
#ifndef IHA_MODEL_CONFIG_CONFIG_COMPARE_H
#define IHA_MODEL_CONFIG_CONFIG_COMPARE_H

#include "model/config/config.h"

struct model_comparison {
    char misfits[600]; /* what keeps the weights from being used, every difference; empty: nothing */
    char changes
        [600]; /* what changes the function of sequences of at most seq_len tokens, the same way; empty: nothing */
    int upcycled; /* layers that were MHA and are IHA: alpha and collapse are new */
};

/* Compare the model *then, whose weights there are, with *now, in which alpha and collapse of new IHA layers are as
 * init_alpha and init_collapse say. Another vocab_size is no difference: see train.resize_vocab.
 *
 * An MHA layer becomes an IHA layer of the same function if every pseudo-head that collapse reads sees P copies of each
 * token that the MHA layer saw, rotated alike. With alpha = identity: the last pseudo-head does, if its window is of
 * whole tokens; all do under the token mask or without one. RoPE must be at the token's position. */
void config_compare(const struct model_config *then, const struct model_config *now, int64_t seq_len,
                    struct model_comparison *c);

#endif

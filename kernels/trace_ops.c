/* A table whose operations are recorded as ranges of their own name: what a profile shows below the model's
 * layers. */
#include "kernels/kernels.h"

static const struct kernels *inner;

#define OP(name, parameters, arguments)                                                                      \
    static void name parameters {                                                                            \
        inner->range_begin(dev, #name, -1);                                                                  \
        inner->name arguments;                                                                               \
        inner->range_end(dev);                                                                               \
    }
#define OP_AUX(name, parameters) /* not recorded */
#include "kernels/ops.def"

const struct kernels *kernels_traced(const struct kernels *k) {
    static struct kernels table;
    inner = k;
    table = *k;
#define OP(name, parameters, arguments) table.name = name;
#define OP_AUX(name, parameters)
#include "kernels/ops.def"
    return &table;
}

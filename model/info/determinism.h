/* What system.deterministic costs, for the opening lines of a run. */
#ifndef IHA_MODEL_INFO_DETERMINISM_H
#define IHA_MODEL_INFO_DETERMINISM_H

#include <stdio.h>

#include "model/model.h"

/* Who serves attention in each kind of layer, and the bytes that being deterministic takes of the memory
 * plan: two lines at most; nothing on devices that are deterministic at no price. */
void determinism_print(FILE *out, const struct model *m);

#endif

/* What follows `train_iha generate CHECKPOINT` on the command line. */
#ifndef IHA_MODEL_GENERATE_GENERATE_OPTIONS_H
#define IHA_MODEL_GENERATE_GENERATE_OPTIONS_H

#include "model/generate/generate.h"

struct generate_options {
    const char *prompt;
    int64_t tokens; /* to generate */
    struct sampling sampling;
    int override_count; /* section.key=value, in any place between the options */
    char **overrides;
};

/* Options that are not given keep their defaults. The overrides are gathered in argv's own memory. EXIT_USER
 * errors name the option, or the nearest to one that is not known. */
int generate_options_parse(int argc, char **argv, struct generate_options *o, struct error *e);

#endif

#include "model/generate/generate_options.h"

#include <math.h>
#include <stdlib.h>

#include "model/config/options.h"

static int parse_number(const char *option, const char *text, bool whole, double most, double *out,
                        struct error *e) {
    char *end;
    *out = strtod(text, &end);
    if (end == text || *end || !(*out >= 0 && *out <= most) || (whole && *out != floor(*out)))
        return fail_user(e, "%s %s: not a %snumber from 0 to %.0f", option, text, whole ? "whole " : "",
                         most);
    return 0;
}

int generate_options_parse(int argc, char **argv, struct generate_options *o, struct error *e) {
    static const char *const known[] = {"--prompt", "--tokens", "--temperature", "--top-k", "--seed", NULL};
    *o = (struct generate_options){.prompt = "", .tokens = 256, .sampling = {0.8, 0, 1}, .overrides = argv};
    for (int i = 0; i < argc; i++) {
        double number = 0;
        if (argv[i][0] != '-') {
            o->overrides[o->override_count++] = argv[i];
            continue;
        }
        int which = option_find("generate", known, argv, i, argc, e);
        if (which < 0)
            return -1;
        const char *value = argv[i + 1];
        double most = which == 1 ? 1e7 : which == 2 ? 100 : 9e15;
        if (which > 0 && parse_number(argv[i], value, which != 2, most, &number, e) != 0)
            return -1;
        i++;
        switch (which) {
        case 0:
            o->prompt = value;
            break;
        case 1:
            o->tokens = (int64_t)number;
            break;
        case 2:
            o->sampling.temperature = number;
            break;
        case 3:
            o->sampling.top_k = (int64_t)number;
            break;
        default:
            o->sampling.seed = (uint64_t)number;
        }
    }
    return 0;
}

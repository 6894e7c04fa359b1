#include "model/generate_options.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model/config.h"

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
        int which = 0;
        while (known[which] && strcmp(argv[i], known[which]) != 0)
            which++;
        const char *near = nearest_name(argv[i], known);
        if (!known[which])
            return fail_user(e, "generate: unknown option %s%s%s; see train_iha generate --help", argv[i],
                             near ? "; did you mean " : "", near ? near : "");
        if (i + 1 == argc)
            return fail_user(e, "generate: %s needs a value", argv[i]);
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

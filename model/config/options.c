#include "model/config/options.h"

#include <string.h>

#include "model/config/config.h"

int option_find(const char *command, const char *const *known, char *const *argv, int i, int argc,
                struct error *e) {
    int which = 0;
    while (known[which] && strcmp(argv[i], known[which]) != 0)
        which++;
    const char *near = nearest_name(argv[i], known);
    if (!known[which])
        return fail_user(e, "%s: unknown option %s%s%s; see train_iha %s --help", command, argv[i],
                         near ? "; did you mean " : "", near ? near : "", command);
    if (i + 1 == argc)
        return fail_user(e, "%s: %s needs a value", command, argv[i]);
    for (int j = i + 2; j < argc; j += argv[j][0] == '-' ? 2 : 1) /* over the values of options */
        if (strcmp(argv[j], argv[i]) == 0)
            return fail_user(e, "%s: %s is given twice", command, argv[i]);
    return which;
}

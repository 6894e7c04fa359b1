/* Options of the command line, "--name value". */
#ifndef IHA_MODEL_CONFIG_OPTIONS_H
#define IHA_MODEL_CONFIG_OPTIONS_H

#include "kernels/error.h"

/* Which of `known`, a NULL-terminated list, argv[i] is; a value follows it. -1 and an EXIT_USER error that
 * begins with the command's name: it is none, and the nearest name; no value follows; it comes again later.
 */
int option_find(const char *command, const char *const *known, char *const *argv, int i, int argc,
                struct error *e);

#endif

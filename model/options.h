/* Options of the command line, "--name value". */
#ifndef IHA_OPTIONS_H
#define IHA_OPTIONS_H

#include "kernels/error.h"

/* Which of `known`, a NULL-terminated list, argv[i] is; a value follows it. -1: it is none, or none does, and
 * an EXIT_USER error that begins with the command's name and gives the nearest name. */
int option_find(const char *command, const char *const *known, char *const *argv, int i, int argc,
                struct error *e);

#endif

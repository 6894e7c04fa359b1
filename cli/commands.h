/* The commands that do not train: eval and generate read a checkpoint, info a checkpoint or a configuration. Each
 * prints its result to stdout. */
#ifndef IHA_CLI_COMMANDS_H
#define IHA_CLI_COMMANDS_H

#include "cli/command_line.h"
#include "cli/run.h"

int eval_command(struct run *r, const struct command_line *line, struct error *e);
int generate_command(struct run *r, const struct command_line *line, struct error *e);
int info_command(struct run *r, const struct command_line *line, struct error *e);

#endif

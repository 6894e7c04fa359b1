/* The command line, parsed in one place: a command, CONFIG or CHECKPOINT, options "--name value", and overrides
 * "section.key=value" in any order after the command. */
#ifndef IHA_MODEL_CONFIG_COMMAND_LINE_H
#define IHA_MODEL_CONFIG_COMMAND_LINE_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "kernels/error.h"

enum command {
    COMMAND_TRAIN,
    COMMAND_EVAL,
    COMMAND_GENERATE,
    COMMAND_ATTENTION,
    COMMAND_INFO,
    COMMAND_CHECK,
    COMMAND_HELP,
    COMMAND_HELP_MARKDOWN, /* the configuration keys, for docs/configuration.md */
    COMMAND_VERSION
};

struct command_line {
    enum command command;
    int help_topic;   /* COMMAND_HELP: the command to explain; -1: the program */
    const char *path; /* CONFIG, CHECKPOINT, or the GLOB of check */
    char **overrides; /* "section.key=value", gathered in argv's own memory */
    int override_count;

    int64_t profile_steps; /* train --profile; 0: not given */

    const char *prompt, *prompt_file; /* generate, attention; NULL: not given */
    int64_t tokens;
    double temperature;
    int64_t top_k;
    double top_p;
    int64_t seed;
    const char *stop;   /* NULL: not given */
    bool chat;          /* talk on the standard input */
    const char *system; /* with chat; NULL: not given */

    int64_t layer;   /* attention */
    const char *out; /* NULL: not given */

    int64_t gpus;    /* info --gpus; 0: not given */
    const char *gpu; /* a name in gpu_names; NULL: not given */
    const char *link;
    bool launches;

    int64_t vocab; /* check --vocab */
};

/* argv: the arguments after the program's name. Options that are not given keep their defaults. EXIT_USER errors
 * name the argument, and the nearest command, option or value for one that is unknown. */
int command_line_parse(struct command_line *line, int argc, char **argv, struct error *e);

/* The text of COMMAND_HELP and COMMAND_VERSION. */
void command_line_print_help(FILE *out, int help_topic);
void command_line_print_version(FILE *out);

#endif

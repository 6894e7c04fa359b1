/* The user's turns of a conversation, from the standard input: a line each. On a terminal (input and output) a prompt is
 * shown, and Ctrl-C ends an answer or, while a line is awaited, the conversation. From a pipe it ends both. */
#ifndef IHA_DATA_TURNS_H
#define IHA_DATA_TURNS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/error.h"

struct turns {
    char *bytes; /* [capacity]; of which [at, length) are read and not yet returned */
    size_t at, length, capacity;
    bool terminal, at_end, interrupted;
};

/* Block SIGINT in this thread and those that it starts, so that no handler runs while they compute, unless it was ignored
 * at start: then it stays ignored. Call it before any other thread exists. */
void turns_open(struct turns *t);
void turns_close(struct turns *t);

/* The next line that is not blank, without its end: 1, and *text and *length until the next call. 0: there is none, or
 * Ctrl-C. -1: the input cannot be read (EXIT_USER), or a line is too long. */
int turns_read(struct turns *t, const char **text, size_t *length, struct error *e);

/* Whether Ctrl-C came since the last call. */
bool turns_interrupted(struct turns *t);

#endif

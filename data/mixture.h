/* Several sources of data with weights: data.train = 0.7 a.bin, 0.3 b.bin
 *
 * A value that begins with a number and a blank is a mixture. Its items are separated by commas: each is a weight, a
 * blank and a glob. A comma within a glob separates nothing unless a blank, or another weight and a blank, follows. */
#ifndef IHA_DATA_MIXTURE_H
#define IHA_DATA_MIXTURE_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/error.h"

enum { MAX_SOURCES = 64, MAX_GLOB = 1024 };

struct mixture {
    int count;
    char globs[MAX_SOURCES][MAX_GLOB];
    int64_t weights[MAX_SOURCES]; /* shares of the sequences, which add up to total_weight */
    int64_t total_weight;
};

/* Whether the text is a mixture rather than one glob. */
bool mixture_is(const char *text);

/* Parse data.train; a text that is no mixture is one source. EXIT_USER: a weight is missing or not positive, or there
 * are too many sources. */
int mixture_parse(struct mixture *m, const char *text, struct error *e);

/* The source of the next sequence, given how many were drawn from each: the one whose count is furthest below its
 * share. */
int mixture_choose(const struct mixture *m, const int64_t *drawn);

#endif

/* Tokens as text: written to a stream as they come, and read back where there is no tokenizer. */
#ifndef IHA_DATA_TEXT_H
#define IHA_DATA_TEXT_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "data/tokenizer.h"

struct text_writer {
    const struct tokenizer *tokenizer; /* NULL: ids are written, as numbers */
    FILE *out, *copy;                  /* copy: NULL, or a second place */
    int32_t end_of_text;               /* -1: none */
};

void text_write(const struct text_writer *w, int32_t token);

/* The same, seen at once, for a generator that asks whether to go on: not past the end of a text. */
bool text_emit(void *text_writer, int32_t token);

/* Token ids below `vocab`, as numbers apart: a malloc'd array in *ids, to be freed also after an error, and
 * its length, or -1. */
int64_t text_parse_ids(const char *text, int64_t vocab, int32_t **ids, struct error *e);

#endif

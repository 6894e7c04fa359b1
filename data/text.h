/* Tokens as text: written to a stream as they come, and read back where there is no tokenizer. */
#ifndef IHA_DATA_TEXT_H
#define IHA_DATA_TEXT_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "data/tokenizer.h"

/* Zeroed but for what the caller sets; one for each sequence of tokens. */
struct text_writer {
    const struct tokenizer *tokenizer; /* NULL: ids are written, as numbers */
    FILE *out, *copy;                  /* copy: NULL, or a second place */
    const struct end_ids *ends;        /* NULL: none */
    struct decoding decoding;
};

void text_write(struct text_writer *w, int32_t token);

/* For a generator that asks whether to go on: false at the end of a text; writes and flushes other tokens. */
bool text_emit(void *text_writer, int32_t token);

/* Token ids below `vocab`, as numbers apart: a malloc'd array in *ids, to be freed also after an error, and
 * its length, or -1. */
int64_t text_parse_ids(const char *text, int64_t vocab, int32_t **ids, struct error *e);

#endif

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
    const char *stop;   /* text at which text_emit stops; NULL: none */
    size_t held_length; /* bytes held back: generated ones with which `stop` begins */
};

/* Write a token of the prompt. */
void text_write(struct text_writer *w, int32_t token);

/* Write a generated token and flush, for a generator that asks whether to go on: not past the end of a text, not
 * where `stop` is complete, which is not written, and not where the stream cannot be written. `stop` may begin and
 * end within tokens: bytes with which it may begin are held back until it is decided. */
bool text_emit(void *text_writer, int32_t token);

/* After the last token: write the bytes held back. */
void text_finish(struct text_writer *w);

/* Token ids below `vocab`, as numbers apart in `length` bytes that end with a zero byte: a malloc'd array in *ids, to
 * be freed also after an error, and its length, or -1. option: the name of the text, for errors. */
int64_t text_parse_ids(const char *option, const char *text, size_t length, int64_t vocab, int32_t **ids,
                       struct error *e);

#endif

/* dataset.json, which data/prepare.py writes beside its shards: the tokenizer that made them and the id that
 * ends their documents. llm.c's shards have none. */
#ifndef IHA_DATA_DATASET_H
#define IHA_DATA_DATASET_H

#include <stddef.h>
#include <stdint.h>

#include "data/tokenizer.h"

/* *separator, if it is -1, becomes the separator in the dataset.json of these shards (globs), or else the tokenizer's end
 * of text; it stays -1 where neither is known. The ids that end a text go to *ends: the separator first, with which a
 * document begins in samples, then those of a generation_config.json beside the tokenizer. tokenizer: NULL for none; text:
 * its file's content, NULL for bytes. Data sets of another tokenizer, of a larger vocabulary, or with different separators
 * are refused (EXIT_USER). */
int dataset_end_ids(const char *const *globs, int count, const struct tokenizer *tokenizer, const char *text,
                    size_t bytes, int64_t vocab_size, int64_t *separator, struct end_ids *ends,
                    struct error *e);

/* Bytes of text per token in the shards of a glob, as the dataset.json beside them count both; 0 where one is not in
 * them. */
double dataset_bytes_per_token(const char *shards);

#endif

/* dataset.json, which data/prepare.py writes beside its shards: the tokenizer that made them and the id that
 * ends their documents. llm.c's shards have none. */
#ifndef IHA_DATA_DATASET_H
#define IHA_DATA_DATASET_H

#include <stddef.h>
#include <stdint.h>

#include "data/tokenizer.h"

/* The ids that end a text of these shards (globs; val may be empty) go to *ends, the one to begin a document
 * with first: the separator of their dataset.json, or else the tokenizer's end of text; then those of a
 * generation_config.json beside the tokenizer. tokenizer: NULL for none; text: its file's content, NULL for
 * bytes. Data sets of another tokenizer, of a larger vocabulary, or with different separators are refused
 * (EXIT_USER). */
int dataset_end_ids(const char *train, const char *val, const struct tokenizer *tokenizer, const char *text,
                    size_t bytes, int64_t vocab_size, struct end_ids *ends, struct error *e);

#endif

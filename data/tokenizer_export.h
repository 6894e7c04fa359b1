/* A tokenizer as files that Hugging Face Transformers reads: tokenizer.json and tokenizer_config.json. */
#ifndef IHA_DATA_TOKENIZER_EXPORT_H
#define IHA_DATA_TOKENIZER_EXPORT_H

#include <stdint.h>

#include "kernels/error.h"

/* A tokenizer.json that gives the byte tokenizer's ids: a byte-level BPE without merges. The added token
 * <|endoftext|> has id 256; written out in a text it is that token, while the byte tokenizer takes it as 13 bytes.
 * malloc'd; NULL: no memory. */
char *tokenizer_bytes_json(void);

/* A tokenizer_config.json for the tokenizer.json `text`: what stands in the tokenizer_config.json beside `path` (NULL:
 * there is none), except that Transformers takes tokenizer.json as it is, and runs no code for it. Where bos_token,
 * eos_token and pad_token are not given they are the added token of id `end` (-1: none). max_tokens: the longest
 * sequence of the model. malloc'd; NULL: an error. */
char *tokenizer_config_json(const char *path, const char *text, int32_t end, int64_t max_tokens,
                            struct error *e);

#endif

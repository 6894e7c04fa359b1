/* Text to tokens and back: the byte tokenizer, or a Hugging Face tokenizer.json.
 *
 * Bytes: ids 0-255 are bytes, 256 ends a document.
 *
 * tokenizer.json: a BPE model, byte-level (GPT-2, Llama 3, Qwen) or SentencePiece's (Llama 2, Mistral,
 * Gemma), encodes and decodes exactly as the tokenizers library does with add_special_tokens=False. No BOS or
 * EOS is added, since the post-processor is not applied; "dropout" is ignored. Bytes that are not UTF-8 are
 * encoded too, each by its own token where there is one. Other models (Unigram, WordPiece), and files with
 * steps or patterns that are not supported, decode only: encoding fails with the reason. A decoder that needs
 * the whole sequence at once is refused.
 *
 * A tokenizer does not change once open: threads may share it. */
#ifndef IHA_DATA_TOKENIZER_H
#define IHA_DATA_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "data/end_of_text.h"
#include "kernels/error.h"

struct tokenizer;

/* `name` is "bytes" or a path. Refuses (EXIT_USER) a file that is not a tokenizer, or has an id >=
 * vocab_size, since such a tokenizer belongs to another model. */
struct tokenizer *tokenizer_open(const char *name, int64_t vocab_size, struct error *e);
void tokenizer_close(struct tokenizer *t);

/* The highest id the tokenizer itself knows, plus one (257 for bytes): the smallest vocab_size for it. */
int64_t tokenizer_size(const struct tokenizer *t);

/* The id that ends a document, or -1: 256 for bytes; of a file, the eos_token of the tokenizer_config.json
 * beside it, or the first known name (end_of_text.c). */
int32_t tokenizer_end_of_text(const struct tokenizer *t);

/* The same if a tokenizer_config.json names it, or -1. */
int32_t tokenizer_eos_token(const struct tokenizer *t);

/* The ids at which generation stops: that one, and those of a generation_config.json beside the file. */
const struct end_ids *tokenizer_end_ids(const struct tokenizer *t);

/* Encode length bytes of text (any bytes, NUL included). Returns the count and a malloc'd array in *ids, or
 * -1. Added tokens written out in the text (such as <|endoftext|>) are recognised as the tokenizers library
 * does. */
int64_t tokenizer_encode(const struct tokenizer *t, const char *text, size_t length, int32_t **ids,
                         struct error *e);

/* What stands before a text that is tokenized apart from it. */
enum text_place {
    TEXT_BEGINS,    /* nothing: tokenizers may put a space in front of it */
    TEXT_FOLLOWS,   /* a special token: some put a space in front here too */
    TEXT_CONTINUES, /* text that it goes on from: none puts a space in front */
};

/* The same, but special tokens written out in the text are ordinary text, as with the library's
 * encode_special_tokens = True: for what a user or a data set says, as data/prepare.py encodes it. */
int64_t tokenizer_encode_plain(const struct tokenizer *t, const char *text, size_t length,
                               enum text_place place, int32_t **ids, struct error *e);

/* Does a special token take the spaces before or after it? Of another id both are false. */
void tokenizer_strips(const struct tokenizer *t, int32_t id, bool *before, bool *after);

/* The bytes of one token after another, NUL-terminated beside *length; "" for ids without text (the byte
 * tokenizer's 256 and ids beyond the vocabulary). Owned by the tokenizer. */
const char *tokenizer_decode(const struct tokenizer *t, int32_t id, size_t *length);

/* The same in its place in a sequence: concatenating what these return for each token decodes the sequence
 * (some decoders drop the first space, or the last). *d is zeroed before the first token. */
struct decoding {
    bool begun, space;
    int stripped;
};
const char *tokenizer_decode_next(const struct tokenizer *t, struct decoding *d, int32_t id, size_t *length);

#endif

/* What the tokenizer's files share; nothing outside data/tokenizer*.c includes this.
 *
 *   tokenizer.c           the public functions and the byte tokenizer
 *   tokenizer_json.c      tokenizer.json: vocabulary and added tokens
 *   tokenizer_spelling.c  how its tokens spell bytes: the byte alphabet and others
 *   tokenizer_regex.c     the pre-tokenizer of a tokenizer.json, as a list of regular expressions
 *   tokenizer_split.c     text to pieces: added tokens first, then those expressions
 *   tokenizer_bpe.c       pieces to ids: the merges
 *   tokenizer_map.c       the two hash tables under them */
#ifndef IHA_DATA_TOKENIZER_INTERNAL_H
#define IHA_DATA_TOKENIZER_INTERNAL_H

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "data/tokenizer.h"

struct cJSON;

/* ---- hash tables; put overwrites and returns 0, or -1 when there is no memory ---- */

struct string_map { /* text of any bytes (borrowed, not copied) to an int32 */
    struct string_slot {
        const char *key;
        uint32_t length;
        int32_t value;
    } * slots;
    size_t capacity, used;
};

int string_map_put(struct string_map *m, const char *key, size_t length, int32_t value);
int32_t string_map_get(const struct string_map *m, const char *key, size_t length, int32_t missing);
void string_map_free(struct string_map *m);

struct pair_map { /* (uint32, uint32) to (uint32, int32); the pair of two UINT32_MAX is not a key */
    struct pair_slot {
        uint32_t a, b;
        uint32_t rank;
        int32_t id;
    } * slots;
    size_t capacity, used;
};

int pair_map_put(struct pair_map *m, uint32_t a, uint32_t b, uint32_t rank, int32_t id);
const struct pair_slot *pair_map_get(const struct pair_map *m, uint32_t a, uint32_t b);
void pair_map_free(struct pair_map *m);

uint64_t hash_piece(const char *bytes, size_t length);

/* ---- splitting ---- */

enum { MAX_STAGES = 16 };

enum split_behavior { SPLIT_ISOLATED, SPLIT_REMOVED, SPLIT_CONTIGUOUS, SPLIT_WITH_PREVIOUS, SPLIT_WITH_NEXT };

/* One step of the pre-tokenizer: split at what a regular expression matches, or put a space in front. */
struct stage {
    pcre2_code *regex; /* NULL: the space */
    enum split_behavior behavior;
    bool invert;
};

struct added_token {
    int32_t id;
    bool lstrip, rstrip, single_word;
};

/* Added tokens as a trie over bytes: (node, byte) to (node, index of the token that ends there or -1). */
struct added_set {
    struct pair_map trie;
    struct added_token *tokens;
    uint32_t count, nodes;
    bool starts[256]; /* bytes that begin a token: everything else is skipped at once */
};

int added_set_put(struct added_set *set, const char *text, const struct added_token *token);
void added_set_free(struct added_set *set);

/* ---- merging ---- */

struct bpe {
    int32_t byte_ids[256]; /* -1: the vocabulary lacks this byte */
    int32_t unk;           /* what then stands for it; -1: nothing does */
    bool fuse_unk;         /* one unk for a run of such bytes */
    bool whole_words;      /* ignore_merges: a piece that is a token needs no merges */
    struct pair_map merges;
    struct string_map words; /* the vocabulary by its bytes, if whole_words */
};

/* ---- the tokenizer ---- */

struct token {
    size_t at; /* of its text in the pool */
    uint32_t length;
    bool known;
};

struct tokenizer {
    bool bytes; /* the byte tokenizer: every member below `pool` is unused */
    int64_t size;
    int32_t end_of_text;
    struct token *tokens; /* [size] */
    char *pool;
    char refusal[512]; /* why it cannot encode; "" when it can */
    /* Text with a code point from here on would be changed by a normalizer that is not implemented. */
    uint32_t normal_below;
    const char *normalizer;
    struct added_set added[2]; /* in the order they are looked for: `normalized: false`, then true */
    struct stage stages[MAX_STAGES];
    int stage_count;
    pcre2_code *word; /* one character of a word, for added tokens that must stand alone */
    struct bpe bpe;
};

/* The first reason stays. Always returns 0: such a tokenizer still decodes. */
int refuse_to_encode(struct tokenizer *t, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* tokenizer_json.c: fills a zeroed *t, or returns -1 and leaves the rest to tokenizer_close. */
int tokenizer_load_json(struct tokenizer *t, const char *path, int64_t vocab_size, struct error *e);

/* tokenizer_regex.c: reads the "pre_tokenizer" (which may be NULL) into t->stages. */
int pre_tokenizer_load(struct tokenizer *t, const struct cJSON *node, const char *path, struct error *e);
void pre_tokenizer_free(struct tokenizer *t);

/* tokenizer_bpe.c: reads the BPE "model"; vocab maps the text of its tokens, as the file writes it, to ids.
 */
int bpe_load(struct tokenizer *t, const struct cJSON *model, const struct string_map *vocab, const char *path,
             struct error *e);
void bpe_free(struct bpe *bpe);

/* tokenizer_spelling.c: how the vocabulary writes text. */
struct spelling {
    enum style { STYLE_PLAIN, STYLE_BYTE_LEVEL, STYLE_METASPACE, STYLE_WORDPIECE } style;
    char prefix[16]; /* WordPiece's "##" */
};

void find_spelling(struct spelling *spelling, const struct cJSON *root, const struct cJSON *model);

/* Writes the bytes of a token to out, which holds strlen(text) + 1, and returns how many. */
size_t spell_token(const struct spelling *spelling, const char *text, char *out);

/* The 256 characters that byte-level vocabularies write bytes with: byte_character fills out with the UTF-8
 * of one byte's and returns its length; bytes_of_token undoes it for a whole token, returning the number of
 * bytes, or -1 when a character is none of the 256 (out, which may be NULL, then holds nothing of use). */
int byte_character(unsigned char byte, char out[3]);
int64_t bytes_of_token(const char *token, char *out);

/* JSON helpers that tell "absent" from "of the wrong type": -1 with an error for the latter. */
int json_bool(const struct cJSON *object, const char *name, bool missing, bool *out, const char *path,
              struct error *e);
int json_text(const struct cJSON *object, const char *name, const char **out, const char *path,
              struct error *e);                                                /* NULL when absent or null */
bool json_is_type(const struct cJSON *node, const char *type);                 /* is its "type" this one? */
const struct cJSON *json_member(const struct cJSON *object, const char *name); /* NULL when absent or null */

/* ---- one call of tokenizer_encode ---- */

enum { CACHE_SLOTS = 4096, CACHE_KEY = 21 };

struct cached_piece { /* a short piece met before in this call, and where its ids stand in the output */
    int64_t at;
    uint16_t count;
    uint8_t length; /* 0: empty slot */
    char key[CACHE_KEY];
};

struct encoding {
    const struct tokenizer *t;
    int32_t *ids;
    int64_t count, capacity;
    struct cached_piece *cache; /* [CACHE_SLOTS], or NULL for short texts */
    pcre2_match_data *match;
    pcre2_match_context *limits;
    struct bpe_scratch {
        struct symbol *symbols;
        uint64_t *heap;
        size_t symbol_capacity, heap_capacity, heap_count;
    } scratch;
    struct error *e;
};

/* Bytes, and the same bytes with whatever is not UTF-8 replaced, one for one: what a regex may look at. */
struct slice {
    const char *bytes, *clean;
    size_t length;
};

int push_id(struct encoding *x, int32_t id);
int encode_text(struct encoding *x, struct slice text);                 /* tokenizer_split.c */
int encode_piece(struct encoding *x, const char *bytes, size_t length); /* tokenizer_bpe.c */
void bpe_scratch_free(struct bpe_scratch *scratch);

/* One code point of UTF-8 and its length (1-4); invalid bytes come one at a time, as UINT32_MAX. */
uint32_t utf8_next(const char *bytes, size_t length, int *used);

#endif

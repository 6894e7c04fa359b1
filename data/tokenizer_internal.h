/* What the tokenizer's files share; nothing outside data/tokenizer*.c includes this.
 *
 *   tokenizer.c               the public functions and the byte tokenizer
 *   tokenizer_json.c          tokenizer.json: vocabulary and added tokens
 *   tokenizer_normalizer.c    its normalizer: a list of steps that rewrite the text
 *   tokenizer_pretokenizer.c  its pre-tokenizer: a list of steps that cut the text
 *   tokenizer_split.c         text to pieces: added tokens first, then those steps
 *   tokenizer_bpe.c           pieces to ids: the merges
 *   tokenizer_decoder.c       its decoder: the text of every token
 *   tokenizer_alphabet.c      the characters that byte-level vocabularies write bytes with
 *   tokenizer_regex.c         regular expressions as the tokenizers library reads them
 *   tokenizer_unicode.c       Unicode as the tokenizers library knows it
 *   tokenizer_map.c           two hash tables
 *   json_file.c               a JSON file, and its members
 *   end_of_text.c             which ids end a text: tokenizer_config.json, generation_config.json, names */
#ifndef IHA_DATA_TOKENIZER_INTERNAL_H
#define IHA_DATA_TOKENIZER_INTERNAL_H

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "data/end_of_text.h"
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

/* ---- Unicode ---- */

/* One code point of UTF-8 and its length (1-4); invalid bytes come one at a time, as UINT32_MAX. */
uint32_t utf8_next(const char *bytes, size_t length, int *used);
int utf8_put(uint32_t code, char out[4]);
bool is_utf8(const char *text, size_t length);
bool is_space(uint32_t code);
size_t step_back(const char *text, size_t end);       /* where the code point before `end` starts */
size_t spaces_after(const char *text, size_t length); /* bytes of spaces at the start */
size_t start_of_spaces_before(const char *text, size_t limit,
                              size_t end); /* back from end, not before limit */

struct text { /* of any bytes; grows */
    char *bytes;
    size_t length, capacity;
};
int text_append(struct text *t, const char *bytes, size_t length); /* -1: no memory */

struct code_ranges {
    uint32_t (*ranges)[2]; /* first, last */
    size_t count, capacity;
};
int code_ranges_add(struct code_ranges *r, uint32_t first, uint32_t last);

/* A regular expression must see UTF-8 only, and categories as the library has them. Bytes that are no UTF-8
 * become U+0001, neither space nor letter nor digit, and code points that PCRE2 may file elsewhere another of
 * the same length, so that offsets stay true; what gets encoded are the bytes as they were. `named`: the code
 * points that patterns name. Sets *clean to a malloc'd copy, or NULL when the text can stay as it is. */
int clean_text(const struct code_ranges *named, const char *text, size_t length, char **clean);

/* Appends text in another form; bytes that are no UTF-8 stay. -1: no memory. */
enum normal_form { FORM_NFC, FORM_NFD, FORM_NFKC, FORM_NFKD };
int append_form(struct text *out, const char *bytes, size_t length, enum normal_form form);
int append_lower(struct text *out, const char *bytes, size_t length);

/* ---- regular expressions ---- */

enum { REGEX_MESSAGE = 200 };

/* A pattern of the file, rewritten for PCRE2. NULL when it has something that the library may read otherwise,
 * or does not compile: then the message, which continues "its pattern ". The code points it names go to
 * *named. */
pcre2_code *regex_compile(const char *pattern, struct code_ranges *named, char message[REGEX_MESSAGE]);
pcre2_code *regex_compile_literal(const char *text, struct code_ranges *named, char message[REGEX_MESSAGE]);
pcre2_code *regex_compile_pcre2(const char *pattern, char message[REGEX_MESSAGE]); /* in PCRE2's own syntax */

/* The first match after the one that ends at last_end (SIZE_MAX: the first of all): 1 found, 0 none, -1 an error, which
 * names the pattern as `what`. An empty match directly after another match does not count, as in Rust's regex. */
int regex_next(const pcre2_code *regex, const char *text, size_t length, size_t last_end,
               pcre2_match_data *match, pcre2_match_context *limits, const char *what, size_t *start,
               size_t *end, struct error *e);

/* ---- normalizing ---- */

enum { MAX_STEPS = 32, HEAP_LIMIT_KIB = 256 << 10 };

struct normal_step {
    enum normal_kind { NORMAL_FORM, NORMAL_LOWER, NORMAL_PREPEND, NORMAL_REPLACE, NORMAL_STRIP } kind;
    enum normal_form form;
    pcre2_code *regex;       /* NORMAL_REPLACE */
    char *pattern, *content; /* NORMAL_REPLACE with pattern as it stands, if regex is NULL; NORMAL_PREPEND */
    bool left, right;        /* NORMAL_STRIP */
};

/* ---- splitting ---- */

enum { MAX_STAGES = 16 };

enum split_behavior { SPLIT_ISOLATED, SPLIT_REMOVED, SPLIT_CONTIGUOUS, SPLIT_WITH_PREVIOUS, SPLIT_WITH_NEXT };

/* One step of the pre-tokenizer. */
struct stage {
    enum stage_kind {
        STAGE_SPLIT,     /* at what a regular expression matches */
        STAGE_SPACE,     /* put a space in front */
        STAGE_METASPACE, /* spaces become the replacement; put one in front; cut before each */
    } kind;
    pcre2_code *regex;
    enum split_behavior behavior;
    bool invert;
    char replacement[8]; /* UTF-8 */
    enum prepend_scheme { PREPEND_ALWAYS, PREPEND_FIRST, PREPEND_NEVER } prepend;
    bool cuts;
};

struct added_token {
    int32_t id;
    bool lstrip, rstrip, single_word;
    bool special; /* control tokens, as <|endoftext|>, which a user's text must not have the power of */
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
    /* byte_level: a symbol to begin with is a byte; otherwise a character. */
    bool byte_level;
    int32_t byte_ids[256];     /* of bytes; or of ASCII characters; -1: the vocabulary lacks it */
    int32_t last_ids[256];     /* the same at the end of a piece, where there is a suffix */
    int32_t fallback_ids[256]; /* <0x00> to <0xFF>, if byte_fallback; -1: none */
    char *suffix;              /* end_of_word_suffix, which the last symbol of a piece has; NULL: none */
    int32_t unk;               /* what stands for a symbol that the vocabulary lacks; -1: nothing does */
    bool fuse_unk;             /* one unk for a run of such symbols */
    bool whole_words;          /* ignore_merges: a piece that is a token needs no merges */
    struct pair_map merges;
    struct string_map
        words; /* the vocabulary: by bytes if byte_level and whole_words, by characters otherwise */
    char *word_text;
};

/* ---- decoding ---- */

struct token {
    size_t at; /* of its text in the pool */
    uint32_t length;
    bool known, space_after;
};

/* What a decoder does to a sequence as a whole; the rest is in the texts of its tokens. */
struct decoder {
    char strip[8];   /* UTF-8 of a character to strip from the front, */
    int strip_count; /* at most so often */
};

/* ---- the tokenizer ---- */

struct tokenizer {
    bool bytes; /* the byte tokenizer: every member below `pool` is unused */
    int64_t size;
    int32_t end_of_text; /* -1: none known */
    bool has_eos_token;  /* end_of_text is what a tokenizer_config.json names */
    struct end_ids ends;
    struct token *tokens; /* [size]; after another token */
    struct token *first;  /* [size]; at the start of a sequence; NULL: as after another */
    char *pool;           /* each text has a space before it and a NUL after it */
    struct decoder decoder;
    char refusal[512];         /* why it cannot encode; "" when it can */
    struct added_set added[2]; /* in the order they are looked for: `normalized: false`, then true */
    struct normal_step steps[MAX_STEPS];
    int step_count;
    struct stage stages[MAX_STAGES];
    int stage_count;
    struct code_ranges named; /* code points that the stages' patterns name */
    pcre2_code *word;         /* one character of a word, for added tokens that must stand alone */
    struct bpe bpe;
};

/* The first reason stays. Always returns 0: such a tokenizer still decodes. */
int refuse_to_encode(struct tokenizer *t, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* tokenizer_json.c: fills a zeroed *t, or returns -1 and leaves the rest to tokenizer_close. */
int tokenizer_load_json(struct tokenizer *t, const char *path, int64_t vocab_size, struct error *e);

/* tokenizer_normalizer.c: reads the "normalizer" (which may be NULL) into t->steps. */
int normalizer_load(struct tokenizer *t, const struct cJSON *node, const char *path, struct error *e);
void normalizer_free(struct tokenizer *t);

/* The text after every step, to be freed by the caller; *moved when its start is not the text's. continues: nothing is
 * put in front of it, and no spaces there are stripped. */
int normalize_text(const struct tokenizer *t, const char *bytes, size_t length, bool continues,
                   struct text *out, bool *moved, struct error *e);

/* tokenizer_pretokenizer.c: reads the "pre_tokenizer" (which may be NULL) into t->stages. */
/* How Metaspace puts a space in front: read from a pre-tokenizer or a decoder. */
int prepend_scheme_load(const struct cJSON *node, enum prepend_scheme *scheme, const char *path,
                        struct error *e);
int pre_tokenizer_load(struct tokenizer *t, const struct cJSON *node, const char *path, struct error *e);
void pre_tokenizer_free(struct tokenizer *t);

/* tokenizer_bpe.c: reads the BPE "model"; vocab maps the text of its tokens, as in the file, to ids. */
int bpe_load(struct tokenizer *t, const struct cJSON *model, const struct string_map *vocab, const char *path,
             struct error *e);
void bpe_free(struct bpe *bpe);

/* tokenizer_decoder.c. A decoder that needs to see more of a sequence than its tokens one after the other is
 * refused (EXIT_USER). token_decoder_text appends a token's text, which begins a sequence or does not. */
struct decoder_steps;
struct decoder_steps *token_decoder_load(struct tokenizer *t, const struct cJSON *node, const char *path,
                                         struct error *e);
int token_decoder_text(const struct decoder_steps *steps, const char *token, bool begins, struct text *out,
                       bool *space_after, struct error *e);
bool token_decoder_knows_begin(const struct decoder_steps *steps); /* may text at the start be another? */
void token_decoder_free(struct decoder_steps *steps);

/* tokenizer_alphabet.c. byte_character fills out with the UTF-8 of one byte's character and returns its
 * length; bytes_of_token undoes it for a whole token, returning the number of bytes, or -1 when a character
 * is none of the 256 (out, which may be NULL, then holds nothing of use). */
int byte_character(unsigned char byte, char out[3]);
int64_t bytes_of_token(const char *token, size_t length, char *out);

/* end_of_text.c. The tokenizer_config.json beside the file `path`, or NULL; its eos_token, malloc'd, or NULL; and the
 * end ids of a generation_config.json beside it. */
extern const char *const end_of_text_names[];
extern const int end_of_text_name_count;
int read_tokenizer_config(const char *path, struct cJSON **root, struct error *e);
int read_eos_token(const char *path, char **name, struct error *e);
int read_generation_config_beside(const char *path, int64_t vocab_size, struct end_ids *ends,
                                  struct error *e);

/* json_file.c. A whole file as JSON, or NULL; `what` ends the message of a file that cannot be opened. */
struct cJSON *json_read(const char *path, const char *what, struct error *e);

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
    const char *start; /* where a slice's bytes are that start the text; NULL: it is done with */
    bool plain;        /* special tokens written out in the text are ordinary text */
    enum text_place place;
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

#endif

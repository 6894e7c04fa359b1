/* The tokenizer's public functions: opening by name, decoding by table, and the course of one encoding.
 *
 * A tokenizer is read-only once open: everything that encoding changes lives in a struct encoding of the
 * call, so any number of threads may share one. */
#include "data/tokenizer_internal.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

enum { BYTE_IDS = 257, END_OF_DOCUMENT = 256 };

/* ---- opening and closing ---- */

static int make_byte_tokenizer(struct tokenizer *t, int64_t vocab_size, struct error *e) {
    if (vocab_size < BYTE_IDS)
        return fail_user(e,
                         "the byte tokenizer has ids up to %d but the model's vocab_size is %lld: set "
                         "model.vocab_size to %d or more",
                         BYTE_IDS - 1, (long long)vocab_size, BYTE_IDS);
    t->bytes = true;
    t->size = BYTE_IDS;
    t->end_of_text = END_OF_DOCUMENT;
    end_ids_add(&t->ends, END_OF_DOCUMENT);
    t->tokens = calloc(BYTE_IDS, sizeof *t->tokens); /* the last one stays unknown: it has no text */
    t->pool = calloc(256, 2);
    if (!t->tokens || !t->pool)
        return fail_run(e, "out of memory for the byte tokenizer");
    for (int b = 0; b < 256; b++) {
        t->pool[2 * b] = (char)b;
        t->tokens[b] = (struct token){.at = 2 * (size_t)b, .length = 1, .known = true};
    }
    return 0;
}

struct tokenizer *tokenizer_open(const char *name, int64_t vocab_size, struct error *e) {
    struct tokenizer *t = calloc(1, sizeof *t);
    if (!t) {
        fail_run(e, "out of memory for a tokenizer");
        return NULL;
    }
    int rc = strcmp(name, "bytes") == 0 ? make_byte_tokenizer(t, vocab_size, e)
                                        : tokenizer_load_json(t, name, vocab_size, e);
    if (rc == 0)
        return t;
    tokenizer_close(t);
    return NULL;
}

void tokenizer_close(struct tokenizer *t) {
    if (!t)
        return;
    added_set_free(&t->added[0]);
    added_set_free(&t->added[1]);
    normalizer_free(t);
    pre_tokenizer_free(t);
    bpe_free(&t->bpe);
    free(t->tokens);
    free(t->first);
    free(t->pool);
    free(t);
}

int64_t tokenizer_size(const struct tokenizer *t) {
    return t->size;
}

int32_t tokenizer_end_of_text(const struct tokenizer *t) {
    return t->end_of_text;
}

int32_t tokenizer_eos_token(const struct tokenizer *t) {
    return t->has_eos_token ? t->end_of_text : -1;
}

const struct end_ids *tokenizer_end_ids(const struct tokenizer *t) {
    return &t->ends;
}

/* ---- decoding ---- */

const char *tokenizer_decode(const struct tokenizer *t, int32_t id, size_t *length) {
    bool known = id >= 0 && id < t->size && t->tokens[id].known;
    *length = known ? t->tokens[id].length : 0;
    return known ? t->pool + t->tokens[id].at : "";
}

const char *tokenizer_decode_next(const struct tokenizer *t, struct decoding *d, int32_t id, size_t *length) {
    *length = 0;
    if (id < 0 || id >= t->size || !t->tokens[id].known)
        return "";
    const struct token *token = t->first && !d->begun ? &t->first[id] : &t->tokens[id];
    const char *text = t->pool + token->at, *strip = t->decoder.strip;
    size_t n = token->length, strip_length = strlen(strip);
    d->begun = true;
    if (d->space) { /* the pool has one before every text */
        text--;
        n++;
    }
    d->space = token->space_after;
    while (d->stripped < t->decoder.strip_count && n >= strip_length &&
           memcmp(text, strip, strip_length) == 0) {
        text += strip_length;
        n -= strip_length;
        d->stripped++;
    }
    if (n > 0)
        d->stripped = t->decoder.strip_count;
    *length = n;
    return text;
}

/* ---- encoding ---- */

int push_id(struct encoding *x, int32_t id) {
    if (x->count == x->capacity) {
        int64_t capacity = 2 * x->capacity;
        int32_t *more = realloc(x->ids, (size_t)capacity * sizeof *more);
        if (!more)
            return fail_run(x->e, "out of memory for %lld tokens", (long long)capacity);
        x->ids = more;
        x->capacity = capacity;
    }
    x->ids[x->count++] = id;
    return 0;
}

static int encode_bytes(struct encoding *x, const char *text, size_t length) {
    for (size_t i = 0; i < length; i++)
        if (push_id(x, (unsigned char)text[i]))
            return -1;
    return 0;
}

enum { CACHE_FROM_BYTES = 512 };

static int prepare_encoding(struct encoding *x, size_t length) {
    x->match = pcre2_match_data_create(1, NULL); /* only the whole match is of interest */
    x->limits = pcre2_match_context_create(NULL);
    if (!x->match || !x->limits)
        return fail_run(x->e, "out of memory for matching");
    pcre2_set_heap_limit(x->limits, HEAP_LIMIT_KIB);
    if (length >= CACHE_FROM_BYTES)
        x->cache = calloc(CACHE_SLOTS, sizeof *x->cache); /* without it, slower and the same */
    return 0;
}

static int encode_with_file(struct encoding *x, const char *text, size_t length) {
    char *clean;
    if (x->t->refusal[0])
        return fail_user(x->e, "this tokenizer cannot encode text: %s; decoding works", x->t->refusal);
    if (length > INT32_MAX)
        return fail_user(x->e, "%zu bytes of text are too many at once: encode it in parts", length);
    if (clean_text(&x->t->named, text, length, &clean))
        return fail_run(x->e, "out of memory for %zu bytes of text", length);
    int rc = prepare_encoding(x, length);
    if (rc == 0)
        rc = encode_text(x, (struct slice){text, clean ? clean : text, length});
    free(clean);
    pcre2_match_data_free(x->match);
    pcre2_match_context_free(x->limits);
    bpe_scratch_free(&x->scratch);
    free(x->cache);
    return rc;
}

static int64_t encode(const struct tokenizer *t, const char *text, size_t length, bool plain,
                      enum text_place place, int32_t **ids, struct error *e) {
    struct encoding x = {.t = t,
                         .e = e,
                         .plain = plain,
                         .place = place,
                         .capacity = (int64_t)(t->bytes ? length : length / 3) + 16};
    *ids = NULL;
    x.ids = malloc((size_t)x.capacity * sizeof *x.ids);
    if (!x.ids)
        return fail_run(e, "out of memory for %lld tokens", (long long)x.capacity);
    if (t->bytes ? encode_bytes(&x, text, length) : encode_with_file(&x, text, length)) {
        free(x.ids);
        return -1;
    }
    *ids = x.ids;
    return x.count;
}

int64_t tokenizer_encode(const struct tokenizer *t, const char *text, size_t length, int32_t **ids,
                         struct error *e) {
    return encode(t, text, length, false, TEXT_BEGINS, ids, e);
}

int64_t tokenizer_encode_plain(const struct tokenizer *t, const char *text, size_t length,
                               enum text_place place, int32_t **ids, struct error *e) {
    return encode(t, text, length, true, place, ids, e);
}

void tokenizer_strips(const struct tokenizer *t, int32_t id, bool *before, bool *after) {
    *before = *after = false;
    for (int k = 0; k < 2; k++)
        for (uint32_t i = 0; i < t->added[k].count; i++)
            if (t->added[k].tokens[i].id == id && t->added[k].tokens[i].special) {
                *before = t->added[k].tokens[i].lstrip;
                *after = t->added[k].tokens[i].rstrip;
            }
}

/* Hugging Face's tokenizer.json: the vocabulary, the added tokens, and the text of every id.
 *
 * The file is parsed with cJSON, whose lists are linked: everything here walks them once and looks tokens up
 * in a hash table. All entries (vocabulary, then added tokens) are first collected and their ids checked,
 * which bounds every later allocation; then their text goes into one pool, already decoded, so that
 * decoding is an array access.
 *
 * Not read: "post_processor" (encoding adds no BOS or EOS), "truncation" and "padding", which belong to a
 * model's input and not to its text. */
#include "data/tokenizer_internal.h"

#include <cjson/cJSON.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAX_IDS = 1 << 24
}; /* the largest published files have 10^6; what is far larger is damaged or hostile */

struct entry {
    const char *text; /* in the JSON tree */
    int32_t id;
};

struct loader {
    struct tokenizer *t;
    const char *path;
    struct error *e;
    const cJSON *root, *model;
    struct entry *entries; /* the vocabulary's, then the added tokens' */
    size_t count, capacity, vocab_count;
    int64_t max_id;
    struct string_map vocab; /* text as the file has it, to id: the model's own tokens */
    struct decoder_steps *decoder;
    struct text pool;
};

/* ---- small helpers ---- */

/* Text of the file, made fit for one line of an error. */
static const char *shown(const char *text, char out[48]) {
    snprintf(out, 48, "%.40s", text);
    for (char *c = out; *c; c++)
        if ((unsigned char)*c < ' ' || *c == 0x7f)
            *c = '?';
    return out;
}

int refuse_to_encode(struct tokenizer *t, const char *format, ...) {
    va_list args;
    if (t->refusal[0])
        return 0;
    va_start(args, format);
    vsnprintf(t->refusal, sizeof t->refusal, format, args);
    va_end(args);
    for (char *c = t->refusal; *c; c++)
        if ((unsigned char)*c < ' ')
            *c = '?';
    return 0;
}

static int out_of_memory(const struct loader *l) {
    return fail_run(l->e, "%s: out of memory", l->path);
}

static int not_a_tokenizer(const struct loader *l, const char *what) {
    return fail_user(l->e, "%s: %s; is this a Hugging Face tokenizer.json?", l->path, what);
}

/* ---- collecting entries ---- */

static int add_entry(struct loader *l, const char *text, double id) {
    char name[48];
    if (!(id >= 0 && id <= INT32_MAX && id == (double)(int32_t)id))
        return fail_user(
            l->e,
            "%s: token '%s' has the id %g, which is not a token id; the file is damaged, fetch it again",
            l->path, shown(text, name), id);
    if (l->count == l->capacity) {
        size_t capacity = l->capacity ? 2 * l->capacity : 1024;
        struct entry *more = realloc(l->entries, capacity * sizeof *more);
        if (!more)
            return out_of_memory(l);
        l->entries = more;
        l->capacity = capacity;
    }
    l->entries[l->count++] = (struct entry){text, (int32_t)id};
    if ((int64_t)id > l->max_id)
        l->max_id = (int64_t)id;
    return 0;
}

static int add_vocab_entry(struct loader *l, const char *text, double id) {
    if (add_entry(l, text, id))
        return -1;
    return string_map_put(&l->vocab, text, strlen(text), (int32_t)id) ? out_of_memory(l) : 0;
}

/* BPE, WordPiece and WordLevel: {"text": id}. */
static int collect_object(struct loader *l, const cJSON *vocab) {
    for (const cJSON *item = vocab->child; item; item = item->next) {
        if (!cJSON_IsNumber(item))
            return not_a_tokenizer(l, "its vocabulary has an id that is not a number");
        if (add_vocab_entry(l, item->string, item->valuedouble))
            return -1;
    }
    return 0;
}

/* Unigram: [["text", score]], where the place is the id. */
static int collect_list(struct loader *l, const cJSON *vocab) {
    double id = 0;
    for (const cJSON *item = vocab->child; item; item = item->next) {
        const cJSON *text = cJSON_IsArray(item) ? item->child : NULL;
        if (!cJSON_IsString(text))
            return not_a_tokenizer(l, "its vocabulary has an entry that is not [text, score]");
        if (add_vocab_entry(l, text->valuestring, id++))
            return -1;
    }
    return 0;
}

static int collect_vocab(struct loader *l) {
    const cJSON *vocab = json_member(l->model, "vocab");
    if (cJSON_IsObject(vocab) && collect_object(l, vocab))
        return -1;
    if (cJSON_IsArray(vocab) && collect_list(l, vocab))
        return -1;
    if (l->count == 0)
        return not_a_tokenizer(l, "its model has no vocabulary");
    l->vocab_count = l->count;
    return 0;
}

static const cJSON *added_tokens(const struct loader *l) {
    return json_member(l->root, "added_tokens");
}

static int collect_added(struct loader *l) {
    const cJSON *list = added_tokens(l);
    char name[48];
    if (list && !cJSON_IsArray(list))
        return not_a_tokenizer(l, "its \"added_tokens\" is not a list");
    for (const cJSON *item = list ? list->child : NULL; item; item = item->next) {
        const cJSON *id = json_member(item, "id"), *content = json_member(item, "content");
        if (!cJSON_IsNumber(id) || !cJSON_IsString(content))
            return not_a_tokenizer(l, "an added token lacks its \"id\" or its \"content\"");
        const char *text = content->valuestring;
        if (!is_utf8(text, strlen(text)))
            return not_a_tokenizer(l, "an added token is not UTF-8");
        if (add_entry(l, text, id->valuedouble))
            return -1;
        int32_t known = string_map_get(&l->vocab, text, strlen(text), -1);
        if (known >= 0 && known != l->entries[l->count - 1].id)
            return fail_user(l->e,
                             "%s: token '%s' has the id %d and, as an added token, %d; the file is damaged",
                             l->path, shown(text, name), known, l->entries[l->count - 1].id);
    }
    return 0;
}

static int check_range(const struct loader *l, int64_t vocab_size) {
    if (l->max_id >= vocab_size)
        return fail_user(
            l->e,
            "%s: the tokenizer has ids up to %lld but the model's vocab_size is %lld: it belongs to "
            "another model",
            l->path, (long long)l->max_id, (long long)vocab_size);
    if (l->max_id >= MAX_IDS)
        return fail_user(
            l->e, "%s: the id %lld is larger than any tokenizer's; the file is damaged, fetch it again",
            l->path, (long long)l->max_id);
    return 0;
}

/* ---- the table of texts ---- */

/* A token's text into the pool, with a space before it and a NUL after it. */
static int add_text(struct loader *l, const char *text, bool begins, struct token *token) {
    bool space_after;
    if (text_append(&l->pool, " ", 1))
        return out_of_memory(l);
    size_t at = l->pool.length;
    if (token_decoder_text(l->decoder, text, begins, &l->pool, &space_after, l->e))
        return -1;
    size_t length = l->pool.length - at;
    if (length > UINT32_MAX || text_append(&l->pool, "", 1))
        return out_of_memory(l);
    *token = (struct token){.at = at, .length = (uint32_t)length, .known = true, .space_after = space_after};
    return 0;
}

static int set_text(struct loader *l, int32_t id, const char *text) {
    if (add_text(l, text, false, &l->t->tokens[id]))
        return -1;
    return l->t->first ? add_text(l, text, true, &l->t->first[id]) : 0;
}

static int same_id(const struct loader *l, const struct entry *entry) {
    char name[48];
    return fail_user(
        l->e, "%s: the id %d belongs to '%s' and to another token; the file is damaged, fetch it again",
        l->path, entry->id, shown(entry->text, name));
}

static int fill_vocab(struct loader *l) {
    struct tokenizer *t = l->t;
    t->size = l->max_id + 1;
    t->tokens = calloc((size_t)t->size, sizeof *t->tokens);
    t->first = token_decoder_knows_begin(l->decoder) ? calloc((size_t)t->size, sizeof *t->first) : NULL;
    if (!t->tokens || (token_decoder_knows_begin(l->decoder) && !t->first))
        return out_of_memory(l);
    for (size_t i = 0; i < l->vocab_count; i++) {
        if (t->tokens[l->entries[i].id].known)
            return same_id(l, &l->entries[i]);
        if (set_text(l, l->entries[i].id, l->entries[i].text))
            return -1;
    }
    return 0;
}

/* What an added token looks like in normalized text, and to the decoder. */
static int added_text(const struct loader *l, const cJSON *item, bool *normalized, struct text *out) {
    const char *text = json_member(item, "content")->valuestring;
    bool special = false, moved;
    *out = (struct text){0};
    if (json_bool(item, "special", false, &special, l->path, l->e) ||
        json_bool(item, "normalized", !special, normalized, l->path, l->e))
        return -1;
    if (*normalized && l->t->step_count && !l->t->refusal[0]) {
        if (normalize_text(l->t, text, strlen(text), false, out, &moved, l->e))
            return -1;
    } else if (text_append(out, text, strlen(text))) {
        return out_of_memory(l);
    }
    return text_append(out, "", 1) ? out_of_memory(l) : 0;
}

static int set_added_text(struct loader *l, const struct entry *entry, const cJSON *item) {
    struct text text;
    bool normalized;
    int rc = added_text(l, item, &normalized, &text);
    if (rc == 0)
        rc = set_text(l, entry->id, text.bytes);
    free(text.bytes);
    return rc;
}

/* An added token may be in the vocabulary too, but not have another's id. */
static int fill_added(struct loader *l) {
    const cJSON *list = added_tokens(l), *item = list ? list->child : NULL;
    struct string_map seen = {0};
    int rc = 0;
    for (size_t i = l->vocab_count; i < l->count && rc == 0; i++, item = item->next) {
        const struct entry *entry = &l->entries[i];
        size_t length = strlen(entry->text);
        int32_t own = string_map_get(&l->vocab, entry->text, length, -1);
        bool taken = l->t->tokens[entry->id].known && own != entry->id;
        if (taken || string_map_get(&seen, entry->text, length, -1) >= 0)
            rc = same_id(l, entry);
        else if (string_map_put(&seen, entry->text, length, entry->id))
            rc = out_of_memory(l);
        else
            rc = set_added_text(l, entry, item);
    }
    string_map_free(&seen);
    return rc;
}

/* ---- what encoding needs ---- */

static int put_added(struct loader *l, const cJSON *item) {
    struct added_token token = {.id = (int32_t)json_member(item, "id")->valuedouble};
    struct text text;
    bool normalized;
    if (json_bool(item, "lstrip", false, &token.lstrip, l->path, l->e) ||
        json_bool(item, "rstrip", false, &token.rstrip, l->path, l->e) ||
        json_bool(item, "special", false, &token.special, l->path, l->e) ||
        json_bool(item, "single_word", false, &token.single_word, l->path, l->e))
        return -1;
    int rc = added_text(l, item, &normalized, &text);
    if (rc == 0 && *text.bytes && added_set_put(&l->t->added[normalized], text.bytes, &token))
        rc = out_of_memory(l);
    free(text.bytes);
    return rc;
}

static int load_added_sets(struct loader *l) {
    const cJSON *list = added_tokens(l);
    int rc = 0;
    for (const cJSON *item = list ? list->child : NULL; item && rc == 0; item = item->next)
        rc = put_added(l, item);
    return rc;
}

static int load_model(struct loader *l) {
    if (!json_is_type(l->model, "BPE") && (json_member(l->model, "type") || !json_member(l->model, "merges")))
        return refuse_to_encode(l->t, "its model is not BPE");
    return bpe_load(l->t, l->model, &l->vocab, l->path, l->e);
}

/* ---- the end of a text ---- */

static int32_t added_id(const struct loader *l, const char *name) {
    for (size_t i = l->vocab_count; i < l->count; i++)
        if (strcmp(l->entries[i].text, name) == 0)
            return l->entries[i].id;
    return -1;
}

static int32_t id_of_name(const struct loader *l, const char *name) {
    int32_t id = added_id(l, name);
    return id >= 0 ? id : string_map_get(&l->vocab, name, strlen(name), -1);
}

/* The rule that data/prepare_tokenizers.py follows too: the eos_token of a tokenizer_config.json beside the
 * file; or the first of end_of_text.c that is an added token, or else an ordinary one. */
static int find_end_of_text(struct loader *l) {
    char *name = NULL;
    int32_t end = -1;
    if (read_eos_token(l->path, &name, l->e))
        return -1;
    if (name) {
        char text[48];
        end = id_of_name(l, name);
        int rc = end >= 0
                     ? 0
                     : fail_user(l->e,
                                 "%s: the tokenizer_config.json beside it names '%s' as its eos_token, and "
                                 "there is no such token; the files do not belong together",
                                 l->path, shown(name, text));
        free(name);
        if (rc)
            return -1;
        l->t->has_eos_token = true;
    }
    for (int i = 0; i < end_of_text_name_count && end < 0; i++)
        end = added_id(l, end_of_text_names[i]);
    for (int i = 0; i < end_of_text_name_count && end < 0; i++)
        end = id_of_name(l, end_of_text_names[i]);
    if (end >= 0)
        end_ids_add(&l->t->ends, end);
    l->t->end_of_text = end;
    return 0;
}

/* ---- all of it ---- */

static int load_tree(struct loader *l, int64_t vocab_size) {
    l->model = json_member(l->root, "model");
    if (!cJSON_IsObject(l->model))
        return not_a_tokenizer(l, "it has no \"model\"");
    if (collect_vocab(l) || collect_added(l) || check_range(l, vocab_size) ||
        normalizer_load(l->t, json_member(l->root, "normalizer"), l->path, l->e) ||
        pre_tokenizer_load(l->t, json_member(l->root, "pre_tokenizer"), l->path, l->e))
        return -1;
    l->decoder = token_decoder_load(l->t, json_member(l->root, "decoder"), l->path, l->e);
    if (!l->decoder || fill_vocab(l) || load_model(l) || fill_added(l) || load_added_sets(l))
        return -1;
    return find_end_of_text(l);
}

int tokenizer_load_json(struct tokenizer *t, const char *path, int64_t vocab_size, struct error *e) {
    struct loader l = {.t = t, .path = path, .e = e, .max_id = -1};
    cJSON *root = json_read(path, "data.tokenizer takes none, bytes or a tokenizer.json", e);
    if (!root)
        return -1;
    l.root = root;
    int rc = load_tree(&l, vocab_size);
    t->pool = l.pool.bytes;
    token_decoder_free(l.decoder);
    free(l.entries);
    string_map_free(&l.vocab);
    cJSON_Delete(root);
    return rc ? rc : read_generation_config_beside(path, vocab_size, &t->ends, e);
}

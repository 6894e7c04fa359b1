/* Byte-pair encoding: a piece of text, as bytes, to the ids of the tokens that its merges lead to.
 *
 * Every byte starts as a token of its own; then, again and again, the adjacent pair whose merge stands first
 * in the file is replaced by its result, the leftmost such pair first (Sennrich et al., 2016, over bytes as
 * in GPT-2). A heap of (rank, position) finds that pair, so that a piece of n bytes takes O(n log n) even
 * when it is a megabyte without a space. Entries go stale when a neighbour is merged away; they are
 * recognised when they come up, by looking at the pair that stands there now. Short pieces repeat a lot in
 * real text: the ids of those met in this call are copied from the output instead of being computed again. */
#include "data/tokenizer_internal.h"

#include <cjson/cJSON.h>
#include <stdlib.h>
#include <string.h>

struct symbol {
    int32_t id;         /* -1: merged into its left neighbour */
    int32_t prev, next; /* -1: none */
};

/* ---- loading ---- */

struct merge_loader {
    struct bpe *bpe;
    const struct string_map *vocab;
    const char *path;
    struct error *e;
    char *joined;
    size_t joined_capacity;
};

/* Puts a and b together in l->joined. */
static int join(struct merge_loader *l, const char *a, size_t a_length, const char *b, size_t b_length) {
    size_t length = a_length + b_length;
    if (length > l->joined_capacity) {
        char *more = realloc(l->joined, 2 * length);
        if (!more)
            return fail_run(l->e, "%s: out of memory", l->path);
        l->joined = more;
        l->joined_capacity = 2 * length;
    }
    memcpy(l->joined, a, a_length);
    memcpy(l->joined + a_length, b, b_length);
    return 0;
}

static int add_merge(struct merge_loader *l, uint32_t rank, const char *a, size_t a_length, const char *b,
                     size_t b_length) {
    int32_t left = -1, right = -1, result = -1;
    if (a_length && b_length) {
        if (join(l, a, a_length, b, b_length))
            return -1;
        left = string_map_get(l->vocab, a, a_length, -1);
        right = string_map_get(l->vocab, b, b_length, -1);
        result = string_map_get(l->vocab, l->joined, a_length + b_length, -1);
    }
    if (left < 0 || right < 0 || result < 0)
        return fail_user(
            l->e,
            "%s: merge %u needs a token that the vocabulary lacks; the file is damaged, fetch it "
            "again",
            l->path, rank);
    if (pair_map_put(&l->bpe->merges, (uint32_t)left, (uint32_t)right, rank, result))
        return fail_run(l->e, "%s: out of memory", l->path);
    return 0;
}

static int bad_merge(struct merge_loader *l, uint32_t rank) {
    return fail_user(
        l->e, "%s: merge %u is neither \"a b\" nor [\"a\", \"b\"]; the file is damaged, fetch it again",
        l->path, rank);
}

static int load_merge(struct merge_loader *l, uint32_t rank, const cJSON *item) {
    if (cJSON_IsString(item)) {
        const char *text = item->valuestring, *space = strchr(text, ' ');
        if (strncmp(text, "#version", 8) == 0) /* a line of the old merges.txt, not a merge */
            return 0;
        if (!space || strchr(space + 1, ' '))
            return bad_merge(l, rank);
        return add_merge(l, rank, text, (size_t)(space - text), space + 1, strlen(space + 1));
    }
    const cJSON *a = cJSON_IsArray(item) ? item->child : NULL, *b = a ? a->next : NULL;
    if (!cJSON_IsString(a) || !cJSON_IsString(b) || b->next)
        return bad_merge(l, rank);
    return add_merge(l, rank, a->valuestring, strlen(a->valuestring), b->valuestring, strlen(b->valuestring));
}

static int load_merges(struct tokenizer *t, const cJSON *merges, const struct string_map *vocab,
                       const char *path, struct error *e) {
    struct merge_loader l = {.bpe = &t->bpe, .vocab = vocab, .path = path, .e = e};
    uint32_t rank = 0;
    int rc = 0;
    for (const cJSON *item = merges->child; item && rc == 0; item = item->next)
        rc = load_merge(&l, rank++, item);
    free(l.joined);
    return rc;
}

/* Which id each byte has: returns how many of the 256 have none. */
static int load_bytes(struct bpe *bpe, const struct string_map *vocab) {
    int lacking = 0;
    for (int b = 0; b < 256; b++) {
        char text[3];
        int length = byte_character((unsigned char)b, text);
        bpe->byte_ids[b] = string_map_get(vocab, text, (size_t)length, -1);
        lacking += bpe->byte_ids[b] < 0;
    }
    return lacking;
}

static int load_words(struct tokenizer *t, const struct string_map *vocab) {
    for (size_t i = 0; i < vocab->capacity; i++) {
        const struct string_slot *slot = &vocab->slots[i];
        if (!slot->key || bytes_of_token(slot->key, NULL) < 0)
            continue;
        const struct token *token = &t->tokens[slot->value];
        if (string_map_put(&t->bpe.words, t->pool + token->at, token->length, slot->value))
            return -1;
    }
    return 0;
}

/* Options that change which ids come out, and that byte-level models do without. */
static int refuse_options(struct tokenizer *t, const cJSON *model, const char *path, struct error *e) {
    const char *prefix = NULL, *suffix = NULL;
    const cJSON *dropout = json_member(model, "dropout");
    if (json_text(model, "continuing_subword_prefix", &prefix, path, e) ||
        json_text(model, "end_of_word_suffix", &suffix, path, e))
        return -1;
    if (dropout && !cJSON_IsNumber(dropout))
        return fail_user(e, "%s: \"dropout\" must be a number; is this a tokenizer.json?", path);
    if (prefix && *prefix)
        refuse_to_encode(t, "its model has a continuing_subword_prefix");
    if (suffix && *suffix)
        refuse_to_encode(t, "its model has an end_of_word_suffix");
    if (dropout && dropout->valuedouble != 0)
        refuse_to_encode(t, "its model draws merges at random (dropout)");
    return 0;
}

static int load_unk(struct bpe *bpe, const cJSON *model, const struct string_map *vocab, const char *path,
                    struct error *e) {
    const char *unk = NULL;
    if (json_text(model, "unk_token", &unk, path, e) ||
        json_bool(model, "fuse_unk", false, &bpe->fuse_unk, path, e))
        return -1;
    bpe->unk = unk ? string_map_get(vocab, unk, strlen(unk), -1) : -1;
    if (unk && bpe->unk < 0)
        return fail_user(e, "%s: its unk_token is not in its vocabulary; the file is damaged, fetch it again",
                         path);
    return 0;
}

int bpe_load(struct tokenizer *t, const cJSON *model, const struct string_map *vocab, const char *path,
             struct error *e) {
    const cJSON *merges = json_member(model, "merges");
    bool byte_fallback = false;
    if (!cJSON_IsArray(merges))
        return fail_user(e, "%s: its model has no list of \"merges\"; is this a tokenizer.json?", path);
    if (refuse_options(t, model, path, e) || load_unk(&t->bpe, model, vocab, path, e) ||
        json_bool(model, "byte_fallback", false, &byte_fallback, path, e) ||
        json_bool(model, "ignore_merges", false, &t->bpe.whole_words, path, e))
        return -1;
    if (load_bytes(&t->bpe, vocab) && byte_fallback)
        refuse_to_encode(t, "its vocabulary lacks bytes and falls back to others (byte_fallback)");
    if (t->refusal[0])
        return 0;
    if (t->bpe.whole_words && load_words(t, vocab))
        return fail_run(e, "%s: out of memory", path);
    return load_merges(t, merges, vocab, path, e);
}

void bpe_free(struct bpe *bpe) {
    pair_map_free(&bpe->merges);
    string_map_free(&bpe->words);
}

/* ---- the heap ---- */

/* An entry is rank << 32 | position: comparing entries compares ranks, then positions. */
static void heap_push(struct bpe_scratch *s, uint64_t entry) {
    size_t i = s->heap_count++;
    while (i > 0 && s->heap[(i - 1) / 2] > entry) {
        s->heap[i] = s->heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    s->heap[i] = entry;
}

static uint64_t heap_pop(struct bpe_scratch *s) {
    uint64_t top = s->heap[0], last = s->heap[--s->heap_count];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= s->heap_count)
            break;
        if (child + 1 < s->heap_count && s->heap[child + 1] < s->heap[child])
            child++;
        if (s->heap[child] >= last)
            break;
        s->heap[i] = s->heap[child];
        i = child;
    }
    s->heap[i] = last;
    return top;
}

/* ---- merging ---- */

/* Room for n symbols. A merge takes one pair away and enters at most two: n - 1 to begin with and two for
 * each of at most n - 1 merges is all the heap ever holds. */
static int reserve(struct bpe_scratch *s, size_t n) {
    if (n > s->symbol_capacity) {
        free(s->symbols);
        s->symbols = malloc(2 * n * sizeof *s->symbols);
        s->symbol_capacity = s->symbols ? 2 * n : 0;
    }
    if (3 * n > s->heap_capacity) {
        free(s->heap);
        s->heap = malloc(6 * n * sizeof *s->heap);
        s->heap_capacity = s->heap ? 6 * n : 0;
    }
    return s->symbols && s->heap ? 0 : -1;
}

void bpe_scratch_free(struct bpe_scratch *s) {
    free(s->symbols);
    free(s->heap);
}

static const struct pair_slot *merge_at(const struct bpe *bpe, const struct symbol *symbols, int32_t i) {
    if (i < 0 || symbols[i].id < 0 || symbols[i].next < 0)
        return NULL;
    return pair_map_get(&bpe->merges, (uint32_t)symbols[i].id, (uint32_t)symbols[symbols[i].next].id);
}

static void offer(const struct bpe *bpe, struct bpe_scratch *s, int32_t i) {
    const struct pair_slot *merge = merge_at(bpe, s->symbols, i);
    if (merge)
        heap_push(s, (uint64_t)merge->rank << 32 | (uint32_t)i);
}

/* A byte for each symbol; bytes the vocabulary lacks become unk, or vanish. Returns the number of symbols. */
static int32_t spell(const struct bpe *bpe, struct symbol *symbols, const char *bytes, size_t length) {
    int32_t n = 0;
    bool after_unk = false;
    for (size_t i = 0; i < length; i++) {
        int32_t id = bpe->byte_ids[(unsigned char)bytes[i]];
        bool is_unk = id < 0;
        if (is_unk)
            id = after_unk && bpe->fuse_unk ? -1 : bpe->unk;
        if (id >= 0) {
            symbols[n] = (struct symbol){id, n - 1, n + 1};
            n++;
        }
        after_unk = is_unk;
    }
    if (n > 0)
        symbols[n - 1].next = -1;
    return n;
}

static void merge_all(const struct bpe *bpe, struct bpe_scratch *s, int32_t n) {
    struct symbol *symbols = s->symbols;
    s->heap_count = 0;
    for (int32_t i = 0; i + 1 < n; i++)
        offer(bpe, s, i);
    while (s->heap_count > 0) {
        uint64_t entry = heap_pop(s);
        int32_t left = (int32_t)(uint32_t)entry;
        const struct pair_slot *merge = merge_at(bpe, symbols, left);
        if (!merge || merge->rank != entry >> 32)
            continue; /* stale */
        int32_t right = symbols[left].next;
        symbols[left].id = merge->id;
        symbols[left].next = symbols[right].next;
        symbols[right].id = -1;
        if (symbols[left].next >= 0)
            symbols[symbols[left].next].prev = left;
        offer(bpe, s, symbols[left].prev);
        offer(bpe, s, left);
    }
}

static int compute_piece(struct encoding *x, const char *bytes, size_t length) {
    const struct bpe *bpe = &x->t->bpe;
    if (bpe->whole_words) {
        int32_t id = string_map_get(&bpe->words, bytes, length, -1);
        if (id >= 0)
            return push_id(x, id);
    }
    if (reserve(&x->scratch, length))
        return fail_run(x->e, "out of memory for a piece of %zu bytes", length);
    int32_t n = spell(bpe, x->scratch.symbols, bytes, length);
    merge_all(bpe, &x->scratch, n);
    for (int32_t i = n > 0 ? 0 : -1; i >= 0; i = x->scratch.symbols[i].next)
        if (push_id(x, x->scratch.symbols[i].id))
            return -1;
    return 0;
}

/* ---- remembering ---- */

static int repeat_ids(struct encoding *x, const struct cached_piece *piece) {
    for (int i = 0; i < piece->count; i++)
        if (push_id(x, x->ids[piece->at + i]))
            return -1;
    return 0;
}

int encode_piece(struct encoding *x, const char *bytes, size_t length) {
    if (!x->cache || length > CACHE_KEY)
        return compute_piece(x, bytes, length);
    struct cached_piece *piece = &x->cache[hash_piece(bytes, length) % CACHE_SLOTS];
    if (piece->length == length && memcmp(piece->key, bytes, length) == 0)
        return repeat_ids(x, piece);
    int64_t at = x->count;
    if (compute_piece(x, bytes, length))
        return -1;
    piece->at = at;
    piece->count = (uint16_t)(x->count - at);
    piece->length = (uint8_t)length;
    memcpy(piece->key, bytes, length);
    return 0;
}

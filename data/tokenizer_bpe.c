/* Byte-pair encoding: a piece of text to the ids of the tokens that its merges lead to.
 *
 * Every byte (byte-level vocabularies) or character (others) starts as a token of its own; then, again and
 * again, the adjacent pair whose merge stands first in the file is replaced by its result, the leftmost such
 * pair first (Sennrich et al., 2016). A heap of (rank, position) finds that pair, so that a piece of n bytes
 * takes O(n log n) even when it is a megabyte without a space. Entries go stale when a neighbour is merged
 * away; they are recognised when they come up, by looking at the pair that stands there now. Short pieces
 * repeat a lot in real text: the ids of those met in this call are copied from the output instead of being
 * computed again. */
#include "data/tokenizer_internal.h"

#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_SUFFIX = 32 };

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

/* The id of the symbol that one byte, or one ASCII character, starts as. */
static int32_t id_of_byte(const struct bpe *bpe, const struct string_map *vocab, int b, const char *suffix) {
    char text[8 + MAX_SUFFIX];
    int length = 1;
    if (!bpe->byte_level && b >= 0x80)
        return -1;
    if (bpe->byte_level)
        length = byte_character((unsigned char)b, text);
    else
        text[0] = (char)b;
    memcpy(text + length, suffix, strlen(suffix));
    return string_map_get(vocab, text, (size_t)length + strlen(suffix), -1);
}

/* Returns how many of the 256 bytes of a byte-level vocabulary are lacking. */
static int load_bytes(struct bpe *bpe, const struct string_map *vocab) {
    int lacking = 0;
    for (int b = 0; b < 256; b++) {
        bpe->byte_ids[b] = id_of_byte(bpe, vocab, b, "");
        bpe->last_ids[b] = bpe->suffix ? id_of_byte(bpe, vocab, b, bpe->suffix) : bpe->byte_ids[b];
        lacking += bpe->byte_level && bpe->byte_ids[b] < 0;
    }
    return lacking;
}

/* <0x00> to <0xFF>, which spell a character that the vocabulary lacks. */
static void load_fallback(struct bpe *bpe, const struct string_map *vocab, bool byte_fallback) {
    char text[8];
    for (int b = 0; b < 256; b++) {
        snprintf(text, sizeof text, "<0x%02X>", b);
        bpe->fallback_ids[b] = byte_fallback ? string_map_get(vocab, text, 6, -1) : -1;
    }
}

/* The vocabulary by what it spells. Borrows no text, since the file's goes away. */
static int load_words(struct bpe *bpe, const struct string_map *vocab) {
    size_t bytes = 1;
    for (size_t i = 0; i < vocab->capacity; i++)
        bytes += vocab->slots[i].key ? vocab->slots[i].length : 0;
    char *out = bpe->word_text = malloc(bytes);
    if (!out)
        return -1;
    for (size_t i = 0; i < vocab->capacity; i++) {
        const struct string_slot *slot = &vocab->slots[i];
        int64_t length = slot->length;
        if (!slot->key || (bpe->byte_level && (length = bytes_of_token(slot->key, slot->length, out)) < 0))
            continue;
        if (!bpe->byte_level)
            memcpy(out, slot->key, slot->length);
        if (string_map_put(&bpe->words, out, (size_t)length, slot->value))
            return -1;
        out += length;
    }
    return 0;
}

/* Options that change which ids come out. "dropout" is for training the model that reads them: encoding here
 * never leaves a merge out. */
static int load_options(struct tokenizer *t, const cJSON *model, const char *path, struct error *e) {
    const char *prefix = NULL, *suffix = NULL;
    const cJSON *dropout = json_member(model, "dropout");
    if (json_text(model, "continuing_subword_prefix", &prefix, path, e) ||
        json_text(model, "end_of_word_suffix", &suffix, path, e))
        return -1;
    if (dropout && !cJSON_IsNumber(dropout))
        return fail_user(e, "%s: \"dropout\" must be a number; is this a tokenizer.json?", path);
    if (prefix && *prefix)
        return refuse_to_encode(t, "its model has a continuing_subword_prefix");
    if (suffix && strlen(suffix) > MAX_SUFFIX)
        return refuse_to_encode(t, "its end_of_word_suffix is longer than %d bytes", MAX_SUFFIX);
    if (suffix && *suffix && !(t->bpe.suffix = strdup(suffix)))
        return fail_run(e, "%s: out of memory", path);
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
    if (load_options(t, model, path, e) || load_unk(&t->bpe, model, vocab, path, e) ||
        json_bool(model, "byte_fallback", false, &byte_fallback, path, e) ||
        json_bool(model, "ignore_merges", false, &t->bpe.whole_words, path, e))
        return -1;
    if (load_bytes(&t->bpe, vocab) && byte_fallback)
        refuse_to_encode(t, "its vocabulary lacks bytes and falls back to others (byte_fallback)");
    if (t->bpe.suffix && byte_fallback)
        refuse_to_encode(t, "its model has an end_of_word_suffix and byte_fallback");
    load_fallback(&t->bpe, vocab, byte_fallback);
    if (t->refusal[0])
        return 0;
    if ((t->bpe.whole_words || !t->bpe.byte_level) && load_words(&t->bpe, vocab))
        return fail_run(e, "%s: out of memory", path);
    return load_merges(t, merges, vocab, path, e);
}

void bpe_free(struct bpe *bpe) {
    pair_map_free(&bpe->merges);
    string_map_free(&bpe->words);
    free(bpe->word_text);
    free(bpe->suffix);
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

/* The symbols of a piece before any merge. */
struct speller {
    const struct bpe *bpe;
    struct symbol *symbols;
    int32_t n;
    bool unk_pending; /* an unk that a following one may be fused with */
};

static void add_symbol(struct speller *s, int32_t id) {
    s->symbols[s->n] = (struct symbol){id, s->n - 1, s->n + 1};
    s->n++;
}

static void add_pending_unk(struct speller *s) {
    if (s->unk_pending)
        add_symbol(s, s->bpe->unk);
    s->unk_pending = false;
}

/* A character that the vocabulary lacks: its bytes, if they all have tokens; or unk; or nothing. Like the
 * library, an unk that waits to be fused comes after such bytes. */
static void add_unknown(struct speller *s, const char *bytes, int length) {
    const int32_t *fallback = s->bpe->fallback_ids;
    bool all = true;
    for (int i = 0; i < length; i++)
        all &= fallback[(unsigned char)bytes[i]] >= 0;
    if (all) {
        for (int i = 0; i < length; i++)
            add_symbol(s, fallback[(unsigned char)bytes[i]]);
    } else if (s->bpe->unk >= 0) {
        if (!s->bpe->fuse_unk)
            add_pending_unk(s);
        s->unk_pending = true;
    }
}

static int32_t id_of_character(const struct bpe *bpe, const char *bytes, int length, bool is_last) {
    char text[8 + MAX_SUFFIX];
    const char *suffix = is_last && bpe->suffix ? bpe->suffix : "";
    if (length == 1)
        return is_last ? bpe->last_ids[(unsigned char)*bytes] : bpe->byte_ids[(unsigned char)*bytes];
    memcpy(text, bytes, (size_t)length);
    memcpy(text + length, suffix, strlen(suffix));
    return string_map_get(&bpe->words, text, (size_t)length + strlen(suffix), -1);
}

/* Returns the number of symbols. */
static int32_t spell(const struct bpe *bpe, struct symbol *symbols, const char *bytes, size_t length) {
    struct speller s = {.bpe = bpe, .symbols = symbols};
    int used = 1;
    for (size_t i = 0; i < length; i += (size_t)used) {
        if (!bpe->byte_level)
            utf8_next(bytes + i, length - i, &used);
        int32_t id = id_of_character(bpe, bytes + i, used, i + (size_t)used == length);
        if (id >= 0) {
            add_pending_unk(&s);
            add_symbol(&s, id);
        } else {
            add_unknown(&s, bytes + i, used);
        }
    }
    add_pending_unk(&s);
    if (s.n > 0)
        symbols[s.n - 1].next = -1;
    return s.n;
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
    if (length > INT32_MAX)
        return fail_user(x->e, "%zu bytes of text in one piece are too many: encode it in parts", length);
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

/* tokenizer.json: ids are in range, every token's text ends in a NUL, and where the file's options lose
 * nothing, decoding what was encoded gives the text back. The text is also a prompt of ids, and --stop ends what is
 * written where it begins in the decoded text.
 *
 * Input: the file, RECORD_SEPARATOR, the text to encode. A byte 1 in the file stands for the vocabulary of
 * the 256 bytes, which would make inputs a hundred times longer. */
#include "tests/fuzz/fuzz.h"

#include "data/text.h"
#include "data/tokenizer_internal.h"

enum {
    BYTES_HERE = 1,
    BYTE_VOCAB = 256 * 24,
    VOCAB_SIZE = 5000,
    REPEATED_BYTES = 600,
    MOST_BYTES = 200,
    MOST_STOP = 4
};

static size_t write_byte_vocab(char *out) {
    size_t n = 0;
    for (int b = 0; b < 256; b++) {
        char text[3];
        byte_character((unsigned char)b, text);
        bool escaped = *text == '"' || *text == '\\';
        n += (size_t)snprintf(out + n, BYTE_VOCAB - n, "%s\"%s%s\":%d", b ? "," : "", escaped ? "\\" : "",
                              text, b);
    }
    return n;
}

static const char *build_file(const uint8_t *data, size_t size) {
    const uint8_t *mark = size ? memchr(data, BYTES_HERE, size) : NULL;
    if (!mark)
        return fuzz_file(0, data, size);
    char *text = malloc(size + BYTE_VOCAB);
    CHECK(text);
    size_t before = (size_t)(mark - data), n = before;
    memcpy(text, data, before);
    n += write_byte_vocab(text + n);
    memcpy(text + n, mark + 1, size - before - 1);
    const char *path = fuzz_file(0, text, n + size - before - 1);
    free(text);
    return path;
}

/* ---- what may be expected of a round trip ---- */

static bool decodes_to(const struct tokenizer *t, int32_t id, const char *text, size_t length) {
    size_t found;
    const char *decoded = tokenizer_decode(t, id, &found);
    return found == length && memcmp(decoded, text, length) == 0;
}

/* The token's text, which the trie has from its last byte back. */
static bool added_decodes_to_itself(const struct tokenizer *t, const struct added_set *set, int32_t index) {
    char text[4096];
    size_t at = sizeof text;
    uint32_t node = UINT32_MAX;
    for (size_t i = 0; i < set->trie.capacity; i++) {
        const struct pair_slot *slot = &set->trie.slots[i];
        bool is_step = slot->a != UINT32_MAX && (node == UINT32_MAX ? slot->id == index : slot->rank == node);
        if (!is_step)
            continue;
        if (at == 0)
            return false;
        text[--at] = (char)slot->b;
        node = slot->a;
        if (node == 0)
            break;
        i = SIZE_MAX; /* again from the front, for the step before */
    }
    return decodes_to(t, set->tokens[index].id, text + at, sizeof text - at);
}

static bool merge_decodes_to_its_parts(const struct tokenizer *t, const struct pair_slot *slot) {
    size_t a, b, ab;
    const char *left = tokenizer_decode(t, (int32_t)slot->a, &a),
               *right = tokenizer_decode(t, (int32_t)slot->b, &b), *both = tokenizer_decode(t, slot->id, &ab);
    return ab == a + b && memcmp(both, left, a) == 0 && memcmp(both + a, right, b) == 0;
}

static bool loses_nothing(const struct tokenizer *t) {
    const struct bpe *bpe = &t->bpe;
    if (t->bytes)
        return true;
    if (!bpe->byte_level || bpe->suffix || t->step_count || t->first || t->decoder.strip_count)
        return false;
    for (int b = 0; b < 256; b++)
        if (bpe->byte_ids[b] < 0 || !decodes_to(t, bpe->byte_ids[b], (const char[]){(char)b}, 1))
            return false;
    for (int64_t i = 0; i < t->size; i++)
        if (t->tokens[i].space_after)
            return false;
    for (int i = 0; i < t->stage_count; i++)
        if (t->stages[i].kind != STAGE_SPLIT || t->stages[i].behavior == SPLIT_REMOVED)
            return false;
    for (int k = 0; k < 2; k++)
        for (uint32_t i = 0; i < t->added[k].count; i++)
            if (t->added[k].tokens[i].lstrip || t->added[k].tokens[i].rstrip ||
                !added_decodes_to_itself(t, &t->added[k], (int32_t)i))
                return false;
    for (size_t i = 0; i < bpe->merges.capacity; i++)
        if (bpe->merges.slots[i].a != UINT32_MAX && !merge_decodes_to_its_parts(t, &bpe->merges.slots[i]))
            return false;
    for (size_t i = 0; i < bpe->words.capacity; i++)
        if (bpe->words.slots[i].key &&
            !decodes_to(t, bpe->words.slots[i].value, bpe->words.slots[i].key, bpe->words.slots[i].length))
            return false;
    return true;
}

/* ---- checks ---- */

static void check_tokens(const struct tokenizer *t) {
    int64_t size = tokenizer_size(t);
    size_t length = 99;
    CHECK(size >= 1 && size <= VOCAB_SIZE);
    CHECK(tokenizer_end_of_text(t) >= -1 && tokenizer_end_of_text(t) < size);
    struct decoding sequence = {0};
    for (int64_t id = -1; id <= size; id++) {
        const char *text = tokenizer_decode_next(t, &sequence, (int32_t)id, &length);
        CHECK(text && text[length] == 0);
        text = tokenizer_decode(t, (int32_t)id, &length);
        CHECK(text && text[length] == 0 && (length == 0 || memchr(text, 0, length + 1)));
        CHECK(length == 0 || (id >= 0 && id < size));
    }
}

static void check_ids(const struct tokenizer *t, const char *text, size_t size, const int32_t *ids,
                      int64_t count) {
    bool same = loses_nothing(t);
    for (int64_t i = 0; i < count; i++) {
        size_t length;
        CHECK(ids[i] >= 0 && ids[i] < tokenizer_size(t));
        const char *token = tokenizer_decode(t, ids[i], &length);
        if (!same)
            continue;
        CHECK(length <= size && memcmp(token, text, length) == 0);
        text += length;
        size -= length;
    }
    CHECK(!same || size == 0);
}

/* ---- merging, the slow and obvious way ---- */

static bool is_one_piece(const struct tokenizer *t) {
    return !t->refusal[0] && t->stage_count == 0 && t->step_count == 0 && !t->bpe.whole_words &&
           !t->bpe.suffix && t->bpe.unk < 0 && t->added[0].count + t->added[1].count == 0;
}

/* The symbols of one character, which is a byte where the vocabulary is byte-level. Returns how many. */
static int symbols_of(const struct bpe *bpe, const char *bytes, int length, int32_t out[4]) {
    *out = bpe->byte_level ? bpe->byte_ids[(unsigned char)*bytes]
                           : string_map_get(&bpe->words, bytes, (size_t)length, -1);
    if (*out >= 0)
        return 1;
    for (int i = 0; i < length; i++) {
        out[i] = bpe->fallback_ids[(unsigned char)bytes[i]];
        if (out[i] < 0)
            return 0;
    }
    return length;
}

/* The best pair of neighbours: the merge that stands first, and its first place. */
static const struct pair_slot *best_pair(const struct tokenizer *t, const int32_t *ids, int64_t n,
                                         int64_t *at) {
    const struct pair_slot *best = NULL;
    for (int64_t i = 0; i + 1 < n; i++) {
        const struct pair_slot *merge = pair_map_get(&t->bpe.merges, (uint32_t)ids[i], (uint32_t)ids[i + 1]);
        if (merge && (!best || merge->rank < best->rank)) {
            best = merge;
            *at = i;
        }
    }
    return best;
}

static void check_merges(const struct tokenizer *t, const char *text, size_t size, const int32_t *ids,
                         int64_t count) {
    int32_t expected[MOST_BYTES + 4];
    const struct pair_slot *merge;
    int64_t n = 0, at = 0;
    int used = 1;
    for (size_t i = 0; i < size; i += (size_t)used) {
        if (!t->bpe.byte_level)
            utf8_next(text + i, size - i, &used);
        n += symbols_of(&t->bpe, text + i, used, expected + n);
    }
    while ((merge = best_pair(t, expected, n, &at))) {
        expected[at] = merge->id;
        memmove(expected + at + 1, expected + at + 2, (size_t)(--n - at - 1) * sizeof *expected);
    }
    CHECK(n == count && (n == 0 || memcmp(ids, expected, (size_t)n * sizeof *ids) == 0));
}

/* ---- what generate reads and writes ---- */

/* The text as a prompt of ids. */
static void check_prompt(const char *text, size_t size) {
    int32_t *ids = NULL;
    struct error e = {0};
    int64_t count = text_parse_ids("--prompt-file", text, size, VOCAB_SIZE, &ids, &e);
    if (count < 0)
        check_user_error(&e);
    CHECK(count <= (int64_t)size);
    for (int64_t i = 0; i < count; i++)
        CHECK(ids[i] >= 0 && ids[i] < VOCAB_SIZE);
    free(ids);
}

/* The tokens' text as it is written, up to `stop` if that is given. */
static char *written(const struct tokenizer *t, const int32_t *ids, int64_t count, const char *stop,
                     size_t *size) {
    char *text = NULL;
    FILE *out = open_memstream(&text, size);
    CHECK(out);
    struct text_writer w = {.tokenizer = t, .out = out, .stop = stop};
    for (int64_t i = 0; i < count && text_emit(&w, ids[i]); i++)
        ;
    text_finish(&w);
    fclose(out);
    return text;
}

/* --stop, a few bytes from the middle of what would be written without it. */
static void check_stop(const struct tokenizer *t, const int32_t *ids, int64_t count) {
    char stop[MOST_STOP + 1];
    size_t size, stopped_size;
    char *whole = written(t, ids, count, NULL, &size);
    snprintf(stop, sizeof stop, "%.*s", MOST_STOP, whole + size / 2);
    if (*stop) {
        char *stopped = written(t, ids, count, stop, &stopped_size),
             *found = memmem(whole, size, stop, strlen(stop));
        CHECK(found && stopped_size == (size_t)(found - whole) && memcmp(stopped, whole, stopped_size) == 0);
        free(stopped);
    }
    free(whole);
}

static void encode(const struct tokenizer *t, const char *text, size_t size) {
    int32_t *ids = NULL;
    struct error e = {0};
    int64_t count = tokenizer_encode(t, text, size, &ids, &e);
    if (count < 0) {
        check_user_error(&e);
        CHECK(!ids);
    } else {
        check_ids(t, text, size, ids, count);
        if (is_one_piece(t) && size <= MOST_BYTES)
            check_merges(t, text, size, ids, count);
        check_stop(t, ids, count);
        free(ids);
    }
}

/* A longer text takes another way, with a memory of pieces. */
static void encode_repeated(const struct tokenizer *t, const char *text, size_t size) {
    size_t copies = size ? REPEATED_BYTES / size + 1 : 0;
    char *repeated = malloc(copies * size + 1);
    CHECK(repeated);
    for (size_t i = 0; i < copies; i++)
        memcpy(repeated + i * size, text, size);
    encode(t, repeated, copies * size);
    free(repeated);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    size_t file = fuzz_part(data, size), rest = file < size ? size - file - 1 : 0;
    struct error e = {0};
    struct tokenizer *t = tokenizer_open(build_file(data, file), VOCAB_SIZE, &e);
    if (!t) {
        check_user_error(&e);
        return 0;
    }
    check_tokens(t);
    char *text = fuzz_text(data + (size - rest), rest);
    check_prompt(text, rest);
    encode(t, text, rest);
    if (rest < REPEATED_BYTES)
        encode_repeated(t, text, rest);
    free(text);
    tokenizer_close(t);
    return 0;
}

/* tokenizer.json: ids are in range, every token's text ends in a NUL, and where the file's options lose
 * nothing, decoding what was encoded gives the text back.
 *
 * Input: the file, RECORD_SEPARATOR, the text to encode. A byte 1 in the file stands for the vocabulary of
 * the 256 bytes, which would make inputs a hundred times longer. */
#include "tests/fuzz/fuzz.h"

#include "data/tokenizer_internal.h"

enum { BYTES_HERE = 1, BYTE_VOCAB = 256 * 24, VOCAB_SIZE = 5000, REPEATED_BYTES = 600, MOST_BYTES = 200 };

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

/* Is this id an added token's, whose text may then differ from what merges make of it? */
static bool is_added(const struct tokenizer *t, int32_t id) {
    for (int k = 0; k < 2; k++)
        for (uint32_t i = 0; i < t->added[k].count; i++)
            if (t->added[k].tokens[i].id == id)
                return true;
    return false;
}

static bool loses_nothing(const struct tokenizer *t) {
    if (t->bytes)
        return true;
    for (int b = 0; b < 256; b++)
        if (t->bpe.byte_ids[b] < 0 || is_added(t, t->bpe.byte_ids[b]))
            return false;
    for (int i = 0; i < t->stage_count; i++)
        if (!t->stages[i].regex || t->stages[i].behavior == SPLIT_REMOVED)
            return false;
    for (int k = 0; k < 2; k++)
        for (uint32_t i = 0; i < t->added[k].count; i++)
            if (t->added[k].tokens[i].lstrip || t->added[k].tokens[i].rstrip)
                return false;
    for (size_t i = 0; i < t->bpe.merges.capacity; i++)
        if (t->bpe.merges.slots[i].a != UINT32_MAX && is_added(t, t->bpe.merges.slots[i].id))
            return false;
    for (size_t i = 0; i < t->bpe.words.capacity; i++)
        if (t->bpe.words.slots[i].key && is_added(t, t->bpe.words.slots[i].value))
            return false;
    return true;
}

/* ---- checks ---- */

static void check_tokens(const struct tokenizer *t) {
    int64_t size = tokenizer_size(t);
    size_t length = 99;
    CHECK(size >= 1 && size <= VOCAB_SIZE);
    CHECK(tokenizer_end_of_text(t) >= -1 && tokenizer_end_of_text(t) < size);
    for (int64_t id = -1; id <= size; id++) {
        const char *text = tokenizer_decode(t, (int32_t)id, &length);
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
    return !t->refusal[0] && t->stage_count == 0 && !t->bpe.whole_words && t->bpe.unk < 0 &&
           t->added[0].count + t->added[1].count == 0;
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
    int32_t expected[MOST_BYTES];
    const struct pair_slot *merge;
    int64_t n = 0, at = 0;
    for (size_t i = 0; i < size; i++)
        if (t->bpe.byte_ids[(unsigned char)text[i]] >= 0)
            expected[n++] = t->bpe.byte_ids[(unsigned char)text[i]];
    while ((merge = best_pair(t, expected, n, &at))) {
        expected[at] = merge->id;
        memmove(expected + at + 1, expected + at + 2, (size_t)(--n - at - 1) * sizeof *expected);
    }
    CHECK(n == count && (n == 0 || memcmp(ids, expected, (size_t)n * sizeof *ids) == 0));
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
    encode(t, text, rest);
    if (rest < REPEATED_BYTES)
        encode_repeated(t, text, rest);
    free(text);
    tokenizer_close(t);
    return 0;
}

/* Tokenizers: C encodes what the tokenizers library encodes (tests/golden/tokenizer_*.json, made by
 * tests/make_tokenizer_cases.py), decoding undoes it, and no file, however damaged, does worse than an error.
 * Files that tests write lie in a fresh directory under /tmp that is removed afterwards. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cmocka.h>
#include <cjson/cJSON.h>

#include "data/tokenizer_internal.h" /* for utf8_next alone */

#define GOLDEN "tests/golden/tokenizer_"

enum { ANY_SIZE = 1000000 };

static char dir[64], file_path[96];

static int make_dir(void **state) {
    (void)state;
    strcpy(dir, "/tmp/iha_tokenizer_XXXXXX");
    if (!mkdtemp(dir))
        return -1;
    snprintf(file_path, sizeof file_path, "%s/tokenizer.json", dir);
    return 0;
}

static int remove_dir(void **state) {
    (void)state;
    remove(file_path);
    return rmdir(dir);
}

/* ---- helpers ---- */

static char *read_file(const char *path, size_t *length) {
    FILE *f = fopen(path, "rb");
    if (!f)
        fail_msg("cannot read %s: run the tests from the repository's root", path);
    fseek(f, 0, SEEK_END);
    *length = (size_t)ftell(f);
    rewind(f);
    char *text = malloc(*length + 1);
    assert_non_null(text);
    assert_int_equal(fread(text, 1, *length, f), *length);
    text[*length] = 0;
    fclose(f);
    return text;
}

static void write_file(const char *text, size_t length) {
    FILE *f = fopen(file_path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(text, 1, length, f), length);
    assert_int_equal(fclose(f), 0);
}

static struct tokenizer *open_good(const char *name) {
    struct error e = {0};
    struct tokenizer *t = tokenizer_open(name, ANY_SIZE, &e);
    if (!t)
        fail_msg("%s", e.text);
    return t;
}

static struct tokenizer *open_text(const char *json) {
    write_file(json, strlen(json));
    return open_good(file_path);
}

static void is_user_error(const struct error *e, const char *word) {
    assert_int_equal(e->exit_code, EXIT_USER);
    assert_true(e->text[0]);
    assert_null(strchr(e->text, '\n'));
    if (!strstr(e->text, word))
        fail_msg("'%s' should contain '%s'", e->text, word);
}

static void refuses_name(const char *name, int64_t vocab_size, const char *word) {
    struct error e = {0};
    assert_null(tokenizer_open(name, vocab_size, &e));
    is_user_error(&e, word);
}

static void refuses_text(const char *json, const char *word) {
    write_file(json, strlen(json));
    refuses_name(file_path, ANY_SIZE, word);
}

static void encode_is_refused(const struct tokenizer *t, const char *text, const char *word) {
    struct error e = {0};
    int32_t *ids = NULL;
    assert_int_equal(tokenizer_encode(t, text, strlen(text), &ids, &e), -1);
    is_user_error(&e, word);
    assert_string_equal(strstr(e.text, "decoding works"), "decoding works");
}

static void encodes_to(const struct tokenizer *t, const char *text, size_t length, int64_t count,
                       const int32_t *expected) {
    struct error e = {0};
    int32_t *ids = NULL;
    int64_t n = tokenizer_encode(t, text, length, &ids, &e);
    if (n < 0)
        fail_msg("%s", e.text);
    assert_non_null(ids);
    for (int64_t i = 0; i < n && i < count; i++)
        if (ids[i] != expected[i])
            fail_msg("'%s': id %d is %d, not %d", text, (int)i, ids[i], expected[i]);
    if (n != count)
        fail_msg("'%s': %d ids, not %d", text, (int)n, (int)count);
    free(ids);
}

/* All ids' bytes in a row; the caller frees. */
static char *decode_all(const struct tokenizer *t, const int32_t *ids, int64_t count, size_t *length) {
    char *out = NULL;
    FILE *f = open_memstream(&out, length);
    assert_non_null(f);
    for (int64_t i = 0; i < count; i++) {
        size_t n = 99;
        const char *bytes = tokenizer_decode(t, ids[i], &n);
        assert_int_equal(bytes[n], 0);
        fwrite(bytes, 1, n, f);
    }
    fclose(f);
    return out;
}

static int64_t comes_back(const struct tokenizer *t, const char *text, size_t length) {
    struct error e = {0};
    int32_t *ids = NULL;
    size_t decoded_length = 0;
    int64_t n = tokenizer_encode(t, text, length, &ids, &e);
    if (n < 0)
        fail_msg("%s", e.text);
    char *decoded = decode_all(t, ids, n, &decoded_length);
    assert_int_equal(decoded_length, length);
    assert_memory_equal(decoded, text, length);
    free(decoded);
    free(ids);
    return n;
}

static void decodes_to(const struct tokenizer *t, int32_t id, const char *expected) {
    size_t length = 99;
    const char *text = tokenizer_decode(t, id, &length);
    assert_int_equal(length, strlen(expected));
    assert_string_equal(text, expected);
}

static uint32_t next_random(uint64_t *state) {
    *state = *state * UINT64_C(6364136223846793005) + 1442695040888963407u;
    return (uint32_t)(*state >> 33);
}

/* ---- against the library ---- */

static void check_case(const struct tokenizer *t, const cJSON *row) {
    const char *text = cJSON_GetObjectItem(row, "text")->valuestring;
    const cJSON *list = cJSON_GetObjectItem(row, "ids");
    int32_t ids[1024];
    int count = 0;
    for (const cJSON *id = list->child; id; id = id->next) {
        assert_in_range(count, 0, 1023);
        ids[count++] = (int32_t)id->valuedouble;
    }
    encodes_to(t, text, strlen(text), count, ids);
    if (cJSON_IsTrue(cJSON_GetObjectItem(row, "exact")))
        comes_back(t, text, strlen(text));
}

static void matches_the_library(const char *name, int at_least) {
    char path[96];
    size_t length;
    snprintf(path, sizeof path, GOLDEN "%s.json", name);
    struct tokenizer *t = open_good(path);
    char *text = read_file(GOLDEN "cases.json", &length);
    cJSON *cases = cJSON_Parse(text);
    const cJSON *rows = cJSON_GetObjectItem(cases, name);
    assert_non_null(rows);
    int count = 0;
    for (const cJSON *row = rows->child; row; row = row->next, count++)
        check_case(t, row);
    assert_true(count >= at_least);
    cJSON_Delete(cases);
    free(text);
    tokenizer_close(t);
}

static void gpt2_matches_the_library(void **state) {
    (void)state;
    matches_the_library("gpt2", 50);
}

static void llama3_matches_the_library(void **state) {
    (void)state;
    matches_the_library("llama3", 50);
}

static void odd_matches_the_library(void **state) {
    (void)state;
    matches_the_library("odd", 50);
}

/* The gpt2 file with one member replaced. */
static struct tokenizer *open_gpt2_with(const char *member, const cJSON *value) {
    size_t length;
    char *text = read_file(GOLDEN "gpt2.json", &length);
    cJSON *root = cJSON_Parse(text);
    assert_true(cJSON_ReplaceItemInObject(root, member, cJSON_Duplicate(value, true)));
    char *changed = cJSON_PrintUnformatted(root);
    struct tokenizer *t = open_text(changed);
    free(changed);
    cJSON_Delete(root);
    free(text);
    return t;
}

static void splits_match_the_library(void **state) {
    (void)state;
    size_t length;
    char *text = read_file(GOLDEN "cases.json", &length);
    cJSON *cases = cJSON_Parse(text);
    const cJSON *splits = cJSON_GetObjectItem(cases, "splits");
    assert_true(cJSON_GetArraySize(splits) >= 15);
    for (const cJSON *split = splits->child; split; split = split->next) {
        struct tokenizer *t = open_gpt2_with("pre_tokenizer", cJSON_GetObjectItem(split, "pre_tokenizer"));
        for (const cJSON *row = cJSON_GetObjectItem(split, "cases")->child; row; row = row->next)
            check_case(t, row);
        tokenizer_close(t);
    }
    cJSON_Delete(cases);
    free(text);
}

static void knows_its_size_and_end(void **state) {
    (void)state;
    struct tokenizer *t = open_good(GOLDEN "gpt2.json");
    assert_int_equal(tokenizer_size(t), 501);
    assert_int_equal(tokenizer_end_of_text(t), 500);
    decodes_to(t, 500, "<|endoftext|>");
    decodes_to(t, 501, "");
    decodes_to(t, -1, "");
    decodes_to(t, INT32_MAX, "");
    decodes_to(t, INT32_MIN, "");
    tokenizer_close(t);
    t = open_good(GOLDEN "llama3.json");
    decodes_to(t, tokenizer_end_of_text(t), "<|end_of_text|>");
    tokenizer_close(t);
    t = open_good(GOLDEN "odd.json");
    decodes_to(t, tokenizer_end_of_text(t), "</s>");
    tokenizer_close(t);
}

/* ---- any bytes ---- */

static void invalid_utf8_is_encoded_too(void **state) {
    (void)state;
    const char *const names[] = {GOLDEN "gpt2.json", GOLDEN "llama3.json"};
    const char *const broken[] = {"\xff",
                                  "a\x80z",
                                  "\xc3",
                                  "caf\xc3 au",
                                  "\xe2\x82",
                                  "\xf0\x9f\x99",
                                  "\xc0\xaf\xe0\x80\xaf",
                                  "\xed\xa0\x80\xed\xb0\x80",
                                  "\xf4\x90\x80\x80\xf8\x88\x80\x80\x80",
                                  "\xff<|endoftext|>\xfe<|eot_id|>\xc3",
                                  " \xe1\xa0\x8e \xff"};
    uint64_t random = 1;
    for (int k = 0; k < 2; k++) {
        struct tokenizer *t = open_good(names[k]);
        for (size_t i = 0; i < sizeof broken / sizeof *broken; i++)
            comes_back(t, broken[i], strlen(broken[i]));
        for (int b = 0; b < 256; b++)
            comes_back(t, (const char[]){(char)b}, 1);
        for (int trial = 0; trial < 500; trial++) {
            char bytes[64]; /* no slack behind it: reading too far is found by the sanitizer */
            size_t length = next_random(&random) % (sizeof bytes + 1);
            char *exact = malloc(length + !length);
            for (size_t i = 0; i < length; i++)
                exact[i] = (char)(next_random(&random) >> 5);
            comes_back(t, exact, length);
            free(exact);
        }
        comes_back(t, "a\0b\0\0c", 6);
        tokenizer_close(t);
    }
}

/* A heap finds the merges: quadratic time would take minutes here. */
static void long_pieces_are_fine(void **state) {
    (void)state;
    enum { LENGTH = 1 << 20 };
    char *text = malloc(LENGTH);
    struct tokenizer *t = open_good(GOLDEN "gpt2.json");
    memset(text, 'a', LENGTH);
    comes_back(t, text, LENGTH);
    memset(text, ' ', LENGTH);
    comes_back(t, text, LENGTH);
    for (int i = 0; i < LENGTH; i++)
        text[i] = "theandqu"[i % 8];
    assert_true(comes_back(t, text, LENGTH) < LENGTH);
    tokenizer_close(t);
    free(text);
}

/* Texts of 512 bytes and more remember their pieces: the ids must be those of the pieces alone. */
static void repeated_pieces_stay_the_same(void **state) {
    (void)state;
    struct tokenizer *t = open_good(GOLDEN "odd.json");
    const char *piece = " the\tTiger x9 \xe6\x9d\xb1-quick,,brown";
    char text[4096] = "";
    struct error e;
    int32_t *once = NULL, *many = NULL;
    int64_t n = tokenizer_encode(t, piece, strlen(piece), &once, &e);
    for (int i = 0; i < 60; i++)
        strcat(text, piece);
    assert_int_equal(tokenizer_encode(t, text, strlen(text), &many, &e), 60 * n);
    for (int64_t i = 0; i < 60 * n; i++)
        assert_int_equal(many[i], once[i % n]);
    free(once);
    free(many);
    tokenizer_close(t);
}

/* The cache of pieces has 4,096 slots: among 9,000 pieces of one length, many meet in a slot. */
static void different_pieces_stay_different(void **state) {
    (void)state;
    struct tokenizer *t = open_good(GOLDEN "gpt2.json");
    enum { PIECES = 9000, LENGTH = 5 };
    char *text = malloc(PIECES * LENGTH + 1);
    int32_t *all = NULL, *one = NULL;
    int64_t at = 0;
    for (int i = 0; i < PIECES; i++)
        sprintf(text + LENGTH * i, " %d", 1000 + i);
    int64_t count = tokenizer_encode(t, text, PIECES * LENGTH, &all, NULL);
    for (int i = 0; i < PIECES; i++, free(one)) {
        int64_t n = tokenizer_encode(t, text + LENGTH * i, LENGTH, &one, NULL);
        assert_in_range(n, 1, count - at);
        assert_memory_equal(all + at, one, (size_t)n * sizeof *one);
        at += n;
    }
    assert_int_equal(at, count);
    free(all);
    free(text);
    tokenizer_close(t);
}

/* Every code point reads back; a surrogate, an overlong form, a cut or a stray byte does not. */
static void utf8_is_read_strictly(void **state) {
    (void)state;
    const char *const invalid[] = {"\x80",
                                   "\xbf",
                                   "\xc0\x80",
                                   "\xc1\xbf",
                                   "\xe0\x9f\xbf",
                                   "\xf0\x8f\xbf\xbf",
                                   "\xed\xa0\x80",
                                   "\xed\xbf\xbf",
                                   "\xf4\x90\x80\x80",
                                   "\xf5\x80\x80\x80",
                                   "\xff",
                                   "\xc3",
                                   "\xe2\x82",
                                   "\xc3(",
                                   "\xe2\x28\xa1",
                                   "\xf0\x9f\x99"};
    int used;
    for (size_t i = 0; i < sizeof invalid / sizeof *invalid; i++) {
        assert_int_equal(utf8_next(invalid[i], strlen(invalid[i]), &used), UINT32_MAX);
        assert_int_equal(used, 1);
    }
    for (uint32_t c = 0; c <= 0x10ffff; c += c == 0xd7ff ? 0x801 : 1) {
        char b[4] = {(char)c};
        int size = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
        for (int i = size - 1, rest = (int)c; size > 1 && i >= 0; i--, rest >>= 6)
            b[i] = (char)(i ? 0x80 | (rest & 0x3f) : (0xf00 >> size & 0xff) | rest);
        assert_int_equal(utf8_next(b, (size_t)size, &used), c);
        assert_int_equal(used, size);
    }
}

static void byte_tokenizer(void **state) {
    (void)state;
    struct tokenizer *t = open_good("bytes");
    const int32_t hi[] = {'h', 'i', 0, 0xc3, 0xa9};
    char all[512];
    for (int i = 0; i < 512; i++)
        all[i] = (char)i;
    encodes_to(t, "hi\0\xc3\xa9", 5, 5, hi);
    encodes_to(t, "", 0, 0, NULL);
    assert_int_equal(comes_back(t, all, 512), 512);
    assert_int_equal(tokenizer_size(t), 257);
    assert_int_equal(tokenizer_end_of_text(t), 256);
    decodes_to(t, 65, "A");
    decodes_to(t, 256, "");
    decodes_to(t, 257, "");
    decodes_to(t, -1, "");
    tokenizer_close(t);
    struct error e = {0};
    t = tokenizer_open("bytes", 257, &e);
    assert_non_null(t);
    tokenizer_close(t);
    refuses_name("bytes", 256, "vocab_size is 256");
}

/* ---- models that only decode ---- */

static void unigram_decodes(void **state) {
    (void)state;
    struct tokenizer *t = open_text(
        "{\"added_tokens\":[{\"id\":0,\"content\":\"<unk>\",\"special\":true}],"
        "\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"\xe2\x96\x81\"},"
        "\"decoder\":{\"type\":\"Metaspace\"},\"model\":{\"type\":\"Unigram\",\"unk_id\":0,\"vocab\":"
        "[[\"<unk>\",0],[\"\xe2\x96\x81the\",-1.5],[\"s\",-2],[\"<0x0A>\",-3],[\"<0xE9>\",-3],["
        "\"a\xe2\x96\x81\xe2\x96\x81z\",-4]]}}");
    decodes_to(t, 0, "<unk>");
    decodes_to(t, 1, " the");
    decodes_to(t, 2, "s");
    decodes_to(t, 3, "\n");
    decodes_to(t, 4, "\xe9");
    decodes_to(t, 5, "a  z");
    encode_is_refused(t, "the", "Metaspace");
    tokenizer_close(t);
}

static void wordpiece_decodes(void **state) {
    (void)state;
    struct tokenizer *t =
        open_text("{\"added_tokens\":[{\"id\":0,\"content\":\"[SEP]\",\"special\":true}],"
                  "\"decoder\":{\"type\":\"WordPiece\",\"prefix\":\"##\",\"cleanup\":true},"
                  "\"model\":{\"type\":\"WordPiece\",\"vocab\":{\"[SEP]\":0,\"play\":1,\"##ing\":2,"
                  "\"##\":4}}}");
    decodes_to(t, 0, "[SEP]");
    decodes_to(t, 1, " play");
    decodes_to(t, 2, "ing");
    decodes_to(t, 3, "");
    decodes_to(t, 4, "");
    assert_int_equal(tokenizer_size(t), 5);
    assert_int_equal(tokenizer_end_of_text(t), -1);
    encode_is_refused(t, "playing", "not byte-level");
    tokenizer_close(t);
}

static void byte_fallback_bpe_decodes(void **state) {
    (void)state;
    struct tokenizer *t = open_text(
        "{\"decoder\":{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Replace\"},{\"type\":\"ByteFallback\"}"
        ","
        "{\"type\":\"Fuse\"}]},\"model\":{\"type\":\"BPE\",\"byte_fallback\":true,\"vocab\":{\"</s>\":0,"
        "\"\xe2\x96\x81\":1,\"<0x41>\":2,\"<0xZZ>\":3},\"merges\":[]}}");
    decodes_to(t, 1, " ");
    decodes_to(t, 2, "A");
    decodes_to(t, 3, "<0xZZ>");
    assert_int_equal(tokenizer_end_of_text(t), 0);
    encode_is_refused(t, "A", "not byte-level");
    tokenizer_close(t);
}

/* ---- variants of a small byte-level file ---- */

/* %s: normalizer, pre-tokenizer, what the model says besides type, vocabulary, merges, added tokens. */
static const char *tiny(const char *normalizer, const char *pre_tokenizer, const char *model,
                        const char *vocab, const char *merges, const char *added) {
    static char json[4096];
    snprintf(
        json, sizeof json,
        "{\"normalizer\":%s,\"pre_tokenizer\":%s,\"decoder\":{\"type\":\"ByteLevel\"},\"added_tokens\":%s,"
        "\"model\":{\"type\":\"BPE\"%s,\"vocab\":%s,\"merges\":%s}}",
        normalizer, pre_tokenizer, added, model, vocab, merges);
    return json;
}

#define BYTE_LEVEL "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":true}"
#define SPLIT(pattern)                                                                                       \
    "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":\"" pattern        \
    "\"},\"behavior\":\"Isolated\",\"invert\":false}," BYTE_LEVEL "]}"
#define VOCAB "{\"a\":0,\"b\":1,\"ab\":2,\"abb\":3,\"ba\":4}"
#define MERGES "[\"b a\",\"a b\",\"ab b\"]"

static void merges_go_by_rank(void **state) {
    (void)state;
    struct tokenizer *t = open_text(tiny("null", BYTE_LEVEL, "", VOCAB, MERGES, "[]"));
    encodes_to(t, "abb", 3, 1, (int32_t[]){3});
    encodes_to(t, "aba", 3, 2, (int32_t[]){0, 4}); /* "b a" stands before "a b" */
    encodes_to(t, "abab", 4, 3, (int32_t[]){0, 4, 1});
    encodes_to(t, "axb", 3, 1, (int32_t[]){2}); /* no token, no unk: as the library, x vanishes */
    encodes_to(t, "xyz", 3, 0, NULL);
    tokenizer_close(t);
    /* "bc" leaves the entry of "a b" stale: "d a" comes before what stands there now, "a bc". */
    t = open_text(tiny("null", BYTE_LEVEL, "",
                       "{\"a\":0,\"b\":1,\"c\":2,\"d\":3,\"bc\":4,\"ab\":5,\"da\":6,\"abc\":7}",
                       "[\"b c\",\"a b\",\"d a\",\"a bc\"]", "[]"));
    encodes_to(t, "dabc", 4, 2, (int32_t[]){6, 4});
    encodes_to(t, "abc", 3, 1, (int32_t[]){7});
    tokenizer_close(t);
    t = open_text(tiny("null", BYTE_LEVEL, ",\"unk_token\":\"ba\"", VOCAB, "[[\"a\",\"b\"]]", "null"));
    encodes_to(t, "axyb", 4, 4, (int32_t[]){0, 4, 4, 1});
    tokenizer_close(t);
    t = open_text(tiny("null", BYTE_LEVEL, ",\"unk_token\":\"ba\",\"fuse_unk\":true", VOCAB, "[]", "[]"));
    encodes_to(t, "axyb", 4, 3, (int32_t[]){0, 4, 1});
    tokenizer_close(t);
    t = open_text(tiny("null", BYTE_LEVEL, ",\"ignore_merges\":true", VOCAB, "[]", "[]"));
    encodes_to(t, "abb", 3, 1, (int32_t[]){3});
    encodes_to(t, "abba", 4, 4, (int32_t[]){0, 1, 1, 0});
    tokenizer_close(t);
}

static void normalizers_are_not_ignored(void **state) {
    (void)state;
    const char *nfc = "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFC\"}]}";
    struct tokenizer *t = open_text(tiny(nfc, BYTE_LEVEL, "", VOCAB, MERGES, "[]"));
    encodes_to(t, "ab\xc3\xa9", 4, 1, (int32_t[]){2}); /* U+00E9 is in normal form already */
    encode_is_refused(t, "e\xcc\x81", "U+0301");
    decodes_to(t, 3, "abb");
    tokenizer_close(t);
    t = open_text(tiny("{\"type\":\"Lowercase\"}", BYTE_LEVEL, "", VOCAB, MERGES, "[]"));
    encode_is_refused(t, "ab", "normalizer");
    decodes_to(t, 3, "abb");
    tokenizer_close(t);
}

/* What PCRE2 might read differently from the library, or what needs a model of another kind. */
static void refuses_to_encode_what_it_would_get_wrong(void **state) {
    (void)state;
    const char *const pre_tokenizers[] = {
        SPLIT("\\\\w+"),
        SPLIT("\\\\h"),
        SPLIT("\\\\b"),
        SPLIT("[a&&b]"),
        SPLIT("[a[bc]]"),
        SPLIT("[[:alpha:]]"),
        SPLIT("(?m:.)"),
        SPLIT("x(?i)y|z"),
        SPLIT("a{2}+"),
        SPLIT("a{2}?"),
        SPLIT("a{,2}"),
        SPLIT("(a"),
        SPLIT("(?<n>a)\\\\k<n>"),
        SPLIT("\\\\p{Nope}"),
        SPLIT("(*ACCEPT)"),
        SPLIT("[a"),
        SPLIT("a\\\\"),
        SPLIT("\\\\p{L"),
        SPLIT("(?"),
        SPLIT("(?<=a*)b"),
        SPLIT("[]a]"),
        "{\"type\":\"Metaspace\"}",
        "{\"type\":\"x\\u000a\\u001b[31m\"}",
        "null",
        "{\"type\":\"Sequence\",\"pretokenizers\":[]}",
        "{\"type\":\"Sequence\",\"pretokenizers\":[" BYTE_LEVEL "," BYTE_LEVEL "]}",
        "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"String\":\"\"},"
        "\"behavior\":"
        "\"Isolated\"}," BYTE_LEVEL "]}",
    };
    for (size_t i = 0; i < sizeof pre_tokenizers / sizeof *pre_tokenizers; i++) {
        struct tokenizer *t = open_text(tiny("null", pre_tokenizers[i], "", VOCAB, MERGES, "[]"));
        encode_is_refused(t, "ab", "cannot encode");
        decodes_to(t, 3, "abb");
        tokenizer_close(t);
    }
    const char *const models[] = {",\"dropout\":0.1", ",\"continuing_subword_prefix\":\"##\"",
                                  ",\"end_of_word_suffix\":\"</w>\"", ",\"byte_fallback\":true"};
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        struct tokenizer *t = open_text(tiny("null", BYTE_LEVEL, models[i], VOCAB, MERGES, "[]"));
        encode_is_refused(t, "ab", "cannot encode");
        tokenizer_close(t);
    }
}

/* A text on which a pattern explodes is an error, not a hang. */
static void exploding_patterns_give_up(void **state) {
    (void)state;
    struct tokenizer *t = open_text(tiny("null", SPLIT("(a|a)*[bc]"), "", VOCAB, MERGES, "[]"));
    char text[65];
    struct error e = {0};
    int32_t *ids;
    memset(text, 'a', 64);
    text[64] = 0;
    assert_int_equal(tokenizer_encode(t, text, 64, &ids, &e), -1);
    is_user_error(&e, "split pattern");
    tokenizer_close(t);
}

/* ---- files that are refused ---- */

static void refuses_what_is_no_tokenizer(void **state) {
    (void)state;
    refuses_name("/nowhere/tokenizer.json", ANY_SIZE, "/nowhere/tokenizer.json: cannot be opened");
    refuses_name("byte", ANY_SIZE, "takes none, bytes or a tokenizer.json");
    refuses_name("/tmp", ANY_SIZE, "not a regular file");
    assert_int_equal(mkfifo(file_path, 0600), 0);
    refuses_name(file_path, ANY_SIZE, "not a regular file");
    assert_int_equal(remove(file_path), 0);

    const char *const texts[] = {"",
                                 " ",
                                 "nonsense",
                                 "null",
                                 "7",
                                 "\"text\"",
                                 "[]",
                                 "{}",
                                 "{\"model\":null}",
                                 "{\"model\":[]}",
                                 "{\"model\":{}}",
                                 "{\"model\":{\"vocab\":7}}",
                                 "{\"model\":{\"vocab\":{}}}",
                                 "{\"model\":{\"vocab\":[]}}",
                                 "{\"model\":{\"vocab\":[7]}}",
                                 "{\"model\":{\"vocab\":[[]]}}",
                                 "{\"model\":{\"vocab\":[[7,\"a\"]]}}",
                                 "{\"model\":{\"vocab\":{\"a\":\"0\"}}}",
                                 "{\"model\":{\"vocab\":{\"a\":null}}}",
                                 "{\"model\":{\"vocab\":{\"a\":0}}} extra"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        refuses_text(texts[i], file_path);
    write_file("{\"model\"\0:{}}", 13);
    refuses_name(file_path, ANY_SIZE, file_path);
    assert_int_equal(truncate(file_path, INT64_C(1) << 40), 0); /* sparse: a terabyte is not read */
    refuses_name(file_path, ANY_SIZE, "1099511627776 bytes are more");
}

static void refuses_bad_ids(void **state) {
    (void)state;
    const char *const ids[] = {"-1",         "0.5",     "1e300", "-1e300", "4294967296",
                               "2147483648", "1e99999", "true",  "\"1\"",  "[1]"};
    char vocab[64], added[96];
    for (size_t i = 0; i < sizeof ids / sizeof *ids; i++) {
        snprintf(vocab, sizeof vocab, "{\"a\":0,\"b\":%s}", ids[i]);
        snprintf(added, sizeof added, "[{\"id\":%s,\"content\":\"new\"}]", ids[i]);
        refuses_text(tiny("null", BYTE_LEVEL, "", vocab, "[]", "[]"), file_path);
        refuses_text(tiny("null", BYTE_LEVEL, "", VOCAB, "[]", added), file_path);
    }
    refuses_text(tiny("null", BYTE_LEVEL, "", "{\"a\":0,\"b\":1,\"c\":1}", "[]", "[]"),
                 "id 1 belongs to 'c'");
    refuses_text(tiny("null", BYTE_LEVEL, "", VOCAB, "[]", "[{\"id\":1,\"content\":\"c\"}]"),
                 "id 1 belongs to 'c'");
    refuses_text(tiny("null", BYTE_LEVEL, "", VOCAB, "[]", "[{\"id\":9,\"content\":\"a\"}]"),
                 "'a' has the id 0");
    refuses_text(tiny("null", BYTE_LEVEL, "", VOCAB, "[]",
                      "[{\"id\":9,\"content\":\"x\"},{\"id\":9,\"content\":\"y\"}]"),
                 "id 9 belongs to 'y'");
    refuses_text(tiny("null", BYTE_LEVEL, "", VOCAB, "[]",
                      "[{\"id\":8,\"content\":\"x\"},{\"id\":9,\"content\":\"x\"}]"),
                 "id 9 belongs to 'x'");
    /* A huge id is refused before a table of its size is made. */
    write_file("{\"model\":{\"vocab\":{\"a\":2147483647}}}", 36);
    refuses_name(file_path, INT64_MAX, "larger than any tokenizer's");
}

static void refuses_another_models_tokenizer(void **state) {
    (void)state;
    struct error e = {0};
    struct tokenizer *t = tokenizer_open(GOLDEN "gpt2.json", 501, &e);
    assert_non_null(t);
    tokenizer_close(t);
    refuses_name(
        GOLDEN "gpt2.json", 500,
        "the tokenizer has ids up to 500 but the model's vocab_size is 500: it belongs to another model");
    refuses_name(GOLDEN "gpt2.json", 0, "vocab_size is 0");
    assert_null(tokenizer_open(GOLDEN "gpt2.json", 1, NULL)); /* nobody listens: still no crash */
}

static void refuses_wrong_types(void **state) {
    (void)state;
    const char *const merges[] = {"null",
                                  "7",
                                  "{}",
                                  "[7]",
                                  "[\"ab\"]",
                                  "[\"a b b\"]",
                                  "[\" \"]",
                                  "[\"a \"]",
                                  "[\"a z\"]",
                                  "[\"b b\"]",
                                  "[[]]",
                                  "[[\"a\"]]",
                                  "[[\"a\",\"b\",\"b\"]]",
                                  "[[\"a\",7]]",
                                  "[[\"\",\"a\"]]",
                                  "[null]"};
    for (size_t i = 0; i < sizeof merges / sizeof *merges; i++)
        refuses_text(tiny("null", BYTE_LEVEL, "", VOCAB, merges[i], "[]"), "merge");
    const char *const models[] = {",\"unk_token\":7",      ",\"unk_token\":\"?\"",
                                  ",\"fuse_unk\":7",       ",\"ignore_merges\":\"yes\"",
                                  ",\"dropout\":\"much\"", ",\"end_of_word_suffix\":{}"};
    for (size_t i = 0; i < sizeof models / sizeof *models; i++)
        refuses_text(tiny("null", BYTE_LEVEL, models[i], VOCAB, MERGES, "[]"), file_path);
    const char *const added[] = {"7",
                                 "{}",
                                 "[7]",
                                 "[{}]",
                                 "[{\"id\":5}]",
                                 "[{\"content\":\"x\"}]",
                                 "[{\"id\":5,\"content\":7}]",
                                 "[{\"id\":5,\"content\":\"x\",\"lstrip\":7}]",
                                 "[{\"id\":5,\"content\":\"x\xff\"}]"};
    for (size_t i = 0; i < sizeof added / sizeof *added; i++)
        refuses_text(tiny("null", BYTE_LEVEL, "", VOCAB, MERGES, added[i]), file_path);
    const char *const pre_tokenizers[] = {
        "7",
        "[]",
        "{}",
        "{\"type\":7}",
        "{\"type\":\"Sequence\"}",
        "{\"type\":\"Sequence\",\"pretokenizers\":7}",
        "{\"type\":\"Sequence\",\"pretokenizers\":[7]}",
        "{\"type\":\"ByteLevel\",\"use_regex\":1}",
        "{\"type\":\"Split\"}",
        "{\"type\":\"Split\",\"pattern\":7}",
        "{\"type\":\"Split\",\"pattern\":{}}",
        "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"a\"}}",
        "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"a\"},\"behavior\":\"Sideways\"}",
        "{\"type\":\"Split\",\"pattern\":{\"Regex\":7},\"behavior\":\"Isolated\"}",
        "{\"type\":\"Split\",\"pattern\":{\"String\":\"a\"},\"behavior\":\"Isolated\",\"invert\":\"no\"}",
        "{\"type\":\"Digits\",\"individual_digits\":3}"};
    for (size_t i = 0; i < sizeof pre_tokenizers / sizeof *pre_tokenizers; i++)
        refuses_text(tiny("null", pre_tokenizers[i], "", VOCAB, MERGES, "[]"), file_path);
}

static void refuses_deep_nesting(void **state) {
    (void)state;
    enum { DEPTH = 200000 };
    char *text = malloc(DEPTH + 1);
    memset(text, '[', DEPTH);
    text[DEPTH] = 0;
    refuses_text(text, "JSON");
    for (int i = 0; i + 5 <= DEPTH; i += 5)
        memcpy(text + i, "{\"a\":", 5);
    refuses_text(text, "JSON");
    free(text);
    /* As deep as the parser allows: Sequence in Sequence in Sequence. */
    static char pre[64 * 400 + 8], json[sizeof pre + 256];
    const char *open = "{\"type\":\"Sequence\",\"pretokenizers\":[";
    for (int i = 0; i < 400; i++)
        strcat(pre, open);
    for (int i = 0; i < 400; i++)
        strcat(pre, "]}");
    snprintf(json, sizeof json,
             "{\"pre_tokenizer\":%s,\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[]}}", pre);
    struct tokenizer *t = open_text(json);
    encode_is_refused(t, "a", "ByteLevel");
    tokenizer_close(t);
}

/* Opened or refused, but never worse; what opens must also survive use. */
static void try_damaged(const char *text, size_t length) {
    struct error e = {0};
    int32_t *ids = NULL;
    const char *sample = "It's 1984 <pad> word, long-er\n\xe6\x9d\xb1 \xff <left>  x";
    write_file(text, length);
    struct tokenizer *t = tokenizer_open(file_path, ANY_SIZE, &e);
    if (!t) {
        is_user_error(&e, file_path);
        return;
    }
    int64_t n = tokenizer_encode(t, sample, strlen(sample), &ids, &e);
    for (int64_t i = 0; i < n; i++) {
        size_t used;
        assert_in_range(ids[i], 0, tokenizer_size(t) - 1);
        tokenizer_decode(t, ids[i], &used);
    }
    free(ids);
    tokenizer_close(t);
}

static void survives_truncated_files(void **state) {
    (void)state;
    size_t length;
    char *text = read_file(GOLDEN "odd.json", &length);
    while (length > 0 && text[length - 1] == '\n')
        length--;
    for (size_t n = 0; n < length; n += 13) {
        write_file(text, n);
        refuses_name(file_path, ANY_SIZE, "not valid JSON");
    }
    write_file(text, length);
    tokenizer_close(open_good(file_path));
    free(text);
}

static void survives_damaged_files(void **state) {
    (void)state;
    const char *const names[] = {GOLDEN "odd.json", GOLDEN "llama3.json"};
    const char replacements[] = "\"{}[]:,0-9a\\ \xff\xc3\x01";
    uint64_t random = 7;
    for (int k = 0; k < 2; k++) {
        size_t length;
        char *text = read_file(names[k], &length);
        for (int trial = 0; trial < 400; trial++) {
            /* half of the damage goes where the structure is: before the long lists */
            size_t at = next_random(&random) % (trial % 2 ? length : length / 4);
            char saved = text[at];
            text[at] = replacements[next_random(&random) % (sizeof replacements - 1)];
            try_damaged(text, length);
            text[at] = saved;
        }
        free(text);
    }
}

#define IN_DIR(test) cmocka_unit_test_setup_teardown(test, make_dir, remove_dir)

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gpt2_matches_the_library),
        cmocka_unit_test(llama3_matches_the_library),
        cmocka_unit_test(odd_matches_the_library),
        IN_DIR(splits_match_the_library),
        cmocka_unit_test(knows_its_size_and_end),
        cmocka_unit_test(utf8_is_read_strictly),
        cmocka_unit_test(different_pieces_stay_different),
        cmocka_unit_test(invalid_utf8_is_encoded_too),
        cmocka_unit_test(long_pieces_are_fine),
        cmocka_unit_test(repeated_pieces_stay_the_same),
        cmocka_unit_test(byte_tokenizer),
        IN_DIR(unigram_decodes),
        IN_DIR(wordpiece_decodes),
        IN_DIR(byte_fallback_bpe_decodes),
        IN_DIR(merges_go_by_rank),
        IN_DIR(normalizers_are_not_ignored),
        IN_DIR(refuses_to_encode_what_it_would_get_wrong),
        IN_DIR(exploding_patterns_give_up),
        IN_DIR(refuses_what_is_no_tokenizer),
        IN_DIR(refuses_bad_ids),
        cmocka_unit_test(refuses_another_models_tokenizer),
        IN_DIR(refuses_wrong_types),
        IN_DIR(refuses_deep_nesting),
        IN_DIR(survives_truncated_files),
        IN_DIR(survives_damaged_files),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

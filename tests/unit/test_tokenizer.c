/* Tokenizers: C encodes what the tokenizers library encodes (tests/golden/tokenizer_*.json, made by
 * tests/reference/make_tokenizer_cases.py), any bytes at all come back from decoding, and models of other
 * kinds decode. */
#include "tests/lib/tokenizer_fixture.h"

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

/* A text without U+FFFD, which the library writes for bytes that are not UTF-8, is decoded to the byte. */
static void check_kind(const struct tokenizer *t, const cJSON *row, const char *name) {
    const cJSON *text = cJSON_GetObjectItem(row, "text"), *list = cJSON_GetObjectItem(row, "ids");
    const char *decoded = cJSON_GetObjectItem(row, "decoded")->valuestring;
    int count = cJSON_GetArraySize(list), n = 0;
    int32_t *ids = malloc((size_t)(count + 1) * sizeof *ids);
    for (const cJSON *id = list->child; id; id = id->next)
        ids[n++] = (int32_t)id->valuedouble;
    if (cJSON_IsString(text))
        encodes_to(t, text->valuestring, strlen(text->valuestring), count, ids);
    size_t length;
    char *found = decode_sequence(t, ids, count, &length);
    if (!strstr(decoded, "\xef\xbf\xbd") &&
        (length != strlen(decoded) || memcmp(found, decoded, length) != 0))
        fail_msg("%s: '%s' should be decoded to '%s'", name, found, decoded);
    free(found);
    free(ids);
}

static void kinds_match_the_library(void **state) {
    (void)state;
    size_t length;
    char *text = read_file(GOLDEN "kinds.json", &length);
    cJSON *kinds = cJSON_Parse(text);
    assert_true(cJSON_GetArraySize(kinds) >= 15);
    for (const cJSON *kind = kinds->child; kind; kind = kind->next) {
        char *json = cJSON_PrintUnformatted(cJSON_GetObjectItem(kind, "tokenizer"));
        struct tokenizer *t = open_text(json);
        const cJSON *cases = cJSON_GetObjectItem(kind, "cases");
        assert_true(cJSON_GetArraySize(cases) >= 100);
        for (const cJSON *row = cases->child; row; row = row->next)
            check_kind(t, row, cJSON_GetObjectItem(kind, "name")->valuestring);
        tokenizer_close(t);
        free(json);
    }
    cJSON_Delete(kinds);
    free(text);
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

/* What a sequence of two ids decodes to. */
static void pair_decodes_to(const struct tokenizer *t, int32_t a, int32_t b, const char *expected) {
    size_t length;
    char *found = decode_sequence(t, (int32_t[]){a, b}, 2, &length);
    assert_string_equal(found, expected);
    free(found);
}

static void unigram_decodes(void **state) {
    (void)state;
    struct tokenizer *t =
        open_text("{\"added_tokens\":[{\"id\":0,\"content\":\"<unk>\",\"special\":true}],"
                  "\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"\xe2\x96\x81\"},"
                  "\"decoder\":{\"type\":\"Metaspace\",\"replacement\":\"\xe2\x96\x81\"},\"model\":{\"type\":"
                  "\"Unigram\",\"unk_id\":0,"
                  "\"vocab\":[[\"<unk>\",0],[\"\xe2\x96\x81the\",-1.5],[\"s\",-2],["
                  "\"a\xe2\x96\x81\xe2\x96\x81z\",-4]]}}");
    decodes_to(t, 0, "<unk>");
    decodes_to(t, 1, " the");
    decodes_to(t, 2, "s");
    decodes_to(t, 3, "a  z");
    pair_decodes_to(t, 1, 1, "the the");
    pair_decodes_to(t, 3, 3, "aza  z"); /* as the library: the first token has none at all */
    encode_is_refused(t, "the", "not BPE");
    tokenizer_close(t);
}

static void wordpiece_decodes(void **state) {
    (void)state;
    struct tokenizer *t =
        open_text("{\"added_tokens\":[{\"id\":0,\"content\":\"[SEP]\",\"special\":true}],"
                  "\"decoder\":{\"type\":\"WordPiece\",\"prefix\":\"##\",\"cleanup\":true},"
                  "\"model\":{\"type\":\"WordPiece\",\"vocab\":{\"[SEP]\":0,\"play\":1,\"##ing\":2,"
                  "\"##\":4,\".\":5}}}");
    decodes_to(t, 0, " [SEP]");
    decodes_to(t, 1, " play");
    decodes_to(t, 2, "ing");
    decodes_to(t, 3, "");
    decodes_to(t, 4, "");
    decodes_to(t, 5, ".");
    pair_decodes_to(t, 1, 2, "playing");
    pair_decodes_to(t, 2, 1, "##ing play");
    pair_decodes_to(t, 3, 1, "play");
    assert_int_equal(tokenizer_size(t), 6);
    assert_int_equal(tokenizer_end_of_text(t), -1);
    encode_is_refused(t, "playing", "not BPE");
    tokenizer_close(t);
}

static void byte_fallback_bpe(void **state) {
    (void)state;
    struct tokenizer *t = open_text(
        "{\"decoder\":{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Replace\",\"pattern\":{\"String\":"
        "\"\xe2\x96\x81\"},\"content\":\" "
        "\"},{\"type\":\"ByteFallback\"},{\"type\":\"Fuse\"}]},\"model\":{\"type\":\"BPE\","
        "\"byte_fallback\":true,\"vocab\":{\"</"
        "s>\":0,\"\xe2\x96\x81\":1,\"<0x41>\":2,\"<0xZZ>\":3,\"<0xFF>\":4},"
        "\"merges\":[]}}");
    decodes_to(t, 1, " ");
    decodes_to(t, 2, "A");
    decodes_to(t, 3, "<0xZZ>");
    decodes_to(t, 4, "\xff");
    assert_int_equal(tokenizer_end_of_text(t), 0);
    encodes_to(t, "A\xe2\x96\x81 A\xff", 7, 4, (int32_t[]){2, 1, 2, 4}); /* no token for the space, nor unk */
    tokenizer_close(t);
}

/* Decoders that would need to see the whole sequence, and a step that is not known. */
static void other_decoders_are_refused(void **state) {
    (void)state;
    const char *const decoders[] = {
        "{\"type\":\"CTC\"}",
        "{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Fuse\"},{\"type\":\"Strip\",\"content\":\" "
        "\",\"start\":0,"
        "\"stop\":1}]}",
        "{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Fuse\"},{\"type\":\"Replace\",\"pattern\":{"
        "\"String\":\"ab\"},"
        "\"content\":\"\"}]}",
        "{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"ByteFallback\"},{\"type\":\"Replace\",\"pattern\":"
        "{\"String\":\"a\"},\"content\":\"b\"}]}",
        "{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"ByteLevel\"},{\"type\":\"BPEDecoder\",\"suffix\":"
        "\"</w>\"}]}",
        "{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"BPEDecoder\",\"suffix\":\"</"
        "w>\"},{\"type\":\"Metaspace\","
        "\"replacement\":\"_\"}]}",
        "{\"type\":\"BPEDecoder\",\"suffix\":\"b\"}", /* in the middle of a token */
    };
    char json[512];
    for (size_t i = 0; i < sizeof decoders / sizeof *decoders; i++) {
        snprintf(json, sizeof json,
                 "{\"decoder\":%s,\"model\":{\"type\":\"BPE\",\"vocab\":{\"abc\":0},\"merges\":[]}}",
                 decoders[i]);
        refuses_text(json, "its decoder cannot be applied token by token");
    }
}

/* ---- the end of a text ---- */

static void write_beside(const char *name, const char *content) {
    char path[192];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    fputs(content, f);
    assert_int_equal(fclose(f), 0);
}

static void remove_beside(const char *name) {
    char path[192];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    assert_int_equal(remove(path), 0);
}

#define WITH_ENDS                                                                                            \
    "{\"decoder\":{\"type\":\"ByteLevel\"},\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"</s>\":256,"     \
    "\"<|endoftext|>\":3},\"merges\":[]},\"added_tokens\":[{\"id\":258,\"content\":\"<eos>\",\"special\":"   \
    "true}]}"

static void ends_are_found_by_one_rule(void **state) {
    (void)state;
    struct tokenizer *t = open_text(WITH_ENDS);
    assert_int_equal(tokenizer_end_of_text(t), 258); /* an added token before ordinary ones */
    assert_int_equal(tokenizer_end_ids(t)->count, 1);
    tokenizer_close(t);
    const char *const same[] = {"{\"eos_token\":\"</s>\"}",
                                "{\"eos_token\":{\"content\":\"</s>\",\"lstrip\":false}}"};
    for (int i = 0; i < 2; i++) {
        write_beside("tokenizer_config.json", same[i]);
        t = open_good(file_path);
        assert_int_equal(tokenizer_end_of_text(t), 256);
        tokenizer_close(t);
    }
    write_beside("tokenizer_config.json", "{\"eos_token\":null}");
    write_beside("generation_config.json", "{\"eos_token_id\":[3,258,0]}");
    t = open_good(file_path);
    assert_int_equal(tokenizer_end_of_text(t), 258);
    assert_int_equal(tokenizer_end_ids(t)->count, 3);
    assert_true(end_ids_has(tokenizer_end_ids(t), 258) && end_ids_has(tokenizer_end_ids(t), 0));
    assert_false(end_ids_has(tokenizer_end_ids(t), 256));
    tokenizer_close(t);
    write_beside("generation_config.json", "{\"eos_token_id\":7}");
    t = open_good(file_path);
    assert_true(end_ids_has(tokenizer_end_ids(t), 7));
    tokenizer_close(t);
    const char *const bad[] = {"{\"eos_token\":\"<nope>\"}", "{\"eos_token\":7}", "{", "[]"};
    for (int i = 0; i < 3; i++) {
        write_beside("tokenizer_config.json", bad[i]);
        refuses_name(file_path, ANY_SIZE, "tokenizer_config.json");
    }
    remove_beside("tokenizer_config.json");
    const char *const bad_ids[] = {"{\"eos_token_id\":\"</s>\"}", "{\"eos_token_id\":[0,1000000]}",
                                   "{\"eos_token_id\":-1}", "nonsense"};
    for (int i = 0; i < 4; i++) {
        write_beside("generation_config.json", bad_ids[i]);
        refuses_name(file_path, ANY_SIZE, "generation_config.json");
    }
    remove_beside("generation_config.json");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gpt2_matches_the_library),
        cmocka_unit_test(llama3_matches_the_library),
        cmocka_unit_test(odd_matches_the_library),
        IN_DIR(splits_match_the_library),
        IN_DIR(kinds_match_the_library),
        cmocka_unit_test(knows_its_size_and_end),
        cmocka_unit_test(utf8_is_read_strictly),
        cmocka_unit_test(different_pieces_stay_different),
        cmocka_unit_test(invalid_utf8_is_encoded_too),
        cmocka_unit_test(long_pieces_are_fine),
        cmocka_unit_test(repeated_pieces_stay_the_same),
        cmocka_unit_test(byte_tokenizer),
        IN_DIR(unigram_decodes),
        IN_DIR(wordpiece_decodes),
        IN_DIR(byte_fallback_bpe),
        IN_DIR(other_decoders_are_refused),
        IN_DIR(ends_are_found_by_one_rule),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

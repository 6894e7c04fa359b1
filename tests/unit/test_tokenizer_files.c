/* Files of tokenizers: options that change the ids are obeyed or refused, and no file, however damaged or
 * hostile, does worse than an error that says what is wrong with it. */
#include "tests/lib/tokenizer_fixture.h"

#include <time.h>

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

static void normalizers_are_applied(void **state) {
    (void)state;
    const char *nfc = "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFC\"}]}";
    const char *vocab =
        "{\"a\":0,\"\xc3\x83\":1,\"\xc2\xa9\":2,\"e\":3,\"\xc4\xa0\":4}"; /* a, bytes c3 and a9, e, space */
    struct tokenizer *t = open_text(tiny(nfc, BYTE_LEVEL, "", vocab, "[]", "[]"));
    encodes_to(t, "a\xc3\xa9", 3, 3, (int32_t[]){0, 1, 2});
    encodes_to(t, "ae\xcc\x81", 4, 3, (int32_t[]){0, 1, 2});
    encodes_to(t,
               "\xff"
               "e\xff\xcc\x81",
               5, 1, (int32_t[]){3}); /* not composed across what is not UTF-8 */
    tokenizer_close(t);
    t = open_text(tiny("{\"type\":\"Lowercase\"}", BYTE_LEVEL, "", VOCAB, MERGES, "[]"));
    encodes_to(t, "ABb", 3, 1, (int32_t[]){3});
    tokenizer_close(t);
    t = open_text(tiny("{\"type\":\"StripAccents\"}", BYTE_LEVEL, "", VOCAB, MERGES, "[]"));
    encode_is_refused(t, "ab", "StripAccents");
    decodes_to(t, 3, "abb");
    tokenizer_close(t);
    const char *const wrong[] = {"7",
                                 "{}",
                                 "{\"type\":\"Sequence\"}",
                                 "{\"type\":\"Prepend\"}",
                                 "{\"type\":\"Replace\"}",
                                 "{\"type\":\"Replace\",\"pattern\":{\"String\":\"a\"}}",
                                 "{\"type\":\"Replace\",\"pattern\":{},\"content\":\"a\"}",
                                 "{\"type\":\"Strip\",\"strip_left\":7}"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        refuses_text(tiny(wrong[i], BYTE_LEVEL, "", VOCAB, MERGES, "[]"), file_path);
}

/* The same ids every time, whatever "dropout" says. */
static void dropout_is_not_applied(void **state) {
    (void)state;
    struct tokenizer *t = open_text(tiny("null", BYTE_LEVEL, ",\"dropout\":0.5", VOCAB, MERGES, "[]"));
    for (int i = 0; i < 20; i++)
        encodes_to(t, "abb", 3, 1, (int32_t[]){3});
    tokenizer_close(t);
}

/* ---- patterns on every version of PCRE2 ---- */

static size_t count_matches(const char *pattern, const char *text) {
    char message[REGEX_MESSAGE] = "";
    struct code_ranges named = {0};
    struct error e = {0};
    pcre2_code *regex = regex_compile(pattern, &named, message);
    if (!regex)
        fail_msg("%s: %s", pattern, message);
    pcre2_match_data *match = pcre2_match_data_create(1, NULL);
    pcre2_match_context *limits = pcre2_match_context_create(NULL);
    size_t count = 0, last_end = SIZE_MAX, start, end;
    for (; regex_next(regex, text, strlen(text), last_end, match, limits, "pattern", &start, &end, &e) > 0 &&
           end > start;
         count++)
        last_end = end;
    pcre2_match_data_free(match);
    pcre2_match_context_free(limits);
    pcre2_code_free(regex);
    free(named.ranges);
    return count;
}

/* What versions of PCRE2 read differently is rewritten: properties where case is ignored (10.45), scripts. */
static void patterns_mean_the_same_everywhere(void **state) {
    (void)state;
    assert_int_equal(count_matches("(?i:\\p{Lu})", "aBcD"), 2);
    assert_int_equal(count_matches("(?i)\\p{Ll}", "aBcD"), 2);
    assert_int_equal(count_matches("(?i:x|(?:y\\p{Lu}))", "XYByb"), 2);
    assert_int_equal(count_matches("(?i:k)", "kK\xe2\x84\xaa"), 3);
    assert_int_equal(count_matches("(?i:[r-t])", "sS\xc5\xbfTu"), 4);
    assert_int_equal(count_matches("(?i:[^k\\s])", "kK \xe2\x84\xaaz"), 1);
    assert_int_equal(count_matches("\\p{Han}", "\xe6\x9d\xb1\xe3\x80\x82"),
                     1); /* U+3002 has Han as an extension */
    assert_int_equal(count_matches("\\p{ Uppercase_Letter }|\\P{^N}", "aB1"), 2);
    assert_int_equal(count_matches("[+\\-.-]", "+-.,"), 3);
    assert_int_equal(count_matches("(?<=a|bc)x", "axbcxcx"), 2);
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
        /* what the versions of PCRE2 from 10.40 on read or take differently */
        SPLIT("(?i:[\\\\p{Lu}])"),
        SPLIT("(?i:[^\\\\p{L}])"),
        SPLIT("(?i:[\\\\S*]{2})"),
        SPLIT("(?i:[\\\\P{N}])"),
        SPLIT("(?i:\xc3\x9f)"),
        SPLIT("(?i:ss)"),
        SPLIT("(?i:of(?:f)ice)"),
        SPLIT("\\\\pL"),
        SPLIT("\\\\p{L&}"),
        SPLIT("\\\\p{Alphabetic}"),
        SPLIT("\\\\p{scx:Han}"),
        SPLIT("\\\\x{ 41 }"),
        SPLIT("\\\\x4"),
        SPLIT("[\\\\xA0]"),
        SPLIT("a{ 1,2 }"),
        SPLIT("(?<=ab?)c"),
        SPLIT("(?<=a{1,2})c"),
        SPLIT("(?<=(?:a|bc)d)e"),
        SPLIT("(?=a)+b"),
        SPLIT("(?[a-c])"),
        SPLIT("[a-\\\\d]"),
        SPLIT("\\\\\xc3\xa9"),
        "{\"type\":\"x\\u000a\\u001b[31m\"}",
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
    const char *const models[] = {",\"continuing_subword_prefix\":\"##\"", ",\"byte_fallback\":true",
                                  ",\"end_of_word_suffix\":\"a suffix that is longer than any known one\""};
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

/* A token of the file that is a space and takes the spaces around it: each looks at all, but not anew. */
static void spaces_are_looked_at_once(void **state) {
    (void)state;
    enum { LENGTH = 1 << 20 };
    struct tokenizer *t = open_text("{\"pre_tokenizer\":{\"type\":\"ByteLevel\"},\"model\":{\"type\":\"BPE\","
                                    "\"vocab\":{\"a\":0},\"merges\":[]},\"added_tokens\":["
                                    "{\"id\":1,\"content\":\" \",\"lstrip\":true,\"rstrip\":true}]}");
    char *text = malloc(LENGTH);
    int32_t *ids = NULL;
    struct error e = {0};
    memset(text, ' ', LENGTH);
    clock_t start = clock();
    assert_int_equal(tokenizer_encode(t, text, LENGTH, &ids, &e), LENGTH);
    assert_true(clock() - start < 20 * CLOCKS_PER_SEC); /* and not half an hour */
    free(ids);
    free(text);
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
    refuses_name(file_path, ANY_SIZE, "1099511627776 bytes are too many");
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
    encodes_to(t, "a", 1, 1, (int32_t[]){0});
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

int main(void) {
    const struct CMUnitTest tests[] = {
        IN_DIR(merges_go_by_rank),
        IN_DIR(normalizers_are_applied),
        IN_DIR(dropout_is_not_applied),
        cmocka_unit_test(patterns_mean_the_same_everywhere),
        IN_DIR(refuses_to_encode_what_it_would_get_wrong),
        IN_DIR(exploding_patterns_give_up),
        IN_DIR(spaces_are_looked_at_once),
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

/* What both tests of tokenizers use: files in a fresh directory under /tmp, removed afterwards, and what may
 * be expected of opening, encoding and decoding. Included once by each test program. */
#ifndef IHA_TESTS_LIB_TOKENIZER_FIXTURE_H
#define IHA_TESTS_LIB_TOKENIZER_FIXTURE_H

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

#include "data/tokenizer_internal.h" /* for UTF-8 and regular expressions */

#define GOLDEN "tests/golden/tokenizer_"

enum { ANY_SIZE = 1000000 };

static char dir[64], file_path[96];

static inline int make_dir(void **state) {
    (void)state;
    strcpy(dir, "/tmp/iha_tokenizer_XXXXXX");
    if (!mkdtemp(dir))
        return -1;
    snprintf(file_path, sizeof file_path, "%s/tokenizer.json", dir);
    return 0;
}

static inline int remove_dir(void **state) {
    (void)state;
    remove(file_path);
    return rmdir(dir);
}

static inline char *read_file(const char *path, size_t *length) {
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

static inline void write_file(const char *text, size_t length) {
    FILE *f = fopen(file_path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(text, 1, length, f), length);
    assert_int_equal(fclose(f), 0);
}

static inline struct tokenizer *open_good(const char *name) {
    struct error e = {0};
    struct tokenizer *t = tokenizer_open(name, ANY_SIZE, &e);
    if (!t)
        fail_msg("%s", e.text);
    return t;
}

static inline struct tokenizer *open_text(const char *json) {
    write_file(json, strlen(json));
    return open_good(file_path);
}

static inline void is_user_error(const struct error *e, const char *word) {
    assert_int_equal(e->exit_code, EXIT_USER);
    assert_true(e->text[0]);
    assert_null(strchr(e->text, '\n'));
    if (!strstr(e->text, word))
        fail_msg("'%s' should contain '%s'", e->text, word);
}

static inline void refuses_name(const char *name, int64_t vocab_size, const char *word) {
    struct error e = {0};
    assert_null(tokenizer_open(name, vocab_size, &e));
    is_user_error(&e, word);
}

static inline void refuses_text(const char *json, const char *word) {
    write_file(json, strlen(json));
    refuses_name(file_path, ANY_SIZE, word);
}

static inline void encode_is_refused(const struct tokenizer *t, const char *text, const char *word) {
    struct error e = {0};
    int32_t *ids = NULL;
    assert_int_equal(tokenizer_encode(t, text, strlen(text), &ids, &e), -1);
    is_user_error(&e, word);
    assert_string_equal(strstr(e.text, "decoding works"), "decoding works");
}

static inline void encodes_to(const struct tokenizer *t, const char *text, size_t length, int64_t count,
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
static inline char *decode_all(const struct tokenizer *t, const int32_t *ids, int64_t count, size_t *length) {
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

/* The text of a sequence, as generation writes it, with a NUL behind it; the caller frees. */
static inline char *decode_sequence(const struct tokenizer *t, const int32_t *ids, int64_t count,
                                    size_t *length) {
    struct decoding state = {0};
    char *out = NULL;
    FILE *f = open_memstream(&out, length);
    assert_non_null(f);
    for (int64_t i = 0; i < count; i++) {
        size_t n = 99;
        const char *bytes = tokenizer_decode_next(t, &state, ids[i], &n);
        assert_int_equal(bytes[n], 0);
        fwrite(bytes, 1, n, f);
    }
    fclose(f);
    return out;
}

static inline int64_t comes_back(const struct tokenizer *t, const char *text, size_t length) {
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

static inline void decodes_to(const struct tokenizer *t, int32_t id, const char *expected) {
    size_t length = 99;
    const char *text = tokenizer_decode(t, id, &length);
    assert_int_equal(length, strlen(expected));
    assert_string_equal(text, expected);
}

static inline uint32_t next_random(uint64_t *state) {
    *state = *state * UINT64_C(6364136223846793005) + 1442695040888963407u;
    return (uint32_t)(*state >> 33);
}

#define IN_DIR(test) cmocka_unit_test_setup_teardown(test, make_dir, remove_dir)

#endif

/* Generated tokens as text: what is written, where it stops, and prompts of token ids. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "data/text.h"

static struct tokenizer *bytes;

static int open_tokenizer(void **state) {
    (void)state;
    struct error e;
    bytes = tokenizer_open("bytes", 257, &e);
    return bytes ? 0 : -1;
}

static int close_tokenizer(void **state) {
    (void)state;
    tokenizer_close(bytes);
    return 0;
}

/* What is written of `text`, a token a byte, and whether text_emit asked to stop. */
static bool emit(const char *text, const char *stop, char *written, size_t size) {
    FILE *out = fmemopen(written, size, "w");
    struct text_writer w = {
        .tokenizer = bytes, .out = out, .ends = tokenizer_end_ids(bytes), .stop = stop};
    bool goes_on = true;
    assert_non_null(out);
    for (; *text && goes_on; text++)
        goes_on = text_emit(&w, (unsigned char)*text);
    text_finish(&w);
    assert_int_equal(fclose(out), 0);
    return !goes_on;
}

/* For every text over two letters and every stop: the text before the first occurrence. */
static void stops_before_the_text(void **state) {
    (void)state;
    for (int stop_length = 1; stop_length <= 5; stop_length++)
        for (int stop_bits = 0; stop_bits < 1 << stop_length; stop_bits++)
            for (int bits = 0; bits < 1 << 10; bits++) {
                char text[11] = "", stop[6] = "", written[32] = "", expected[11];
                for (int i = 0; i < 10; i++)
                    text[i] = bits >> i & 1 ? 'a' : 'b';
                for (int i = 0; i < stop_length; i++)
                    stop[i] = stop_bits >> i & 1 ? 'a' : 'b';
                char *found = strstr(text, stop);
                snprintf(expected, sizeof expected, "%.*s", found ? (int)(found - text) : 10, text);
                bool stopped = emit(text, stop, written, sizeof written);
                if (stopped != (found != NULL) || strcmp(written, expected) != 0)
                    fail_msg("%s stopped at %s: %s, not %s", text, stop, written, expected);
            }
}

static void writes_at_once_what_cannot_be_the_stop(void **state) {
    (void)state;
    char written[32] = "";
    FILE *out = fmemopen(written, sizeof written, "w");
    struct text_writer w = {
        .tokenizer = bytes, .out = out, .ends = tokenizer_end_ids(bytes), .stop = "\n\nQ"};
    assert_true(text_emit(&w, 'x'));
    assert_string_equal(written, "x");
    assert_true(text_emit(&w, '\n'));
    assert_true(text_emit(&w, '\n'));
    assert_string_equal(written, "x");
    assert_true(text_emit(&w, '\n'));
    assert_string_equal(written, "x\n");
    assert_false(text_emit(&w, 256)); /* the end of the document */
    text_finish(&w);
    fflush(out);
    assert_string_equal(written, "x\n\n\n");
    fclose(out);
}

/* A full disk, or a closed pipe. */
static void stops_when_it_cannot_write(void **state) {
    (void)state;
    FILE *full = fopen("/dev/full", "w");
    if (!full)
        skip();
    struct text_writer w = {.tokenizer = bytes, .out = full, .ends = tokenizer_end_ids(bytes)};
    assert_false(text_emit(&w, 'x'));
    w.copy = fopen("/dev/null", "w");
    assert_true(text_emit(&w, 'x')); /* the copy goes on */
    fclose(w.copy);
    fclose(full);
}

static void check_ids(const char *text, int64_t expected, int32_t last) {
    int32_t *ids;
    struct error e = {0};
    int64_t count = text_parse_ids("--prompt", text, strlen(text), 300, &ids, &e);
    assert_int_equal(count, expected);
    if (count > 0)
        assert_int_equal(ids[count - 1], last);
    if (count < 0)
        assert_non_null(strstr(e.text, "--prompt: "));
    free(ids);
}

static void parses_ids(void **state) {
    (void)state;
    check_ids("", 0, 0);
    check_ids(" \r\n", 0, 0);
    check_ids("0", 1, 0);
    check_ids(" 1 2\n299\n", 3, 299);
    check_ids("1,2", -1, 0);
    check_ids("1 300", -1, 0);
    check_ids("-1", -1, 0);
    check_ids("1 x", -1, 0);
    check_ids("99999999999999999999", -1, 0);
    int32_t *ids;
    assert_int_equal(text_parse_ids("--prompt-file", "1 2\0 3", 6, 300, &ids, NULL), -1);
    free(ids);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(stops_before_the_text),
        cmocka_unit_test(writes_at_once_what_cannot_be_the_stop),
        cmocka_unit_test(stops_when_it_cannot_write),
        cmocka_unit_test(parses_ids),
    };
    return cmocka_run_group_tests(tests, open_tokenizer, close_tokenizer);
}

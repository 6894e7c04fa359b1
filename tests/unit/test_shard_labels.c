/* Labels beside shards: what is read, what is refused, and what changes the fingerprint. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdbool.h>
#include <sys/stat.h>
#include <cmocka.h>

#include "data/shards.h"
#include "tests/lib/shard_files.h"

static void labels_are_the_targets(void **state) {
    (void)state;
    write_shard("a.bin", U16, 9, 10, 100);
    write_labels("a.labels", 9, -2);
    write_shard("b.bin", U32, 6, 50, 100);
    write_labels("b.labels", 6, 90);
    struct shards *s = open_good("*.bin", 4, 100);
    assert_true(shards_have_labels(s));
    assert_int_equal(shards_sequences(s), 3); /* (9-1)/4 + (6-1)/4: as without labels */
    const int32_t first_token[] = {10, 14, 50}, first_label[] = {-2, 2, 90};
    for (int i = 0; i < 3; i++) {
        int32_t tokens[5] = {0, 0, 0, 0, -7}, targets[5] = {0, 0, 0, 0, -7};
        assert_int_equal(shards_read(s, i, tokens, targets, NULL), 0);
        for (int k = 0; k < 4; k++) {
            assert_int_equal(tokens[k], first_token[i] + k);
            assert_int_equal(targets[k], first_label[i] + k);
        }
        assert_int_equal(tokens[4], -7);
        assert_int_equal(targets[4], -7);
    }
    shards_close(s);
}

static void reads_ranges(void **state) {
    (void)state;
    const int magics[] = {U16, U32};
    for (int m = 0; m < 2; m++)
        for (int labelled = 0; labelled < 2; labelled++) {
            write_shard("a.bin", magics[m], 20, 0, 1000);
            write_shard("b.bin", magics[m], 5000, 100, 10000);
            if (labelled) {
                write_labels("a.labels", 20, 0);
                write_labels("b.labels", 5000, -2);
            } else {
                remove(in_dir("a.labels"));
                remove(in_dir("b.labels"));
            }
            struct shards *s = open_good("*.bin", 4, 10000);
            assert_int_equal(shards_have_labels(s), labelled);
            assert_int_equal(shards_files(s), 2);
            assert_int_equal(shards_file_tokens(s, 0), 20);
            assert_int_equal(shards_file_tokens(s, 1), 5000);
            static int32_t tokens[5001], labels[5001];
            const int64_t starts[] = {0, 0, 7, 4999, 5000}, counts[] = {5000, 1, 4990, 1, 0};
            for (int r = 0; r < 5; r++) {
                tokens[counts[r]] = labels[counts[r]] = 12345;
                assert_int_equal(
                    shards_read_range(s, 1, starts[r], counts[r], tokens, labelled ? labels : NULL, NULL), 0);
                for (int64_t k = 0; k < counts[r]; k++) {
                    assert_int_equal(tokens[k], 100 + starts[r] + k);
                    if (labelled)
                        assert_int_equal(labels[k], -2 + starts[r] + k);
                }
                assert_int_equal(tokens[counts[r]], 12345);
                assert_int_equal(labels[counts[r]], 12345);
            }
            shards_close(s);
        }
}

static void refuses_bad_labels(void **state) {
    (void)state;
    write_shard("a.bin", U16, 10, 0, 50);
    write_labels("a.labels", 9, 0);
    refuses("a.bin", 4, 50, "a.labels: 9 labels for the 10 tokens of", "a.bin; make the labels again");
    write_labels("a.labels", 11, 0);
    refuses("a.bin", 4, 50, "a.labels: 11 labels for the 10 tokens of", "a.bin");
    write_labels_header("a.labels", U32, 1, 10, 10, 0);
    refuses("a.bin", 4, 50, "a.labels: not a file of labels: it starts with 20240801",
            "20261129 is expected");
    write_labels_header("a.labels", LABELS, 7, 10, 10, 0);
    refuses("a.bin", 4, 50, "a.labels: labels version 7 where 1 is expected", "");
    write_labels_header("a.labels", LABELS, 1, 10, 9, 0);
    refuses("a.bin", 4, 50, "a.labels: truncated: header promises 10 labels (1064 bytes)", "has 1060");
    write_labels_header("a.labels", LABELS, 1, 10, 11, 0);
    refuses("a.bin", 4, 50, "a.labels: too long: header promises 10 labels", "");
    write_labels_header("a.labels", LABELS, 1, -1, 10, 0);
    refuses("a.bin", 4, 50, "a.labels: damaged: its header promises -1 labels", "");
    assert_int_equal(truncate(in_dir("a.labels"), 100), 0);
    refuses("a.bin", 4, 50, "a.labels: truncated: 100 bytes cannot hold", "");
    write_labels("a.labels", 10, 41);
    refuses("a.bin", 4, 50, "a.labels: label 9 is 50 but vocab_size is 50", "-1 (does not count) or -2");
    write_labels("a.labels", 10, -3);
    refuses("a.bin", 4, 50, "a.labels: label 0 is -3 but", "");

    write_labels("a.labels", 10, 0);
    refuses("a.labels", 4, 50, "a.labels: these are labels, not tokens", ".bin files only");
    assert_int_equal(unlink(in_dir("a.labels")), 0);
    assert_int_equal(symlink("/nowhere/at/all", in_dir("a.labels")), 0);
    refuses("a.bin", 4, 50, "a.labels: cannot be opened: No such file", "");
    assert_int_equal(unlink(in_dir("a.labels")), 0);
    assert_int_equal(mkdir(in_dir("a.labels"), 0700), 0);
    refuses("a.bin", 4, 50, "a.labels: not a regular file", "");
}

static void labels_for_all_shards_or_for_none(void **state) {
    (void)state;
    write_shard("a.bin", U16, 10, 0, 50);
    write_shard("b.bin", U16, 10, 0, 50);
    write_shard("c.bin", U16, 10, 0, 50);
    write_labels("b.labels", 10, 0);
    refuses("*.bin", 4, 50, "/a.bin has no labels, and", "/b.bin has some: make labels for all");
    refuses("[bc].bin", 4, 50, "/c.bin has no labels, and", "/b.bin has some");
    struct shards *s = open_good("[ac].bin", 4, 50);
    assert_false(shards_have_labels(s));
    shards_close(s);
}

/* Ids are checked in blocks of 4,096; small and huge vocabularies take different paths. */
static void finds_a_bad_label_anywhere(void **state) {
    (void)state;
    const long positions[] = {0, 4095, 4096, 8191, 9999};
    const int64_t vocabularies[] = {512, INT32_MAX - 2, INT32_MAX};
    write_shard("a.bin", U16, 10000, 0, 500);
    write_labels("a.labels", 10000, 0);
    for (int i = 0; i < 10000; i++)
        overwrite_token("a.labels", 4, i, (uint32_t)(i % 514 - 2)); /* -2 .. 511 */
    shards_close(open_good("a.bin", 64, 512));
    for (size_t v = 0; v < 3; v++)
        for (size_t p = 0; p < sizeof positions / sizeof *positions; p++) {
            const int64_t vocab = vocabularies[v], bad[] = {-3, INT32_MIN, vocab};
            for (int b = 0; b < 3; b++) {
                char words[64];
                overwrite_token("a.labels", 4, positions[p], (uint32_t)bad[b]);
                snprintf(words, sizeof words, "label %ld is %lld but", positions[p], (long long)bad[b]);
                refuses("a.bin", 64, vocab, words, "a.labels");
            }
            overwrite_token("a.labels", 4, positions[p], (uint32_t)(vocab - 1));
            shards_close(open_good("a.bin", 64, vocab));
            overwrite_token("a.labels", 4, positions[p], (uint32_t)-2);
            shards_close(open_good("a.bin", 64, vocab));
        }
    overwrite_token("a.labels", 4, 5000, INT32_MAX);
    shards_close(open_good("a.bin", 64, INT64_MAX));
}

static void fails_to_read_labels(struct shards *s, int64_t i, const char *words) {
    struct error e = {0};
    int32_t tokens[4], targets[4];
    if (shards_read(s, i, tokens, targets, &e) == 0)
        fail_msg("was read, but expected '%s'", words);
    assert_int_equal(e.exit_code, EXIT_RUN);
    assert_null(strchr(e.text, '\n'));
    if (!strstr(e.text, words))
        fail_msg("'%s' should contain '%s'", e.text, words);
}

static void finds_changed_labels(void **state) {
    (void)state;
    int32_t tokens[4], targets[4];
    enum { COUNT = 200000 };
    write_shard("a.bin", U16, COUNT, 0, 2000);
    write_labels("a.labels", COUNT, 0);
    struct shards *s = open_good("a.bin", 4, COUNT);
    assert_int_equal(shards_read(s, 500, tokens, targets, NULL), 0);
    overwrite_token("a.labels", 4, 2001, (uint32_t)-3); /* not among the labels that are compared */
    fails_to_read_labels(s, 500, "a.labels: label 2001 is id -3, outside the vocabulary");
    assert_int_equal(shards_read(s, 501, tokens, targets, NULL), 0);
    overwrite_token("a.labels", 4, 2001, COUNT);
    fails_to_read_labels(s, 500, "label 2001 is id 200000, outside the vocabulary");
    overwrite_token("a.labels", 4, 2001, 2001);
    assert_int_equal(shards_read(s, 500, tokens, targets, NULL), 0);
    overwrite_token("a.labels", 4, 3158 * 5, 7);
    fails_to_read_labels(s, 500, "a.labels: the file has changed since the run began: some of its labels");
    assert_int_equal(truncate(in_dir("a.labels"), 4000), 0);
    fails_to_read_labels(s, 500, "a.labels: the file has changed since the run began: it has 4000 bytes");
    shards_close(s);
}

static void fingerprint_of(char out[17]) {
    struct shards *s = open_good("*.bin", 4, 60000);
    shards_fingerprint(s, out);
    shards_close(s);
}

static void labels_change_the_fingerprint(void **state) {
    (void)state;
    char bare[17], labelled[17], now[17];
    write_shard("a.bin", U16, 200000, 0, 50000);
    fingerprint_of(bare);
    write_labels("a.labels", 200000, -200000 + 60000);
    for (int i = 0; i < 200000; i++)
        if (i < 139998)
            overwrite_token("a.labels", 4, i, (uint32_t)-1);
    fingerprint_of(labelled);
    assert_string_not_equal(labelled, bare);
    const long positions[] = {0, 3158 * 5, 199999};
    for (int p = 0; p < 3; p++) {
        uint32_t before = positions[p] < 139998 ? (uint32_t)-1 : (uint32_t)(positions[p] - 140000);
        overwrite_token("a.labels", 4, positions[p], 3);
        fingerprint_of(now);
        assert_string_not_equal(now, labelled);
        overwrite_token("a.labels", 4, positions[p], before);
        fingerprint_of(now);
        assert_string_equal(now, labelled);
    }
    assert_int_equal(unlink(in_dir("a.labels")), 0);
    fingerprint_of(now);
    assert_string_equal(now, bare);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        IN_DIR(labels_are_the_targets),
        IN_DIR(reads_ranges),
        IN_DIR(refuses_bad_labels),
        IN_DIR(labels_for_all_shards_or_for_none),
        IN_DIR(finds_a_bad_label_anywhere),
        IN_DIR(finds_changed_labels),
        IN_DIR(labels_change_the_fingerprint),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

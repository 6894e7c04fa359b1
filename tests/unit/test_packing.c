/* Where segments begin, and how whole documents are packed into sequences. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "data/packing.h"
#include "tests/lib/id_files.h"
#include "tests/lib/temporary_directory.h"

/* ---- segments ---- */

static void check_segments(struct document_rule rule, int64_t n, const int32_t *tokens,
                           const int32_t *targets, const int32_t *expected) {
    int32_t segments[16];
    segments_find(rule, tokens, targets, n, segments);
    assert_memory_equal(segments, expected, (size_t)n * sizeof *segments);
}

static void segments_begin_where_documents_do(void **state) {
    (void)state;
    const int32_t tokens[10] = {5, 9, 1, 2, 9, 9, 3, 4, 5, 9}, counted[10] = {0};
    check_segments((struct document_rule){9, false}, 10, tokens, counted,
                   (int32_t[]){0, 0, 2, 2, 2, 5, 6, 6, 6, 6});
    check_segments((struct document_rule){9, true}, 10, tokens, counted,
                   (int32_t[]){0, 1, 1, 1, 4, 5, 5, 5, 5, 9});
    check_segments((struct document_rule){-1, false}, 10, tokens, counted, (int32_t[10]){0});
}

static void each_run_of_padding_is_a_segment(void **state) {
    (void)state;
    const int32_t tokens[10] = {9, 9, 1, 2, 9, 9, 9, 3, 4, 9};
    const int32_t targets[10] = {-2, -2, 2, -1, 3, -2, -2, 4, -1, -2};
    check_segments((struct document_rule){9, false}, 10, tokens, targets,
                   (int32_t[]){0, 0, 2, 2, 2, 5, 5, 7, 7, 9});
    /* A separator ends the padding before it, and padding after a document needs none. */
    const int32_t starts[6] = {9, 9, 9, 1, 9, 9}, labels[6] = {-2, -2, 1, 1, -2, -2};
    check_segments((struct document_rule){9, true}, 6, starts, labels, (int32_t[]){0, 0, 2, 2, 4, 4});
}

/* ---- packing ---- */

static struct packer *open_packer(const char *pattern, int64_t seq_len, struct document_rule rule,
                                  struct shards **s) {
    struct error e = {0};
    const struct shards_options options = {.seq_len = 1, .vocab_size = 1 << 23};
    *s = shards_open(pattern, &options, &e);
    struct packer *p = *s ? packer_open(*s, rule, seq_len, &e) : NULL;
    if (!p)
        fail_msg("%s", e.text);
    return p;
}

static void check_sequence(const struct packer *p, int64_t i, const int32_t tokens[8],
                           const int32_t targets[8]) {
    int32_t x[8], y[8];
    packer_copy(p, i, x, y);
    assert_memory_equal(x, tokens, sizeof x);
    assert_memory_equal(y, targets, sizeof y);
}

static void packs_by_best_fit(void **state) {
    (void)state;
    /* Documents of 5, 3, 4, 2 and 12 tokens, and one without an end. */
    const int32_t ids[29] = {11, 12, 13, 14, 9,  21, 22, 9,  31, 32, 33, 9,  41, 9, 51,
                             52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 9,  71, 72, 73};
    write_ids("a.bin", ids, 29);
    struct shards *s;
    struct packer *p = open_packer("a.bin", 8, (struct document_rule){9, false}, &s);
    assert_int_equal(packer_blocks(p), 1);
    assert_int_equal(packer_load(p, 0, NULL), 4);
    /* Longest first: 12 is cropped to 8 and alone; 5 and the first 3; 4 and the other 3; 2 in what is left least. */
    check_sequence(p, 0, (int32_t[]){11, 12, 13, 14, 9, 21, 22, 9},
                   (int32_t[]){12, 13, 14, 9, 21, 22, 9, 31});
    check_sequence(p, 1, (int32_t[]){31, 32, 33, 9, 71, 72, 73, 9},
                   (int32_t[]){32, 33, 9, 41, 72, 73, LABEL_IGNORED, LABEL_PADDING});
    check_sequence(p, 2, (int32_t[]){41, 9, 9, 9, 9, 9, 9, 9},
                   (int32_t[]){9, 51, LABEL_PADDING, LABEL_PADDING, LABEL_PADDING, LABEL_PADDING,
                               LABEL_PADDING, LABEL_PADDING});
    check_sequence(p, 3, (int32_t[]){51, 52, 53, 54, 55, 56, 57, 58},
                   (int32_t[]){52, 53, 54, 55, 56, 57, 58, 59});
    const struct packing_stats *stats = packer_stats(p);
    assert_int_equal(stats->tokens, 29);
    assert_int_equal(stats->packed_tokens, 5 + 3 + 4 + 2 + 8 + 3);
    assert_int_equal(stats->documents, 6);
    assert_int_equal(stats->cropped, 1);
    assert_int_equal(stats->sequences, 4);
    packer_close(p);
    shards_close(s);
}

static void labels_and_padding_are_kept_apart(void **state) {
    (void)state;
    /* An example, padding, an example whose answer lies beyond a sequence, one without an answer, and a last one. */
    const int32_t ids[20] = {1, 2, 3, 9, 9, 9, 4, 5, 6, 7, 8, 8, 8, 8, 9, 1, 9, 2, 3, 9};
    const int32_t labels[20] = {-1, -1, 9, -1, -2, -2, -1, -1, -1, -1, -1, -1, -1, 9, -1, -1, -1, -1, 9, -1};
    write_ids("a.bin", ids, 20);
    write_labels("a.labels", labels, 20);
    struct shards *s;
    struct packer *p = open_packer("a.bin", 7, (struct document_rule){9, false}, &s);
    assert_int_equal(packer_load(p, 0, NULL), 1);
    int32_t x[7], y[7];
    packer_copy(p, 0, x, y);
    assert_memory_equal(x, ((int32_t[]){1, 2, 3, 9, 2, 3, 9}), sizeof x);
    assert_memory_equal(y, ((int32_t[]){-1, -1, 9, -1, -1, 9, -1}), sizeof y);
    assert_int_equal(packer_stats(p)->documents, 2);
    assert_int_equal(packer_stats(p)->left_out, 2);
    assert_int_equal(packer_stats(p)->left_out_tokens, 2 + 9 + 2);
    packer_close(p);
    shards_close(s);
    remove("a.labels");
}

/* Every document of a file of several blocks is packed once, whole, in the block in which it begins. Token i of the
 * file is i + 1, except for separators, so that its place is known. */
enum { TOKENS = 2 * PACKING_BLOCK + 300000 };

static void fill_with_documents(int32_t *ids, bool at_start, unsigned seed, int longest) {
    srand(seed);
    for (int i = 0; i < TOKENS;) {
        int length = 2 + rand() % (rand() % 50 == 0 ? longest : 400);
        length = i + length > TOKENS - 2 ? TOKENS - i : length;
        for (int k = 0; k < length; k++)
            ids[i + k] = i + k + 1;
        ids[at_start ? i : i + length - 1] = 0;
        i += length;
    }
}

static bool begins_document(const int32_t *ids, bool at_start, int i) {
    return i == 0 || ids[at_start ? i : i - 1] == 0;
}

/* Check the documents of one sequence, which are marked in `seen`. Returns its tokens that are not padding. */
static int check_documents(const int32_t *ids, bool at_start, int64_t block, const int32_t *x,
                           const int32_t *y, int T, bool *seen) {
    int used = 0;
    while (used < T && y[used] != LABEL_PADDING) {
        int start = at_start ? x[used + 1] - 2 : x[used] - 1, length = 0;
        assert_true(start >= 0 && start < TOKENS && begins_document(ids, at_start, start) && !seen[start]);
        assert_int_equal(start / PACKING_BLOCK, block);
        seen[start] = true;
        do {
            assert_int_equal(x[used + length], ids[start + length]);
            assert_int_equal(y[used + length],
                             start + length + 1 < TOKENS ? ids[start + length + 1] : LABEL_IGNORED);
            length++;
        } while (length < T && start + length < TOKENS && !begins_document(ids, at_start, start + length));
        used += length;
    }
    for (int i = used; i < T; i++) {
        assert_int_equal(x[i], 0);
        assert_int_equal(y[i], LABEL_PADDING);
    }
    return used;
}

static void check_whole_file(bool at_start, int T, int longest) {
    int32_t *ids = malloc(TOKENS * sizeof *ids), *x = malloc((size_t)T * 8), *y = x + T;
    bool *seen = calloc(TOKENS, sizeof *seen);
    fill_with_documents(ids, at_start, 7, longest);
    write_ids("b.bin", ids, TOKENS);
    struct shards *s;
    struct packer *p = open_packer("b.bin", T, (struct document_rule){0, at_start}, &s);
    int64_t sequences = 0, used = 0;
    assert_int_equal(packer_blocks(p), 3);
    for (int64_t block = 0; block < 3; block++) {
        int64_t count = packer_load(p, block, NULL);
        assert_true(count >= 0);
        for (int64_t i = 0; i < count; i++) {
            packer_copy(p, i, x, y);
            used += check_documents(ids, at_start, block, x, y, T, seen);
        }
        sequences += count;
    }
    int64_t cropped = 0;
    for (int i = 0, length = 0; i < TOKENS; i++) {
        assert_int_equal(seen[i], begins_document(ids, at_start, i));
        length = seen[i] ? 1 : length + 1;
        cropped += length > T;
    }
    const struct packing_stats *stats = packer_stats(p);
    assert_int_equal(stats->packed_tokens, used);
    assert_int_equal(stats->tokens - stats->packed_tokens, cropped);
    assert_int_equal(stats->sequences, sequences);
    if (longest < PACKING_BLOCK) /* otherwise a block may have few documents */
        assert_true((double)used > 0.98 * (double)(sequences * T));
    packer_close(p);
    shards_close(s);
    free(ids);
    free(x);
    free(seen);
}

static void every_document_is_packed_once(void **state) {
    (void)state;
    check_whole_file(false, 512, 2000);
    check_whole_file(true, 1000, 900);
}

static void a_document_may_span_whole_blocks(void **state) {
    (void)state;
    check_whole_file(false, 512, 1500000);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(segments_begin_where_documents_do),
        cmocka_unit_test(each_run_of_padding_is_a_segment),
        cmocka_unit_test(packs_by_best_fit),
        cmocka_unit_test(labels_and_padding_are_kept_apart),
        cmocka_unit_test(every_document_is_packed_once),
        cmocka_unit_test(a_document_may_span_whole_blocks),
    };
    return cmocka_run_group_tests(tests, enter_directory, leave_directory);
}

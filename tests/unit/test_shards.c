/* Shards: what is read, what is refused, and in which order a run sees the sequences.
 * Every file is written here, in a fresh directory under /tmp that is removed afterwards. */
#include <glob.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <stdbool.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

#include "data/shards.h"
#include "tests/lib/shard_files.h"

static void reads_sequences_across_files(void **state) {
    (void)state;
    write_shard("b.bin", U32, 9, 70000, 100000);  /* 2 sequences of 4, no token left over but the target */
    write_shard("a.bin", U16, 12, 100, 100000);   /* 2 sequences of 4, and a tail */
    write_shard("c.bin", U16, 5, 300, 100000);    /* 1 */
    write_shard("ignored.txt", U16, 50, 0, 1000); /* not in the glob */
    struct shards *s = open_good("*.bin", 4, 100000);
    assert_int_equal(shards_files(s), 3);
    assert_int_equal(shards_sequences(s), 5);
    assert_int_equal(shards_tokens(s), 26);
    const int32_t first[5] = {100, 104, 70000, 70004, 300};
    for (int i = 0; i < 5; i++) {
        int32_t tokens[5] = {0, 0, 0, 0, -7}, targets[5] = {0, 0, 0, 0, -7};
        assert_int_equal(shards_read(s, i, tokens, targets, NULL), 0);
        for (int k = 0; k < 4; k++) {
            assert_int_equal(tokens[k], first[i] + k);
            assert_int_equal(targets[k], first[i] + k + 1);
        }
        assert_int_equal(tokens[4], -7); /* nothing is written past seq_len */
        assert_int_equal(targets[4], -7);
    }
    shards_close(s);
}

static void sequence_counts_follow_the_contract(void **state) {
    (void)state;
    for (int n = 2; n < 40; n++) {
        write_shard("a.bin", U16, n, 0, 1000);
        for (int seq_len = 1; seq_len < n; seq_len++) {
            struct shards *s = open_good("a.bin", seq_len, 1000);
            assert_int_equal(shards_sequences(s), (n - 1) / seq_len);
            shards_close(s);
        }
        refuses("a.bin", n, 1000, "a.bin", "hold no sequence");
    }
}

static void refuses_bad_files(void **state) {
    (void)state;
    refuses("nothing_*.bin", 4, 100, "no file matches", "nothing_*.bin");

    write_shard_header("s.bin", U16, 1, 1000, 488, 0, 100);
    refuses("s.bin", 4, 100, "s.bin: truncated: header promises 1000 tokens (3024 bytes)", "has 2000");
    write_shard_header("s.bin", U16, 1, 10, 11, 0, 100);
    refuses("s.bin", 4, 100, "s.bin: too long", "1046");
    write_shard_header("s.bin", U16, 1, -1, 11, 0, 100);
    refuses("s.bin", 4, 100, "s.bin", "promises -1 tokens");
    write_shard_header("s.bin", U32, 7, INT32_MIN, 11, 0, 100);
    refuses("s.bin", 4, 100, "s.bin", "promises -2147483648 tokens");
    write_shard_header("s.bin", U32, 7, INT32_MAX, 11, 0, 100);
    refuses("s.bin", 4, 100, "truncated", "(8589935612 bytes)");
    write_shard_header("s.bin", U16, 7, 11, 11, 0, 100);
    refuses("s.bin", 4, 100, "s.bin", "version 7 where 1");
    write_shard_header("s.bin", U32, 1, 11, 11, 0, 100);
    refuses("s.bin", 4, 100, "s.bin", "version 1 where 7");
    write_shard_header("s.bin", 1234, 1, 11, 11, 0, 100);
    refuses("s.bin", 4, 100, "s.bin", "not a token shard");
    write_shard("s.bin", U16, 0, 0, 100);
    refuses("s.bin", 4, 100, "s.bin", "0 tokens hold no sequence");
    write_shard("s.bin", U16, 1, 0, 100);
    refuses("s.bin", 1, 100, "s.bin", "hold no sequence");

    assert_int_equal(truncate(in_dir("s.bin"), 1023), 0);
    refuses("s.bin", 4, 100, "s.bin", "1023 bytes cannot hold");
    assert_int_equal(truncate(in_dir("s.bin"), 0), 0);
    refuses("s.bin", 4, 100, "s.bin", "0 bytes cannot hold");
    write_shard("s.bin", U16, 10, 0, 100);
    assert_int_equal(truncate(in_dir("s.bin"), 1024 + 19), 0); /* half a token */
    refuses("s.bin", 4, 100, "truncated", "1043");

    assert_int_equal(mkdir(in_dir("d.bin"), 0700), 0);
    refuses("d.bin", 4, 100, "d.bin", "not a regular file");
    assert_int_equal(mkfifo(in_dir("f.bin"), 0600), 0);
    refuses("f.bin", 4, 100, "f.bin", "not a regular file");
    assert_int_equal(symlink("/nowhere/at/all", in_dir("l.bin")), 0);
    refuses("l.bin", 4, 100, "l.bin", "cannot be opened");
}

static void one_bad_file_spoils_the_glob(void **state) {
    (void)state;
    write_shard("a.bin", U16, 50, 0, 50);
    write_shard("b.bin", U16, 50, 1, 51);
    refuses("?.bin", 4, 50, "b.bin: token 49 is id 50", "vocab_size is 50");
    shards_close(open_good("?.bin", 4, 51));
}

static void fails_to_read(struct shards *s, int64_t i, const char *word) {
    struct error e = {0};
    int32_t tokens[4], targets[4];
    if (shards_read(s, i, tokens, targets, &e) == 0)
        fail_msg("was read, but expected '%s'", word);
    assert_int_equal(e.exit_code, EXIT_RUN);
    assert_null(strchr(e.text, '\n'));
    if (!strstr(e.text, word) || !strstr(e.text, "a.bin"))
        fail_msg("'%s' should contain '%s' and a.bin", e.text, word);
}

static void reads(struct shards *s, int64_t i, int32_t first) {
    struct error e = {0};
    int32_t tokens[4], targets[4];
    if (shards_read(s, i, tokens, targets, &e) != 0)
        fail_msg("%s", e.text);
    for (int k = 0; k < 4; k++) {
        assert_int_equal(tokens[k], first + k);
        assert_int_equal(targets[k], first + k + 1);
    }
}

/* A file that changes after shards_open. Of 200,000 tokens, 1,024 are compared at each end and every 3,158. */
static void finds_a_changed_file(void **state) {
    (void)state;
    enum { TOKENS = 200000 };
    static const char others[] = "some of its tokens are different";
    const int magics[] = {U16, U32};
    for (int m = 0; m < 2; m++) {
        int token_bytes = magics[m] == U32 ? 4 : 2;
        write_shard("a.bin", magics[m], TOKENS, 0, 2000);
        struct shards *s = open_good("a.bin", 4, 2000);
        reads(s, 0, 0);
        reads(s, 503, 12);

        /* Ids outside the vocabulary, as tokens and as the last target. */
        overwrite_token("a.bin", token_bytes, 2013, 2000);
        fails_to_read(s, 503, "token 2013 is id 2000");
        overwrite_token("a.bin", token_bytes, 2013, 13);
        overwrite_token("a.bin", token_bytes, 2016, 65535);
        fails_to_read(s, 503, "token 2016 is id 65535");
        reads(s, 502, 8);
        overwrite_token("a.bin", token_bytes, 2016, 16);
        reads(s, 503, 12); /* put back: written to, but the same */

        const long compared[] = {3, 3158, 10 * 3158 + 1023, 63 * 3158, TOKENS - 1};
        for (size_t i = 0; i < sizeof compared / sizeof *compared; i++) {
            overwrite_token("a.bin", token_bytes, compared[i], 77);
            fails_to_read(s, 503, others);
            overwrite_token("a.bin", token_bytes, compared[i], (uint32_t)compared[i] % 2000);
        }
        overwrite_token("a.bin", token_bytes, 3158, 2000);
        fails_to_read(s, 503, "token 3158 is id 2000");
        overwrite_token("a.bin", token_bytes, 3158, 1158);
        reads(s, 503, 12);

        write_shard("a.bin", magics[m], TOKENS, 5, 2000); /* rewritten in place */
        fails_to_read(s, 503, others);
        write_shard_header("a.bin", 1234, 1, TOKENS, TOKENS, 0, 2000);
        assert_int_equal(truncate(in_dir("a.bin"), 1024 + TOKENS * token_bytes), 0);
        fails_to_read(s, 503, "its header");
        write_shard("a.bin", magics[m], TOKENS + 1, 0, 2001);
        fails_to_read(s, 503, "bytes and had");
        assert_int_equal(truncate(in_dir("a.bin"), 1500), 0);
        fails_to_read(s, 503, "has 1500 bytes and had");
        fails_to_read(s, 0, "has 1500 bytes and had");
        assert_int_equal(truncate(in_dir("a.bin"), 0), 0);
        fails_to_read(s, 0, "has 0 bytes and had");
        shards_close(s);
    }
}

/* A file of the same name takes its place. */
static void finds_a_replaced_file(void **state) {
    (void)state;
    write_shard("a.bin", U16, 5, 0, 2000);
    struct shards *s = open_good("a.bin", 4, 2000);
    write_shard("b.bin", U16, 5, 0, 2000); /* the same */
    assert_int_equal(rename(in_dir("b.bin"), in_dir("a.bin")), 0);
    reads(s, 0, 0);
    shards_close(s);
    s = open_good("a.bin", 4, 2000);
    write_shard("b.bin", U16, 5, 1, 2000);
    assert_int_equal(rename(in_dir("b.bin"), in_dir("a.bin")), 0);
    fails_to_read(s, 0, "some of its tokens are different");
    shards_close(s);
}

static int open_descriptors(void) {
    int count = 0;
    for (int fd = 0; fd < 32; fd++)
        count += fcntl(fd, F_GETFD) != -1;
    return count;
}

/* More files than the process may have open: they are closed and opened again as they are read. */
static void reads_more_files_than_may_be_open(void **state) {
    (void)state;
    enum { FILES = 60 };
    struct rlimit before, few = {.rlim_cur = 32};
    for (int i = 0; i < FILES; i++) {
        char name[16];
        snprintf(name, sizeof name, "f%02d.bin", i);
        write_shard(name, U16, 5, 10 * i, 1000);
    }
    write_shard("a.bin", U16, 5, 0, 1000);
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &before), 0);
    few.rlim_max = before.rlim_max;
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &few), 0);
    int before_count = open_descriptors();
    struct shards *s = open_good("f*.bin", 4, 1000), *a = open_good("[af]*.bin", 4, 1000);
    for (int round = 0; round < 3; round++)
        for (int i = 0; i < FILES; i++) {
            reads(s, (i * 7 + round) % FILES, 10 * ((i * 7 + round) % FILES));
            reads(a, 1 + i, 10 * i);
        }
    assert_in_range(open_descriptors() - before_count, 8, 16); /* half of those it may have */
    assert_int_equal(unlink(in_dir("a.bin")), 0);              /* closed long ago */
    fails_to_read(a, 0, "cannot be opened again: No such file");
    shards_close(s);
    shards_close(a);
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &before), 0);
}

/* A folder that may not be listed or searched is not one without matching files. Root may do both, so another user
 * looks. */
static void names_what_is_not_permitted(void **state) {
    (void)state;
    static const struct {
        mode_t mode;
        const char *pattern, *words;
    } cases[] = {{0700, "d/*.bin", "/d: Permission denied; check its permissions"},
                 {0700, "d/s.bin", "d/s.bin: cannot be opened: Permission denied"},
                 {0711, "d/*.bin", "/d: Permission denied; check its permissions"},
                 {0744, "d/*.bin", "d/s.bin: cannot be opened: Permission denied"},
                 {0744, "*/s.bin", "/d: Permission denied; check its permissions"},
                 {0744, "[de]/./s.bin", "/d: Permission denied; check its permissions"},
                 {0700, "*/s.bin", "/d: Permission denied; check its permissions"},
                 {0755, "d/none*.bin", "no file matches"},
                 {0755, "*/s.bin/x.bin", "no file matches"}};
    assert_int_equal(chmod(dir, 0755), 0);
    assert_int_equal(mkdir(in_dir("d"), 0700), 0);
    assert_int_equal(mkdir(in_dir("e"), 0755), 0);
    write_shard("d/s.bin", U16, 50, 0, 50);
    write_shard("e/s.bin", U16, 50, 0, 50); /* found, which does not make up for the other */
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int status;
        assert_int_equal(chmod(in_dir("d"), cases[i].mode), 0);
        pid_t child = fork();
        if (child == 0) {
            struct error e = {0};
            if (geteuid() == 0 && (setgid(65534) != 0 || setuid(65534) != 0))
                _exit(2);
            struct shards *s = open_as(in_dir(cases[i].pattern), 4, 50, &e);
            bool right = !s && e.exit_code == EXIT_USER && strstr(e.text, cases[i].words);
            if (!right)
                fprintf(stderr, "%s: %s\n", cases[i].pattern, e.text);
            _exit(right ? 0 : 1);
        }
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_int_equal(status, 0);
    }
    assert_int_equal(chmod(in_dir("d"), 0755), 0);
    assert_int_equal(unlink(in_dir("d/s.bin")), 0);
    assert_int_equal(unlink(in_dir("e/s.bin")), 0);
}

static void says_what_a_relative_path_is_relative_to(void **state) {
    (void)state;
    char before[1024], words[128];
    struct error e = {0};
    snprintf(words, sizeof words, "'data/*.bin' relative to the current directory %s", dir);
    assert_non_null(getcwd(before, sizeof before));
    assert_int_equal(chdir(dir), 0);
    assert_null(open_as("data/*.bin", 4, 50, &e));
    assert_int_equal(chdir(before), 0);
    if (!strstr(e.text, words))
        fail_msg("'%s' should contain '%s'", e.text, words);
}

/* Ids are checked in blocks of 4,096: try a bad id at every kind of position. */
static void finds_a_bad_id_anywhere(void **state) {
    (void)state;
    const long positions[] = {0, 1, 4095, 4096, 5000, 8191, 8192, 9998, 9999};
    const int magics[] = {U16, U32};
    for (int m = 0; m < 2; m++) {
        for (size_t p = 0; p < sizeof positions / sizeof *positions; p++) {
            int token_bytes = magics[m] == U32 ? 4 : 2;
            char place[64];
            write_shard("a.bin", magics[m], 10000, 0, 512);
            shards_close(open_good("a.bin", 64, 512));
            overwrite_token("a.bin", token_bytes, positions[p], 512);
            snprintf(place, sizeof place, "token %ld is id 512 ", positions[p]);
            refuses("a.bin", 64, 512, "a.bin", place);
            overwrite_token("a.bin", token_bytes, positions[p], UINT32_MAX);
            snprintf(place, sizeof place, "token %ld is id %u ", positions[p],
                     token_bytes == 4 ? UINT32_MAX : 65535u);
            refuses("a.bin", 64, 512, "a.bin", place);
            if (token_bytes == 4) /* would be negative as an int32 */
                refuses("a.bin", 64, INT64_MAX, "a.bin", place);
        }
    }
    write_shard("a.bin", U16, 100, 65500, 65536); /* every uint16 is below 65536 */
    shards_close(open_good("a.bin", 64, 65536));
    refuses("a.bin", 64, 65535, "a.bin", "token 35 is id 65535");
}

static void refuses_bad_arguments(void **state) {
    (void)state;
    write_shard("a.bin", U16, 50, 0, 50);
    refuses("a.bin", 0, 50, "seq_len", "0");
    refuses("a.bin", -4, 50, "seq_len", "-4");
    refuses("a.bin", 4, 0, "vocab_size", "0");
}

/* Opens a set of exactly n sequences of length 1. */
static struct shards *with_sequences(int n) {
    write_shard("n.bin", U16, n + 1, 0, 60000);
    return open_good("n.bin", 1, 60000);
}

static void every_epoch_visits_each_sequence_once(void **state) {
    (void)state;
    for (int n = 1; n <= 300; n += n < 40 ? 1 : 37) {
        struct shards *s = with_sequences(n);
        for (int64_t epoch = 0; epoch < 3; epoch++) {
            char seen[512] = {0};
            for (int i = 0; i < n; i++) {
                int64_t g = epoch * n + i, x = shards_draw(s, g, true, 42);
                assert_in_range(x, 0, n - 1);
                assert_int_equal(seen[x]++, 0);
                assert_int_equal(shards_draw(s, g, true, 42), x);
                assert_int_equal(shards_draw(s, g, false, 42), i);
            }
        }
        shards_close(s);
    }
}

static int positions_that_agree(const struct shards *s, int64_t g1, uint64_t seed1, int64_t g2,
                                uint64_t seed2) {
    int same = 0, n = (int)shards_sequences(s);
    for (int i = 0; i < n; i++)
        same += shards_draw(s, g1 + i, true, seed1) == shards_draw(s, g2 + i, true, seed2);
    return same;
}

/* Two random permutations agree in one position on average; 10 would be a one in ten million event. */
static void seeds_and_epochs_differ(void **state) {
    (void)state;
    struct shards *s = with_sequences(1000);
    assert_in_range(positions_that_agree(s, 0, 1, 0, 2), 0, 9);
    assert_in_range(positions_that_agree(s, 0, 1, 1000, 1), 0, 9);
    assert_in_range(positions_that_agree(s, 0, 2, 1000, 1), 0, 9);
    assert_in_range(positions_that_agree(s, 1000, 0, 0, 1), 0, 9);
    assert_in_range(positions_that_agree(s, 0, 0, 0, UINT64_MAX), 0, 9);
    int in_place = 0, neighbours = 0;
    for (int i = 0; i < 999; i++) {
        int64_t x = shards_draw(s, i, true, 1), y = shards_draw(s, i + 1, true, 1);
        in_place += x == i;
        neighbours += y == x + 1;
    }
    assert_in_range(in_place, 0, 9);
    assert_in_range(neighbours, 0, 9);
    shards_close(s);
}

/* Over many seeds each sequence comes first equally often: chi-squared with 9 degrees of freedom. */
static void first_draws_are_uniform(void **state) {
    (void)state;
    struct shards *s = with_sequences(10);
    int counts[10] = {0};
    for (uint64_t seed = 0; seed < 10000; seed++)
        counts[shards_draw(s, 0, true, seed)]++;
    double chi2 = 0;
    for (int i = 0; i < 10; i++)
        chi2 += (counts[i] - 1000.0) * (counts[i] - 1000.0) / 1000.0;
    assert_true(chi2 < 33.7); /* p = 0.0001 */
    shards_close(s);
}

/* A resumed run relies on this order staying what it was: changing it breaks every checkpoint. */
static void the_order_is_pinned(void **state) {
    (void)state;
    const int64_t expected[8] = {21, 495, 120, 127, 654, 601, 76, 180};
    struct shards *s = with_sequences(1000);
    for (int i = 0; i < 8; i++)
        assert_int_equal(shards_draw(s, 995 + i, true, 1337), expected[i]);
    shards_close(s);
}

static void fingerprint_of(const char *pattern, char out[17]) {
    struct shards *s = open_good(pattern, 4, 60000);
    shards_fingerprint(s, out);
    shards_close(s);
    assert_int_equal(strspn(out, "0123456789abcdef"), 16);
    assert_int_equal(out[16], 0);
}

static void fingerprint_follows_the_data(void **state) {
    (void)state;
    char before[17], now[17];
    write_shard("a1.bin", U16, 1000, 0, 60000);
    write_shard("a2.bin", U16, 20, 0, 60000);
    fingerprint_of("a*.bin", before);
    assert_string_equal(before, "fe2620eb9fae4c36"); /* trainer.json of runs long ago holds it */

    assert_int_equal(rename(in_dir("a1.bin"), in_dir("b1.bin")), 0); /* paths do not count */
    assert_int_equal(rename(in_dir("a2.bin"), in_dir("b2.bin")), 0);
    fingerprint_of("b*.bin", now);
    assert_string_equal(now, before);

    fingerprint_of("b1.bin", now); /* the number of files does */
    assert_string_not_equal(now, before);
    overwrite_token("b1.bin", 2, 999, 7); /* and a last token */
    fingerprint_of("b*.bin", now);
    assert_string_not_equal(now, before);
    write_shard("b1.bin", U16, 1000, 0, 60000);
    fingerprint_of("b*.bin", now);
    assert_string_equal(now, before);
    overwrite_token("b1.bin", 2, 0, 7); /* and a first one */
    fingerprint_of("b*.bin", now);
    assert_string_not_equal(now, before);
    write_shard("b1.bin", U16, 1001, 0, 60000); /* and a count */
    fingerprint_of("b*.bin", now);
    assert_string_not_equal(now, before);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        IN_DIR(reads_sequences_across_files),
        IN_DIR(sequence_counts_follow_the_contract),
        IN_DIR(refuses_bad_files),
        IN_DIR(one_bad_file_spoils_the_glob),
        IN_DIR(finds_a_changed_file),
        IN_DIR(finds_a_replaced_file),
        IN_DIR(reads_more_files_than_may_be_open),
        IN_DIR(names_what_is_not_permitted),
        IN_DIR(says_what_a_relative_path_is_relative_to),
        IN_DIR(finds_a_bad_id_anywhere),
        IN_DIR(refuses_bad_arguments),
        IN_DIR(every_epoch_visits_each_sequence_once),
        IN_DIR(seeds_and_epochs_differ),
        IN_DIR(first_draws_are_uniform),
        IN_DIR(the_order_is_pinned),
        IN_DIR(fingerprint_follows_the_data),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

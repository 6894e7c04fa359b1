/* The checks before the first step: how much is read, what is sampled, and how ranks share them. Ranks are threads. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdbool.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <time.h>
#include <cmocka.h>

#include "data/shards.h"
#include "tests/lib/shard_files.h"
#include "tests/lib/thread_comm.h"

/* Bytes that this process has read. */
static int64_t bytes_read(void) {
    long long bytes = -1;
    FILE *f = fopen("/proc/self/io", "r");
    assert_non_null(f);
    assert_int_equal(fscanf(f, "rchar: %lld", &bytes), 1);
    fclose(f);
    return bytes;
}

/* ---- ranks ---- */

struct rank_job {
    struct thread_world *world;
    int rank;
    const char *pattern;
    struct shards_options options;
    struct shards *shards;
    struct error error;
};

static void *open_on_rank(void *context) {
    struct rank_job *j = context;
    struct thread_comm comm;
    thread_comm_open(&comm, j->world, j->rank);
    j->options.comm = &comm.base;
    j->shards = shards_open(j->pattern, &j->options, &j->error);
    return NULL;
}

static void open_on_ranks(struct rank_job *jobs, int ranks, const char *const *patterns,
                          struct shards_options options) {
    static struct thread_world world;
    static char paths[THREAD_RANKS][256];
    pthread_t threads[THREAD_RANKS];
    thread_world_open(&world, ranks);
    for (int r = 0; r < ranks; r++) {
        snprintf(paths[r], sizeof paths[r], "%s", in_dir(patterns[r]));
        jobs[r] = (struct rank_job){.world = &world, .rank = r, .pattern = paths[r], .options = options};
        assert_int_equal(pthread_create(&threads[r], NULL, open_on_rank, &jobs[r]), 0);
    }
    for (int r = 0; r < ranks; r++)
        pthread_join(threads[r], NULL);
    pthread_barrier_destroy(&world.barrier);
}

static const char *const same[THREAD_RANKS] = {"*.bin", "*.bin", "*.bin", "*.bin"};

static void fails_on_ranks(int ranks, const char *const *patterns, struct shards_options options,
                           const char *start, const char *words) {
    struct rank_job jobs[THREAD_RANKS];
    open_on_ranks(jobs, ranks, patterns, options);
    for (int r = 0; r < ranks; r++) {
        assert_null(jobs[r].shards);
        assert_int_equal(jobs[r].error.exit_code, EXIT_USER);
        if (strncmp(jobs[r].error.text, start, strlen(start)) != 0 || !strstr(jobs[r].error.text, words))
            fail_msg("rank %d: '%s' should start with '%s' and contain '%s'", r, jobs[r].error.text, start,
                     words);
    }
}

enum { FILES = 10, TOKENS = 5000 };

static void write_files(bool labelled) {
    for (int i = 0; i < FILES; i++) {
        char name[32];
        snprintf(name, sizeof name, "s%d.bin", i);
        write_shard(name, i % 3 ? U16 : U32, TOKENS + i, 10 * i, 60000);
        snprintf(name, sizeof name, "s%d.labels", i);
        if (labelled)
            write_labels(name, TOKENS + i, 7 * i);
    }
}

/* Every rank reads what one rank alone reads, though it has checked only some of the files. */
static void ranks_read_the_same(void **state) {
    (void)state;
    const struct shards_options options = {.seq_len = 64, .vocab_size = 60000};
    for (int labelled = 0; labelled < 2; labelled++)
        for (int ranks = 2; ranks <= 4; ranks++) {
            struct rank_job jobs[THREAD_RANKS];
            char expected[17], print[17];
            write_files(labelled);
            struct shards *alone = open_good("*.bin", 64, 60000);
            shards_fingerprint(alone, expected);
            open_on_ranks(jobs, ranks, same, options);
            for (int r = 0; r < ranks; r++) {
                if (!jobs[r].shards)
                    fail_msg("rank %d: %s", r, jobs[r].error.text);
                shards_fingerprint(jobs[r].shards, print);
                assert_string_equal(print, expected);
                assert_int_equal(shards_sequences(jobs[r].shards), shards_sequences(alone));
                assert_int_equal(shards_tokens(jobs[r].shards), shards_tokens(alone));
                for (int64_t i = 0; i < shards_sequences(alone); i++) {
                    int32_t x[2][64], y[2][64];
                    assert_int_equal(shards_read(alone, i, x[0], y[0], NULL), 0);
                    assert_int_equal(shards_read(jobs[r].shards, i, x[1], y[1], NULL), 0);
                    assert_memory_equal(x[0], x[1], sizeof x[0]);
                    assert_memory_equal(y[0], y[1], sizeof y[0]);
                }
                shards_close(jobs[r].shards);
            }
            shards_close(alone);
        }
}

/* The first bad file is reported, by all ranks, whichever rank finds it. */
static void ranks_agree_on_the_first_error(void **state) {
    (void)state;
    const struct shards_options options = {.seq_len = 64, .vocab_size = 60000};
    write_files(true);
    for (int bad = FILES - 1; bad >= 0; bad--) {
        char name[32], start[300];
        snprintf(name, sizeof name, "s%d.%s", bad, bad % 2 ? "labels" : "bin");
        overwrite_token(name, bad % 2 || bad % 3 == 0 ? 4 : 2, 4321, 60001);
        snprintf(start, sizeof start, "%s: %s 4321 is ", in_dir(name), bad % 2 ? "label" : "token");
        for (int ranks = 1; ranks <= 4; ranks += 1 + (bad < FILES - 1))
            fails_on_ranks(ranks, same, options, start, "60001");
    }
}

/* Hosts with disks of their own. */
static void ranks_have_the_same_data(void **state) {
    (void)state;
    static const char differs[] = "rank 1: its training or validation data differs from rank 0's: ";
    const char *const patterns[] = {"a.bin", "b.bin"};
    const struct shards_options options = {.seq_len = 64, .vocab_size = 60000};
    struct rank_job jobs[THREAD_RANKS];
    write_shard("a.bin", U16, TOKENS, 0, 60000);
    write_shard("b.bin", U16, TOKENS, 1, 60000);
    fails_on_ranks(2, patterns, options, differs, "/b.bin; all hosts must have the same shards");
    write_shard("b.bin", U16, TOKENS, 0, 60000);
    overwrite_token("b.bin", 2, 2000, 7); /* in the middle */
    fails_on_ranks(2, patterns, options, differs, "/b.bin; all hosts must have the same shards");
    write_shard("b.bin", U16, TOKENS + 1, 0, 60000);
    fails_on_ranks(2, patterns, options, differs, "a different number of files or different sizes");
    const char *const other_counts[] = {"a.bin", "*.bin"};
    fails_on_ranks(2, other_counts, options, differs, "a different number of files or different sizes");
    const char *const none[] = {"a.bin", "c.bin"};
    fails_on_ranks(2, none, options, "rank 1: no file matches", "c.bin");

    write_shard("b.bin", U16, TOKENS, 0, 60000); /* written at another time, with the same contents */
    struct timespec times[2] = {{.tv_sec = 1000}, {.tv_sec = 1000}};
    assert_int_equal(utimensat(AT_FDCWD, in_dir("b.bin"), times, 0), 0);
    open_on_ranks(jobs, 2, patterns, options);
    for (int r = 0; r < 2; r++) {
        int32_t tokens[64], targets[64];
        assert_non_null(jobs[r].shards);
        assert_int_equal(shards_read(jobs[r].shards, 1, tokens, targets, NULL), 0);
        assert_int_equal(tokens[0], 64);
        shards_close(jobs[r].shards);
    }
}

static void ranks_share_the_reading(void **state) {
    (void)state;
    const struct shards_options options = {.seq_len = 64, .vocab_size = 60000};
    struct rank_job jobs[THREAD_RANKS];
    for (int i = 0; i < 4; i++) {
        char name[32];
        snprintf(name, sizeof name, "s%d.bin", i);
        write_shard_header(name, U16, 1, 4000000, 0, 0, 1);
        assert_int_equal(truncate(in_dir(name), 1024 + 8000000), 0);
    }
    int64_t before = bytes_read();
    open_on_ranks(jobs, 4, same, options);
    int64_t bytes = bytes_read() - before;
    assert_in_range(bytes, 4 * 8000000, 4 * 9000000); /* each file once, and some places again */
    for (int r = 0; r < 4; r++)
        shards_close(jobs[r].shards);
}

/* ---- data at scale ---- */

static struct shards *open_sampled(int64_t whole_bytes, struct error *e) {
    const struct shards_options o = {.seq_len = 64, .vocab_size = 50000, .whole_bytes = whole_bytes};
    return shards_open(in_dir("*.bin"), &o, e);
}

static void expect_bad_token(int64_t whole_bytes, const char *words) {
    struct error e = {0};
    struct shards *s = open_sampled(whole_bytes, &e);
    if (words && (s || !strstr(e.text, words)))
        fail_msg("'%s' should contain '%s'", e.text, words);
    if (!words && !s)
        fail_msg("%s", e.text);
    shards_close(s);
}

/* Beyond the first bytes of all files, ids are checked at 64 places of each file here, 1,024 at each. */
static void samples_beyond_the_whole_part(void **state) {
    (void)state;
    enum { COUNT = 200000, STRIDE = 3158 };
    write_shard("a.bin", U16, COUNT, 0, 50000);
    write_shard("b.bin", U16, COUNT, 0, 50000);
    const int64_t first_file = 1024 + 2 * COUNT;
    const struct {
        const char *file;
        long position;
        int64_t whole_bytes;
        bool found;
    } cases[] = {
        {"a.bin", 2000, 4002, true},
        {"a.bin", 2000, 4000, false},
        {"a.bin", 2000, 1, false},
        {"b.bin", 2000, first_file + 4002, true},
        {"b.bin", 2000, first_file + 4000, false},
        {"b.bin", STRIDE, 1, true},
        {"b.bin", 20 * STRIDE + 1023, 1, true},
        {"b.bin", 20 * STRIDE + 1024, 1, false},
        {"a.bin", 0, 1, true},
        {"a.bin", COUNT - 1, 1, true},
        {"b.bin", STRIDE - 1, 1, false},
        {"b.bin", STRIDE - 1, 0, true},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char words[64];
        snprintf(words, sizeof words, "%s: token %ld is id 50000", cases[i].file, cases[i].position);
        overwrite_token(cases[i].file, 2, cases[i].position, 50000);
        expect_bad_token(cases[i].whole_bytes, cases[i].found ? words : NULL);
        overwrite_token(cases[i].file, 2, cases[i].position, (uint32_t)cases[i].position % 50000);
    }

    /* An id that was not sampled is found when it is read. */
    struct error e = {0};
    int32_t tokens[64], targets[64];
    overwrite_token("a.bin", 2, 2000, 50000);
    struct shards *s = open_sampled(1, &e);
    assert_non_null(s);
    assert_int_equal(shards_read(s, 30, tokens, targets, &e), 0);
    assert_int_equal(shards_read(s, 31, tokens, targets, &e), -1);
    assert_int_equal(e.exit_code, EXIT_RUN);
    assert_non_null(
        strstr(e.text, "a.bin: token 2000 is id 50000, outside the vocabulary: it was not checked"));
    shards_close(s);
}

/* The mechanism that lets a run over a terabyte start at once: of 300 shards of 1 GB, which are holes, little is read. */
static void reads_little_of_much(void **state) {
    (void)state;
    enum { SHARDS = 300 };
    for (int i = 0; i < SHARDS; i++) {
        char name[32];
        snprintf(name, sizeof name, "s%03d.bin", i);
        write_shard_header(name, U16, 1, 500000000, 0, 0, 1);
        assert_int_equal(truncate(in_dir(name), 1024 + INT64_C(1000000000)), 0);
    }
    int64_t before = bytes_read();
    struct error e = {0};
    struct shards *s = open_sampled(1000000, &e);
    int64_t bytes = bytes_read() - before;
    if (!s)
        fail_msg("%s", e.text);
    assert_int_equal(shards_tokens(s), INT64_C(500000000) * SHARDS);
    assert_in_range(bytes, 1000000, 1000000 + SHARDS * 14 * 2500); /* 13 places of 2 KB and both ends */
    shards_close(s);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        IN_DIR(ranks_read_the_same),           IN_DIR(ranks_agree_on_the_first_error),
        IN_DIR(ranks_have_the_same_data),      IN_DIR(ranks_share_the_reading),
        IN_DIR(samples_beyond_the_whole_part), IN_DIR(reads_little_of_much),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

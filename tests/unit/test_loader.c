/* The data of a run: mixtures, the order of training on any number of ranks, positions to resume from, and the thread
 * that reads ahead. */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "data/loader.h"
#include "data/read_ahead.h"
#include "tests/lib/id_files.h"
#include "tests/lib/temporary_directory.h"

/* ---- mixtures ---- */

static void parses_mixtures(void **state) {
    (void)state;
    static struct mixture m;
    assert_false(mixture_is("a/*.bin"));
    assert_false(mixture_is("0.7"));
    assert_false(mixture_is("0.7/*.bin"));
    assert_false(mixture_is("./2 a/*.bin"));
    assert_true(mixture_is("0.7 a"));
    assert_int_equal(mixture_parse(&m, "a, b/*.bin", NULL), 0);
    assert_int_equal(m.count, 1);
    assert_string_equal(m.globs[0], "a, b/*.bin");
    assert_int_equal(mixture_parse(&m, "3 a,b/*.bin,1e0 c d/*.bin ,  4 e,5/f", NULL), 0);
    assert_int_equal(m.count, 3);
    assert_string_equal(m.globs[0], "a,b/*.bin");
    assert_string_equal(m.globs[1], "c d/*.bin");
    assert_string_equal(m.globs[2], "e,5/f");
    assert_int_equal(m.weights[0], 3 * m.weights[1]);
    assert_int_equal(m.weights[2], 4 * m.weights[1]);
    setenv("HOME", "/home/an*a\\", 1);
    assert_int_equal(mixture_parse(&m, "1e308 ~/a, 1e308 b~", NULL), 0);
    assert_string_equal(m.globs[0], "/home/an[*]a\\\\/a");
    assert_string_equal(m.globs[1], "b~");
    assert_int_equal(m.weights[0], m.weights[1]);
}

static void refuses_mixture(const char *text, const char *word) {
    static struct mixture m;
    struct error e = {0};
    assert_int_equal(mixture_parse(&m, text, &e), -1);
    assert_int_equal(e.exit_code, EXIT_USER);
    assert_null(strchr(e.text, '\n'));
    if (!strstr(e.text, word))
        fail_msg("'%s' should contain '%s'", e.text, word);
}

static void refuses_bad_mixtures(void **state) {
    (void)state;
    refuses_mixture("0.7 a, b", "'b' is not a weight and a glob");
    refuses_mixture("0.7 a, ", "'' is not a weight and a glob");
    refuses_mixture("0.7 , 0.3 b", "'0.7' is not a weight and a glob");
    refuses_mixture("0.7.1 a, 0.3 b", "'0.7.1 a' is not a weight and a glob");
    refuses_mixture("0 a, 0.3 b", "the weight of '0 a' must be above 0");
    refuses_mixture("1 a, -3 b", "the weight of '-3 b' must be above 0");
    refuses_mixture("1 a, 1e999 b", "the weight of '1e999 b'");
    char text[1024] = "1 a";
    for (int i = 0; i < MAX_SOURCES; i++)
        strcat(text, ", 1 b");
    refuses_mixture(text, "more than 64 sources");
}

static void mixtures_are_even(void **state) {
    (void)state;
    static struct mixture m;
    int64_t drawn[MAX_SOURCES] = {0};
    assert_int_equal(mixture_parse(&m, "0.62 a, 0.03 b, 0.35 c", NULL), 0);
    for (int n = 1; n <= 10000; n++) {
        drawn[mixture_choose(&m, drawn)]++;
        for (int i = 0; i < 3; i++) {
            double share = (double)n * (double)m.weights[i] / (double)m.total_weight;
            assert_true((double)drawn[i] > share - 1.01 && (double)drawn[i] < share + 1.01);
        }
    }
    assert_int_equal(drawn[0], 6200);
    assert_int_equal(drawn[1], 300);
}

/* ---- the order of training ---- */

enum { T = 16, SEQUENCES = 12, STEPS = 40 };

/* Documents of 2 to 30 tokens that end with 0; other ids are above `base`. */
static void write_documents(const char *path, int count, int base) {
    int32_t *ids = malloc((size_t)count * sizeof *ids);
    for (int i = 0, left = 0; i < count; i++, left--) {
        if (left == 0)
            left = 2 + rand() % 29;
        ids[i] = left == 1 ? 0 : base + i;
    }
    write_ids(path, ids, count);
    free(ids);
}

static void write_data(void) {
    static bool written;
    if (!written) {
        srand(3);
        write_documents("a_0.bin", 3000, 1);
        write_documents("a_1.bin", 1500, 5000);
        write_documents("b_0.bin", 700, 10000);
        write_documents("c_0.bin", 400, 20000);
    }
    written = true;
}

static const struct kind {
    const char *data;
    bool fit, shuffle;
} KINDS[] = {{"a_*.bin", false, true},
             {"a_*.bin", true, true},
             {"a_*.bin", true, false},
             {"0.5 a_*.bin, 0.3 b_*.bin, 0.2 c_*.bin", false, true},
             {"2 a_*.bin, 1 b_*.bin", true, true}};

static struct loader *open_loader(const struct kind *kind) {
    struct error e = {0};
    struct loader_options o = {.data = kind->data,
                               .seq_len = T,
                               .vocab_size = 30000,
                               .fit = kind->fit,
                               .shuffle = kind->shuffle,
                               .seed = 5,
                               .segments = true};
    struct loader *l = loader_open(&o, &e);
    if (!l || loader_set_documents(l, (struct document_rule){0, false}, &e) != 0)
        fail_msg("%s", e.text);
    return l;
}

/* Everything a rank reads in `steps` steps of SEQUENCES sequences goes to its places among those of all ranks:
 * [steps, passes, ranks, micro_batch, 3, T]. Returns the position after the last step. */
static struct loader_position read_rank(const struct kind *kind, int rank, int ranks, int micro_batch,
                                        int steps, int64_t sequences, const struct loader_position *from,
                                        int32_t *out) {
    struct error e = {0};
    struct loader *l = open_loader(kind);
    int passes = SEQUENCES / (ranks * micro_batch);
    struct loader_share share = {rank, ranks, micro_batch, passes};
    struct loader_step step;
    if (loader_start(l, &share, steps, sequences, from, &e) != 0)
        fail_msg("%s", e.text);
    for (int n = 0; n < steps; n++) {
        if (loader_next(l, &step, &e) != 0)
            fail_msg("%s", e.text);
        for (int i = 0; i < passes * micro_batch; i++) {
            int pass = i / micro_batch, b = i % micro_batch;
            int32_t *at = out + (((n * passes + pass) * ranks + rank) * micro_batch + b) * 3 * T;
            memcpy(at, step.tokens + i * T, T * sizeof *at);
            memcpy(at + T, step.targets + i * T, T * sizeof *at);
            memcpy(at + 2 * T, step.segments + i * T, T * sizeof *at);
        }
    }
    loader_close(l);
    return step.position;
}

enum { STEP = SEQUENCES * 3 * T, ALL = STEPS * STEP };

static void ranks_share_one_order(void **state) {
    (void)state;
    static int32_t one[ALL], many[ALL];
    const struct loader_position start = {0};
    static const struct { int ranks, micro_batch; } shares[] = {{1, 3}, {2, 6}, {2, 1}, {3, 2}};
    write_data();
    for (size_t k = 0; k < sizeof KINDS / sizeof *KINDS; k++) {
        read_rank(&KINDS[k], 0, 1, SEQUENCES, STEPS, 0, &start, one);
        for (size_t s = 0; s < sizeof shares / sizeof *shares; s++) {
            memset(many, 0xff, sizeof many);
            for (int rank = 0; rank < shares[s].ranks; rank++)
                read_rank(&KINDS[k], rank, shares[s].ranks, shares[s].micro_batch, STEPS, 0, &start, many);
            assert_memory_equal(many, one, sizeof one);
        }
    }
}

static void resumes_at_any_step(void **state) {
    (void)state;
    static int32_t whole[ALL], part[ALL];
    const struct loader_position start = {0};
    write_data();
    for (size_t k = 0; k < sizeof KINDS / sizeof *KINDS; k++) {
        struct loader_position end = read_rank(&KINDS[k], 0, 1, SEQUENCES, STEPS, 0, &start, whole);
        for (int n = 1; n < STEPS; n += 3) {
            struct loader_position at = read_rank(&KINDS[k], 0, 1, SEQUENCES, n, 0, &start, part);
            assert_memory_equal(part, whole, (size_t)(n * STEP) * sizeof *part);
            /* On two ranks; both have the same position. */
            for (int rank = 0; rank < 2; rank++) {
                struct loader_position again =
                    read_rank(&KINDS[k], rank, 2, SEQUENCES / 2, STEPS - n, n * SEQUENCES, &at, part);
                assert_int_equal(again.count, end.count);
                assert_memory_equal(again.values, end.values, (size_t)end.count * sizeof *end.values);
            }
            assert_memory_equal(part, whole + n * STEP, (size_t)((STEPS - n) * STEP) * sizeof *part);
        }
    }
}

/* In each epoch of a shuffled packing every document is seen once, in another order. */
static void every_epoch_visits_every_document(void **state) {
    (void)state;
    static int32_t read[ALL];
    const struct loader_position start = {0};
    const struct kind kind = {"c_*.bin", true, true};
    int seen[401] = {0}, sequences = 0;
    write_data();
    struct loader_position end = read_rank(&kind, 0, 1, SEQUENCES, STEPS, 0, &start, read);
    struct loader *l = open_loader(&kind);
    int64_t in_epoch;
    assert_int_equal(loader_count(l, INT64_MAX, &in_epoch, NULL), 0);
    loader_close(l);
    int epochs = (int)(STEPS * SEQUENCES / in_epoch);
    assert_true(epochs > 5);
    assert_int_equal(end.values[0], STEPS * SEQUENCES);
    assert_in_range(end.values[1], epochs - 1, epochs);
    for (; sequences < epochs * in_epoch; sequences++)
        for (int t = 0; t < T; t++)
            seen[read[sequences * 3 * T + t] ? read[sequences * 3 * T + t] - 20000 : 400]++;
    for (int i = 0; i < 400; i++)
        assert_true(seen[i] == 0 || seen[i] == epochs); /* 0: a separator, or cropped */
    assert_memory_not_equal(read, read + in_epoch * 3 * T, (size_t)in_epoch * 3 * T * sizeof *read);
}

static void refuses_other_positions(void **state) {
    (void)state;
    write_data();
    struct loader_share share = {0, 1, 1, 1};
    static const struct loader_position bad[] = {{0},
                                                 {4, {10, 0, 1, 0}},
                                                 {4, {10, 0, -1, 0}},
                                                 {4, {10, -1, 0, 0}},
                                                 {4, {9, 0, 0, 0}},
                                                 {8, {9, 0, 0, 0, 1}}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct loader *l = open_loader(&(struct kind){"c_*.bin", true, true});
        struct error e = {0};
        assert_int_equal(loader_start(l, &share, 1, 10, &bad[i], &e), -1);
        assert_int_equal(e.exit_code, EXIT_USER);
        assert_null(strchr(e.text, '\n'));
        loader_close(l);
    }
}

static void reads_in_file_order(void **state) {
    (void)state;
    static int32_t read[ALL];
    const struct loader_position start = {0};
    const struct kind kind = {"a_*.bin", true, false};
    int32_t x[T], y[T], segments[T];
    int64_t count, some;
    write_data();
    read_rank(&kind, 0, 1, SEQUENCES, STEPS, 0, &start, read);
    struct loader *l = open_loader(&kind);
    assert_int_equal(loader_count(l, 3, &some, NULL), 0);
    assert_int_equal(some, 3);
    assert_int_equal(loader_count(l, INT64_MAX, &count, NULL), 0);
    assert_in_range(count, 100, STEPS * SEQUENCES);
    for (int64_t i = count - 1; i >= 0; i -= i % 7 + 1) {
        assert_int_equal(loader_read(l, i, x, y, segments, NULL), 0);
        assert_memory_equal(x, read + i * 3 * T, sizeof x);
        assert_memory_equal(y, read + i * 3 * T + T, sizeof y);
        assert_memory_equal(segments, read + i * 3 * T + 2 * T, sizeof segments);
    }
    loader_close(l);
}

static void fingerprints_cover_sources_and_weights(void **state) {
    (void)state;
    static const char *const data[] = {"a_*.bin",
                                       "b_*.bin",
                                       "1 a_*.bin, 1 b_*.bin",
                                       "2 a_*.bin, 1 b_*.bin",
                                       "1 a_*.bin, 2 b_*.bin",
                                       "1 b_*.bin, 1 a_*.bin",
                                       "1 a_*.bin, 1 c_*.bin"};
    enum { N = sizeof data / sizeof *data };
    char prints[N + 1][17];
    write_data();
    for (int i = 0; i <= N; i++) {
        struct loader *l =
            open_loader(&(struct kind){i < N ? data[i] : "0.5 a_*.bin, 0.5 b_*.bin", false, true});
        loader_fingerprint(l, prints[i]);
        loader_close(l);
        for (int k = 0; k < i && i < N; k++)
            assert_string_not_equal(prints[i], prints[k]);
    }
    assert_string_equal(prints[N], prints[2]);
}

/* ---- reading ahead ---- */

/* A disk that completes a read only when it is allowed to. */
struct disk {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    int allowed, done, failing; /* the number of the read that fails, from 1; 0: none */
    int slots[64];
};

static int read_from_disk(void *context, int slot, struct error *e) {
    struct disk *d = context;
    pthread_mutex_lock(&d->mutex);
    while (d->done >= d->allowed)
        pthread_cond_wait(&d->changed, &d->mutex);
    int status = d->done + 1 == d->failing ? fail_run(e, "read %d fails", d->failing) : 0;
    d->slots[d->done++] = slot;
    pthread_cond_broadcast(&d->changed);
    pthread_mutex_unlock(&d->mutex);
    return status;
}

static void allow(struct disk *d, int reads) {
    pthread_mutex_lock(&d->mutex);
    d->allowed = reads;
    pthread_cond_broadcast(&d->changed);
    pthread_mutex_unlock(&d->mutex);
}

static void await_reads(struct disk *d, int reads) {
    pthread_mutex_lock(&d->mutex);
    while (d->done < reads)
        pthread_cond_wait(&d->changed, &d->mutex);
    pthread_mutex_unlock(&d->mutex);
}

static void a_slow_disk_is_hidden(void **state) {
    (void)state;
    struct disk d = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, .allowed = 8};
    struct read_ahead *r = read_ahead_start(8, 1000, read_from_disk, &d, NULL);
    assert_non_null(r);
    await_reads(&d, 8); /* all slots are filled before the first step is wanted */
    for (int burst = 0; burst < 5; burst++) {
        /* The disk stalls, and 8 steps go on; the first of them frees the slot that was in use. */
        for (int i = 0; i < 8; i++) {
            int step = burst * 8 + i;
            assert_int_equal(read_ahead_next(r, NULL), step % 8);
            await_reads(&d, 8 * (burst + 1));
            assert_int_equal(d.slots[step], step % 8);
        }
        /* It catches up, until one slot is left, which is in use. */
        allow(&d, 8 * (burst + 2));
        await_reads(&d, 8 * (burst + 2) - 1);
    }
    read_ahead_stop(r);
}

/* The steps that a loader holds at once, as their places in memory show. */
static int count_places(int64_t micro_batch, int steps) {
    static const int32_t *places[64];
    struct error e = {0};
    struct loader *l = open_loader(&KINDS[0]);
    const struct loader_share share = {0, 1, micro_batch, 1};
    const struct loader_position start = {0};
    struct loader_step step;
    int count = 0;
    assert_int_equal(loader_start(l, &share, steps, 0, &start, &e), 0);
    for (int n = 0; n < steps; n++) {
        assert_int_equal(loader_next(l, &step, &e), 0);
        int i = 0;
        while (i < count && places[i] != step.tokens)
            i++;
        places[i] = step.tokens;
        count += i == count;
    }
    loader_close(l);
    return count;
}

static void a_loader_reads_many_steps_ahead(void **state) {
    (void)state;
    write_data();
    assert_int_equal(count_places(4, 50), 32);
    assert_int_equal(count_places(4, 5), 5);
    assert_int_equal(count_places((64 << 20) / (10 * 3 * T * (int64_t)sizeof(int32_t)), 15), 10); /* 64 MB */
    assert_int_equal(count_places((64 << 20) / (3 * T * (int64_t)sizeof(int32_t)) + 1, 3), 2);
}

static void a_step_fails_when_it_is_wanted(void **state) {
    (void)state;
    struct disk d = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, .allowed = 64, .failing = 4};
    struct error e = {0};
    struct read_ahead *r = read_ahead_start(8, 1000, read_from_disk, &d, NULL);
    await_reads(&d, 4);
    for (int i = 0; i < 3; i++)
        assert_int_equal(read_ahead_next(r, &e), i);
    assert_int_equal(e.exit_code, 0);
    for (int i = 0; i < 2; i++) {
        e = (struct error){0};
        assert_int_equal(read_ahead_next(r, &e), -1);
        assert_int_equal(e.exit_code, EXIT_RUN);
        assert_string_equal(e.text, "read 4 fails");
    }
    read_ahead_stop(r);
    assert_int_equal(d.done, 4); /* and nothing was read after it */
}

static void reads_no_more_steps_than_asked(void **state) {
    (void)state;
    for (int slots = 1; slots <= 4; slots++) {
        struct disk d = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, .allowed = 64};
        struct read_ahead *r = read_ahead_start(slots, 3, read_from_disk, &d, NULL);
        for (int i = 0; i < 3; i++)
            assert_int_equal(read_ahead_next(r, NULL), i % slots);
        read_ahead_stop(r);
        assert_int_equal(d.done, 3);
        r = read_ahead_start(slots, 60, read_from_disk, &d, NULL);
        read_ahead_stop(r); /* before anything was wanted */
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(parses_mixtures),
        cmocka_unit_test(refuses_bad_mixtures),
        cmocka_unit_test(mixtures_are_even),
        cmocka_unit_test(ranks_share_one_order),
        cmocka_unit_test(resumes_at_any_step),
        cmocka_unit_test(every_epoch_visits_every_document),
        cmocka_unit_test(refuses_other_positions),
        cmocka_unit_test(reads_in_file_order),
        cmocka_unit_test(fingerprints_cover_sources_and_weights),
        cmocka_unit_test(a_slow_disk_is_hidden),
        cmocka_unit_test(a_loader_reads_many_steps_ahead),
        cmocka_unit_test(a_step_fails_when_it_is_wanted),
        cmocka_unit_test(reads_no_more_steps_than_asked),
    };
    alarm(300); /* a step that is never read would be waited for without end */
    return cmocka_run_group_tests(tests, enter_directory, leave_directory);
}

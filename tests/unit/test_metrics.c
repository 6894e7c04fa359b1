/* metrics.jsonl when a run is resumed: lines of later steps and damaged lines are removed, all others stay as
 * they are. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "model/checkpoint/files.h"
#include "model/train/metrics.h"
#include "tests/lib/temporary_directory.h"

static void open_at(int64_t step) {
    struct error e = {0};
    struct metrics *m = metrics_open(".", step, &e);
    if (!m)
        fail_msg("%s", e.text);
    metrics_close(m);
}

/* The file `before`, opened at `step`, becomes `after`. */
static void check_trimmed(const char *before, int64_t step, const char *after) {
    char *text;
    assert_int_equal(files_write_synced("metrics.jsonl", before, strlen(before), NULL), 0);
    open_at(step);
    assert_int_equal(files_read_all("metrics.jsonl", 1 << 20, &text, NULL, NULL), 0);
    assert_string_equal(text, after);
    free(text);
}

#define LINE(step) "{\"step\": " #step ", \"loss\": 2.5}\n"

static void lines_past_the_step_go(void **state) {
    (void)state;
    check_trimmed(LINE(1) LINE(2) LINE(3), 2, LINE(1) LINE(2));
    check_trimmed(LINE(1) LINE(2), 2, LINE(1) LINE(2));
    check_trimmed(LINE(1), 0, "");
    check_trimmed("", 5, "");
}

static void damaged_lines_go(void **state) {
    (void)state;
    check_trimmed(LINE(1) "{\"step\": 2, \"lo", 2, LINE(1));
    check_trimmed(LINE(1) "\n" LINE(2), 2, LINE(1) LINE(2));
    check_trimmed("garbage\n" LINE(2), 2, LINE(2));
    check_trimmed(LINE(99999999999999999999), 2, "");
    /* Each line counts by itself: the number may not be taken from the next line. */
    check_trimmed("{\"step\":\n" LINE(2), 2, LINE(2));
    check_trimmed("{\"step\":\n 2, \"loss\": 1}\n", 2, "");
    check_trimmed("{\"step\": 2\n, \"loss\": 1}\n", 2, "");
}

/* As many lines as a week of training writes, in far less time than a quadratic search would take. */
static void a_long_file_takes_no_time(void **state) {
    (void)state;
    enum { STEPS = 400000 };
    FILE *f = fopen("metrics.jsonl", "w");
    for (int step = 1; step <= STEPS; step++)
        fprintf(f, "{\"step\": %d, \"loss\": 2.5, \"lr\": 0.001, \"grad_norm\": 1.5, \"tokens\": 524288}\n",
                step);
    assert_int_equal(fclose(f), 0);
    clock_t start = clock();
    open_at(STEPS / 2);
    assert_true(clock() - start < 10 * CLOCKS_PER_SEC);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(lines_past_the_step_go),
        cmocka_unit_test(damaged_lines_go),
        cmocka_unit_test(a_long_file_takes_no_time),
    };
    return cmocka_run_group_tests(tests, enter_directory, leave_directory);
}

/* The table of a hand-made trace, and the report when its file cannot be written. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "model/train/profile.h"
#include "tests/lib/temporary_directory.h"

static void range(struct trace *t, const char *name, double begin, double end) {
    struct traced_range *r = trace_enter(t, name, -1);
    assert_non_null(r);
    r->begin = begin;
    r->end = end;
}

/* What profile_report prints, to be freed. */
static char *report(const struct trace *t, const char *dir, int64_t steps, int status) {
    char *text = NULL;
    size_t bytes;
    struct error e = {0};
    FILE *out = open_memstream(&text, &bytes);
    assert_non_null(out);
    assert_int_equal(profile_report(out, t, dir, 3, steps, &e), status);
    assert_int_equal(e.exit_code, status ? EXIT_RUN : 0);
    fclose(out);
    return text;
}

static void has_line(const char *text, const char *line) {
    if (!strstr(text, line))
        fail_msg("no line\n%sin\n%s", line, text);
}

static void each_range_has_its_own_time(void **state) {
    struct trace *t = trace_create();
    (void)state;
    for (int step = 0; step < 2; step++) {
        range(t, "forward", step, step + 0.4);
        range(t, "linear", step + 0.1, step + 0.2);
        trace_leave(t);
        trace_leave(t);
        range(t, PROFILE_BETWEEN_STEPS, step + 0.4, step + 0.9); /* a pass that evaluates, and a second one */
        for (int pass = 0; pass < 2; pass++) {
            range(t, "forward", step + 0.5, step + 0.6);
            range(t, "linear", step + 0.5, step + 0.6);
            trace_leave(t);
            trace_leave(t);
        }
        trace_leave(t);
        range(t, "update", step + 0.9, step + 1);
        trace_leave(t);
    }
    char *text = report(t, ".", 2, 0);
    has_line(text, "steps 4 to 5, ");
    has_line(text, "\nforward                           300.000    60.0%          1.0\n");
    has_line(text, "\nlinear                            100.000    20.0%          1.0\n");
    has_line(text, "\nupdate                            100.000    20.0%          1.0\n");
    has_line(text, "\nall of a step                     500.000\n");
    has_line(text, "\nnot counted: 1000.000 ms in all of evaluation, sampling and saving\n");
    free(text);
    trace_free(t);
}

/* Ranges of no duration, and an empty trace. */
static void no_time_is_no_share(void **state) {
    struct trace *t = trace_create();
    (void)state;
    char *text = report(t, ".", 1, 0);
    has_line(text, "\nall of a step                       0.000\n");
    assert_null(strstr(text, "not counted"));
    free(text);
    range(t, "forward", 1, 1);
    trace_leave(t);
    text = report(t, ".", 1, 0);
    has_line(text, "\nforward                             0.000     0.0%          1.0\n");
    assert_null(strstr(text, "nan"));
    free(text);
    trace_free(t);
}

static void the_table_is_there_without_the_file(void **state) {
    struct trace *t = trace_create();
    (void)state;
    range(t, "forward", 0, 1);
    trace_leave(t);
    char *text = report(t, "./nowhere", 1, -1);
    has_line(text, "\nall of a step                    1000.000\n");
    free(text);
    trace_free(t);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_range_has_its_own_time),
        cmocka_unit_test(no_time_is_no_share),
        cmocka_unit_test(the_table_is_there_without_the_file),
    };
    return cmocka_run_group_tests(tests, enter_directory, leave_directory);
}

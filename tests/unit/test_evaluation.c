/* The figures of an evaluation, and what they decide: the best checkpoint, and when patience ends a run. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "model/train/evaluation.h"

/* ---- counting ---- */

enum { B = 3, T = 6 };

/* A sequence with a wrong label, one without a label that counts, and one that is all right. */
static const int32_t targets[B * T] = {-1, 4,  5,  -1, 6,  7,  //
                                       -1, -2, -2, -1, -1, -1, //
                                       8,  9,  -1, -1, -1, 3};
static const int32_t correct[B * T] = {0, 1, 0, 0, 1, 1, //
                                       0, 0, 0, 0, 0, 0, //
                                       1, 1, 0, 0, 0, 1};

static void check_counts(const int32_t *segments, int64_t count, int64_t exact) {
    struct evaluation v = {.targets = 7};
    evaluation_count(&v, B, T, targets, segments, correct);
    assert_int_equal(v.correct, 6);
    assert_int_equal(v.segments, count);
    assert_int_equal(v.exact, exact);
    assert_true(evaluation_accuracy(&v) == 6.0 / 7 && evaluation_exact(&v) == (double)exact / (double)count);
}

static void sequences_are_segments(void **state) {
    (void)state;
    check_counts(NULL, 2, 1);
}

static void segments_count_by_themselves(void **state) {
    (void)state;
    /* In the first sequence, one with the error and one without; in the last, one of three has no label. */
    static const int32_t segments[B * T] = {0, 0, 0, 3, 3, 3, //
                                            0, 1, 1, 3, 3, 3, //
                                            0, 0, 2, 2, 2, 5};
    check_counts(segments, 4, 3);
    /* The same first token in two sequences: still two segments. */
    static const int32_t whole[B * T] = {0};
    check_counts(whole, 2, 1);
}

/* ---- the best ---- */

static struct trainer_state new_run(enum best_by best_by) {
    return (struct trainer_state){.best_by = best_by, .best_value = (double)NAN};
}

/* An evaluation at the next step, of 100 targets and 10 segments. True: a new best is to be saved. */
static bool next(struct trainer_state *p, double loss, int correct_of_100, int exact_of_10, int64_t patience,
                 bool saves) {
    p->step++;
    struct evaluation v = {.loss = loss,
                           .targets = 100,
                           .labelled = true,
                           .correct = correct_of_100,
                           .segments = 10,
                           .exact = exact_of_10};
    return evaluation_note(p, &v, patience, saves);
}

static void the_best_by_each_figure(void **state) {
    (void)state;
    static const double best[] = {[BEST_BY_LOSS] = 2, [BEST_BY_ACCURACY] = 0.75, [BEST_BY_EXACT] = 0.5};
    static const int64_t best_step[] = {[BEST_BY_LOSS] = 2, [BEST_BY_ACCURACY] = 3, [BEST_BY_EXACT] = 1};
    for (int by = BEST_BY_LOSS; by <= BEST_BY_EXACT; by++) {
        struct trainer_state p = new_run((enum best_by)by);
        next(&p, 3, 50, 5, 0, true);
        next(&p, 2, 50, 5, 0, true);
        next(&p, 4, 75, 4, 0, true);
        next(&p, (double)INFINITY, 99, 9, 0, true); /* diverged */
        assert_true(p.best_value == best[by]);
        assert_int_equal(p.best_step, best_step[by]);
        assert_int_equal(p.evals_since_best, 0);
    }
}

/* Without patience, a better evaluation whose step is not saved is forgotten. */
static void only_saved_steps_are_best(void **state) {
    (void)state;
    struct trainer_state p = new_run(BEST_BY_LOSS);
    assert_false(next(&p, 1, 0, 0, 0, false));
    assert_true(isnan(p.best_value));
    assert_true(next(&p, 2, 0, 0, 0, true));
    assert_int_equal(p.best_step, 2);
}

static void patience_counts_evaluations_since_the_best(void **state) {
    (void)state;
    struct trainer_state p = new_run(BEST_BY_LOSS);
    assert_true(next(&p, 3, 0, 0, 2, false));  /* saved at once */
    assert_false(next(&p, 3, 0, 0, 2, false)); /* equal is not better */
    assert_false(patience_is_over(&p, 2));
    assert_true(next(&p, 2.9, 0, 0, 2, false));
    assert_int_equal(p.evals_since_best, 0);
    assert_false(next(&p, (double)NAN, 0, 0, 2, true));
    assert_false(patience_is_over(&p, 2));
    assert_false(next(&p, 3, 0, 0, 2, true));
    assert_true(patience_is_over(&p, 2) && !patience_is_over(&p, 3) && !patience_is_over(&p, 0));
    assert_true(p.best_value == 2.9);
    assert_int_equal(p.best_step, 3);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sequences_are_segments),
        cmocka_unit_test(segments_count_by_themselves),
        cmocka_unit_test(the_best_by_each_figure),
        cmocka_unit_test(only_saved_steps_are_best),
        cmocka_unit_test(patience_counts_evaluations_since_the_best),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

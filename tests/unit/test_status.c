/* The status line fits any width, and drops what is least important first. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "model/train/status.h"

static const struct step_record whole = {.step = 12345,
                                         .steps = 99999,
                                         .targets = 1,
                                         .loss = 2.5,
                                         .lr = 6e-4,
                                         .grad_norm = 1.25,
                                         .seconds = 0.5,
                                         .tokens_per_second = 54321,
                                         .mfu = 0.412,
                                         .until_evaluation = 655};

/* Columns of UTF-8 text: bytes that begin a character. */
static int columns_in(const char *text) {
    int columns = 0;
    for (; *text; text++)
        columns += ((unsigned char)*text & 0xc0) != 0x80;
    return columns;
}

static void fits_any_width(void **state) {
    (void)state;
    char line[STATUS_BYTES];
    struct step_record r = whole;
    for (int variant = 0; variant < 4; variant++) {
        struct status s = {.unicode = variant & 1, .loss = 2.5, .losses = 3, .seconds_a_step = 0.5};
        r.skipped = variant & 2;
        for (int columns = 1; columns <= 300; columns++) {
            int used = status_line(&s, &r, columns, line);
            assert_int_equal(used, columns_in(line));
            assert_true(used <= columns);
            if (columns >= 20)
                assert_non_null(strstr(line, "step 12345/99999"));
        }
    }
}

static void says_everything_where_there_is_room(void **state) {
    (void)state;
    char line[STATUS_BYTES];
    struct status s = {.loss = 2.5, .losses = 3, .seconds_a_step = 0.5};
    const char *parts[] = {"step 12345/99999", " 12%",      "loss 2.5000",   "lr 6.00e-04", "norm 1.25",
                           "54.3k tok/s",      "mfu 41.2%", "12:10:27 left", "eval in 655"};
    for (int columns = 0; columns <= 200; columns += 200) {
        status_line(&s, &whole, columns, line);
        for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
            assert_non_null(strstr(line, parts[i]));
        assert_int_equal(strstr(line, "==---") != NULL, columns > 0);
    }
}

static void drops_what_matters_least(void **state) {
    (void)state;
    char line[STATUS_BYTES];
    struct status s = {.loss = 2.5, .losses = 3, .seconds_a_step = 0.5};
    const char *order[] = {"norm", " 12%", "lr", "mfu", "eval", "tok/s", "left", "loss"};
    size_t gone = 0;
    for (int columns = 200; columns > 0; columns--) {
        status_line(&s, &whole, columns, line);
        while (gone < sizeof order / sizeof *order && !strstr(line, order[gone]))
            gone++;
        for (size_t i = gone; i < sizeof order / sizeof *order; i++)
            assert_non_null(strstr(line, order[i]));
    }
    assert_int_equal(gone, sizeof order / sizeof *order);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(fits_any_width),
        cmocka_unit_test(says_everything_where_there_is_room),
        cmocka_unit_test(drops_what_matters_least),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* classifier of the CUDA backend against the CPU backend. */
#include "tests/cuda/classifier_check.h"

/* ---- which targets have the largest logit ---- */

/* Small whole numbers: every logit is exact, and the largest one often occurs several times. In one row of
 * bf16, 256 + 1 is rounded to 256: a tie of the logits as they are computed. */
enum { CORRECT_ROWS = 300, CORRECT_C = 4, CORRECT_V = 2000 };

static int32_t expected_correct(enum dtype t, const double *h, const double *w, int32_t target) {
    double picked = 0;
    bool correct = target >= 0;
    for (int before = 1; before >= 0 && correct; before--)
        for (int32_t i = 0; i < CORRECT_V; i++) {
            double logit = 0;
            for (int c = 0; c < CORRECT_C; c++)
                logit += h[c] * w[i * CORRECT_C + c];
            logit = round_to(t, logit);
            if (before && i == target)
                picked = logit;
            else if (!before && (logit > picked || (logit == picked && i < target)))
                correct = false;
        }
    return correct;
}

static void check_correct(enum device_precision precision, bool gradient) {
    static double h[CORRECT_ROWS * CORRECT_C], w[CORRECT_V * CORRECT_C];
    int32_t targets[CORRECT_ROWS];
    int right = 0;
    struct backends *k = backends(precision);
    for (int i = 0; i < CORRECT_V * CORRECT_C; i++)
        w[i] = floor(fixture_noise() * 3);
    for (int n = 0; n < CORRECT_ROWS; n++) {
        for (int c = 0; c < CORRECT_C; c++)
            h[n * CORRECT_C + c] = floor(fixture_noise() * 3);
        /* One in three is any; the others have the first or another of the largest logits, mostly. */
        targets[n] = (int32_t)((fixture_noise() + 1) / 2 * CORRECT_V);
        for (int32_t i = 0; i < CORRECT_V && n % 3 > 0; i++)
            if (expected_correct(DTYPE_F64, h + n * CORRECT_C, w, i)) {
                targets[n] = n % 3 == 1 ? i : i + 1 + (int32_t)((fixture_noise() + 1) * 8);
                break;
            }
        targets[n] = n % 11 == 0 ? -1 : targets[n] % CORRECT_V;
    }
    double large[CORRECT_C] = {256, 1, 0, 0}, tied[2][CORRECT_C] = {{1, 0, 0, 0}, {1, 1, 0, 0}};
    memcpy(h + 2 * CORRECT_C, large, sizeof large); /* logits 256 and 257 for these tokens, above the rest */
    memcpy(h + 3 * CORRECT_C, large, sizeof large);
    for (int i = 0; i < CORRECT_V; i++)
        w[i * CORRECT_C] = fmin(w[i * CORRECT_C], 0);
    memcpy(w + 40 * CORRECT_C, tied, sizeof tied);
    targets[2] = 40;
    targets[3] = 41;

    struct classifier_spec s = {CORRECT_ROWS, CORRECT_C, CORRECT_V, 0};
    struct operand rows = operand_of(k, k->compute, h, s.rows, s.hidden, 0, 0, 0),
                   table = operand_of(k, k->compute, w, s.vocab, s.hidden, 0, 0, 0);
    struct operand id = ids(k, targets, s.rows, 0), correct = ids(k, targets, s.rows, 0);
    struct operand dh = gradient ? output(k, k->compute, s.rows, s.hidden, 0, 0, 0) : absent();
    struct operand dw = gradient ? output(k, DTYPE_F32, s.vocab, s.hidden, 0, 0, 0) : absent();
    plan(k, (struct op_spec){.kind = OP_CLASSIFIER, .classifier = s});
    EACH(k, b) {
        struct step_state begin = {0}, end;
        void *state = b->k->alloc(b->dev, sizeof begin, NULL);
        b->k->step_write(b->dev, state, &begin);
        b->k->classifier(b->dev, &s, on(rows, b), on(table, b), on(id, b), 1, state, on(correct, b),
                         on(dh, b), on(dw, b), false);
        b->k->step_read(b->dev, state, &end);
        b->k->release(b->dev, state);
        double *values = values_on(b, correct);
        enum dtype t = b->which == CUDA ? k->compute : type_on(k->compute, b->which);
        int64_t counted = 0;
        for (int n = 0; n < CORRECT_ROWS; n++) {
            int32_t expected = expected_correct(t, h + n * CORRECT_C, w, targets[n]);
            if (values[n] != expected)
                fail_msg("row %d, target %d: correct %g, not %d", n, targets[n], values[n], expected);
            right += expected;
            counted += targets[n] >= 0;
        }
        assert_true(end.targets == (double)counted);
        assert_true(values[2] == (b->which == CUDA && precision == DEVICE_BF16));
        assert_true(values[3] == (b->which != CUDA || precision == DEVICE_FP32));
        free(values);
    }
    assert_true(right > 3 * CORRECT_ROWS / 8 && right < 3 * CORRECT_ROWS);
    done(k);
}

static void correct_rows(void **state) {
    (void)state;
    size_t kept = emulator_gpu.memory;
    for (int precision = DEVICE_FP32; precision <= DEVICE_BF16; precision++)
        for (int gradient = 0; gradient < 2; gradient++) {
            check_correct((enum device_precision)precision, gradient);
            emulator_gpu.memory = (size_t)64 << 20; /* the second time in several chunks */
        }
    emulator_gpu.memory = kept;
}

/* A GPU with little memory takes several chunks, the last one shorter. */
static void chunks(void **state) {
    (void)state;
    static const struct op_case fp32 = {COMPARE, CLASSIFIER_CASE(300, 8, 1000)},
                                bf16 = {COMPARE, CLASSIFIER_CASE(300, 8, 2000), ACCUMULATE};
    size_t kept = emulator_gpu.memory;
    emulator_gpu.memory = (size_t)64 << 20;
    check_classifier(DEVICE_FP32, &fp32);
    check_classifier(DEVICE_BF16, &bf16);
    emulator_gpu.memory = kept;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        EVERY_CASE("classifier_fp32", OP_CLASSIFIER, DEVICE_FP32, check_classifier),
        EVERY_CASE("classifier_bf16", OP_CLASSIFIER, DEVICE_BF16, check_classifier),
        cmocka_unit_test(correct_rows),
        cmocka_unit_test(chunks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

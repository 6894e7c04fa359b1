/* classifier of the CUDA backend in the harness of tests/cuda/emulator/. */
#include "tests/cuda/fixture.h"

static const struct classifier_case {
    int64_t rows, hidden, vocab;
} CASES[] = {{1, 1, 2}, {5, 8, 7}, {9, 24, 64}, {6, 16, 4099}, {33, 40, 130}, {3, 8, 8200}};

/* The plain computation: logits in fp32, kept in the type under test, and so are their gradients. */
static double plain_classifier(struct backends *k, const struct classifier_spec *s, struct operand h,
                               struct operand w, const int32_t *targets, double scale, struct operand dh,
                               struct operand dw, bool accumulate) {
    struct backend *b = &k->each[PLAIN];
    int64_t N = s->rows, V = s->vocab;
    struct linear_spec linear = {N, s->hidden, V};
    struct operand logits = output(k, k->compute, N, V, 0, 0, 0);
    b->k->linear(b->dev, &linear, on(h, b), on(w, b), tensor_none(), on(logits, b));
    round_plain(k, logits);
    double *x = values_on(b, logits), loss = 0;
    for (int64_t n = 0; n < N; n++) {
        double *row = x + n * V, max = row[0], picked = targets[n] >= 0 ? row[targets[n]] : 0;
        float sum = 0;
        for (int64_t i = 0; i < V; i++)
            max = fmax(max, row[i]);
        for (int64_t i = 0; i < V; i++)
            sum += (float)(row[i] = (double)expf((float)(row[i] - max)));
        for (int64_t i = 0; i < V; i++)
            row[i] = targets[n] < 0 ? 0 : scale * (row[i] / (double)sum - (i == targets[n]));
        loss += targets[n] < 0 ? 0 : log((double)sum) + max - picked;
    }
    b->k->upload(b->dev, on(logits, b), x, DTYPE_F64);
    round_plain(k, logits);
    free(x);
    if (dh.on[PLAIN].data)
        b->k->linear_backward(b->dev, &linear, on(logits, b), on(h, b), on(w, b), on(dh, b), false, on(dw, b),
                              tensor_none(), accumulate);
    return scale * loss;
}

static void check(enum device_precision precision, struct classifier_case c, bool gradient, bool accumulate) {
    struct backends *k = backends(precision);
    enum dtype t = k->compute;
    struct classifier_spec s = {c.rows, c.hidden, c.vocab};
    double scale = 1.0 / 16;
    int32_t *chosen = malloc((size_t)c.rows * sizeof *chosen);
    for (int64_t n = 0; n < c.rows; n++)
        chosen[n] = n % 4 == 3 ? -1 : (int32_t)((fixture_noise() + 1) / 2 * (double)c.vocab);
    struct operand h = scaled_input(k, t, 2, 0, c.rows, c.hidden, 0, 0, 0),
                   w = input(k, t, c.vocab, c.hidden, 0, 0, 0);
    struct operand targets = ids(k, chosen, c.rows, 0);
    struct operand dh = gradient ? output(k, t, c.rows, c.hidden, 0, 0, 0) : absent();
    struct operand dw = !gradient    ? absent()
                        : accumulate ? input(k, DTYPE_F32, c.vocab, c.hidden, 0, 0, 0)
                                     : output(k, DTYPE_F32, c.vocab, c.hidden, 0, 0, 0);
    plan(k, (struct op_spec){.kind = OP_CLASSIFIER, .classifier = s});
    double loss[BACKENDS];
    EACH(k, b) {
        if (b->which == PLAIN) {
            loss[PLAIN] = 1.5 + plain_classifier(k, &s, h, w, chosen, scale, dh, dw, accumulate);
            continue;
        }
        struct step_state begin = {.loss = 1.5}, end;
        void *state = b->k->alloc(b->dev, sizeof begin, NULL);
        b->k->step_write(b->dev, state, &begin);
        b->k->classifier(b->dev, &s, on(h, b), on(w, b), on(targets, b), scale, state, on(dh, b), on(dw, b),
                         accumulate);
        b->k->step_read(b->dev, state, &end);
        loss[b->which] = end.loss;
        b->k->release(b->dev, state);
    }
    /* One number, whose plain error is a matter of luck: or what rounding each row's logits, of some 4 nats,
     * to the type under test may add up to. */
    double rounding = (t == DTYPE_BF16 ? 0x1p-9 : 0x1p-22) * 4 * scale * sqrt((double)c.rows);
    double error = fabs(loss[CUDA] - loss[EXACT]),
           allowed = FACTOR * fabs(loss[PLAIN] - loss[EXACT]) + rounding;
    if (!(error <= allowed))
        fail_msg("classifier: loss %.9g, not %.9g: error %.3g, allowed %.3g", loss[CUDA], loss[EXACT], error,
                 allowed);
    if (gradient) {
        expect_close("classifier", "dh", k, dh);
        expect_close("classifier", "dW", k, dw);
    }
    free(chosen);
    done(k);
}

static void check_all(enum device_precision precision) {
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        emulator_seed(i);
        check(precision, CASES[i], false, false);
        check(precision, CASES[i], true, false);
        check(precision, CASES[i], true, true);
    }
}

static void classifier_fp32(void **state) {
    (void)state;
    check_all(DEVICE_FP32);
}

static void classifier_bf16(void **state) {
    (void)state;
    check_all(DEVICE_BF16);
}

/* A GPU with little memory takes several chunks, the last one shorter. */
static void chunks(void **state) {
    (void)state;
    size_t kept = emulator_gpu.memory;
    emulator_gpu.memory = (size_t)64 << 20;
    check(DEVICE_FP32, (struct classifier_case){300, 8, 1000}, true, false);
    check(DEVICE_BF16, (struct classifier_case){300, 8, 2000}, true, true);
    emulator_gpu.memory = kept;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(classifier_fp32),
        cmocka_unit_test(classifier_bf16),
        cmocka_unit_test(chunks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

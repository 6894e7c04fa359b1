/* A case of classifier on the three backends of fixture.h: its loss and its gradients. */
#ifndef IHA_TESTS_CUDA_CLASSIFIER_CHECK_H
#define IHA_TESTS_CUDA_CLASSIFIER_CHECK_H

#include "tests/cuda/op_run.h"

enum { ROWS_H, W, TARGETS, DH, DW };

/* The plain computation: logits in fp32, kept in the type under test, and so are their gradients. */
static inline double plain_classifier(struct op_run *r) {
    struct backends *k = r->k;
    struct backend *b = &k->each[PLAIN];
    int64_t N = r->spec.classifier.rows, V = r->spec.classifier.vocab;
    struct linear_spec linear = {N, r->spec.classifier.hidden, V};
    tensor w = tensor_rows(on(r->x[W], b), 0, V);
    struct operand logits = output(k, k->compute, N, V, 0, 0, 0);
    b->k->linear(b->dev, &linear, on(r->x[ROWS_H], b), w, tensor_none(), on(logits, b));
    round_plain(k, logits);
    double *x = values_on(b, logits), *targets = values_on(b, r->x[TARGETS]), loss = 0;
    for (int64_t n = 0; n < N; n++) {
        int64_t target = (int64_t)targets[n];
        double *row = x + n * V, max = row[0], picked = target >= 0 ? row[target] : 0;
        float sum = 0;
        for (int64_t i = 0; i < V; i++)
            max = fmax(max, row[i]);
        for (int64_t i = 0; i < V; i++)
            sum += (float)(row[i] = (double)expf((float)(row[i] - max)));
        for (int64_t i = 0; i < V; i++)
            row[i] = target < 0 ? 0 : CLASSIFIER_SCALE * (row[i] / (double)sum - (i == target));
        loss += target < 0 ? 0 : log((double)sum) + max - picked;
    }
    b->k->upload(b->dev, on(logits, b), x, DTYPE_F64);
    round_plain(k, logits);
    free(x);
    free(targets);
    if (r->info[DH].name)
        b->k->linear_backward(b->dev, &linear, on(logits, b), tensor_none(), on(r->x[ROWS_H], b), w,
                              on(r->x[DH], b), false, tensor_rows(on(r->x[DW], b), 0, V), tensor_none(),
                              r->c->options & ACCUMULATE);
    return CLASSIFIER_SCALE * loss;
}

/* What the operation adds to a loss. */
static inline double added_loss(const struct op_run *r, const struct backend *b) {
    struct step_state begin = {.loss = 1.5}, end;
    void *state = b->k->alloc(b->dev, sizeof begin, NULL);
    b->k->step_write(b->dev, state, &begin);
    run_backward(r, b, state);
    b->k->step_read(b->dev, state, &end);
    b->k->release(b->dev, state);
    return end.loss - begin.loss;
}

/* One draw of the inputs; the gradients are compared by the caller. */
static inline void check_loss(struct op_run *r, enum device_precision precision) {
    double loss[BACKENDS];
    EACH(r->k, b)
    loss[b->which] = b->which == PLAIN ? plain_classifier(r) : added_loss(r, b);
    /* One number, whose plain error is random: or what rounding each row's logits, of some 4 nats,
     * to the type under test may add up to. */
    double rounding = (precision == DEVICE_BF16 ? 0x1p-9 : 0x1p-22) * 4 * CLASSIFIER_SCALE *
                      sqrt((double)r->spec.classifier.rows);
    double error = fabs(loss[CUDA] - loss[EXACT]),
           allowed = FACTOR * fabs(loss[PLAIN] - loss[EXACT]) + rounding;
    if (!(error <= allowed))
        fail_msg("%s: loss %.9g, not %.9g: error %.3g, allowed %.3g", op_describe(r->c), loss[CUDA],
                 loss[EXACT], error, allowed);
}

/* The same bits in another order of threads and blocks. */
static inline void check_same(struct op_run *r) {
    struct backend *cuda = &r->k->each[CUDA];
    double loss = added_loss(r, cuda), *before[OP_OPERANDS] = {NULL};
    bool compared[OP_OPERANDS] = {
        [DH] = r->info[DH].name != NULL, [DW] = r->info[DW].name && !(r->c->options & ACCUMULATE)};
    for (int i = DH; i <= DW; i++)
        before[i] = compared[i] ? values_on(cuda, r->x[i]) : NULL;
    emulator_seed(1);
    double again = added_loss(r, cuda);
    if (memcmp(&loss, &again, sizeof loss) != 0)
        fail_msg("%s: the loss depends on the order of threads or blocks", op_describe(r->c));
    for (int i = DH; i <= DW; i++)
        if (compared[i])
            expect_same(op_describe(r->c), r->info[i].name, r->k, r->x[i], before[i]);
}

/* What pads the vocabulary has no gradient. */
static inline void check_padding(const struct op_run *r) {
    const struct backend *b = &r->k->each[CUDA];
    int64_t rows = r->spec.classifier.vocab, all = classifier_padded(&r->spec.classifier),
            C = r->spec.classifier.hidden;
    if (!r->info[DW].name)
        return;
    double *dw = values_on(b, r->x[DW]);
    for (int64_t i = rows * C; i < all * C; i++)
        assert_true(dw[i] == 0);
    free(dw);
}

static inline void check_classifier(enum device_precision precision, const struct op_case *c) {
    struct op_run r;
    run_open(&r, precision, c);
    check_loss(&r, precision);
    for (int draw = 1; draw < run_draws(&r); draw++) {
        run_collect(&r);
        run_draw(&r);
        check_loss(&r, precision);
    }
    check_padding(&r);
    run_expect_close(&r);
    check_same(&r);
    done(r.k);
}

#endif

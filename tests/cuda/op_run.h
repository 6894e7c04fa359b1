/* Any case of tests/lib/op_cases.h on the three backends of fixture.h. */
#ifndef IHA_TESTS_CUDA_OP_RUN_H
#define IHA_TESTS_CUDA_OP_RUN_H

#include "tests/cuda/fixture.h"
#include "tests/lib/op_operands.h"

/* The error of a few numbers is random: the plain one may be 0, or what is added may cancel, so
 * that one rounding of a term is large beside the result. So outputs of fewer than FEW elements are compared
 * over several draws of the inputs at once, of together ENOUGH elements or more. */
enum { FEW = 16, ENOUGH = 32 };

/* What the backends have computed for one operand, draw after draw. */
struct op_results {
    double *values[BACKENDS];
    int64_t count;
};

struct op_run {
    const struct op_case *c;
    struct op_spec spec;
    struct backends *k;
    struct op_operand info[OP_OPERANDS];
    struct operand x[OP_OPERANDS];
    struct operand rows[OP_OPERANDS]; /* with a gap: what x is the first columns of */
    struct op_results results[OP_OPERANDS];
};

/* linear's activations, but not dx, may be columns of wider rows. */
static inline int64_t run_gap(const struct op_run *r, int i) {
    return r->spec.kind == OP_LINEAR && (i == 0 || i == 3 || i == 4) ? r->c->gap : 0;
}

/* Inputs hold noise, outputs NaN. */
static inline struct operand run_operand(struct op_run *r, int i) {
    const struct op_operand *x = &r->info[i];
    enum dtype t = x->type == TYPE_COMPUTE ? r->k->compute : x->type == TYPE_IDS ? DTYPE_I32 : DTYPE_F32;
    int64_t s[TENSOR_MAX_DIMS];
    memcpy(s, x->shape, sizeof s);
    s[1] += run_gap(r, i);
    if (x->type == TYPE_IDS) {
        int64_t n = tensor_count(tensor_of(NULL, t, s[0], s[1], s[2], 0, 0));
        int32_t *chosen = (int32_t *)malloc((size_t)n * sizeof *chosen);
        for (int64_t j = 0; j < n; j++)
            chosen[j] = op_id(r->c, x, j, fixture_noise());
        struct operand made = ids(r->k, chosen, n, 0);
        for (int which = 0; which < BACKENDS; which++)
            made.on[which] = tensor_of(made.on[which].data, t, s[0], s[1], s[2], 0, 0);
        free(chosen);
        return made;
    }
    bool given =
        x->touched & FORWARD_READS || (x->touched & BACKWARD_READS && !(x->touched & FORWARD_WRITES));
    struct operand made = scaled_input(r->k, t,
                                       !given         ? 0
                                       : x->scale > 0 ? x->scale
                                                      : 1,
                                       given ? x->offset : (double)NAN, s[0], s[1], s[2], s[3], s[4]);
    EACH(r->k, b)
    if (x->zero_rows > 0) {
        tensor rows = tensor_rows(on(made, b), s[0] - x->zero_rows, x->zero_rows);
        b->k->zero(b->dev, rows.data, (size_t)tensor_count(rows) * dtype_bytes(rows.dtype));
    }
    return made;
}

/* New inputs, and outputs that hold NaN. */
static inline void run_draw(struct op_run *r) {
    for (int i = 0; i < OP_OPERANDS; i++) {
        if (!r->info[i].name)
            continue;
        r->x[i] = r->rows[i] = run_operand(r, i);
        EACH(r->k, b) {
            if (run_gap(r, i) > 0)
                r->x[i].on[b->which].shape[1] -= run_gap(r, i);
            if (r->info[i].type == TYPE_ROPE)
                b->k->rope_table(b->dev, &(const struct rope_spec){.theta = 100}, on(r->x[i], b));
        }
    }
}

static inline void run_open(struct op_run *r, enum device_precision precision, const struct op_case *c) {
    *r = (struct op_run){.c = c, .spec = op_spec_of(c), .k = backends(precision)};
    op_operands(c, r->info);
    run_draw(r);
    plan(r->k, r->spec);
}

static inline void run_tensors(const struct op_run *r, const struct backend *b, tensor t[OP_OPERANDS]) {
    for (int i = 0; i < OP_OPERANDS; i++)
        t[i] = on(r->x[i], b);
}

static inline void run_forward(const struct op_run *r, const struct backend *b, struct step_state *state) {
    tensor t[OP_OPERANDS];
    run_tensors(r, b, t);
    op_forward(b->k, b->dev, r->c, t, b->saved, state);
}

static inline void run_backward(const struct op_run *r, const struct backend *b, struct step_state *state) {
    tensor t[OP_OPERANDS];
    run_tensors(r, b, t);
    op_backward(b->k, b->dev, r->c, t, b->saved, state);
}

/* Whether operand i is an output that is compared: not what has gaps. */
static inline bool run_compares(const struct op_run *r, int i) {
    return r->info[i].touched & (FORWARD_WRITES | BACKWARD_WRITES) && r->info[i].name && run_gap(r, i) == 0;
}

/* How many draws of the inputs are to be run. */
static inline int run_draws(const struct op_run *r) {
    int64_t least = ENOUGH;
    for (int i = 0; i < OP_OPERANDS; i++) {
        int64_t n = run_compares(r, i) ? tensor_count(r->x[i].on[EXACT]) : ENOUGH;
        least = n < least ? n : least;
    }
    return least < FEW ? (int)((ENOUGH + least - 1) / least) : 1;
}

/* Keep this draw's outputs. */
static inline void run_collect(struct op_run *r) {
    for (int i = 0; i < OP_OPERANDS; i++) {
        if (!run_compares(r, i))
            continue;
        struct op_results *all = &r->results[i];
        int64_t n = tensor_count(r->x[i].on[EXACT]);
        EACH(r->k, b) {
            double **values = &all->values[b->which], *now = values_on(b, r->x[i]);
            *values = (double *)realloc(*values, (size_t)(all->count + n) * sizeof **values);
            memcpy(*values + all->count, now, (size_t)n * sizeof *now);
            free(now);
        }
        all->count += n;
    }
}

/* Forward and backward once, on every backend. */
static inline void run_both(const struct op_run *r) {
    EACH(r->k, b) {
        run_forward(r, b, NULL);
        run_backward(r, b, NULL);
    }
}

/* The outputs of this draw and of those collected before. */
static inline void run_expect_close(struct op_run *r) {
    run_collect(r);
    for (int i = 0; i < OP_OPERANDS; i++) {
        struct op_results *all = &r->results[i];
        if (all->count > 0)
            expect_close_values(op_describe(r->c), r->info[i].name, r->x[i].dtype, all->values[CUDA],
                                all->values[PLAIN], all->values[EXACT], all->count);
        EACH(r->k, b)
        free(all->values[b->which]);
        *all = (struct op_results){0};
    }
}

/* Both again, in another order of threads and blocks (backwards, in which a warp runs ahead of the
 * others), leave the same bits in everything that is written over. */
static inline void run_expect_same(struct op_run *r) {
    struct backend *cuda = &r->k->each[CUDA];
    double *before[OP_OPERANDS] = {NULL};
    for (int i = 0; i < OP_OPERANDS; i++)
        if (r->info[i].name && r->info[i].touched & (FORWARD_WRITES | BACKWARD_WRITES) &&
            (r->info[i].touched & BACKWARD_ADDS) != BACKWARD_ADDS && !r->info[i].of_added)
            before[i] = values_on(cuda, r->x[i]);
    emulator_seed(1);
    run_forward(r, cuda, NULL);
    run_backward(r, cuda, NULL);
    for (int i = 0; i < OP_OPERANDS; i++)
        if (before[i])
            expect_same(op_describe(r->c), r->info[i].name, r->k, r->x[i], before[i]);
}

/* Move the cuda backend's copy of operand i: it begins so many elements behind an aligned address. */
static inline void run_shift(struct op_run *r, int i, int64_t elements) {
    struct backend *cuda = &r->k->each[CUDA];
    tensor moved = on(r->x[i], cuda);
    size_t bytes = dtype_bytes(moved.dtype), n = (size_t)(tensor_count(moved) + elements);
    double *values = values_on(cuda, r->x[i]);
    assert_true(r->k->operands < MAX_OPERANDS);
    char *memory = (char *)cuda->k->alloc(cuda->dev, n * bytes, NULL);
    r->k->memory[r->k->operands++][CUDA] = memory;
    moved.data = memory + (size_t)elements * bytes;
    cuda->k->upload(cuda->dev, moved, values, DTYPE_F64);
    r->x[i].on[CUDA] = moved;
    free(values);
}

/* In bf16, `count` operands from i on begin at every element within 16 bytes, and the bits stay the same. */
static inline void check_at_any_address(const struct op_case *c, int i, int count) {
    for (int shift = 1; shift < 8; shift++) {
        struct op_run r;
        run_open(&r, DEVICE_BF16, c);
        run_forward(&r, r.k->each, NULL);
        run_backward(&r, r.k->each, NULL);
        for (int w = 0; w < count; w++)
            run_shift(&r, i + w, (shift + w) % 8);
        run_expect_same(&r);
        done(r.k);
    }
}

/* Since then kernels have asked for whole tokens in advance, each at most once, and not for the first. */
static inline void expect_prefetched(struct op_run *r, int64_t since, int64_t tokens, int64_t token_bytes) {
    free(values_on(&r->k->each[CUDA], r->x[0])); /* waits */
    int64_t bytes = emulator_prefetched - since;
    assert_int_equal(bytes % token_bytes, 0);
    assert_true(bytes > tokens / 2 * token_bytes && bytes < tokens * token_bytes);
}

/* ---- tests that run every case ---- */

struct every_case {
    enum op_kind kind;
    enum device_precision precision;
    void (*check)(enum device_precision precision, const struct op_case *c);
    uint64_t number; /* of the case: seeds its data, and the order of threads and blocks */
};

static inline void check_one_case(const struct op_case *c, void *context) {
    struct every_case *all = (struct every_case *)context;
    emulator_seed(all->number);
    fixture_seed = ++all->number; /* a case's numbers do not depend on the cases before it */
    all->check(all->precision, c);
}

static inline void check_every_case(void **state) {
    struct every_case *all = (struct every_case *)*state;
    assert_true(op_cases_run(all->kind, COMPARE, check_one_case, all) > 0);
}

/* The whole check of an operation: forward and backward are as close to float64 as the plain computation, and have the
 * same bits in another order of threads and blocks. */
static inline void check_case(enum device_precision precision, const struct op_case *c) {
    struct op_run r;
    run_open(&r, precision, c);
    run_both(&r);
    run_expect_close(&r);
    run_expect_same(&r);
    done(r.k);
}

/* An element of a list of tests. */
#define EVERY_CASE(NAME, KIND, PRECISION, CHECK)                                                             \
    {                                                                                                        \
        NAME, check_every_case, NULL, NULL, &(struct every_case) {                                           \
            KIND, PRECISION, CHECK, 0                                                                        \
        }                                                                                                    \
    }

#endif

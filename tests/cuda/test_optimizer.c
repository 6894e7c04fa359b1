/* The step state, sumsq and AdamW of the CUDA backend against the CPU backend. */
#include "kernels/rounding.h"
#include "tests/cuda/fixture.h"

/* A step state on each backend. */
static struct operand make_state(struct backends *k) {
    struct operand s = {.dtype = DTYPE_I32};
    EACH(k, b) {
        struct step_state *state = b->k->alloc(b->dev, sizeof *state, NULL);
        k->memory[k->operands][b->which] = state;
        s.on[b->which].data = state;
    }
    k->operands++;
    return s;
}

static struct step_state read_state(struct backend *b, struct operand s) {
    struct step_state host;
    b->k->step_read(b->dev, on(s, b).data, &host);
    return host;
}

static void expect_near(const char *what, double cuda, double plain, double exact) {
    expect_close_values("step state", what, DTYPE_F32, &cuda, &plain, &exact, 1);
}

static void sumsq(void **unused) {
    (void)unused;
    const int64_t sizes[] = {1, 3, 4, 1023, 1024, 5000, 40003};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        emulator_seed(i);
        struct backends *k = backends(DEVICE_BF16);
        struct operand state = make_state(k);
        struct operand g = input(k, DTYPE_F32, sizes[i], 0, 0, 0, 0), h = input(k, DTYPE_F32, 9, 7, 0, 0, 0);
        struct step_state after[BACKENDS];
        EACH(k, b) {
            b->k->step_begin(b->dev, on(state, b).data, 12, 0.5);
            b->k->sumsq(b->dev, on(g, b), on(state, b).data);
            b->k->sumsq(b->dev, on(h, b), on(state, b).data);
            if (sizes[i] > 1) { /* a range that starts off 16 bytes */
                tensor tail = tensor_rows(on(g, b), 1, sizes[i] - 1);
                b->k->sumsq(b->dev, tail, on(state, b).data);
            }
            after[b->which] = read_state(b, state);
        }
        expect_near("sumsq", after[CUDA].sumsq, after[PLAIN].sumsq, after[EXACT].sumsq);
        assert_true(after[CUDA].step == 12 && after[CUDA].lr == 0.5);
        done(k);
    }
}

static void decide(void **unused) {
    (void)unused;
    struct backends *k = backends(DEVICE_FP32);
    struct operand state = make_state(k);
    const struct {
        double loss, sumsq, grad_clip;
    } cases[] = {{2, 9, 1},        {2, 0.25, 1},       {2, 9, 0}, {NAN, 9, 1},
                 {2, INFINITY, 1}, {INFINITY, NAN, 0}, {2, 4, 1}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct step_state after[BACKENDS];
        EACH(k, b) {
            b->k->step_begin(b->dev, on(state, b).data, (int64_t)i, 1);
            struct step_state s = read_state(b, state);
            assert_true(s.loss == 0 && s.sumsq == 0 && s.skip == 0);
            s.loss = cases[i].loss;
            s.targets = 3;
            s.sumsq = cases[i].sumsq;
            b->k->step_write(b->dev, on(state, b).data, &s);
            b->k->step_decide(b->dev, on(state, b).data, 6, cases[i].grad_clip, 0);
            after[b->which] = read_state(b, state);
        }
        struct step_state c = after[CUDA], p = after[PLAIN];
        assert_true(c.skip == p.skip && c.history.skips_run == p.history.skips_run &&
                    c.history.updates == p.history.updates);
        if (!c.skip)
            assert_true(c.factor == p.factor && c.grad_norm == p.grad_norm);
    }
    done(k);
}

enum { MAX_TEST_GROUPS = 300 };

enum { FIRST_INDEX = 12345, INDEX_STEP = 100000 }; /* in rounding: of the first group, and between groups */

/* `steps` updates over `count` groups of `each` elements that begin at `start`, with gaps of `gap`. */
static void check_adamw(enum device_precision precision, int count, int64_t start, int64_t each, int64_t gap,
                        int steps) {
    struct backends *k = backends(precision);
    struct operand state = make_state(k);
    int64_t n = start + count * (each + gap);
    bool separate = precision == DEVICE_BF16;
    struct operand master = input(k, DTYPE_F32, n, 0, 0, 0, 0), g = input(k, DTYPE_F32, n, 0, 0, 0, 0);
    struct operand p = separate ? input(k, DTYPE_BF16, n, 0, 0, 0, 0) : absent();
    struct operand m = scaled_input(k, DTYPE_F32, 0.1, 0, n, 0, 0, 0, 0);
    struct operand v = scaled_input(k, DTYPE_F32, 0.1, 0.2, n, 0, 0, 0, 0);
    struct param_group groups[MAX_TEST_GROUPS];
    for (int i = 0; i < count; i++)
        groups[i] = (struct param_group){start + i * (each + gap),
                                         start + i * (each + gap) + each,
                                         1 + 0.5f * (float)(i % 3),
                                         i % 2 ? 0.1f : 0,
                                         0,
                                         FIRST_INDEX + i * INDEX_STEP};
    struct adamw_hyper hyper = {0.9, 0.95, 1e-8};
    double *before = separate ? values_on(&k->each[CUDA], p) : NULL;
    EACH(k, b) {
        for (int step = 0; step < steps; step++) {
            b->k->step_begin(b->dev, on(state, b).data, step, 0.01);
            b->k->sumsq(b->dev, on(g, b), on(state, b).data);
            struct step_state s = read_state(b, state);
            s.targets = 1;
            b->k->step_write(b->dev, on(state, b).data, &s);
            b->k->step_decide(b->dev, on(state, b).data, 1, 2, 0);
            b->k->adamw(b->dev, &hyper, groups, count, on(master, b),
                        b->which == CUDA ? on(p, b) : tensor_none(), on(g, b), on(m, b), on(v, b),
                        on(state, b).data);
        }
    }
    expect_close("adamw", "master", k, master);
    expect_close("adamw", "m", k, m);
    expect_close("adamw", "v", k, v);
    if (separate) { /* the parameters are the master weights, rounded; gaps are left alone */
        double *values = values_on(&k->each[CUDA], p), *master_weights = values_on(&k->each[CUDA], master);
        int64_t i = 0;
        for (int group = 0; group <= count; group++) {
            for (; i < (group < count ? groups[group].begin : n); i++)
                assert_true(values[i] == before[i]);
            for (; group < count && i < groups[group].end; i++) {
                uint32_t bits = (uint32_t)round_stochastic(
                                    (float)master_weights[i], (uint32_t)steps,
                                    (uint64_t)(groups[group].rounding_index + i - groups[group].begin))
                                << 16;
                float rounded;
                memcpy(&rounded, &bits, sizeof rounded);
                assert_true(values[i] == (double)rounded);
            }
        }
        free(values);
        free(master_weights);
        free(before);
    }
    done(k);
}

static void adamw(void **unused) {
    (void)unused;
    for (int precision = DEVICE_FP32; precision <= DEVICE_BF16; precision++) {
        emulator_seed(2);
        check_adamw((enum device_precision)precision, 1, 0, 1, 0, 1);
        check_adamw((enum device_precision)precision, 3, 0, 64, 0, 3);
        check_adamw((enum device_precision)precision, 2, 0, 4100, 4, 2);
        check_adamw((enum device_precision)precision, 3, 3, 77, 5, 2);
        check_adamw((enum device_precision)precision, 1, 3, 77, 4, 1);
        check_adamw((enum device_precision)precision, 250, 0, 8, 0, 1);
    }
}

/* A skipped step changes nothing. */
static void skipped(void **unused) {
    (void)unused;
    struct backends *k = backends(DEVICE_FP32);
    struct operand state = make_state(k), x[4];
    for (int i = 0; i < 4; i++)
        x[i] = input(k, DTYPE_F32, 100, 0, 0, 0, 0);
    struct backend *b = &k->each[CUDA];
    struct param_group group = {0, 100, 1, 0.1f, 0, 0};
    struct adamw_hyper hyper = {0.9, 0.95, 1e-8};
    double *before[4];
    for (int i = 0; i < 4; i++)
        before[i] = values_on(b, x[i]);
    b->k->step_begin(b->dev, on(state, b).data, 1, 0.01);
    struct step_state s = read_state(b, state);
    s.loss = NAN;
    s.targets = 1;
    b->k->step_write(b->dev, on(state, b).data, &s);
    b->k->step_decide(b->dev, on(state, b).data, 1, 1, 0);
    b->k->adamw(b->dev, &hyper, &group, 1, on(x[0], b), tensor_none(), on(x[1], b), on(x[2], b), on(x[3], b),
                on(state, b).data);
    for (int i = 0; i < 4; i++) {
        double *after = values_on(b, x[i]);
        assert_memory_equal(before[i], after, 100 * sizeof *after);
        free(before[i]);
        free(after);
    }
    done(k);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sumsq),
        cmocka_unit_test(decide),
        cmocka_unit_test(adamw),
        cmocka_unit_test(skipped),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

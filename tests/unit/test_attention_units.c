/* How attention on the CPU is divided among threads: any schedule gives the bits of one thread that computes
 * the same units, and scratch memory does not grow with the sequence. */
#include <omp.h>

#include "tests/lib/model_fixture.h"
#include "tests/lib/attention_cases.h"

#include "kernels/cpu/cpu.h"

enum { THREADS = 3, RESULTS = 5 };

/* A device of more threads than there may be processors, which opening one does not allow. */
static struct device *three_threads(void) {
    static struct device *dev;
    struct error e = {0};
    struct device_options options = {.threads = 1, .precision = DEVICE_FP32};
    if (!dev && !(dev = kernels_cpu()->open(&options, &e)))
        fail_msg("%s", e.text);
    dev->threads = THREADS;
    return dev;
}

static struct op_cost cost_of(const struct attention_spec *s) {
    struct op_spec op = {.kind = OP_ATTENTION, .attention = *s};
    struct op_cost cost;
    struct error e = {0};
    assert_int_equal(kernels_cpu()->plan(three_threads(), &op, &cost, &e), 0);
    return cost;
}

/* q, k, v, d_o, then the results o, dq, dk, dv, and saved. */
struct run {
    struct attention_spec spec;
    int64_t count; /* elements of a tensor */
    float *in, *results[RESULTS];
    size_t bytes[RESULTS];
    int32_t *segments;
    void *workspace;
    struct op_cost cost;
};

static struct run run_alloc(const struct attention_spec *s, const int64_t *lengths) {
    struct run r = {.spec = *s, .count = s->batch * s->length * s->heads * s->head_dim, .cost = cost_of(s)};
    uint64_t seed = 3;
    r.in = malloc((size_t)(4 * r.count) * sizeof *r.in);
    for (int64_t i = 0; i < 4 * r.count; i++)
        r.in[i] = (float)fixture_noise(&seed);
    for (int i = 0; i < RESULTS; i++) {
        r.bytes[i] = i < 4 ? (size_t)r.count * sizeof(float) : r.cost.saved;
        r.results[i] = malloc(r.bytes[i]);
    }
    r.segments = malloc((size_t)(2 * s->batch * s->length) * sizeof *r.segments);
    if (lengths)
        fill_segments(lengths, s->batch, s->length / s->pseudo, r.segments);
    r.workspace = aligned_alloc(4096, (r.cost.workspace + 4095) / 4096 * 4096);
    return r;
}

static void run_free(struct run *r) {
    for (int i = 0; i < RESULTS; i++)
        free(r->results[i]);
    free(r->in);
    free(r->segments);
    free(r->workspace);
}

static tensor whole(const struct run *r, float *data) {
    const struct attention_spec *s = &r->spec;
    return tensor_of(data, DTYPE_F32, s->batch, s->length, s->heads, s->head_dim, 0);
}

/* Forward and backward, over results that hold NaN. */
static void run_once(const struct run *r) {
    const struct kernels *k = kernels_cpu();
    const struct attention_spec *s = &r->spec;
    tensor t[8], segments = s->segmented
                                ? tensor_of(r->segments, DTYPE_I32, 2, s->batch, s->length / s->pseudo, 0, 0)
                                : tensor_none();
    for (int i = 0; i < RESULTS; i++)
        memset(r->results[i], 0xff, r->bytes[i]);
    for (int i = 0; i < 4; i++) {
        t[i] = whole(r, r->in + i * r->count);
        t[4 + i] = whole(r, r->results[i]);
    }
    k->set_workspace(three_threads(), r->workspace, r->cost.workspace);
    k->attention(three_threads(), s, t[0], t[1], t[2], segments, t[4], r->results[4]);
    k->attention_backward(three_threads(), s, t[0], t[1], t[2], segments, t[4], t[3], r->results[4], t[5],
                          t[6], t[7]);
}

static void check_schedules(struct attention_spec s, const int64_t *lengths) {
    static const char *const names[RESULTS] = {"o", "dq", "dk", "dv", "saved"};
    if (!in_sample())
        return;
    s.scale = 0.3;
    struct run serial = run_alloc(&s, lengths), parallel = run_alloc(&s, lengths);
    int levels = omp_get_max_active_levels();
    omp_set_max_active_levels(0); /* one thread takes all units, in order */
    run_once(&serial);
    omp_set_max_active_levels(levels);
    for (int repeat = 0; repeat < 4; repeat++) {
        run_once(&parallel);
        for (int i = 0; i < RESULTS; i++)
            if (memcmp(serial.results[i], parallel.results[i], serial.bytes[i]) != 0)
                fail_msg(
                    "H %d S %d P %d causal %d token %d window %d segments of %d: %s depends on the schedule",
                    (int)s.heads, (int)s.length, (int)s.pseudo, s.causal, s.token_mask, (int)s.window,
                    lengths ? (int)lengths[0] : 0, names[i]);
    }
    run_free(&serial);
    run_free(&parallel);
}

/* One head, whose tiles are units by themselves, and heads enough for groups of tiles. */
static void any_schedule_gives_the_same_bits(void **state) {
    (void)state;
    static const int64_t windows[] = {0, 65, 300}, heads[] = {1, 12};
    for (size_t h = 0; h < COUNT(heads); h++)
        for (size_t w = 0; w < COUNT(windows); w++)
            for (size_t m = 0; m < COUNT(ATTENTION_MASKS); m++) {
                struct attention_spec s = {.batch = 1,
                                           .length = 900,
                                           .heads = heads[h],
                                           .head_dim = 8,
                                           .pseudo = ATTENTION_MASKS[m].pseudo,
                                           .causal = ATTENTION_MASKS[m].causal,
                                           .token_mask = ATTENTION_MASKS[m].token_mask,
                                           .window = windows[w]};
                if (!(ATTENTION_MASKS[m].on & ON_CPU))
                    continue;
                check_schedules(s, NULL);
                s.segmented = true;
                check_schedules(s, ATTENTION_SEGMENTS[4]);
            }
}

/* A number for each query and a counter for each tile of them are all that is added for a longer sequence. */
static void scratch_does_not_grow_with_the_sequence(void **state) {
    (void)state;
    for (int64_t d = 16; d <= 256; d *= 4) {
        struct attention_spec s = {1, 1 << 16, 4, d, 1, true, false, 0, 0.3, false, 0, false}, longer = s;
        longer.length *= 64;
        size_t small = cost_of(&s).workspace, large = cost_of(&longer).workspace;
        size_t tiles = (size_t)(longer.heads * longer.length) / 64;
        assert_true(large - small <= tiles * (64 * sizeof(float) + sizeof(int32_t)));
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(any_schedule_gives_the_same_bits),
        cmocka_unit_test(scratch_does_not_grow_with_the_sequence),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

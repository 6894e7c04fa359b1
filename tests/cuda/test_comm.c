/* What ranks' numbers go through on a GPU: sums in rank order and rounding, bit for bit what a plain loop
 * computes, at sizes and addresses that allow wide accesses and at others. */
#include "tests/cuda/fixture.h"

#include "kernels/cuda/comm/comm_sums.h"
#include "kernels/rounding.h"

enum { GUARD = 16, MAX_RANKS = 5 };

static const int64_t sizes[] = {1, 3, 4, 7, 8, 15, 64, 255, 1000, 1001, 2048, 8 * 256 * 3, 8 * 256 * 3 + 5};
enum { SIZES = sizeof sizes / sizeof *sizes, OFFSETS = 5 };

/* So many elements after an address that is aligned. */
static const int offsets[OFFSETS] = {0, 1, 2, 4, 5};

#define ok(call) assert_int_equal(call, cudaSuccess)

static float noise(void) {
    return (float)(fixture_noise() * pow(2, (int)(fixture_noise() * 12)));
}

/* Device memory with these bytes. */
static char *given(const void *host, size_t bytes) {
    char *p;
    ok(cudaMalloc((void **)&p, bytes));
    ok(cudaMemcpy(p, host, bytes, cudaMemcpyHostToDevice));
    ok(cudaDeviceSynchronize()); /* from pageable memory the copy may return before it has arrived */
    return p;
}

/* [GUARD, offset, n, GUARD] elements of noise. */
static float *guarded(int64_t n, int offset) {
    float *x = malloc((size_t)(n + offset + 2 * GUARD) * sizeof *x);
    for (int64_t i = 0; i < n + offset + 2 * GUARD; i++)
        x[i] = noise();
    return x;
}

static void expect(const void *device, const void *want, size_t bytes, const char *what, int64_t n,
                   int offset) {
    char *got = malloc(bytes);
    ok(cudaDeviceSynchronize());
    ok(cudaMemcpy(got, device, bytes, cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < bytes; i++)
        if (got[i] != ((const char *)want)[i])
            fail_msg("%s of %lld elements, offset %d: byte %zu of %zu differs", what, (long long)n, offset, i,
                     bytes);
    free(got);
}

static void one_sum(cudaStream_t stream, enum dtype wire, int rank, int ranks, int64_t n, int offset,
                    bool accumulate, bool in_place) {
    size_t element = wire == DTYPE_BF16 ? 2 : 4, bytes = (size_t)(n + offset + 2 * GUARD) * 4;
    float *own = guarded(n, offset), *out = in_place ? own : guarded(n, offset);
    float *others = guarded(n * ranks, offset);
    uint16_t *rounded = malloc((size_t)(n * ranks + offset + 2 * GUARD) * sizeof *rounded);
    for (int64_t i = 0; i < n * ranks + offset + 2 * GUARD; i++)
        rounded[i] = round_to_bf16(others[i]);
    int64_t at = GUARD + offset;
    char *d_own = given(own, bytes), *d_out = in_place ? d_own : given(out, bytes);
    char *d_others = given(wire == DTYPE_BF16 ? (void *)rounded : (void *)others,
                           (size_t)(n * ranks + offset + 2 * GUARD) * element);
    for (int64_t i = 0; i < n; i++) {
        float sum = 0;
        for (int r = 0; r < ranks; r++) {
            int64_t j = at + r * n + i;
            float x = r == rank ? own[at + i] : wire == DTYPE_BF16 ? from_bf16(rounded[j]) : others[j];
            sum = r == 0 ? x : sum + x;
        }
        out[at + i] = accumulate ? out[at + i] + sum : sum;
    }
    comm_add_in_rank_order(stream, (float *)d_own + at, d_others + (size_t)at * element, wire, rank, ranks, n,
                           (float *)d_out + at, accumulate);
    expect(d_out, out, bytes, "sum in rank order", n, offset);
    ok(cudaFree(d_own));
    ok(cudaFree(d_others));
    if (!in_place) {
        ok(cudaFree(d_out));
        free(out);
    }
    free(own);
    free(others);
    free(rounded);
}

static void sums_in_rank_order(void **state) {
    (void)state;
    cudaStream_t stream;
    ok(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    for (int wire = 0; wire < 2; wire++)
        for (int s = 0; s < SIZES; s++)
            for (int o = 0; o < OFFSETS; o++) {
                int ranks = 1 + (s + o + wire) % MAX_RANKS, rank = (s + 2 * o) % ranks;
                enum dtype type = wire ? DTYPE_BF16 : DTYPE_F32;
                one_sum(stream, type, rank, ranks, sizes[s], offsets[o], (s + o) % 2, o == 2);
                one_sum(stream, type, rank, MAX_RANKS, sizes[s], offsets[o], s % 2, o == 0);
                one_sum(stream, type, 0, 2, sizes[s], offsets[o], false, false);
            }
    ok(cudaStreamDestroy(stream));
    assert_int_equal(emulator_allocations(), 0);
}

static void additions(void **state) {
    (void)state;
    cudaStream_t stream;
    ok(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    for (int s = 0; s < SIZES; s++)
        for (int o = 0; o < OFFSETS; o++) {
            int64_t n = sizes[s], at = GUARD + offsets[o], other = GUARD + offsets[(o + s) % OFFSETS];
            float *x = guarded(n, offsets[OFFSETS - 1]), *out = guarded(n, offsets[OFFSETS - 1]);
            size_t bytes = (size_t)(n + offsets[OFFSETS - 1] + 2 * GUARD) * sizeof *x;
            char *d_x = given(x, bytes), *d_out = given(out, bytes);
            for (int64_t i = 0; i < n; i++)
                out[at + i] += x[other + i];
            comm_add_to(stream, (float *)d_x + other, n, (float *)d_out + at);
            expect(d_out, out, bytes, "addition", n, offsets[o]);
            ok(cudaFree(d_x));
            ok(cudaFree(d_out));
            free(x);
            free(out);
        }
    ok(cudaStreamDestroy(stream));
}

/* To the nearest, ties to even, infinities as they are. */
static void rounding(void **state) {
    (void)state;
    cudaStream_t stream;
    ok(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    for (int s = 0; s < SIZES; s++)
        for (int o = 0; o < OFFSETS; o++) {
            int64_t n = sizes[s], at = GUARD + offsets[o], other = GUARD + offsets[(o + s) % OFFSETS];
            int64_t length = n + offsets[OFFSETS - 1] + 2 * GUARD;
            float *from = guarded(n, offsets[OFFSETS - 1]);
            uint16_t *to = malloc((size_t)length * sizeof *to);
            memset(to, 0x5a, (size_t)length * sizeof *to);
            const float special[] = {INFINITY, -INFINITY, -0.0f, 1 + 0x1p-8f, 1 + 0x1.8p-7f, 0x1p-130f};
            for (int64_t i = 0; i < n && i < 6; i++)
                from[at + (n - 1 - i)] = special[i];
            char *d_from = given(from, (size_t)length * 4), *d_to = given(to, (size_t)length * 2);
            for (int64_t i = 0; i < n; i++)
                to[other + i] = round_to_bf16(from[at + i]);
            comm_round_to_bf16(stream, (float *)d_from + at, n, (uint16_t *)d_to + other);
            expect(d_to, to, (size_t)length * 2, "rounding", n, offsets[o]);
            ok(cudaFree(d_from));
            ok(cudaFree(d_to));
            free(from);
            free(to);
        }
    ok(cudaStreamDestroy(stream));
}

static void sums_of_doubles(void **state) {
    (void)state;
    enum { COUNT = 3 };
    double all[MAX_RANKS * COUNT], want[COUNT];
    for (int i = 0; i < MAX_RANKS * COUNT; i++)
        all[i] = fixture_noise() * pow(2, 40 * fixture_noise());
    for (int ranks = 1; ranks <= MAX_RANKS; ranks++) {
        for (int i = 0; i < COUNT; i++) {
            want[i] = all[i];
            for (int r = 1; r < ranks; r++)
                want[i] += all[r * COUNT + i];
        }
        char *d_all = given(all, sizeof all), *values = given(all, sizeof want);
        comm_sum_doubles(NULL, (double *)d_all, ranks, COUNT, (double *)values);
        expect(values, want, sizeof want, "sum of doubles", ranks, 0);
        ok(cudaFree(d_all));
        ok(cudaFree(values));
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sums_in_rank_order),
        cmocka_unit_test(additions),
        cmocka_unit_test(rounding),
        cmocka_unit_test(sums_of_doubles),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

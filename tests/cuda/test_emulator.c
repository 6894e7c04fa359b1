/* The emulator of a GPU (tests/cuda/emulator/): what it computes, and which faults of kernels it reports. */
#include "tests/cuda/fixture.h"

#include "tests/cuda/death.h"
#include "tests/cuda/samples.h"

enum { SEEDS = 6 };

#if defined __SANITIZE_ADDRESS__
static const bool SANITIZED = true;
#else
static const bool SANITIZED = false;
#endif

static void orders_agree(void **state) {
    (void)state;
    for (int seed = 0; seed < SEEDS; seed++) {
        float reversed[256], rotated[64], sums[4];
        emulator_seed((uint64_t)seed);
        sample_reverse(reversed, 1);
        for (int i = 0; i < 256; i++)
            assert_true(reversed[i] == (float)(255 - i));
        sample_rotate(rotated, 1);
        for (int i = 0; i < 64; i++)
            assert_true(rotated[i] == (float)((i + 3) % 64));
        sample_atomics(sums);
        for (int i = 0; i < 4; i++)
            assert_true(sums[i] == 128 * 10000 + 127 * 64 * 128);
    }
}

/* A missing barrier changes the result under at least one seed; between a store and a load it shows as NaN.
 */
static void missing_barrier(void **state) {
    (void)state;
    int wrong_reverse = 0, wrong_rotate = 0, poisoned = 0;
    for (int seed = 0; seed < SEEDS; seed++) {
        float reversed[256], rotated[64];
        emulator_seed((uint64_t)seed);
        sample_reverse(reversed, 0);
        for (int i = 0; i < 256; i++) {
            wrong_reverse += reversed[i] != (float)(255 - i);
            poisoned += isnan(reversed[i]);
        }
        sample_rotate(rotated, 0);
        for (int i = 0; i < 64; i++)
            wrong_rotate += rotated[i] != (float)((i + 3) % 64);
    }
    assert_true(wrong_reverse > 0 && poisoned == wrong_reverse);
    assert_true(wrong_rotate > 0);
}

static void uninitialised_shared(void **state) {
    (void)state;
    float out[32];
    sample_uninitialised(out);
    for (int i = 0; i < 32; i++)
        assert_true(isnan(out[i]));
}

static void large_blocks(void **state) {
    (void)state;
    assert_int_equal(sample_large_block(), 0);
}

static void stray_stores(void **state) {
    (void)state;
    const char *beside =
        SANITIZED ? "use-after-poison" : "emulator: write_at: wrote beside an allocation of 40 bytes";
    expect_death(sample_write_at, 10, beside);
    expect_death(sample_write_at, -1, beside);
    expect_death(sample_write_shared, 16,
                 SANITIZED ? "use-after-poison" : "wrote behind its 64 bytes of dynamic shared memory");
    if (SANITIZED)
        expect_death(sample_read_at, 10, "use-after-poison");
}

static void overlapping_launches(void **state) {
    (void)state;
    sample_early(64);
    expect_death(sample_early, 63, "emulator: early: 63 of 64 threads waited for the kernel before");
    expect_death(sample_early, 0, "emulator: early: 0 of 64 threads waited for the kernel before");
}

static void divergence(void **state) {
    (void)state;
    for (int seed = 0; seed < SEEDS; seed++) {
        emulator_seed((uint64_t)seed);
        expect_death(sample_divergent, 0, "31 wait at a barrier");
        expect_death(sample_divergent, 1, "threads wait at different barriers");
        expect_death(sample_divergent, 2, "deadlock");
        expect_death(sample_divergent, 3, "more than the warp's 16 threads");
    }
}

static void host_access(int unused) {
    (void)unused;
    sample_host_access();
}

/* Device memory is out of the host's reach. */
static void host_reads_device_memory(void **state) {
    (void)state;
    expect_death(host_access, 0, "");
}

static void warp_operations(void **state) {
    (void)state;
    for (int seed = 0; seed < SEEDS; seed++) {
        float out[SAMPLE_WARP_RESULTS][32];
        emulator_seed((uint64_t)seed);
        sample_warps(out[0]);
        for (int lane = 0; lane < 32; lane++) {
            const int want[SAMPLE_WARP_RESULTS] = {5,
                                                   lane ^ 3,
                                                   lane < 2 ? lane : lane - 2,
                                                   lane > 29 ? lane : lane + 2,
                                                   lane % 8 > 5 ? lane : lane + 2,
                                                   496,
                                                   31,
                                                   11,
                                                   31,
                                                   496};
            for (int i = 0; i < SAMPLE_WARP_RESULTS; i++)
                assert_int_equal((int)out[i][lane], want[i]);
        }
    }
}

static void tensor_core(void **state) {
    (void)state;
    float a[16][16], b[16][8], d[16][8];
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++) {
            a[i][k] =
                (float)(int)(fixture_noise() * 100); /* integers: bf16 holds them and the sums are exact */
            b[k][i % 8] = (float)(int)(fixture_noise() * 100);
        }
    for (int seed = 0; seed < SEEDS; seed++) {
        emulator_seed((uint64_t)seed);
        sample_matmul(a[0], b[0], d[0], 1);
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 8; j++) {
                float want = 0;
                for (int k = 0; k < 16; k++)
                    want += a[i][k] * b[k][j];
                assert_true(d[i][j] == want);
            }
        sample_matmul(a[0], b[0], d[0], 0);
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 8; j++)
                assert_true(isnan(d[i][j]));
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(orders_agree),
        cmocka_unit_test(missing_barrier),
        cmocka_unit_test(uninitialised_shared),
        cmocka_unit_test(stray_stores),
        cmocka_unit_test(overlapping_launches),
        cmocka_unit_test(divergence),
        cmocka_unit_test(host_reads_device_memory),
        cmocka_unit_test(warp_operations),
        cmocka_unit_test(tensor_core),
        cmocka_unit_test(large_blocks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

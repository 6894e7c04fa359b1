/* Timing of alternatives, to choose between them when an operation is planned.
 *
 * An idle GPU runs at a fraction of its clock and needs tens of milliseconds of work to reach it. So it is
 * kept busy before anything is timed, and the candidates are timed in turn, in several rounds: a change of the
 * clock then meets all of them. Each is judged by its fastest round, since whatever disturbs a measurement
 * makes it longer. */
#include "kernels/cuda/timing.h"

#include <stdlib.h>
#include <string.h>

#include <vector>

#include "kernels/clock.h"
#include "kernels/cuda/check_values.cuh"
#include "kernels/cuda/cuda.cuh"
#include "kernels/cuda/plan_file.h"

enum { ROUNDS = 3, MOST_RUNS = 1000 };
static const float WARM_UP_MS = 100, ROUND_MS = 2;
static const double STAYS_WARM = 0.5; /* seconds */

struct stopwatch {
    struct device *dev;
    cudaEvent_t begin, end;
};

/* Milliseconds of each of `runs` runs, or a negative number if one cannot run. */
static float time_runs(const struct stopwatch *w, const std::function<bool(int)> &run, int candidate,
                       int runs) {
    float ms;
    cuda_check(cudaEventRecord(w->begin, w->dev->stream));
    for (int i = 0; i < runs; i++)
        if (!run(candidate))
            return -1;
    cuda_check(cudaEventRecord(w->end, w->dev->stream));
    cuda_check(cudaEventSynchronize(w->end));
    cuda_check(cudaEventElapsedTime(&ms, w->begin, w->end));
    return ms / (float)runs;
}

/* Keep the GPU busy until its clock is up. The host's clock only ends what does not get on. */
static void warm_up(const struct stopwatch *w, const std::function<bool(int)> &run, int candidate) {
    double start = clock_seconds();
    float busy = 0;
    if (w->dev->timed_at > 0 && start - w->dev->timed_at < STAYS_WARM)
        return;
    for (int runs = 1; busy < WARM_UP_MS && clock_seconds() - start < 1;) {
        float ms = time_runs(w, run, candidate, runs) * (float)runs;
        busy += ms;
        if (ms < WARM_UP_MS / 10 && runs < MOST_RUNS)
            runs *= 2;
    }
}

/* So many runs that they take ROUND_MS, if one takes `ms`. */
static int runs_of_a_round(float ms) {
    float runs = ROUND_MS / (ms > ROUND_MS / MOST_RUNS ? ms : ROUND_MS / MOST_RUNS);
    return (int)runs + 1;
}

static int fastest_of(struct device *dev, int count, const std::function<bool(int)> &run) {
    struct stopwatch w = {dev, NULL, NULL};
    std::vector<float> best((size_t)count, -1);
    std::vector<int> runs((size_t)count, 0);
    int first = -1, fastest = NONE_RUNS;
    cuda_check(cudaEventCreate(&w.begin));
    cuda_check(cudaEventCreate(&w.end));
    for (int i = 0; i < count; i++) /* which load their code, too */
        if ((best[i] = time_runs(&w, run, i, 1)) >= 0 && first < 0)
            first = i;
    if (first >= 0)
        warm_up(&w, run, first);
    for (int i = 0; i < count; i++)
        if (best[i] >= 0)
            runs[i] = runs_of_a_round(best[i] = time_runs(&w, run, i, 1));
    for (int round = 0; round < ROUNDS; round++)
        for (int i = 0; i < count; i++) {
            float ms = runs[i] > 0 ? time_runs(&w, run, i, runs[i]) : -1;
            if (ms >= 0 && (round == 0 || ms < best[i]))
                best[i] = ms;
        }
    for (int i = 0; i < count; i++)
        if (best[i] >= 0 && (fastest < 0 || best[i] < best[fastest]))
            fastest = i;
    cuda_check(cudaEventDestroy(w.begin));
    cuda_check(cudaEventDestroy(w.end));
    dev->timed_at = clock_seconds();
    return fastest;
}

/* x [n] words: as bf16 and as fp32, numbers of random sign and digits between 1 and 2. Products of equal numbers need less
 * power, and would be timed at a clock that training does not reach. */
static __global__ void __launch_bounds__(CHECK_THREADS) fill_operands(uint32_t *x, int64_t n) {
    wait_for_previous();
    int64_t i = (int64_t)blockIdx.x * CHECK_THREADS + threadIdx.x;
    for (; i < n; i += (int64_t)gridDim.x * CHECK_THREADS)
        x[i] = 0x3f803f80u | (random_bits(17, i) & 0x807f807fu);
}

int time_fastest(struct device *dev, int count, size_t operand_bytes, size_t workspace_bytes,
                 const std::function<bool(int, char *)> &run) {
    char *memory, *workspace = dev->workspace;
    size_t operands = (size_t)round_up((int64_t)operand_bytes, 256), bytes = dev->workspace_bytes;
    if (cudaMalloc((void **)&memory, operands + workspace_bytes) != cudaSuccess) {
        cudaGetLastError();
        return NO_MEMORY;
    }
    launch<fill_operands>(dev, check_blocks(dev, (int64_t)operands / 4), CHECK_THREADS, 0, (uint32_t *)memory,
                          (int64_t)operands / 4);
    dev->workspace = memory + operands;
    dev->workspace_bytes = workspace_bytes;
    int fastest = fastest_of(dev, count, [&](int i) { return run(i, memory); });
    dev->workspace = workspace;
    dev->workspace_bytes = bytes;
    cuda_check(cudaFree(memory));
    return fastest;
}

int choice_of_environment(const char *variable, std::initializer_list<const char *> names, int *which,
                          struct error *e) {
    const char *value = getenv(variable);
    *which = -1;
    if (!value || !*value)
        return 0;
    for (int i = 0; i < (int)names.size(); i++)
        if (strcmp(value, names.begin()[i]) == 0) {
            *which = i;
            return 0;
        }
    return fail_user(e, "%s=%s: the environment variable takes %s or %s", variable, value, names.begin()[0],
                     names.begin()[1]);
}

int choose_once(struct device *dev, const char *what, std::initializer_list<const char *> names,
                const std::function<int()> &time) {
    const char *recorded = plan_file_find(dev->plan_file, what);
    for (int i = 0; recorded && i < (int)names.size(); i++)
        if (strcmp(recorded, names.begin()[i]) == 0)
            return i;
    int timed = time(), chosen = timed < 0 ? 0 : timed;
    plan_file_add(dev->plan_file, what, names.begin()[chosen]);
    return chosen;
}

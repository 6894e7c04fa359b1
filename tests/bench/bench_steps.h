/* Optimizer steps in fp32 and in bf16 and, where --torch names a Python with PyTorch, PyTorch's: one step of each in
 * turn, so that all meet the same moments of a shared machine. PyTorch runs in a process of its own, torch_steps.py,
 * with the same number of threads; while one steps, the others wait. */
#ifndef IHA_TESTS_BENCH_BENCH_STEPS_H
#define IHA_TESTS_BENCH_BENCH_STEPS_H

#include <math.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/bench/bench_models.h"

/* The process of PyTorch. */
struct torch {
    FILE *to, *from; /* NULL: no --torch */
    char version[64];
};

static inline _Noreturn void torch_fail(const char *why) {
    fprintf(stderr, "bench: --torch: %s; give a Python that has PyTorch\n", why);
    exit(EXIT_USER);
}

/* Start it. Before this process pins its threads, because a child inherits that. */
static inline void torch_start(struct torch *t, const char *python, const char *quickstart) {
    int to[2], from[2];
    if (pipe(to) != 0 || pipe(from) != 0)
        torch_fail("no pipe can be made");
    signal(SIGPIPE, SIG_IGN); /* the answer that does not come is noticed */
    fflush(NULL);
    pid_t child = fork();
    if (child < 0)
        torch_fail("no process can be started");
    if (child == 0) {
        dup2(to[0], STDIN_FILENO);
        dup2(from[1], STDOUT_FILENO);
        close(to[0]), close(to[1]);
        close(from[0]), close(from[1]);
        execlp(python, python, "tests/bench/torch_steps.py", quickstart, (char *)NULL);
        fprintf(stderr, "bench: cannot run %s\n", python);
        _exit(127);
    }
    close(to[0]);
    close(from[1]);
    t->to = fdopen(to[1], "w");
    t->from = fdopen(from[0], "r");
    if (!t->to || !t->from)
        torch_fail("no pipe can be opened");
}

/* Say the number of threads; the version is the answer. */
static inline void torch_threads(struct torch *t, int threads) {
    fprintf(t->to, "threads %d\n", threads);
    fflush(t->to);
    char answer[512];
    if (!fgets(answer, sizeof answer, t->from) || sscanf(answer, "ready %63s", t->version) != 1)
        torch_fail("PyTorch did not start");
}

/* Seconds of one step; NAN, with a line about why, where PyTorch cannot do it. */
static inline double torch_step(struct torch *t, const char *what) {
    char answer[512];
    fprintf(t->to, "%s\n", what);
    fflush(t->to);
    if (!fgets(answer, sizeof answer, t->from))
        torch_fail("PyTorch ended before its work did");
    char *end;
    double seconds = strtod(answer, &end);
    if (end != answer)
        return seconds;
    fprintf(stderr, "PyTorch, %s: %s", what, answer);
    return NAN;
}

/* What takes part, in the order of the rows. */
enum { FP32, BF16, PRECISIONS };
enum { OURS, EAGER, COMPILED, WAYS };
static const char *const precision_names[] = {"fp32", "bf16"}, *const way_names[] = {"", "eager", "compiled"};

/* One step of a way in a precision; training: ours. */
static inline double contender_step(struct torch *torch, const char *model, int way, int precision,
                                    struct training *training) {
    if (way == OURS)
        return time_calls(training_step, training, 1);
    char what[64];
    snprintf(what, sizeof what, "%s %s %s", model, precision_names[precision], way_names[way]);
    return torch_step(torch, what);
}

/* A row of one way in one precision. */
static inline struct row *step_row(const struct bench *b, struct table *table, const char *what, int way,
                                   int precision, struct summary took) {
    char name[128] = "ours";
    if (way != OURS)
        snprintf(name, sizeof name, "PyTorch %s %s", b->torch->version, way_names[way]);
    struct row *row = table_row(table, "%s: %s, %s", what, name, precision_names[precision]);
    cell_seconds(row->took, took);
    return row;
}

/* A row each. Ours in bf16 is compared with ours in fp32, PyTorch with ours in the same precision. */
static inline void step_rows(const struct bench *b, struct table *table, const char *what, double tokens,
                             const struct samples (*found)[PRECISIONS]) {
    double ours[PRECISIONS] = {samples_summary(&found[OURS][FP32], 0).median,
                               samples_summary(&found[OURS][BF16], 0).median};
    for (int way = OURS; way < WAYS; way++)
        for (int p = 0; p < PRECISIONS; p++) {
            const struct samples *s = &found[way][p];
            if (s->count == 0)
                continue;
            struct summary took = samples_summary(s, 0);
            struct row *row = step_row(b, table, what, way, p, took);
            cell(row->rate, "%.0f tokens/s", tokens / took.median);
            if (way == OURS && p == FP32)
                continue;
            int other = way == OURS ? FP32 : p;
            cell(row->compared, "ours in %s", precision_names[other]);
            cell(row->ratio, "%.2f", took.median / ours[other]);
        }
}

/* A program that keeps one processor busy, that of this thread: it inherits what the thread may run on. */
static inline pid_t start_busy_loop(void) {
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (volatile int i = 0;;)
            i = i + 1;
    }
    if (child < 0)
        bench_fail(&(struct error){.text = "no process can be started"});
    return child;
}

/* A row each: how much longer steps take beside that program. */
static inline void busy_rows(const struct bench *b, struct table *table, const char *model,
                             const struct samples (*alone)[PRECISIONS],
                             const struct samples (*busy)[PRECISIONS]) {
    char what[512];
    snprintf(what, sizeof what, "%s, beside a loop that keeps one core busy", model);
    for (int way = OURS; way < WAYS; way++)
        for (int p = 0; p < PRECISIONS; p++) {
            if (busy[way][p].count == 0)
                continue;
            struct summary took = samples_summary(&busy[way][p], 0);
            struct row *row = step_row(b, table, what, way, p, took);
            cell(row->compared, "the same alone");
            cell(row->ratio, "%.2f", took.median / samples_summary(&alone[way][p], 0).median);
        }
}

/* Steps of each in turn. warm_up: steps before those that count. */
static inline void sample_steps(struct bench *b, const char *model, const char *what, int warm_up,
                                struct training *t, struct samples (*found)[PRECISIONS]) {
    int ways = b->torch->to ? WAYS : EAGER;
    for (int i = -warm_up; i < b->repeats; i++)
        for (int way = OURS; way < ways; way++)
            for (int p = 0; p < PRECISIONS; p++) {
                double seconds = contender_step(b->torch, model, way, p, &t[p]);
                fprintf(stderr, "%s, %s %s: %.3f s%s\n", what, way == OURS ? "ours" : way_names[way],
                        precision_names[p], seconds, i < 0 ? " (warm-up)" : "");
                if (i >= 0 && !isnan(seconds))
                    samples_add(&found[way][p], seconds);
            }
}

/* devices: ours in each precision. beside_others: also beside a program that keeps a core busy. */
static inline void compare_steps(struct bench *b, struct table *table, const char *model, const char *what,
                                 const struct config *config, struct device *const *devices,
                                 bool beside_others) {
    const struct kernels *backends[] = {kernels_cpu(), kernels_cpu_bf16()};
    static struct training t[PRECISIONS];
    static struct samples alone[WAYS][PRECISIONS], busy[WAYS][PRECISIONS];
    memset(t, 0, sizeof t);
    memset(alone, 0, sizeof alone);
    memset(busy, 0, sizeof busy);
    for (int p = 0; p < PRECISIONS; p++) {
        t[p].config = *config;
        training_open(&t[p], backends[p], devices[p]);
    }
    sample_steps(b, model, what, 2, t, alone); /* PyTorch compiles while it warms up */
    step_rows(b, table, what, (double)config->train.batch_tokens, alone);
    if (beside_others) {
        pid_t loop = start_busy_loop();
        sample_steps(b, model, what, 1, t, busy);
        kill(loop, SIGKILL);
        waitpid(loop, NULL, 0);
        busy_rows(b, table, what, alone, busy);
    }
    for (int p = 0; p < PRECISIONS; p++)
        training_close(&t[p]);
}

static inline void bench_steps(struct bench *b, struct table *table) {
    static char *const gpt2[] = {GPT2_STEP_KEYS};
    static struct config c;
    struct device_options options = {.precision = DEVICE_BF16};
    struct error e = {0};
    struct device *bf16 = kernels_cpu_bf16()->open(&options, &e);
    if (!bf16)
        bench_fail(&e);
    struct device *devices[] = {b->dev, bf16};
    if (b->torch->to)
        torch_threads(b->torch, omp_get_max_threads());
    read_config(&c, NULL, sizeof gpt2 / sizeof *gpt2, gpt2);
    compare_steps(b, table, "gpt2", "GPT-2 124M, B=4, T=64, one optimizer step", &c, devices, false);
    read_config(&c, b->quickstart, 0, NULL);
    char what[256];
    snprintf(what, sizeof what, "%s, one optimizer step", b->quickstart);
    compare_steps(b, table, "quickstart", what, &c, devices, true);
    kernels_cpu_bf16()->close(bf16);
}

#endif

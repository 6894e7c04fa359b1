#include "model/info/info_estimate.h"

#include <stdlib.h>

#include "model/info/info.h"
#include "model/config/options.h"
#include "model/info/estimate.h"

/* ---- the command line ---- */

enum { MAX_GPUS = 1 << 20, MOST_ADVISED = 1 << 14 };

static int unknown_name(const char *option, const char *given, const char *const *names, struct error *e) {
    const char *near = nearest_name(given, names);
    char list[128] = "";
    for (size_t at = 0; *names && at < sizeof list; names++)
        at += (size_t)snprintf(list + at, sizeof list - at, "%s%s", at ? ", " : "", *names);
    return fail_user(e, "info: %s %.60s is not known; it may be %s%s%s%s", option, given, list,
                     near ? "; did you mean '" : "", near ? near : "", near ? "'?" : "");
}

static int parse_gpus(const char *text, int *gpus, struct error *e) {
    char *end;
    long n = strtol(text, &end, 10);
    if (end == text || *end || n < 1 || n > MAX_GPUS)
        return fail_user(e, "info: --gpus %.60s: not a whole number from 1 to %d", text, (int)MAX_GPUS);
    *gpus = (int)n;
    return 0;
}

static int parse_option(int which, const char *value, struct info_options *o, struct error *e) {
    if (which == 0)
        return parse_gpus(value, &o->gpus, e);
    if (which == 1)
        return (o->gpu = gpu_spec(value)) ? 0 : unknown_name("--gpu", value, gpu_names, e);
    return (o->link = link_spec(value)) ? 0 : unknown_name("--link", value, link_names, e);
}

/* What was not said: H200s, on NVLink as far as it reaches. */
static int complete(struct info_options *o, struct error *e) {
    if (o->gpus == 0)
        return o->gpu || o->link
                   ? fail_user(e, "info: --gpu and --link plan a run: say on how many, --gpus N")
                   : 0;
    if (!o->gpu)
        o->gpu = gpu_spec("h200");
    if (!o->link)
        o->link = link_spec(o->gpus <= NODE_GPUS ? "nvlink" : "ib400");
    if (o->gpus > NODE_GPUS && o->link->network == 0)
        return fail_user(
            e, "info: --link %s joins the %d GPUs of a node, not %d; use --link ib400 for several nodes",
            o->link->name, NODE_GPUS, o->gpus);
    if (o->gpus > NODE_GPUS && o->gpus % NODE_GPUS != 0)
        return fail_user(e, "info: --gpus %d: several nodes have %d GPUs each; the nearest that fits is %d",
                         o->gpus, NODE_GPUS, (o->gpus + NODE_GPUS / 2) / NODE_GPUS * NODE_GPUS);
    return 0;
}

int info_parse(int argc, char **argv, struct info_options *o, struct error *e) {
    static const char *const known[] = {"--gpus", "--gpu", "--link", NULL};
    *o = (struct info_options){.overrides = argv};
    for (int i = 0; i < argc; i++) {
        if (argv[i][0] != '-') {
            o->overrides[o->override_count++] = argv[i];
            continue;
        }
        int which = option_find("info", known, argv, i, argc, e);
        if (which < 0)
            return -1;
        if (parse_option(which, argv[++i], o, e) != 0)
            return -1;
    }
    return complete(o, e);
}

/* Refuse a configuration that asks for what is not predicted. */
static int check_plannable(const struct config *c, int gpus, struct error *e) {
    bool cpu = c->system.device == DEVICE_CPU, fp32 = c->system.precision == PRECISION_FP32;
    bool mpi = c->system.comm == COMM_MPI && gpus > 1;
    if (!cpu && !fp32 && !mpi)
        return 0;
    return fail_user(
        e,
        "info --gpus predicts runs on GPUs, in bf16, over NCCL; the configuration says otherwise: "
        "add%s%s%s",
        cpu ? " system.device=auto" : "", fp32 ? " system.precision=auto" : "",
        mpi ? " system.comm=auto" : "");
}

/* ---- printing ---- */

static void print_header(FILE *out, const struct config *c, const struct info_options *o,
                         const struct run_estimate *p) {
    const char *modes[] = {"none", "light", "full"};
    int nodes = (o->gpus + NODE_GPUS - 1) / NODE_GPUS;
    fprintf(out, "Prediction for %d x %s, ", o->gpus, o->gpu->name);
    if (nodes > 1)
        fprintf(out, "%d nodes of %d, NVLink within and %s between them\n", nodes, NODE_GPUS, o->link->name);
    else
        fprintf(out, "%s\n", o->gpus > 1 ? "one node, NVLink" : "nothing to share");
    if (nodes == 1 && o->link->network > 0)
        fprintf(out, "  --link %s has no effect: it joins nodes, and up to %d GPUs are one\n", o->link->name,
                NODE_GPUS);
    fprintf(out, "  not measured on this hardware: ceilings and published figures "
                 "(kernels/estimate/hardware.c), so read\n"
                 "  the speed as the best that is possible\n");
    fprintf(out,
            "  bf16, zero_stage %lld, recompute %s; a step of %lld tokens is %lld pass%s of %lld x %lld on "
            "each GPU\n\n",
            (long long)c->system.zero_stage, modes[c->system.recompute], (long long)c->train.batch_tokens,
            (long long)p->passes, p->passes == 1 ? "" : "es", (long long)c->train.micro_batch,
            (long long)c->train.seq_len);
}

static void print_speed(FILE *out, const struct config *c, const struct info_options *o,
                        const struct run_estimate *p) {
    double run = p->step.now * (double)c->train.steps;
    fprintf(out, "  %-12s %10.1f ms\n", "step", 1e3 * p->step.now);
    fprintf(out, "  %-12s %10.0f tokens/s, %.0f per GPU\n", "speed", p->tokens_per_second,
            p->tokens_per_second / o->gpus);
    fprintf(out, "  %-12s %10.1f %%    of %.0f TFLOP/s dense bf16\n", "MFU", 100 * p->mfu,
            o->gpu->peak / 1e12);
    bool long_run = run > 2 * 86400;
    fprintf(out, "  %-12s %10.1f %s for %lld steps: %.0f GPU-hours, without evaluation and saving\n\n", "run",
            run / (long_run ? 86400 : 3600), long_run ? "days" : "hours", (long long)c->train.steps,
            run / 3600 * o->gpus);
}

static void print_share(FILE *out, const char *name, double seconds, double step, const char *what) {
    fprintf(out, "  %-36s %10.2f ms  %5.1f%%%s%s\n", name, 1e3 * seconds, 100 * seconds / step,
            *what ? "   " : "", what);
}

static void print_time(FILE *out, const struct run_estimate *p) {
    static const char *const parts[ESTIMATE_PARTS] = {
        "matrix products", "attention", "mixing and collapse", "classifier", "norm, activation, embedding",
        "optimizer"};
    static const char *const waits[MESSAGES] = {"waiting for reduce-scatter", "waiting for all-gather",
                                                "waiting for the gradient norm"};
    fprintf(out, "Where the time of a step goes:\n");
    for (int i = 0; i < ESTIMATE_PARTS; i++) {
        char rates[64];
        double t = p->step.seconds[i];
        if (t == 0)
            continue;
        snprintf(rates, sizeof rates, p->step.flops[i] > 0 ? "%.2f TB/s, %.0f TFLOP/s" : "%.2f TB/s",
                 p->step.bytes[i] / t / 1e12, p->step.flops[i] / t / 1e12);
        print_share(out, parts[i], t, p->step.now, rates);
    }
    for (int i = 0; i < MESSAGES && p->step.messages[MESSAGE_REDUCE_SCATTER] > 0; i++) {
        char hidden[96];
        snprintf(hidden, sizeof hidden, "of %.2f ms on the links, %lld x %.2f MB", 1e3 * p->step.moving[i],
                 (long long)p->step.messages[i],
                 p->step.message_bytes[i] / (double)p->step.messages[i] / 1e6);
        print_share(out, waits[i], p->step.exposed[i], p->step.now, p->step.messages[i] > 0 ? hidden : "");
    }
    fputc('\n', out);
}

/* What differs between two configurations, as a user would write it. */
static void print_changes(FILE *out, const struct config *was, const struct config *is) {
    const char *modes[] = {"none", "light", "full"};
    if (is->train.micro_batch != was->train.micro_batch)
        fprintf(out, " train.micro_batch=%lld", (long long)is->train.micro_batch);
    if (is->system.recompute != was->system.recompute)
        fprintf(out, " system.recompute=%s", modes[is->system.recompute]);
    if (is->system.zero_stage != was->system.zero_stage)
        fprintf(out, " system.zero_stage=%lld", (long long)is->system.zero_stage);
}

/* What is left where no change makes it fit: *c has all of them. More GPUs share the optimizer and the
 * gradients among them, but not what each keeps for itself. */
static int print_last_resort(FILE *out, const struct config *was, const struct config *c,
                             struct estimate_options more, struct error *e) {
    struct memory_plan plan;
    int fit = 0;
    while (fit == 0 && more.ranks < MOST_ADVISED) {
        more.ranks = more.ranks < NODE_GPUS ? NODE_GPUS : 2 * more.ranks;
        fit = estimate_fits(c, &more, &plan, e);
    }
    if (fit < 0)
        return -1;
    fprintf(out, "    a smaller model, or a shorter train.seq_len");
    if (fit > 0) {
        int64_t pass = c->train.micro_batch * c->train.seq_len * more.ranks, batch = c->train.batch_tokens;
        fprintf(out, "; or --gpus %d", more.ranks);
        print_changes(out, was, c);
        if (batch % pass != 0)
            fprintf(out, " train.batch_tokens=%lld", (long long)((batch / pass + 1) * pass));
        fprintf(out, "   (%.1f GB)", (double)memory_total(&plan) / 1e9);
    }
    fputc('\n', out);
    return 0;
}

static int print_room(FILE *out, const struct config *c, const struct info_options *o,
                      const struct estimate_options *estimate, const struct memory_plan *memory,
                      struct error *e) {
    double room = estimate_room(o->gpu), need = (double)memory_total(memory);
    struct config changed;
    bool any = false;
    if (need <= room) {
        fprintf(out, "  fits: %.1f of %.0f GB on each GPU, %.0f GB left aside for CUDA and NCCL\n",
                need / 1e9, o->gpu->memory / 1e9, o->gpu->reserved / 1e9);
        return 0;
    }
    fprintf(out,
            "  DOES NOT FIT: %.1f GB of %.0f that each GPU has, %.0f left aside for CUDA and NCCL; try\n",
            need / 1e9, o->gpu->memory / 1e9, o->gpu->reserved / 1e9);
    /* The last attempt makes all changes together: only where none suffices alone. */
    for (int attempt = 0; attempt < FIT_ATTEMPTS && !(any && attempt == FIT_ATTEMPTS - 1); attempt++) {
        struct memory_plan plan;
        int fit = estimate_fit(c, estimate, attempt, &changed, &plan, e);
        if (fit < 0)
            return -1;
        if (fit == 0)
            continue;
        any = true;
        fprintf(out, "   ");
        print_changes(out, c, &changed);
        fprintf(out, "   (%.1f GB)\n", (double)memory_total(&plan) / 1e9);
    }
    return any ? 0 : print_last_resort(out, c, &changed, *estimate, e);
}

int info_print_estimate(FILE *out, const struct config *c, const struct info_options *o, struct error *e) {
    struct estimate_options estimate = {.gpu = o->gpu,
                                        .link = o->link,
                                        .ranks = o->gpus,
                                        .precision = DEVICE_BF16,
                                        .deterministic = c->system.deterministic};
    struct run_estimate p;
    if (check_plannable(c, o->gpus, e) != 0 || info_print_counts(out, c, e) != 0 ||
        estimate_run(&p, c, &estimate, e) != 0)
        return -1;
    print_header(out, c, o, &p);
    print_speed(out, c, o, &p);
    print_time(out, &p);
    info_print_memory(out, c, DTYPE_BF16, &p.memory);
    fprintf(out, "  workspace is an estimate: logits, or the scratch of cuDNN's backward\n");
    return print_room(out, c, o, &estimate, &p.memory, e);
}

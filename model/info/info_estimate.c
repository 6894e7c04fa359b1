#include "model/info/info_estimate.h"

#include "model/info/info.h"
#include "model/info/estimate.h"
#include "model/info/info_launches.h"

enum { MAX_GPUS_ADVISED = 1 << 14 };

/* ---- options ---- */

int info_options_set(struct info_options *o, int gpus, const char *gpu, const char *link, bool launches,
                     struct error *e) {
    *o = (struct info_options){.gpus = gpus, .launches = launches};
    if (gpus == 0)
        return gpu || link || launches ? fail_user(e, "info: --gpu, --link and --launches need the number of "
                                                      "GPUs: add --gpus N")
                                       : 0;
    bool one_node = gpus <= NODE_GPUS;
    o->gpu = gpu_spec(gpu ? gpu : "h200");
    o->link = link_spec(link ? link : one_node ? "nvlink" : "ib400");
    if (!one_node && o->link->network == 0)
        return fail_user(
            e, "info: --link %s joins the %d GPUs of a node, not %d; use --link ib400 for several nodes",
            o->link->name, NODE_GPUS, gpus);
    if (!one_node && gpus % NODE_GPUS != 0)
        return fail_user(e, "info: --gpus %d: several nodes have %d GPUs each; the nearest multiple is %d",
                         gpus, NODE_GPUS, (gpus + NODE_GPUS / 2) / NODE_GPUS * NODE_GPUS);
    return 0;
}

/* Refuse a configuration that cannot be estimated. */
static int check_can_estimate(const struct config *c, int gpus, struct error *e) {
    bool cpu = c->system.device == DEVICE_CPU, fp32 = c->system.precision == PRECISION_FP32;
    bool mpi = c->system.comm == COMM_MPI && gpus > 1;
    if (!cpu && !fp32 && !mpi)
        return 0;
    return fail_user(
        e,
        "info --gpus estimates runs on GPUs, in bf16, over NCCL; the configuration asks for something else: "
        "add%s%s%s",
        cpu ? " system.device=auto" : "", fp32 ? " system.precision=auto" : "",
        mpi ? " system.comm=auto" : "");
}

/* ---- printing ---- */

static void print_header(FILE *out, const struct config *c, const struct info_options *o,
                         const struct run_estimate *p) {
    int nodes = (o->gpus + NODE_GPUS - 1) / NODE_GPUS;
    fprintf(out, "Estimate for %d x %s, ", o->gpus, o->gpu->name);
    if (nodes > 1)
        fprintf(out, "%d nodes of %d, NVLink within and %s between them\n", nodes, NODE_GPUS, o->link->name);
    else
        fprintf(out, "%s\n", o->gpus > 1 ? "one node, NVLink" : "no communication");
    if (nodes == 1 && o->link->network > 0)
        fprintf(out, "  --link %s ignored: up to %d GPUs are one node, joined by NVLink\n", o->link->name,
                NODE_GPUS);
    fprintf(out, "  calculated from peak rates and published figures, not measured: an upper bound\n"
                 "  of the speed (kernels/estimate/hardware.c)\n");
    fprintf(out,
            "  bf16, zero_stage %lld, recompute %s\n  a step of %lld tokens is %lld pass%s of %lld x %lld on "
            "each "
            "GPU\n\n",
            (long long)c->system.zero_stage, recompute_names[c->system.recompute],
            (long long)c->train.batch_tokens, (long long)p->passes, p->passes == 1 ? "" : "es",
            (long long)c->train.micro_batch, (long long)c->train.seq_len);
}

static void print_speed(FILE *out, const struct config *c, const struct info_options *o,
                        const struct run_estimate *p) {
    double run = p->step.now * (double)c->train.total_steps;
    fprintf(out, "  %-12s %10.1f ms\n", "step", 1e3 * p->step.now);
    fprintf(out, "  %-12s %10.0f tokens/s, %.0f per GPU\n", "speed", p->tokens_per_second,
            p->tokens_per_second / o->gpus);
    fprintf(out, "  %-12s %10.1f %%    of %.0f TFLOP/s dense bf16\n", "MFU", 100 * p->mfu,
            o->gpu->peak / 1e12);
    bool long_run = run > 2 * 86400;
    if (c->train.total_steps > 0)
        fprintf(out, "  %-12s %10.1f %s for %lld steps: %.0f GPU-hours, steps alone\n", "run",
                run / (long_run ? 86400 : 3600), long_run ? "days" : "hours", (long long)c->train.total_steps,
                run / 3600 * o->gpus);
    fprintf(out, "\n");
}

static void print_share(FILE *out, const char *name, double seconds, double step, const char *what) {
    fprintf(out, "  %-27s %9.2f ms %5.1f%%%s%s\n", name, 1e3 * seconds, 100 * seconds / step,
            *what ? "  " : "", what);
}

static void print_time(FILE *out, const struct run_estimate *p) {
    static const char *const parts[ESTIMATE_PARTS] = {
        "matrix products", "attention", "mixing and collapse", "classifier", "norm, activation, embedding",
        "optimizer"};
    static const char *const waits[MESSAGES] = {"waiting for reduce-scatter", "waiting for all-gather",
                                                "waiting for gradient norm"};
    fprintf(out, "Time of a step:\n");
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
        snprintf(hidden, sizeof hidden, "of %.2f ms, %lld x %.2f MB", 1e3 * p->step.moving[i],
                 (long long)p->step.messages[i],
                 p->step.message_bytes[i] / (double)p->step.messages[i] / 1e6);
        print_share(out, waits[i], p->step.exposed[i], p->step.now, p->step.messages[i] > 0 ? hidden : "");
    }
    fputc('\n', out);
}

/* The keys that differ between two configurations, as overrides. */
static void print_changes(FILE *out, const struct config *from, const struct config *to) {
    if (to->train.micro_batch != from->train.micro_batch)
        fprintf(out, " train.micro_batch=%lld", (long long)to->train.micro_batch);
    if (to->system.recompute != from->system.recompute)
        fprintf(out, " system.recompute=%s", recompute_names[to->system.recompute]);
    if (to->system.zero_stage != from->system.zero_stage)
        fprintf(out, " system.zero_stage=%lld", (long long)to->system.zero_stage);
}

/* Advice if even *changed, which has all memory-saving settings, does not fit: a smaller model, or more GPUs,
 * which helps only as far as optimizer state and gradients are sharded. */
static int print_last_resort(FILE *out, const struct config *c, const struct config *changed,
                             struct estimate_options more, struct error *e) {
    struct memory_plan plan;
    int fit = 0;
    while (fit == 0 && more.ranks < MAX_GPUS_ADVISED) {
        more.ranks = more.ranks < NODE_GPUS ? NODE_GPUS : 2 * more.ranks;
        fit = estimate_fits(changed, &more, &plan, e);
    }
    if (fit < 0)
        return -1;
    fprintf(out, "    a smaller model, or a shorter train.seq_len");
    if (fit > 0) {
        int64_t pass = changed->train.micro_batch * changed->train.seq_len * more.ranks;
        int64_t batch = changed->train.batch_tokens;
        fprintf(out, "; or\n    --gpus %d", more.ranks);
        print_changes(out, c, changed);
        if (batch % pass != 0)
            fprintf(out, " train.batch_tokens=%lld", (long long)((batch / pass + 1) * pass));
        fprintf(out, "   (%.1f GB)", (double)memory_total(&plan) / 1e9);
    }
    fputc('\n', out);
    return 0;
}

static int print_fit(FILE *out, const struct config *c, const struct info_options *o,
                     const struct estimate_options *estimate, const struct memory_plan *memory,
                     struct error *e) {
    double usable = estimate_usable_memory(o->gpu), need = (double)memory_total(memory);
    struct config changed;
    bool found = false;
    if (need <= usable) {
        fprintf(out, "  fits: %.1f of %.0f GB per GPU, %.0f GB of them for CUDA and NCCL\n", need / 1e9,
                o->gpu->memory / 1e9, o->gpu->reserved / 1e9);
        return 0;
    }
    fprintf(out, "  DOES NOT FIT: %.1f of %.0f GB per GPU, %.0f GB of them for CUDA and NCCL; try\n",
            need / 1e9, o->gpu->memory / 1e9, o->gpu->reserved / 1e9);
    /* The last attempt makes all changes together: only if no single one is enough. */
    for (int attempt = 0; attempt < FIT_ATTEMPTS && !(found && attempt == FIT_ATTEMPTS - 1); attempt++) {
        struct memory_plan plan;
        int fit = estimate_fit(c, estimate, attempt, &changed, &plan, e);
        if (fit < 0)
            return -1;
        if (fit == 0)
            continue;
        found = true;
        fprintf(out, "   ");
        print_changes(out, c, &changed);
        fprintf(out, "   (%.1f GB)\n", (double)memory_total(&plan) / 1e9);
    }
    return found ? 0 : print_last_resort(out, c, &changed, *estimate, e);
}

int info_print_estimate(FILE *out, const struct config *c, const struct info_options *o, struct error *e) {
    struct estimate_options estimate = {.gpu = o->gpu,
                                        .link = o->link,
                                        .ranks = o->gpus,
                                        .precision = DEVICE_BF16,
                                        .deterministic = c->system.deterministic};
    struct run_estimate p;
    if (check_can_estimate(c, o->gpus, e) != 0)
        return -1;
    if (o->launches)
        return info_print_launches(out, c, &estimate, e);
    if (info_print_counts(out, c, e) != 0 || estimate_run(&p, c, &estimate, e) != 0)
        return -1;
    print_header(out, c, o, &p);
    print_speed(out, c, o, &p);
    print_time(out, &p);
    info_print_memory(out, c, DTYPE_BF16, &p.memory);
    fprintf(out, "  workspace is estimated: the logits, or the workspace of cuDNN's backward\n");
    return print_fit(out, c, o, &estimate, &p.memory, e);
}

#include "model/info/info_launches.h"

#include <stdlib.h>
#include <string.h>

#include "model/info/estimate.h"

/* ---- collecting ---- */

static enum launch_kind kind_of(const struct estimate_launch *l) {
    return l->rows > 0 ? LAUNCH_PRODUCT : l->part == ESTIMATE_ATTENTION ? LAUNCH_ATTENTION : LAUNCH_OTHER;
}

static void add_to(struct launch_sums *sums, const struct estimate_launch *l) {
    enum launch_kind kind = kind_of(l);
    sums->bytes[kind] += l->bytes;
    sums->flops[kind] += l->flops;
    sums->floor[kind] += l->floor;
    sums->count[kind]++;
}

static void add_sums(struct launch_sums *to, const struct launch_sums *from) {
    for (int kind = 0; kind < LAUNCH_KINDS; kind++) {
        to->bytes[kind] += from->bytes[kind];
        to->flops[kind] += from->flops[kind];
        to->floor[kind] += from->floor[kind];
        to->count[kind] += from->count[kind];
    }
}

static bool alike(const struct estimate_launch *a, const struct estimate_launch *b) {
    return strcmp(a->op, b->op) == 0 && strcmp(a->phase, b->phase) == 0 && a->part == b->part &&
           a->rows == b->rows && a->columns == b->columns && a->inner == b->inner && a->flops == b->flops &&
           a->bytes == b->bytes;
}

static enum layer_type type_of(const struct launches *s, int layer) {
    return layer < 0 ? LAYER_TYPES : s->model->layer_types[layer];
}

void launches_add(void *context, const struct estimate_launch *l) {
    struct launches *s = context;
    if (strcmp(l->op, "step_begin") == 0) { /* forget the step before */
        const struct model_config *model = s->model;
        memset(s, 0, sizeof *s);
        s->model = model;
    }
    add_to(l->layer < 0 ? &s->outside : &s->layers[l->layer], l);
    int i = 0;
    while (i < s->count && !(s->rows[i].type == type_of(s, l->layer) && alike(&s->rows[i].launch, l)))
        i++;
    if (i == LAUNCH_ROWS) {
        s->full = true;
        return;
    }
    if (i == s->count)
        s->rows[s->count++] = (struct launch_row){*l, type_of(s, l->layer), 0};
    s->rows[i].count++;
}

/* ---- printing ---- */

static void print_row(FILE *out, const struct launch_row *r, double unit) {
    const struct estimate_launch *l = &r->launch;
    char size[64] = "", flops[32] = "-";
    if (l->rows > 0)
        snprintf(size, sizeof size, "%.0f x %.0f x %.0f", l->rows, l->columns, l->inner);
    if (l->flops > 0)
        snprintf(flops, sizeof flops, "%.2f", l->flops / 1e9);
    fprintf(out, "  %-8s %-23s %-22s %7lld %9.2f %9.2f %10s %9.1f\n", l->phase, l->op, size,
            (long long)r->count, l->bytes / unit, l->bytes / 1e6, flops, 1e6 * l->floor);
}

static void print_rows(FILE *out, const struct launches *s, enum layer_type type, double unit) {
    fprintf(out, "  %-8s %-23s %-22s %7s %9s %9s %10s %9s\n", "", "operation", "product", "kernels", "u each",
            "MB each", "GFLOP each", "floor us");
    for (int i = 0; i < s->count; i++)
        if (s->rows[i].type == type)
            print_row(out, &s->rows[i], unit);
}

static double sum_of(const double *values) {
    return values[LAUNCH_PRODUCT] + values[LAUNCH_ATTENTION] + values[LAUNCH_OTHER];
}

/* The last layer of a type, since the first of all has no residual to add. */
static void print_layers(FILE *out, const struct launches *s, enum layer_type type, int64_t passes,
                         double unit) {
    int count = 0, last = -1;
    for (int i = 0; i < s->model->num_hidden_layers; i++)
        if (s->model->layer_types[i] == type) {
            count++;
            last = i;
        }
    if (count == 0)
        return;
    const struct launch_sums *one = &s->layers[last];
    double each = unit * (double)passes;
    fprintf(out, "%s: %d layer%s\n", layer_type_name(type), count, count == 1 ? "" : "s");
    print_rows(out, s, type, unit);
    fprintf(out,
            "  layer %d, a pass: %.2f u outside of products and attention, %.2f u in attention, %.2f u in "
            "products\n"
            "    %.3f TFLOP; at least %.0f us, %.0f us of them outside of products and attention\n\n",
            last, one->bytes[LAUNCH_OTHER] / each, one->bytes[LAUNCH_ATTENTION] / each,
            one->bytes[LAUNCH_PRODUCT] / each, sum_of(one->flops) / (double)passes / 1e12,
            1e6 * sum_of(one->floor) / (double)passes, 1e6 * one->floor[LAUNCH_OTHER] / (double)passes);
}

static void print_sums(FILE *out, const char *name, double bytes, double flops, double floor, int64_t count) {
    fprintf(out, "  %-38s %8lld %11.2f %11.2f %9.2f\n", name, (long long)count, bytes / 1e9, flops / 1e12,
            1e3 * floor);
}

static void print_step(FILE *out, const struct launches *s) {
    static const char *const names[] = {"matrix products of layers", "attention", "all else in layers"};
    struct launch_sums layers = {.bytes = {0}}, all = s->outside;
    for (int i = 0; i < s->model->num_hidden_layers; i++)
        add_sums(&layers, &s->layers[i]);
    add_sums(&all, &layers);
    fprintf(out, "The step\n  %-38s %8s %11s %11s %9s\n", "", "kernels", "GB", "TFLOP", "floor ms");
    for (int kind = 0; kind < LAUNCH_KINDS; kind++)
        print_sums(out, names[kind], layers.bytes[kind], layers.flops[kind], layers.floor[kind],
                   layers.count[kind]);
    print_sums(out, "classifier's products", s->outside.bytes[LAUNCH_PRODUCT],
               s->outside.flops[LAUNCH_PRODUCT], s->outside.floor[LAUNCH_PRODUCT],
               s->outside.count[LAUNCH_PRODUCT]);
    print_sums(out, "embedding, loss, final norm, optimizer", s->outside.bytes[LAUNCH_OTHER],
               s->outside.flops[LAUNCH_OTHER], s->outside.floor[LAUNCH_OTHER],
               s->outside.count[LAUNCH_OTHER]);
    print_sums(out, "all", sum_of(all.bytes), sum_of(all.flops), sum_of(all.floor),
               all.count[LAUNCH_PRODUCT] + all.count[LAUNCH_ATTENTION] + all.count[LAUNCH_OTHER]);
}

static void print(FILE *out, const struct config *c, const struct estimate_options *o,
                  const struct launches *s, int64_t passes) {
    double rows = (double)(c->train.micro_batch * c->train.seq_len),
           unit = rows * (double)c->model.hidden_size * 2;
    fprintf(out,
            "Kernels of a step on %s%s, %lld pass%s of %lld x %lld tokens, in bf16\n"
            "  bytes: every input read once, every output written once; floor: the time that the\n"
            "  bytes take at %.2f TB/s, or the FLOPs at the rate of what computes them (products: %.0f\n"
            "  TFLOP/s), the longer of the two, without launches and messages; calculated, not measured\n"
            "  (kernels/estimate/hardware.c); not listed: sums over what the blocks of a kernel leave\n"
            "  u: N C 2 bytes, %.0f x %lld x 2 = %.2f MB\n\n",
            o->ranks > 1 ? "each " : "one ", o->gpu->name, (long long)passes, passes == 1 ? "" : "es",
            (long long)c->train.micro_batch, (long long)c->train.seq_len, o->gpu->copy / 1e12,
            o->gpu->matmul / 1e12, rows, (long long)c->model.hidden_size, unit / 1e6);
    for (int type = 0; type < LAYER_TYPES; type++)
        print_layers(out, s, (enum layer_type)type, passes, unit);
    fprintf(out, "Outside of layers\n");
    print_rows(out, s, LAYER_TYPES, unit);
    fputc('\n', out);
    print_step(out, s);
    if (s->full)
        fprintf(out, "  more than %d kinds of kernels: the tables above lack some, the sums do not\n",
                LAUNCH_ROWS);
}

int info_print_launches(FILE *out, const struct config *c, const struct estimate_options *options,
                        struct error *e) {
    struct estimate_options o = *options;
    struct run_estimate p;
    struct launches *s = calloc(1, sizeof *s);
    if (!s)
        return fail_run(e, "info --launches: out of memory");
    s->model = &c->model;
    o.launched = launches_add;
    o.context = s;
    int status = estimate_run(&p, c, &o, e);
    if (status == 0)
        print(out, c, &o, s, p.passes);
    free(s);
    return status;
}

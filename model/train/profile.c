#include "model/train/profile.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "model/config/config.h"
#include "model/checkpoint/files.h"

enum { MAX_NAMES = 64 };

struct row {
    const char *name;
    double seconds;
    int64_t calls;
};

static struct row *row_of(struct row *rows, int *count, const char *name) {
    for (int i = 0; i < *count; i++)
        if (strcmp(rows[i].name, name) == 0)
            return &rows[i];
    if (*count == MAX_NAMES)
        return &rows[MAX_NAMES - 1];
    rows[*count] = (struct row){.name = name};
    return &rows[(*count)++];
}

static int by_time(const void *a, const void *b) {
    double x = ((const struct row *)a)->seconds, y = ((const struct row *)b)->seconds;
    return (x < y) - (x > y);
}

/* Ranges are in the order of their beginning, so nested ones follow directly, one level deeper. */
static double self_seconds(const struct trace *t, int i) {
    double seconds = t->list[i].end - t->list[i].begin;
    for (int j = i + 1; j < t->count && t->list[j].depth > t->list[i].depth; j++)
        if (t->list[j].depth == t->list[i].depth + 1)
            seconds -= t->list[j].end - t->list[j].begin;
    return seconds;
}

static int last_nested(const struct trace *t, int i) {
    int last = i;
    while (last + 1 < t->count && t->list[last + 1].depth > t->list[i].depth)
        last++;
    return last;
}

static void print_table(FILE *out, const struct trace *t, int64_t steps) {
    struct row rows[MAX_NAMES];
    int count = 0;
    double total = 0, between_steps = 0;
    for (int i = 0; i < t->count; i++) {
        const struct traced_range *r = &t->list[i];
        if (strcmp(r->name, PROFILE_BETWEEN_STEPS) == 0) {
            between_steps += r->end - r->begin;
            i = last_nested(t, i);
            continue;
        }
        double seconds = self_seconds(t, i);
        struct row *row = row_of(rows, &count, r->name);
        row->seconds += seconds;
        row->calls++;
        total += seconds;
    }
    qsort(rows, (size_t)count, sizeof *rows, by_time);
    fprintf(out, "%-28s %12s %8s %12s\n", "self time of", "ms a step", "share", "times a step");
    for (int i = 0; i < count; i++)
        fprintf(out, "%-28s %12.3f %7.1f%% %12.1f\n", rows[i].name, 1e3 * rows[i].seconds / (double)steps,
                total > 0 ? 100 * rows[i].seconds / total : 0, (double)rows[i].calls / (double)steps);
    fprintf(out, "%-28s %12.3f\n", "all of a step", 1e3 * total / (double)steps);
    if (between_steps > 0)
        fprintf(out, "not counted: %.3f ms in all of evaluation, sampling and saving\n", 1e3 * between_steps);
    if (t->full)
        fprintf(out, "(out of memory for the trace: later ranges are missing)\n");
}

static int write_timeline(const char *path, const struct trace *t, struct error *e) {
    FILE *f = fopen(path, "w");
    if (!f)
        return fail_run(e, "%s: cannot write: %s; %s", path, strerror(errno), files_advice(errno));
    fprintf(f, "{\"displayTimeUnit\": \"ms\", \"traceEvents\": [");
    for (int i = 0; i < t->count; i++) {
        const struct traced_range *r = &t->list[i];
        fprintf(f, "%s\n{\"name\": \"%s", i ? "," : "", r->name);
        if (r->index >= 0)
            fprintf(f, " %d", r->index);
        fprintf(f, "\", \"ph\": \"X\", \"pid\": 0, \"tid\": 0, \"ts\": %.3f, \"dur\": %.3f}", 1e6 * r->begin,
                1e6 * (r->end - r->begin));
    }
    fprintf(f, "\n]}\n");
    int err = ferror(f) ? errno : 0;
    if (fclose(f) != 0 && !err)
        err = errno;
    return err ? fail_run(e, "%s: cannot write: %s; %s", path, strerror(err), files_advice(err)) : 0;
}

int profile_report(FILE *out, const struct trace *t, const char *run_dir, int64_t first, int64_t steps,
                   struct error *e) {
    char path[MAX_TEXT + 32];
    snprintf(path, sizeof path, "%s/profile.json", run_dir);
    fprintf(out, "steps %lld to %lld, operation by operation; timeline for ui.perfetto.dev: %s\n",
            (long long)first + 1, (long long)(first + steps), path);
    print_table(out, t, steps);
    return write_timeline(path, t, e);
}

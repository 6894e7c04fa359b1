#include "model/train/profile.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "model/config/config.h"
#include "model/checkpoint/files.h"

enum { MAX_NAMES = 64 };

struct line {
    const char *name;
    double seconds;
    int64_t calls;
};

static struct line *line_of(struct line *lines, int *count, const char *name) {
    for (int i = 0; i < *count; i++)
        if (strcmp(lines[i].name, name) == 0)
            return &lines[i];
    if (*count == MAX_NAMES)
        return &lines[MAX_NAMES - 1];
    lines[*count] = (struct line){.name = name};
    return &lines[(*count)++];
}

static int by_time(const void *a, const void *b) {
    double x = ((const struct line *)a)->seconds, y = ((const struct line *)b)->seconds;
    return (x < y) - (x > y);
}

/* Ranges come in the order they began, so what lies in one follows it, one deeper. */
static double own_seconds(const struct trace *t, int i) {
    double seconds = t->list[i].end - t->list[i].begin;
    for (int j = i + 1; j < t->count && t->list[j].depth > t->list[i].depth; j++)
        if (t->list[j].depth == t->list[i].depth + 1)
            seconds -= t->list[j].end - t->list[j].begin;
    return seconds;
}

static int last_within(const struct trace *t, int i) {
    int last = i;
    while (last + 1 < t->count && t->list[last + 1].depth > t->list[i].depth)
        last++;
    return last;
}

static void print_table(FILE *out, const struct trace *t, int64_t steps) {
    struct line lines[MAX_NAMES];
    int count = 0;
    double total = 0, apart = 0;
    for (int i = 0; i < t->count; i++) {
        const struct traced_range *r = &t->list[i];
        if (strcmp(r->name, PROFILE_BETWEEN_STEPS) == 0) {
            apart += r->end - r->begin;
            i = last_within(t, i);
            continue;
        }
        double seconds = own_seconds(t, i);
        struct line *l = line_of(lines, &count, r->name);
        l->seconds += seconds;
        l->calls++;
        total += seconds;
    }
    qsort(lines, (size_t)count, sizeof *lines, by_time);
    fprintf(out, "%-28s %12s %8s %12s\n", "own time of", "ms a step", "share", "times a step");
    for (int i = 0; i < count; i++)
        fprintf(out, "%-28s %12.3f %7.1f%% %12.1f\n", lines[i].name, 1e3 * lines[i].seconds / (double)steps,
                total > 0 ? 100 * lines[i].seconds / total : 0, (double)lines[i].calls / (double)steps);
    fprintf(out, "%-28s %12.3f\n", "all of a step", 1e3 * total / (double)steps);
    if (apart > 0)
        fprintf(out, "not counted: %.3f ms in all of evaluation, sampling and saving\n", 1e3 * apart);
    if (t->full)
        fprintf(out, "(memory ran out: later ranges are missing)\n");
}

static int write_time_line(const char *path, const struct trace *t, struct error *e) {
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
    fprintf(out, "steps %lld to %lld, operation by operation; as a time line, for ui.perfetto.dev: %s\n",
            (long long)first + 1, (long long)(first + steps), path);
    print_table(out, t, steps);
    return write_time_line(path, t, e);
}

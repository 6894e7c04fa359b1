#include "model/train/metrics.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kernels/clock.h"
#include "model/config/config.h"
#include "model/checkpoint/files.h"
#include "model/model.h"

struct metrics {
    FILE *file;
    char path[MAX_TEXT + 32];
    bool terminal, line_open;
    double seconds_per_step; /* smoothed */
    double last_shown;
};

/* Keep the complete lines of steps up to `step`; drop a last line that a kill cut off. Returns the new length. */
static size_t keep_lines(char *text, size_t length, int64_t step) {
    size_t out = 0;
    for (size_t at = 0; at < length;) {
        char *line = text + at, *end = memchr(line, '\n', length - at);
        if (!end)
            break;
        size_t bytes = (size_t)(end - line) + 1;
        long long number;
        int after_comma = 0; /* stays 0 if the comma is missing */
        *end = '\0';         /* sscanf would take the length of all that follows, and read on into it */
        bool keep = sscanf(line, "{\"step\": %lld,%n", &number, &after_comma) == 1 && after_comma > 0 &&
                    number <= step;
        *end = '\n';
        if (keep) {
            memmove(text + out, line, bytes);
            out += bytes;
        }
        at += bytes;
    }
    return out;
}

/* Keep the samples up to `step`. Each begins with a line "---- step N", in the order of the steps: cut before the
 * first one after `step`, or else before a last line that was cut off. Returns the new length. */
static size_t keep_samples(char *text, size_t length, int64_t step) {
    for (size_t at = 0; at < length;) {
        char *line = text + at, *end = memchr(line, '\n', length - at);
        long long number;
        if (!end || (sscanf(line, "---- step %lld\n", &number) == 1 && number > step))
            return at;
        at += (size_t)(end - line) + 1;
    }
    return length;
}

/* Rewrite a file with what `keep` keeps of it. Anything but a regular file is left as it is. */
static int drop_later(const char *path, size_t (*keep)(char *, size_t, int64_t), int64_t step,
                      struct error *e) {
    char *text, tmp[MAX_TEXT + 64];
    size_t length;
    struct stat st;
    int absent = stat(path, &st) == 0 ? 0 : errno;
    if (absent == ENOENT || (!absent && !S_ISREG(st.st_mode)))
        return 0;
    if (files_read_all(path, (size_t)1 << 40, &text, &length, e) != 0)
        return -1;
    size_t kept = keep(text, length, step);
    snprintf(tmp, sizeof tmp, "%s.tmp", path);
    int status = kept == length ? 0 : files_write_synced(tmp, text, kept, e);
    free(text);
    if (status == 0 && kept != length && rename(tmp, path) != 0)
        status = fail_run(e, "%s: cannot replace: %s; %s", path, strerror(errno), files_advice(errno));
    return status;
}

struct metrics *metrics_open(const char *run_dir, int64_t step, struct error *e) {
    struct metrics *m = calloc(1, sizeof *m);
    if (!m) {
        fail_run(e, "out of memory opening metrics.jsonl");
        return NULL;
    }
    char samples[MAX_TEXT + 32];
    snprintf(samples, sizeof samples, "%s/samples.txt", run_dir);
    snprintf(m->path, sizeof m->path, "%s/metrics.jsonl", run_dir);
    m->terminal = isatty(STDERR_FILENO);
    if (drop_later(m->path, keep_lines, step, e) != 0 || drop_later(samples, keep_samples, step, e) != 0) {
        free(m);
        return NULL;
    }
    m->file = fopen(m->path, "a");
    if (!m->file) {
        fail_user(e, "%s: cannot write: %s; %s", m->path, strerror(errno), files_advice(errno));
        free(m);
        return NULL;
    }
    return m;
}

void metrics_close(struct metrics *m) {
    if (!m)
        return;
    status_break(m);
    fclose(m->file);
    free(m);
}

static int finish_line(struct metrics *m, struct error *e) {
    if (fflush(m->file) != 0)
        return fail_run(e, "%s: cannot write: %s; %s", m->path, strerror(errno), files_advice(errno));
    return 0;
}

/* JSON has no NaN: a value that is not finite is null. */
static void put_number(FILE *f, const char *key, double x, const char *format) {
    fprintf(f, ", \"%s\": ", key);
    if (isfinite(x))
        fprintf(f, format, x);
    else
        fputs("null", f);
}

/* An object with the parts that the model has. */
static void put_parts(FILE *f, const char *key, const double norms[PARAM_PARTS]) {
    static const char *const names[] = {[PART_EMBEDDINGS] = "embeddings",
                                        [PART_ATTENTION] = "attention",
                                        [PART_MIX] = "mix",
                                        [PART_MLP] = "mlp",
                                        [PART_NORMS] = "norms",
                                        [PART_HEAD] = "lm_head"};
    const char *separator = "";
    fprintf(f, ", \"%s\": {", key);
    for (int part = 0; part < PARAM_PARTS; part++) {
        if (norms[part] < 0)
            continue;
        fprintf(f, isfinite(norms[part]) ? "%s\"%s\": %.9g" : "%s\"%s\": null", separator, names[part],
                norms[part]);
        separator = ", ";
    }
    fputc('}', f);
}

int metrics_step(struct metrics *m, const struct step_record *r, struct error *e) {
    fprintf(m->file, "{\"step\": %" PRId64, r->step);
    put_number(m->file, "loss", r->targets > 0 ? r->loss : (double)NAN, "%.9g");
    put_number(m->file, "lr", r->lr, "%.9g");
    put_number(m->file, "grad_norm", r->grad_norm, "%.9g");
    if (r->norms) {
        put_parts(m->file, "grad_norms", r->norms->gradient);
        put_parts(m->file, "weight_norms", r->norms->weight);
    }
    fprintf(m->file, ", \"tokens\": %" PRId64, r->tokens);
    if (r->some_ignored)
        put_number(m->file, "target_tokens", r->targets, "%.0f");
    put_number(m->file, "tokens_per_second", r->tokens_per_second, "%.1f");
    put_number(m->file, "mfu", r->mfu > 0 ? r->mfu : (double)NAN, "%.4f");
    fprintf(m->file, ", \"skipped\": %s}\n", r->skipped ? "true" : "false");
    return finish_line(m, e);
}

int metrics_eval(struct metrics *m, int64_t step, const struct evaluation *v, struct error *e) {
    fprintf(m->file, "{\"step\": %" PRId64, step);
    put_number(m->file, "val_loss", v->loss, "%.9g");
    if (v->labelled) {
        put_number(m->file, "val_accuracy", evaluation_accuracy(v), "%.9g");
        put_number(m->file, "val_exact", evaluation_exact(v), "%.9g");
    }
    fputs("}\n", m->file);
    return finish_line(m, e);
}

int metrics_sync(struct metrics *m, struct error *e) {
    int err = files_sync_stream(m->file);
    return err ? fail_run(e, "%s: cannot write: %s; %s", m->path, strerror(err), files_advice(err)) : 0;
}

static void format_rate(double rate, char out[32]) {
    if (rate < 1e4)
        snprintf(out, 32, "%.0f tok/s", rate);
    else
        snprintf(out, 32, rate < 1e6 ? "%.1fk tok/s" : "%.2fM tok/s", rate / (rate < 1e6 ? 1e3 : 1e6));
}

enum { BAR = 20 }; /* cells of the progress bar at most */

static int terminal_columns(void) {
    struct winsize size;
    return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 40 ? size.ws_col : 80;
}

void status_step(struct metrics *m, const struct step_record *r) {
    double smooth = 0.05, t = clock_seconds();
    m->seconds_per_step =
        m->seconds_per_step == 0 ? r->seconds : (1 - smooth) * m->seconds_per_step + smooth * r->seconds;
    double interval = m->terminal ? 0.1 : 10;
    if (r->step < r->steps && m->last_shown > 0 && t - m->last_shown < interval)
        return;
    m->last_shown = t;
    char left[32], rate[32], mfu[32] = "", loss[32] = "none", bar[3 * BAR + 1] = "", head[128], tail[192];
    clock_format_duration(m->seconds_per_step * (double)(r->steps - r->step), left);
    format_rate(r->tokens_per_second, rate);
    if (r->mfu > 0)
        snprintf(mfu, sizeof mfu, "  mfu %.1f%%", 100 * r->mfu);
    if (r->targets > 0)
        snprintf(loss, sizeof loss, "%.4f", r->loss);
    snprintf(head, sizeof head, "step %" PRId64 "/%" PRId64 " ", r->step, r->steps);
    snprintf(tail, sizeof tail, "%3d%%  loss %s  lr %.2e  norm %.2f  %s%s  %s left%s",
             (int)(100 * r->step / r->steps), loss, r->lr, r->grad_norm, rate, mfu, left,
             r->skipped       ? "  SKIPPED"
             : r->targets > 0 ? ""
                              : "  NO TARGETS");
    if (!m->terminal) {
        fprintf(stderr, "%s%s\n", head, tail);
        return;
    }
    /* Fit into one line: shorten the bar first, then cut the numbers. */
    int columns_left = terminal_columns() - 2 - (int)strlen(head) - (int)strlen(tail),
        cells = columns_left < BAR ? columns_left : BAR;
    for (int i = 0; i < cells; i++)
        strcat(bar, i < (int)(cells * r->step / r->steps) ? "━" : "─");
    fprintf(stderr, "\r\033[K%s%s%s%.*s", head, bar, cells > 0 ? " " : "",
            columns_left < 0 ? (int)strlen(tail) + columns_left : (int)strlen(tail), tail);
    m->line_open = m->terminal;
    fflush(stderr);
}

void status_break(struct metrics *m) {
    if (m->line_open)
        fputc('\n', stderr);
    m->line_open = false;
}

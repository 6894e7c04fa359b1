#include "model/train/metrics.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "model/config/config.h"
#include "model/checkpoint/files.h"
#include "model/model.h"
#include "model/train/choice_scores.h"

struct metrics {
    FILE *file;
    char path[MAX_TEXT + 32];
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
    if (v->bytes_per_token > 0)
        put_number(m->file, "val_bits_per_byte", evaluation_bits_per_byte(v), "%.9g");
    if (v->labelled) {
        put_number(m->file, "val_accuracy", evaluation_accuracy(v), "%.9g");
        put_number(m->file, "val_exact", evaluation_exact(v), "%.9g");
    }
    fputs("}\n", m->file);
    return finish_line(m, e);
}

int metrics_choices(struct metrics *m, int64_t step, const struct choice_data *data,
                    const struct choice_scores *v, struct error *e) {
    fprintf(m->file, "{\"step\": %" PRId64 ", \"task\": \"%s\", \"items\": %" PRId64, step, data->name,
            v->items);
    put_number(m->file, "chance", v->chance, "%.9g");
    put_number(m->file, "accuracy", (double)v->correct / (double)v->items, "%.9g");
    put_number(m->file, "accuracy_norm", (double)v->correct_norm / (double)v->items, "%.9g");
    fputs("}\n", m->file);
    return finish_line(m, e);
}

int metrics_sync(struct metrics *m, struct error *e) {
    int err = files_sync_stream(m->file);
    return err ? fail_run(e, "%s: cannot write: %s; %s", m->path, strerror(err), files_advice(err)) : 0;
}

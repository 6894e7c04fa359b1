/* A run's record: metrics.jsonl, one line a step and one an evaluation, and the status line on the terminal.
 */
#ifndef IHA_MODEL_TRAIN_METRICS_H
#define IHA_MODEL_TRAIN_METRICS_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/error.h"

struct step_record {
    int64_t step, steps, tokens;
    double loss, lr, grad_norm;
    double seconds; /* this step alone: without evaluation and saving */
    double tokens_per_second;
    double mfu; /* 0: unknown device, not printed */
    bool skipped;
};

struct metrics;

/* Open run_dir/metrics.jsonl for appending, after dropping what lies past `step` from it and from
 * run_dir/samples.txt (a resumed run writes it again). */
struct metrics *metrics_open(const char *run_dir, int64_t step, struct error *e);
void metrics_close(struct metrics *m);

int metrics_step(struct metrics *m, const struct step_record *r, struct error *e);
int metrics_eval(struct metrics *m, int64_t step, double val_loss, struct error *e);

/* Return once all lines are on the disk: to be called before a checkpoint that they lead up to is saved. */
int metrics_sync(struct metrics *m, struct error *e);

/* On a terminal, one line rewritten in place; elsewhere a line now and then. Goes to stderr. */
void status_step(struct metrics *m, const struct step_record *r);
/* End the status line, so that something else can be printed. */
void status_break(struct metrics *m);

#endif

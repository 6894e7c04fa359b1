/* metrics.jsonl, one line for each step and each evaluation. */
#ifndef IHA_MODEL_TRAIN_METRICS_H
#define IHA_MODEL_TRAIN_METRICS_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/error.h"
#include "model/train/evaluation.h"

struct part_norms; /* model.h */

struct step_record {
    int64_t step, steps, tokens;
    double targets;    /* of the step, that count; 0: the step has updated nothing, and has no loss */
    bool some_ignored; /* targets may be fewer than the step's tokens: print how many there are */
    double loss, lr, grad_norm;
    const struct part_norms *norms; /* by part of the model; NULL: not of this step */
    double seconds;                 /* this step alone: without evaluation and saving */
    double tokens_per_second;
    double mfu; /* 0: unknown device, not printed */
    bool skipped;
    int64_t until_evaluation; /* steps; -1: no evaluation comes. Not in metrics.jsonl */
};

struct metrics;

/* Open run_dir/metrics.jsonl for appending, after removing the lines of steps after `step` from it and from
 * run_dir/samples.txt, since a resumed run writes them again. */
struct metrics *metrics_open(const char *run_dir, int64_t step, struct error *e);
void metrics_close(struct metrics *m);

int metrics_step(struct metrics *m, const struct step_record *r, struct error *e);
struct choice_data;
struct choice_scores;

int metrics_eval(struct metrics *m, int64_t step, const struct evaluation *v, struct error *e);

int metrics_choices(struct metrics *m, int64_t step, const struct choice_data *data,
                    const struct choice_scores *v, struct error *e);

/* Return once all lines are on the disk. Called before a checkpoint of the same step is saved. */
int metrics_sync(struct metrics *m, struct error *e);

#endif

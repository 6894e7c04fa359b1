/* The figures of an evaluation, and what they decide: which checkpoint is the best, and when train.patience ends the
 * run. */
#ifndef IHA_MODEL_TRAIN_EVALUATION_H
#define IHA_MODEL_TRAIN_EVALUATION_H

#include "model/checkpoint/trainer_state.h"

struct evaluation {
    double loss;            /* mean in nats over the targets */
    int64_t targets;        /* that count: those >= 0 */
    double bytes_per_token; /* of text, in the data's shards; 0: not known */
    bool labelled;          /* the data has labels: the counts below are filled */
    int64_t correct;        /* targets that have the largest logit */
    int64_t segments,
        exact; /* segments in which a target counts, and those of them whose targets are all correct */
};

/* Add to correct, segments and exact those of a batch [B,T]. segments: the index of the first token of each token's
 * segment, as in struct batch; NULL: a sequence is one segment. correct: 1 or 0, read where a target counts. */
void evaluation_count(struct evaluation *v, int64_t B, int64_t T, const int32_t *targets,
                      const int32_t *segments, const int32_t *correct);

double evaluation_accuracy(const struct evaluation *v);
double evaluation_exact(const struct evaluation *v);

/* Nats a token as bits a byte. */
double evaluation_bits_per_byte(const struct evaluation *v);

/* The figure that best_by names. */
double evaluation_figure(const struct evaluation *v, enum best_by best_by);

/* Compare with the best so far. A better one becomes the best of *p, if `saves` (a checkpoint of this step is saved
 * anyway) or with patience > 0. Returns true if a checkpoint must be saved because of it. */
bool evaluation_note(struct trainer_state *p, const struct evaluation *v, int64_t patience, bool saves);

/* Whether train.patience ends the run. */
bool patience_is_over(const struct trainer_state *p, int64_t patience);

#endif

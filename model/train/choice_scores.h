/* Scores of choices: which of several endings of a context the model finds most likely. */
#ifndef IHA_MODEL_TRAIN_CHOICE_SCORES_H
#define IHA_MODEL_TRAIN_CHOICE_SCORES_H

#include <stdio.h>

#include "model/model.h"

enum { MAX_CHOICE_ENDINGS = 64 };

/* One item: token ids, and the index of the right ending. */
struct choice {
    int32_t label, endings;
    const int32_t *context, *ids[MAX_CHOICE_ENDINGS];
    int32_t context_length, lengths[MAX_CHOICE_ENDINGS], characters[MAX_CHOICE_ENDINGS];
};

/* Items, from wherever they come. */
struct choice_data {
    const char *name;
    int64_t items;
    int32_t start; /* the id before the context */
    const void *source;
    void (*read)(const void *source, int64_t i, struct choice *item);
};

struct choice_scores {
    int64_t items, cut;   /* cut: endings whose context lost its beginning, to fit */
    int64_t correct;      /* the right ending has the largest log-likelihood */
    int64_t correct_norm; /* the largest log-likelihood per character */
    double chance;        /* mean of 1 / endings */
};

/* The log-likelihood of an ending is the sum over its tokens of log p(token | start, context, tokens before). Of equal
 * ones the first counts. A context that does not fit into the model's T tokens loses its beginning. Items are distributed
 * over the ranks of m->comm, and the figures do not depend on how many there are. The device's step state is as before
 * afterwards. The model was created with model_options.scores. All ranks call it, and fail together. */
int score_choices(struct model *m, const struct choice_data *data, struct choice_scores *scores,
                  struct error *e);

/* A table of several sets. step: that of the title; -1: no title. */
void choice_scores_print(FILE *out, int64_t step, const struct choice_data *data,
                         const struct choice_scores *scores, int count);

#endif

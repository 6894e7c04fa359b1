/* trainer.json: the progress of a run, and its configuration. */
#ifndef IHA_MODEL_CHECKPOINT_TRAINER_STATE_H
#define IHA_MODEL_CHECKPOINT_TRAINER_STATE_H

#include "kernels/kernels.h"
#include "model/config/config.h"

/* Numbers of which the data loader knows the meaning. */
enum { MAX_DATA_POSITION = 256 };

struct trainer_state {
    int64_t step;            /* optimizer steps done */
    int64_t tokens;          /* trained on */
    int64_t sequences;       /* drawn from the training data: the data position */
    int data_position_count; /* 0: `sequences` is the whole position */
    int64_t data_position[MAX_DATA_POSITION];
    struct step_history history;
    double seconds;       /* of training, without evaluation and saving */
    enum best_by best_by; /* the validation figure of best_value; NAN: none yet */
    double best_value;
    int64_t best_step;
    int64_t evals_since_best; /* counted with train.patience only */
    char train_fingerprint[17], val_fingerprint[17];
};

int trainer_state_write(const char *path, const struct trainer_state *p, const struct config *c,
                        struct error *e);
int trainer_state_read(const char *path, struct trainer_state *p, struct error *e);

/* Call visit for every setting in trainer.json: "section.key" and its value. */
typedef void setting_visitor(void *context, const char *key, const char *value);
int settings_visit(const char *path, setting_visitor *visit, void *context, struct error *e);

#endif

/* The files of a checkpoint, one function each way; checkpoint.c makes a directory of them. */
#ifndef IHA_MODEL_CHECKPOINT_CHECKPOINT_FILES_H
#define IHA_MODEL_CHECKPOINT_CHECKPOINT_FILES_H

#include "model/model.h"

/* What trainer.json holds beside the configuration. */
struct trainer_state {
    int64_t step;      /* optimizer steps done */
    int64_t tokens;    /* trained on */
    int64_t sequences; /* drawn from the training data: the data position */
    struct step_history history;
    double seconds;       /* of training, without evaluation and saving */
    double best_val_loss; /* NAN: none yet */
    int64_t best_step;
    char train_fingerprint[17], val_fingerprint[17];
};

/* Where the numbers come from: the model itself, or a copy taken earlier, so that training can go on. */
struct checkpoint_source {
    struct model *model;
    float *weights; /* NULL, or [params.num_params] */
    float *moments; /* NULL, or [2 * optimizer_elements]: first, then second */
};

int weights_write(const char *path, const struct checkpoint_source *from, struct error *e);
int weights_read(const char *path, struct model *m, int64_t updates, struct error *e);

/* Optimizer state. A rank's file holds `ranges` [n,2], the parameters whose moments it has, counted through
 * model.safetensors' order without padding, and exp_avg, exp_avg_sq: their moments end to end. So any number
 * of ranks reads what any other wrote. read: all that this rank updates, from all files of `dir`. */
enum { OPTIMIZER_NAME = 48 };
void optimizer_name(char out[OPTIMIZER_NAME], int rank, int ranks);
int64_t optimizer_elements(const struct model *m); /* that this rank owns; -1: no memory to count them */
int optimizer_copy(struct model *m, float *moments, struct error *e);
int optimizer_write(const char *path, const struct checkpoint_source *from, struct error *e);
int optimizer_read(const char *dir, struct model *m, struct error *e);

int trainer_state_write(const char *path, const struct trainer_state *p, const struct config *c,
                        struct error *e);
int trainer_state_read(const char *path, struct trainer_state *p, struct error *e);

/* Every setting trainer.json recorded, "section.key" and its value. */
typedef void setting_visitor(void *context, const char *key, const char *value);
int settings_visit(const char *path, setting_visitor *visit, void *context, struct error *e);

#endif

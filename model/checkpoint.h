/* Checkpoints: a directory step_00001000/ in the run's directory that exists whole or not at all.
 *
 *   model.safetensors                        weights, fp32
 *   config.json                              the model, as other tools read it
 *   optimizer-00000-of-00001.safetensors     moments of one rank's range of the flat buffer
 *   trainer.json                             everything else a resumed run needs
 *   tokenizer.json                           when the run has a tokenizer file */
#ifndef IHA_CHECKPOINT_H
#define IHA_CHECKPOINT_H

#include "model/model.h"

/* What trainer.json holds beside the configuration. */
struct progress {
    int64_t step;         /* optimizer steps done */
    int64_t tokens;       /* trained on */
    int64_t sequences;    /* drawn from the training data: the data position */
    int64_t updates;      /* steps that were not skipped */
    int32_t skips_run;    /* skipped in a row */
    double seconds;       /* of training, without evaluation and saving */
    double best_val_loss; /* NAN: none yet */
    int64_t best_step;
    char train_fingerprint[17], val_fingerprint[17];
};

/* Write a checkpoint of *m into run_dir, then remove all but the newest `keep` and the best (keep = 0: remove
 * none). tokenizer: a path to copy, or NULL. EXIT_RUN errors leave earlier checkpoints as they were. */
int checkpoint_save(const char *run_dir, struct model *m, const struct config *c, const struct progress *p,
                    const char *tokenizer, struct error *e);

/* The newest checkpoint of run_dir that loads, into *m and *p. One that does not load is reported on stderr
 * and passed over. 1: loaded, its directory in `dir`; 0: run_dir holds none; -1: an error (EXIT_USER), also
 * when the checkpoint belongs to another model or other data: *c is what the run was asked for. */
int checkpoint_resume(const char *run_dir, struct model *m, const struct config *c, struct progress *p,
                      char dir[MAX_TEXT], struct error *e);

/* Step of the newest checkpoint directory in run_dir, without looking inside; -1: none. */
int64_t checkpoint_newest_step(const char *run_dir);

/* `path` itself when it is a checkpoint, or the newest checkpoint of the run directory `path` whose model
 * opens; one that does not is reported on stderr and passed over. */
int checkpoint_find(const char *path, char dir[MAX_TEXT], struct error *e);

/* Pieces, for eval, generate, info and init_from. The model's shape must be the checkpoint's. */
int checkpoint_read_config(const char *dir, struct model_config *config, struct error *e);
int checkpoint_load_weights(const char *dir, struct model *m, struct error *e);
int checkpoint_load_optimizer(const char *dir, struct model *m, struct error *e);
int checkpoint_read_progress(const char *dir, struct progress *p, struct error *e);

/* The value of "section.key" in the checkpoint's trainer.json, or an empty string. */
int checkpoint_setting(const char *dir, const char *key, char value[MAX_TEXT], struct error *e);

/* What saving does after the checkpoint is there: point `best` at the best one, remove those past `keep`. To
 * be done on resuming too, since the run may have been killed before it came to that. */
int checkpoint_settle(const char *run_dir, const struct config *c, const struct progress *p, struct error *e);

/* Remove what a killed run left half-written or half-removed. */
void checkpoint_clean(const char *run_dir);

#endif

/* Checkpoints: a directory step_00001000/ in the run's directory that exists whole or not at all.
 *
 *   model.safetensors                        weights, fp32
 *   config.json                              the model, as other tools read it
 *   optimizer-RRRRR-of-WWWWW.safetensors     moments of what rank R of W owns
 *   trainer.json                             everything else a resumed run needs
 *   tokenizer.json                           when the run has a tokenizer file */
#ifndef IHA_MODEL_CHECKPOINT_CHECKPOINT_H
#define IHA_MODEL_CHECKPOINT_CHECKPOINT_H

#include "model/checkpoint/checkpoint_files.h"
#include "model/model.h"

/* What a parameter takes in a checkpoint: the weight and its two moments. */
enum { CHECKPOINT_PARAM_BYTES = 3 * sizeof(float) };

/* Saving comes in parts, so that ranks write together and training goes on meanwhile: rank 0 begins (an empty
 * step_N.tmp), every rank writes its files, and when all have, rank 0 publishes: renames the directory, marks
 * the best, and removes all but the newest `keep` and the best (keep = 0: none). EXIT_RUN errors leave
 * earlier checkpoints as they were. */
struct checkpoint_job {
    const char *run_dir;
    const struct config *config;
    const char *tokenizer; /* the text of tokenizer.json, or NULL */
    size_t tokenizer_bytes;
    struct trainer_state trainer;
    struct checkpoint_source from;
};
/* The tokenizer's file, read once: it may be gone or another when a later checkpoint is saved. Freed by the
 * caller. */
int checkpoint_tokenizer(const char *path, char **text, size_t *bytes, struct error *e);

int checkpoint_begin(const char *run_dir, int64_t step, struct error *e);
int checkpoint_write(const struct checkpoint_job *job, struct error *e);
int checkpoint_publish(const struct checkpoint_job *job, struct error *e);

/* All of it, on one rank. */
int checkpoint_save(const char *run_dir, struct model *m, const struct config *c,
                    const struct trainer_state *p, const char *tokenizer, struct error *e);

/* The newest checkpoint of run_dir that loads, into *m and *p. One that does not load is reported on stderr
 * and passed over. 1: loaded, its directory in `dir`; 0: run_dir holds none; -1: an error (EXIT_USER), also
 * when the checkpoint belongs to another model or other data: *c is what the run was asked for. */
int checkpoint_resume(const char *run_dir, struct model *m, const struct config *c, struct trainer_state *p,
                      char dir[MAX_TEXT], bool warns, struct error *e);

/* `path` itself when it is a checkpoint, or the newest checkpoint of the run directory `path` whose model
 * opens; one that does not is reported on stderr and passed over. */
int checkpoint_find(const char *path, char dir[MAX_TEXT], struct error *e);

/* Pieces, for eval, generate, info and init_from. The model's shape must be the checkpoint's. updates: see
 * model_set_param. */
int checkpoint_read_config(const char *dir, struct model_config *config, struct error *e);
int checkpoint_load_weights(const char *dir, struct model *m, int64_t updates, struct error *e);
int checkpoint_load_optimizer(const char *dir, struct model *m, struct error *e);
int checkpoint_read_trainer_state(const char *dir, struct trainer_state *p, struct error *e);

/* Is the checkpoint's model the one of *now? Weights of another geometry may fit by their shapes and mean
 * nothing. */
int checkpoint_check_geometry(const char *dir, const struct model_config *now, struct error *e);

/* The value of "section.key" in the checkpoint's trainer.json, or an empty string. */
int checkpoint_setting(const char *dir, const char *key, char value[MAX_TEXT], struct error *e);

/* What saving does after the checkpoint is there: point `best` at the best one, remove those past `keep`. To
 * be done on resuming too, since the run may have been killed before it came to that. */
int checkpoint_prune(const char *run_dir, const struct config *c, const struct trainer_state *p,
                     struct error *e);

/* Remove what a killed run left half-written or half-removed. */
void checkpoint_clean(const char *run_dir);

#endif

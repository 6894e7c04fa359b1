/* Checkpoints: a directory step_00001000/ in the run's directory that exists whole or not at all.
 *
 *   model.safetensors                        weights, fp32
 *   config.json                              the model, as other tools read it
 *   optimizer-RRRRR-of-WWWWW.safetensors     the optimizer's moments of the parameters that rank R of W owns
 *   trainer.json                             everything else that a resumed run needs
 *   tokenizer.json, tokenizer_config.json    when the run has a tokenizer
 *   generation_config.json                   the ids that end a text
 *   chat.json                                the chat template, when the run's data has one
 *   configuration_iha.py, modeling_iha.py    the model for Hugging Face Transformers */
#ifndef IHA_MODEL_CHECKPOINT_CHECKPOINT_H
#define IHA_MODEL_CHECKPOINT_CHECKPOINT_H

#include "model/checkpoint/checkpoint_dirs.h"
#include "model/checkpoint/trainer_state.h"
#include "model/config/config_compare.h"
#include "model/model.h"

/* Bytes of a parameter in a checkpoint: the weight and its two moments. */
enum { CHECKPOINT_PARAM_BYTES = 3 * sizeof(float) };

/* Saving has three parts, so that all ranks write at the same time, and training can go on meanwhile: rank 0
 * begins (makes an empty step_N.tmp), every rank writes its files, and when all have, rank 0 publishes: renames
 * the directory and prunes. EXIT_RUN errors leave earlier checkpoints as they were. */
struct checkpoint_job {
    const char *run_dir;
    const struct config *config;
    const char *tokenizer; /* the text of tokenizer.json, or NULL */
    size_t tokenizer_bytes;
    const char *tokenizer_config;  /* the text of tokenizer_config.json, or NULL */
    const char *generation_config; /* the text of generation_config.json; NULL: no ids are known */
    const char *chat;              /* the text of chat.json, or NULL */
    struct trainer_state trainer;
    struct model *model;
    const float
        *weights; /* copies to write from, see weights_write and optimizer_write; NULL: from the model */
    const float *moments;
};

/* Read the tokenizer's file, once: it may change before a later checkpoint is saved. The caller frees the text. */
int checkpoint_tokenizer(const char *path, char **text, size_t *bytes, struct error *e);

int checkpoint_begin(const char *run_dir, int64_t step, struct error *e);
int checkpoint_write(const struct checkpoint_job *job, struct error *e);
int checkpoint_publish(const struct checkpoint_job *job, struct error *e);

/* Load the newest checkpoint of run_dir that loads into *m and *p. One that does not load is skipped, with a
 * warning on stderr if `warns`. 1: loaded, its directory in `dir`; 0: run_dir holds none; -1: an error
 * (EXIT_USER), also when the checkpoint is of a run with another configuration than *c, or of other data. */
int checkpoint_resume(const char *run_dir, struct model *m, const struct config *c, struct trainer_state *p,
                      char dir[MAX_TEXT], bool warns, struct error *e);

/* `path` itself if it is a checkpoint, or the newest checkpoint in the run directory `path` whose model opens;
 * those that do not are skipped with a warning. */
int checkpoint_find(const char *path, char dir[MAX_TEXT], struct error *e);

/* Parts, for eval, generate, info and init_from. The model's shape must be the checkpoint's. updates: see
 * model_set_param. */
int checkpoint_read_config(const char *dir, struct model_config *config, struct error *e);
int checkpoint_load_weights(const char *dir, struct model *m, int64_t updates, struct error *e);
int checkpoint_load_optimizer(const char *dir, struct model *m, struct error *e);

/* The same from a checkpoint of the model *then, which may have another vocab_size, and MHA layers where *m has IHA
 * layers. Weights of new token ids are the mean of the old, and their moments zero; alpha and collapse of new IHA layers
 * keep their values. With `optimizer` all layers must have the same tensors. */
int checkpoint_load_from(const char *dir, struct model *m, const struct model_config *then, bool optimizer,
                         struct error *e);
int checkpoint_read_trainer_state(const char *dir, struct trainer_state *p, struct error *e);

/* Compare the checkpoint's model, which is read into *then, with *now: see config_compare.h. EXIT_USER if its weights do
 * not fit; weights of another model can have the same shapes. */
int checkpoint_compare(const char *dir, const struct model_config *now, int64_t seq_len,
                       struct model_config *then, struct model_comparison *c, struct error *e);

/* The value of "section.key" in the checkpoint's trainer.json, or an empty string. */
int checkpoint_setting(const char *dir, const char *key, char value[MAX_TEXT], struct error *e);

/* *c: the checkpoint's model, what trainer.json records of its data and shape, and defaults for the rest. */
int checkpoint_read_settings(const char *dir, struct config *c, struct error *e);

/* Point run_dir/best at the best checkpoint, and remove all but the newest run.keep and the best (keep = 0: remove
 * none). Part of publishing; done on resuming too, in case the run was killed before it. */
int checkpoint_prune(const char *run_dir, const struct config *c, const struct trainer_state *p,
                     struct error *e);

#endif

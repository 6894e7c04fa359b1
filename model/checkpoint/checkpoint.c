#include "model/checkpoint/checkpoint.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "model/checkpoint/files.h"
#include "model/checkpoint/optimizer_state.h"
#include "model/checkpoint/safetensors.h"
#include "model/checkpoint/transformers.h"
#include "model/checkpoint/weights.h"

enum { MAX_TOKENIZER = 256 << 20 }; /* bytes */

/* Transformers can spread a large model over several files. */
static int weights_path(char path[PATH_BYTES], const char *dir, struct error *e) {
    path_join(path, dir, "model.safetensors");
    if (path_exists(dir, "model.safetensors") || !path_exists(dir, "model.safetensors.index.json"))
        return 0;
    return fail_user(e,
                     "%s: its weights are in several files; save them in one: save_pretrained(DIR, "
                     "max_shard_size=\"1TB\")",
                     dir);
}

/* ---- finding ---- */

/* Whether config.json and the header of model.safetensors can be read. */
static int check_opens(const char *dir, struct error *e) {
    char path[PATH_BYTES];
    struct model_config config;
    struct safetensors weights;
    if (weights_path(path, dir, e) != 0 || checkpoint_read_config(dir, &config, e) != 0 ||
        safetensors_open(&weights, path, e) != 0)
        return -1;
    safetensors_close(&weights);
    return 0;
}

static int newest_that_opens(const char *run_dir, char dir[MAX_TEXT], struct error *e) {
    int64_t *steps;
    int count = checkpoint_list_steps(run_dir, &steps, e), status = -1;
    if (count == 0)
        fail_user(e, "%s: neither a checkpoint (no config.json) nor a run directory that holds one", run_dir);
    for (int i = 0; i < count && status != 0; i++) {
        char name[CHECKPOINT_NAME];
        checkpoint_name(name, steps[i]);
        snprintf(dir, MAX_TEXT, "%s/%s", run_dir, name);
        status = check_opens(dir, e);
        if (status != 0 && i + 1 < count)
            fprintf(stderr, "warning: %s does not load (%s); trying the previous one\n", dir, e->text);
    }
    free(steps);
    return status;
}

int checkpoint_find(const char *path, char dir[MAX_TEXT], struct error *e) {
    struct stat st;
    if (strlen(path) + 32 >= MAX_TEXT)
        return fail_user(e, "%.40s...: the path is too long", path);
    if (stat(path, &st) != 0)
        return fail_user(e, "%s: %s; give a checkpoint directory, or the run directory that holds one", path,
                         strerror(errno));
    snprintf(dir, MAX_TEXT, "%s", path);
    if (path_exists(path, "config.json"))
        return 0;
    return newest_that_opens(path, dir, e);
}

/* ---- reading ---- */

int checkpoint_read_config(const char *dir, struct model_config *config, struct error *e) {
    char path[PATH_BYTES], *text;
    size_t length;
    path_join(path, dir, "config.json");
    if (files_read_all(path, 1 << 20, &text, &length, e) != 0)
        return -1;
    int status = strlen(text) == length ? config_model_from_json(config, text, path, e)
                                        : fail_user(e, "%s: contains a zero byte: the file is damaged", path);
    free(text);
    return status;
}

int checkpoint_load_weights(const char *dir, struct model *m, int64_t updates, struct error *e) {
    char path[PATH_BYTES];
    return weights_path(path, dir, e) == 0 ? weights_read(path, m, updates, e) : -1;
}

int checkpoint_load_optimizer(const char *dir, struct model *m, struct error *e) {
    return optimizer_read(dir, m, e);
}

int checkpoint_load_from(const char *dir, struct model *m, const struct model_config *then, bool optimizer,
                         struct error *e) {
    char path[PATH_BYTES];
    if (weights_path(path, dir, e) != 0 || weights_read_from(path, m, then, e) != 0)
        return -1;
    return optimizer ? optimizer_read_resized(dir, m, then->vocab_size, e) : 0;
}

int checkpoint_read_trainer_state(const char *dir, struct trainer_state *p, struct error *e) {
    char path[PATH_BYTES];
    path_join(path, dir, "trainer.json");
    return trainer_state_read(path, p, e);
}

struct wanted_setting {
    const char *key;
    char *value;
};

static void pick_setting(void *context, const char *key, const char *value) {
    struct wanted_setting *w = context;
    if (strcmp(key, w->key) == 0)
        snprintf(w->value, MAX_TEXT, "%s", value);
}

int checkpoint_setting(const char *dir, const char *key, char value[MAX_TEXT], struct error *e) {
    char path[PATH_BYTES];
    struct wanted_setting w = {key, value};
    value[0] = '\0';
    if (!path_exists(dir, "trainer.json"))
        return 0; /* a checkpoint that this program did not write */
    path_join(path, dir, "trainer.json");
    return settings_visit(path, pick_setting, &w, e);
}

int checkpoint_read_settings(const char *dir, struct config *c, struct error *e) {
    config_defaults(c);
    if (checkpoint_read_config(dir, &c->model, e) != 0)
        return -1;
    c->train.seq_len = c->model.max_position_embeddings;
    c->train.micro_batch = 1;
    static const char *const recorded[] = {"train.seq_len",     "train.micro_batch",     "data.val",
                                           "data.packing",      "data.segments",         "data.separator",
                                           "data.separator_at", "data.segment_positions"};
    for (size_t i = 0; i < sizeof recorded / sizeof *recorded; i++) {
        char value[MAX_TEXT], text[MAX_TEXT + 64], *setting = text;
        if (checkpoint_setting(dir, recorded[i], value, e) != 0)
            return -1;
        snprintf(text, sizeof text, "%s=%s", recorded[i], value);
        if (value[0] && config_override(c, 1, &setting, e) != 0)
            return -1;
    }
    return 0;
}

/* ---- saving ---- */

/* text: NULL writes nothing. */
static int write_text(const char *dir, const char *name, const char *text, struct error *e) {
    char path[PATH_BYTES];
    path_join(path, dir, name);
    return text ? files_write_synced(path, text, strlen(text), e) : 0;
}

static int write_config(const char *dir, const struct checkpoint_job *job, struct error *e) {
    char *text = transformers_config_json(&job->config->model, job->generation_config);
    if (!text)
        return fail_run(e, "out of memory saving config.json");
    int status = write_text(dir, "config.json", text, e);
    free(text);
    return status;
}

/* What a program needs beside the weights. */
static int write_description(const char *dir, const struct checkpoint_job *job, struct error *e) {
    char path[PATH_BYTES];
    const char *generation = job->generation_config ? job->generation_config : "{}\n";
    path_join(path, dir, "tokenizer.json");
    if (job->tokenizer && files_write_synced(path, job->tokenizer, job->tokenizer_bytes, e) != 0)
        return -1;
    return write_config(dir, job, e) != 0 ||
                   write_text(dir, "tokenizer_config.json", job->tokenizer_config, e) != 0 ||
                   write_text(dir, "generation_config.json", generation, e) != 0 ||
                   transformers_write_code(dir, e) != 0
               ? -1
               : 0;
}

/* Remove all but the newest `keep` (0: remove none) and the best. Checkpoints after `step` are those that did not
 * load when the run was resumed: they are not counted, and kept until the run overwrites them. */
static void remove_old(const char *run_dir, int64_t step, int64_t keep, int64_t best_step) {
    int64_t *steps, kept = 0;
    if (keep == 0)
        return;
    struct error e;
    int count = checkpoint_list_steps(run_dir, &steps, &e);
    if (count < 0)
        fprintf(stderr, "warning: %s\n", e.text);
    for (int i = 0; i < count; i++) {
        if (steps[i] > step || kept++ < keep || steps[i] == best_step)
            continue;
        if (checkpoint_remove(run_dir, steps[i], &e) != 0)
            fprintf(stderr, "warning: %s\n", e.text);
    }
    free(steps);
}

/* Point run_dir/best at the checkpoint of p->best_step, if that exists and the link is not right already. */
static int mark_best(const char *run_dir, const struct trainer_state *p, struct error *e) {
    char name[CHECKPOINT_NAME], link[PATH_BYTES], now[CHECKPOINT_NAME] = "";
    checkpoint_name(name, p->best_step);
    path_join(link, run_dir, "best");
    if (!isfinite(p->best_value) || !path_exists(run_dir, name))
        return 0;
    if (readlink(link, now, sizeof now - 1) > 0 && strcmp(now, name) == 0)
        return 0;
    return files_link_replace(name, link, e);
}

int checkpoint_prune(const char *run_dir, const struct config *c, const struct trainer_state *p,
                     struct error *e) {
    if (mark_best(run_dir, p, e) != 0)
        return -1;
    remove_old(run_dir, p->step, c->run.keep, p->best_step);
    return 0;
}

int checkpoint_tokenizer(const char *path, char **text, size_t *bytes, struct error *e) {
    return files_read_all(path, MAX_TOKENIZER, text, bytes, e);
}

int checkpoint_begin(const char *run_dir, int64_t step, struct error *e) {
    char tmp[PATH_BYTES];
    checkpoint_tmp_path(tmp, run_dir, step);
    if (files_remove_tree(tmp, e) != 0)
        return -1;
    if (mkdir(tmp, 0777) != 0)
        return fail_run(e, "%s: cannot create the directory: %s; %s", tmp, strerror(errno),
                        files_advice(errno));
    return 0;
}

int checkpoint_write(const struct checkpoint_job *job, struct error *e) {
    const struct partition *p = &job->model->partition;
    char dir[PATH_BYTES], path[PATH_BYTES + 64], name[OPTIMIZER_NAME];
    checkpoint_tmp_path(dir, job->run_dir, job->trainer.step);
    optimizer_name(name, p->rank, p->ranks);
    snprintf(path, sizeof path, "%s/%s", dir, name);
    if (optimizer_write(path, job->model, job->moments, e) != 0)
        return -1;
    if (p->rank > 0)
        return 0;
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    if (weights_write(path, job->model, job->weights, e) != 0 || write_description(dir, job, e) != 0)
        return -1;
    snprintf(path, sizeof path, "%s/chat.json", dir);
    if (job->chat && files_write_synced(path, job->chat, strlen(job->chat), e) != 0)
        return -1;
    snprintf(path, sizeof path, "%s/trainer.json", dir);
    return trainer_state_write(path, &job->trainer, job->config, e);
}

int checkpoint_publish(const struct checkpoint_job *job, struct error *e) {
    const struct trainer_state *p = &job->trainer;
    char tmp[PATH_BYTES], final[PATH_BYTES];
    checkpoint_tmp_path(tmp, job->run_dir, p->step);
    checkpoint_path(final, job->run_dir, p->step);
    /* A checkpoint of this step can only be one that did not load when the run was resumed. */
    if (checkpoint_remove(job->run_dir, p->step, e) != 0 || files_publish_dir(tmp, final, e) != 0)
        return -1;
    return checkpoint_prune(job->run_dir, job->config, p, e);
}

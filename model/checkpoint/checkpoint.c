#include "model/checkpoint/checkpoint.h"

#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "model/checkpoint/checkpoint_files.h"
#include "model/checkpoint/files.h"
#include "model/checkpoint/safetensors.h"

enum { PATH_BYTES = MAX_TEXT + 128, MAX_TOKENIZER = 256 << 20 };

static void join(char out[PATH_BYTES], const char *dir, const char *name) {
    snprintf(out, PATH_BYTES, "%s/%s", dir, name);
}

static void step_name(char out[32], int64_t step) {
    snprintf(out, 32, "step_%08lld", (long long)step);
}

/* What cannot be looked at counts as there: whoever opens it will say why it cannot be. */
static bool exists(const char *dir, const char *name) {
    char path[PATH_BYTES];
    join(path, dir, name);
    return access(path, F_OK) == 0 || (errno != ENOENT && errno != ENOTDIR);
}

/* ---- which checkpoints there are ---- */

/* The step in a directory name "step_00001000", or -1. */
static int64_t step_of(const char *name) {
    if (strncmp(name, "step_", 5) != 0 || name[5] == '\0' ||
        strspn(name + 5, "0123456789") != strlen(name + 5) || strlen(name) > 20)
        return -1;
    return strtoll(name + 5, NULL, 10);
}

static int descending(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x < y) - (x > y);
}

/* The steps in an open directory, in its order. 0, or the errno. */
static int read_steps(DIR *dir, int64_t **steps, int *count) {
    for (int capacity = 0;;) {
        errno = 0;
        struct dirent *item = readdir(dir);
        if (!item)
            return errno;
        int64_t step = step_of(item->d_name);
        if (step < 0)
            continue;
        if (*count == capacity) {
            capacity = capacity ? 2 * capacity : 16;
            int64_t *grown = realloc(*steps, (size_t)capacity * sizeof **steps);
            if (!grown)
                return ENOMEM;
            *steps = grown;
        }
        (*steps)[(*count)++] = step;
    }
}

/* Steps of the checkpoints in run_dir, newest first: a malloc'd array and its length. A part of them is an
 * error, -1: a run that overlooks its newest checkpoint, or all, would begin again and write over them. */
static int list_steps(const char *run_dir, int64_t **steps, struct error *e) {
    int count = 0;
    *steps = NULL;
    DIR *dir = opendir(run_dir);
    if (!dir && (errno == ENOENT || errno == ENOTDIR))
        return 0;
    int err = dir ? read_steps(dir, steps, &count) : errno;
    if (dir)
        closedir(dir);
    if (err) {
        free(*steps);
        *steps = NULL;
        return fail_run(e, "%s: cannot list its checkpoints: %s; %s", run_dir, strerror(err),
                        files_advice(err));
    }
    if (count > 0)
        qsort(*steps, (size_t)count, sizeof **steps, descending);
    return count;
}

/* Does the directory hold a model that can be read? Its headers are checked, its numbers are not. */
static int check_opens(const char *dir, struct error *e) {
    char path[PATH_BYTES];
    struct model_config config;
    struct safetensors weights;
    join(path, dir, "model.safetensors");
    if (checkpoint_read_config(dir, &config, e) != 0 || safetensors_open(&weights, path, e) != 0)
        return -1;
    safetensors_close(&weights);
    return 0;
}

static int newest_that_opens(const char *run_dir, char dir[MAX_TEXT], struct error *e) {
    int64_t *steps;
    int count = list_steps(run_dir, &steps, e), status = -1;
    if (count == 0)
        fail_user(e, "%s: neither a checkpoint (no config.json) nor a run directory with one", run_dir);
    for (int i = 0; i < count && status != 0; i++) {
        char name[32];
        step_name(name, steps[i]);
        snprintf(dir, MAX_TEXT, "%s/%s", run_dir, name);
        status = check_opens(dir, e);
        if (status != 0 && i + 1 < count)
            fprintf(stderr, "warning: %s does not load (%s); trying the one before\n", dir, e->text);
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
    if (exists(path, "config.json"))
        return 0;
    return newest_that_opens(path, dir, e);
}

/* ---- reading ---- */

int checkpoint_read_config(const char *dir, struct model_config *config, struct error *e) {
    char path[PATH_BYTES], *text;
    size_t length;
    join(path, dir, "config.json");
    if (files_read_all(path, 1 << 20, &text, &length, e) != 0)
        return -1;
    int status = strlen(text) == length ? config_model_from_json(config, text, path, e)
                                        : fail_user(e, "%s: a zero byte: the file is damaged", path);
    free(text);
    return status;
}

int checkpoint_load_weights(const char *dir, struct model *m, int64_t updates, struct error *e) {
    char path[PATH_BYTES];
    join(path, dir, "model.safetensors");
    return weights_read(path, m, updates, e);
}

int checkpoint_load_optimizer(const char *dir, struct model *m, struct error *e) {
    return optimizer_read(dir, m, e);
}

int checkpoint_read_trainer_state(const char *dir, struct trainer_state *p, struct error *e) {
    char path[PATH_BYTES];
    join(path, dir, "trainer.json");
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
    if (!exists(dir, "trainer.json"))
        return 0; /* a checkpoint from elsewhere */
    join(path, dir, "trainer.json");
    return settings_visit(path, pick_setting, &w, e);
}

/* ---- resuming ---- */

struct difference {
    const char *key, *recorded;
    bool known, found;
    char text[512];
};

static void compare_setting(void *context, const char *key, const char *value) {
    struct difference *d = context;
    if (strcmp(key, d->key) != 0)
        return;
    d->known = true;
    if (strcmp(value, d->recorded) != 0 && !d->found) {
        d->found = true;
        snprintf(d->text, sizeof d->text, "%s was %s and is now %s", key, d->recorded, value);
    }
}

struct recorded_check {
    const struct config *asked;
    int compared;
    struct difference first;
};

/* Data is compared by fingerprint, not by path: a corpus may move. */
static void check_recorded(void *context, const char *key, const char *value) {
    struct recorded_check *r = context;
    bool path =
        strcmp(key, "data.train") == 0 || strcmp(key, "data.val") == 0 || strcmp(key, "data.tokenizer") == 0;
    if (r->first.found || path || config_may_change_on_resume(key))
        return;
    r->first.key = key;
    r->first.recorded = value;
    r->first.known = false;
    config_visit(r->asked, compare_setting, &r->first);
    r->compared += r->first.known;
}

static int check_same_run(const char *dir, const struct config *c, const struct trainer_state *asked,
                          const struct trainer_state *found, struct error *e) {
    char path[PATH_BYTES];
    struct recorded_check r = {.asked = c};
    join(path, dir, "trainer.json");
    if (settings_visit(path, check_recorded, &r, e) != 0)
        return -1;
    if (r.compared == 0)
        return fail_user(
            e,
            "%s: records no configuration, so whether this is the same run cannot be known; set another "
            "run.dir and train.init_from = %s",
            path, dir);
    if (r.first.found)
        return fail_user(e, "%s is a checkpoint of another run: %s; change it back, or set another run.dir",
                         dir, r.first.text);
    bool val_changed = asked->val_fingerprint[0] && found->val_fingerprint[0] &&
                       strcmp(asked->val_fingerprint, found->val_fingerprint) != 0;
    if (val_changed)
        return fail_user(e,
                         "%s: the validation data has changed since this checkpoint, and losses would not "
                         "compare; give the same shards, or set another run.dir",
                         dir);
    if (strcmp(asked->train_fingerprint, found->train_fingerprint) != 0)
        return fail_user(
            e,
            "%s: the training data has changed since this checkpoint; give the same shards, or set "
            "another run.dir",
            dir);
    return 0;
}

int checkpoint_check_geometry(const char *dir, const struct model_config *now, struct error *e) {
    struct model_config then;
    if (checkpoint_read_config(dir, &then, e) != 0)
        return -1;
    const char *differs = then.num_attention_heads != now->num_attention_heads ? "num_attention_heads"
                          : then.head_dim != now->head_dim                     ? "head_dim"
                          : then.activation != now->activation                 ? "activation"
                          : then.norm != now->norm                             ? "norm"
                          : then.num_pseudo_heads != now->num_pseudo_heads     ? "num_pseudo_heads"
                          : then.iha_collapse != now->iha_collapse             ? "iha_collapse"
                          : then.position_embedding != now->position_embedding ? "position_embedding"
                                                                               : NULL;
    if (!differs)
        return 0;
    return fail_user(e,
                     "train.init_from: %s is of another model: its %s (in config.json) is not model.%s; make "
                     "them the same",
                     dir, differs, differs);
}

int checkpoint_resume(const char *run_dir, struct model *m, const struct config *c, struct trainer_state *p,
                      char dir[MAX_TEXT], bool warns, struct error *e) {
    int64_t *steps;
    int count = list_steps(run_dir, &steps, e), status = count == 0 ? 0 : -1;
    struct trainer_state asked = *p;
    for (int i = 0; i < count && status < 0; i++) {
        char name[32];
        step_name(name, steps[i]);
        snprintf(dir, MAX_TEXT, "%.*s/%s", MAX_TEXT - 40, run_dir, name);
        if (checkpoint_read_trainer_state(dir, p, e) == 0) {
            /* Before the weights: those of another model would look damaged. */
            if (check_same_run(dir, c, &asked, p, e) != 0)
                break;
            if (p->step != steps[i])
                fail_user(e, "trainer.json is of step %lld", (long long)p->step);
            else if (checkpoint_load_weights(dir, m, p->history.updates, e) == 0 &&
                     checkpoint_load_optimizer(dir, m, e) == 0) {
                status = 1;
                break;
            }
        }
        if (warns)
            fprintf(stderr, "warning: %s does not load (%s)%s\n", dir, e->text,
                    i + 1 < count ? "; trying the one before" : "");
        if (i + 1 == count)
            fail_user(
                e, "%s: none of its %d checkpoints loads; set another run.dir, or remove them to start anew",
                run_dir, count);
    }
    free(steps);
    if (status == 1)
        snprintf(p->val_fingerprint, sizeof p->val_fingerprint, "%s", asked.val_fingerprint);
    return status;
}

/* ---- saving ---- */

static int write_config(const char *dir, const struct model_config *config, struct error *e) {
    char path[PATH_BYTES], *text = config_model_to_json(config);
    if (!text)
        return fail_run(e, "out of memory saving config.json");
    join(path, dir, "config.json");
    int status = files_write_synced(path, text, strlen(text), e);
    free(text);
    return status;
}

/* ---- names that come and go as a whole ---- */

static void tmp_path(char out[PATH_BYTES], const char *run_dir, int64_t step) {
    char name[32];
    step_name(name, step);
    snprintf(out, PATH_BYTES, "%s/%s.tmp", run_dir, name);
}

static void final_path(char out[PATH_BYTES], const char *run_dir, int64_t step) {
    char name[32];
    step_name(name, step);
    join(out, run_dir, name);
}

/* A checkpoint goes as it comes, whole or not at all: by a name that the next start clears away first. */
static int remove_checkpoint(const char *run_dir, int64_t step, struct error *e) {
    char name[32], old_name[48], path[PATH_BYTES], old[PATH_BYTES];
    step_name(name, step);
    snprintf(old_name, sizeof old_name, "%s.old.tmp", name);
    join(path, run_dir, name);
    join(old, run_dir, old_name);
    if (rename(path, old) != 0)
        return errno == ENOENT
                   ? 0
                   : fail_run(e, "cannot remove \"%s\": %s; %s", path, strerror(errno), files_advice(errno));
    return files_remove_tree(old, e);
}

/* All but the newest `keep` (0: none is removed) and the best. Checkpoints past `step` are those that did not
 * load when the run was resumed: they count for nothing, and stay until the run has passed them. */
static void remove_old(const char *run_dir, int64_t step, int64_t keep, int64_t best_step) {
    int64_t *steps, kept = 0;
    if (keep == 0)
        return;
    struct error e;
    int count = list_steps(run_dir, &steps, &e);
    if (count < 0)
        fprintf(stderr, "warning: %s\n", e.text);
    for (int i = 0; i < count; i++) {
        if (steps[i] > step || kept++ < keep || steps[i] == best_step)
            continue;
        if (remove_checkpoint(run_dir, steps[i], &e) != 0)
            fprintf(stderr, "warning: %s\n", e.text);
    }
    free(steps);
}

/* Point run_dir/best at the checkpoint of p->best_step, if it is there and the link leads elsewhere. */
static int mark_best(const char *run_dir, const struct trainer_state *p, struct error *e) {
    char name[32], link[PATH_BYTES], now[32] = "";
    step_name(name, p->best_step);
    join(link, run_dir, "best");
    if (!isfinite(p->best_val_loss) || !exists(run_dir, name))
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
    tmp_path(tmp, run_dir, step);
    if (files_remove_tree(tmp, e) != 0)
        return -1;
    if (mkdir(tmp, 0777) != 0)
        return fail_run(e, "%s: cannot create the directory: %s; %s", tmp, strerror(errno),
                        files_advice(errno));
    return 0;
}

int checkpoint_write(const struct checkpoint_job *job, struct error *e) {
    const struct partition *p = &job->from.model->partition;
    char dir[PATH_BYTES], path[PATH_BYTES + 64], name[OPTIMIZER_NAME];
    tmp_path(dir, job->run_dir, job->trainer.step);
    optimizer_name(name, p->rank, p->ranks);
    snprintf(path, sizeof path, "%s/%s", dir, name);
    if (optimizer_write(path, &job->from, e) != 0)
        return -1;
    if (p->rank > 0)
        return 0;
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    if (weights_write(path, &job->from, e) != 0 || write_config(dir, &job->config->model, e) != 0)
        return -1;
    snprintf(path, sizeof path, "%s/tokenizer.json", dir);
    if (job->tokenizer && files_write_synced(path, job->tokenizer, job->tokenizer_bytes, e) != 0)
        return -1;
    snprintf(path, sizeof path, "%s/trainer.json", dir);
    return trainer_state_write(path, &job->trainer, job->config, e);
}

int checkpoint_publish(const struct checkpoint_job *job, struct error *e) {
    const struct trainer_state *p = &job->trainer;
    char tmp[PATH_BYTES], final[PATH_BYTES];
    tmp_path(tmp, job->run_dir, p->step);
    final_path(final, job->run_dir, p->step);
    /* What stands at its place did not load, or this run would not have passed here again. */
    if (remove_checkpoint(job->run_dir, p->step, e) != 0 || files_publish_dir(tmp, final, e) != 0)
        return -1;
    return checkpoint_prune(job->run_dir, job->config, p, e);
}

int checkpoint_save(const char *run_dir, struct model *m, const struct config *c,
                    const struct trainer_state *p, const char *tokenizer, struct error *e) {
    struct checkpoint_job job = {.run_dir = run_dir, .config = c, .trainer = *p, .from = {.model = m}};
    char *text = NULL;
    int status = tokenizer ? checkpoint_tokenizer(tokenizer, &text, &job.tokenizer_bytes, e) : 0;
    job.tokenizer = text;
    if (status == 0)
        status = checkpoint_begin(run_dir, p->step, e) == 0 && checkpoint_write(&job, e) == 0 &&
                         checkpoint_publish(&job, e) == 0
                     ? 0
                     : -1;
    free(text);
    if (status == 0)
        return 0;
    checkpoint_clean(run_dir);
    e->exit_code = EXIT_RUN;
    return -1;
}

/* A checkpoint half written or half removed, or one of the files that replace others by a rename. */
static bool is_left_over(const char *name) {
    const char *end = strstr(name, ".tmp");
    if (!end || end[4] != '\0')
        return false;
    return strncmp(name, "step_", 5) == 0 || strcmp(name, "best.tmp") == 0 ||
           strcmp(name, "metrics.jsonl.tmp") == 0 || strcmp(name, "samples.txt.tmp") == 0;
}

void checkpoint_clean(const char *run_dir) {
    DIR *dir = opendir(run_dir);
    struct dirent *item;
    while (dir && (errno = 0, item = readdir(dir))) {
        if (!is_left_over(item->d_name))
            continue;
        char path[PATH_BYTES];
        struct error e;
        join(path, run_dir, item->d_name);
        if (files_remove_tree(path, &e) != 0)
            fprintf(stderr, "warning: %s\n", e.text);
    }
    if (!dir || errno != 0)
        fprintf(stderr, "warning: %s: cannot look for what a killed run left: %s\n", run_dir,
                strerror(errno));
    if (dir)
        closedir(dir);
}

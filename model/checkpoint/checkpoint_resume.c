/* Resuming: the newest checkpoint of a run directory that loads, if it is one of the same run. */
#include "model/checkpoint/checkpoint.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/checkpoint/checkpoint_dirs.h"

/* ---- is it the same run? ---- */

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
    const struct config *requested;
    int compared;
    struct difference first;
};

/* Data is compared by fingerprint, not by path, since it may have moved. */
static bool is_path(const char *key) {
    return strcmp(key, "data.train") == 0 || strcmp(key, "data.val") == 0 ||
           strcmp(key, "data.tokenizer") == 0;
}

static void check_recorded(void *context, const char *key, const char *value) {
    struct recorded_check *r = context;
    if (r->first.found || is_path(key) || config_may_change_on_resume(key))
        return;
    r->first.key = key;
    r->first.recorded = value;
    r->first.known = false;
    config_visit(r->requested, compare_setting, &r->first);
    r->compared += r->first.known;
}

/* Checkpoints from before a key existed do not record it: it was at its default then. */
struct unrecorded_check {
    const char *dir;
    struct difference *first;
    int status;
    struct error *error;
};

static void check_unrecorded(void *context, const char *key, const char *value) {
    struct unrecorded_check *u = context;
    char recorded[MAX_TEXT];
    bool checked = strncmp(key, "data.", 5) == 0 || strncmp(key, "model.", 6) == 0 ||
                   strcmp(key, "train.optimizer") == 0;
    if (u->status != 0 || u->first->found || !checked || is_path(key) || config_may_change_on_resume(key))
        return;
    u->status = checkpoint_setting(u->dir, key, recorded, u->error);
    const char *initial = config_default(key);
    if (u->status != 0 || recorded[0] || !initial)
        return;
    u->first->key = key;
    u->first->recorded = initial;
    compare_setting(u->first, key, value);
}

static int check_same_run(const char *dir, const struct config *c, const struct trainer_state *requested,
                          const struct trainer_state *found, struct error *e) {
    char path[PATH_BYTES];
    struct recorded_check r = {.requested = c};
    path_join(path, dir, "trainer.json");
    if (settings_visit(path, check_recorded, &r, e) != 0)
        return -1;
    if (r.compared == 0)
        return fail_user(
            e,
            "%s: records no configuration, so it cannot be resumed from; set another run.dir and "
            "train.init_from = %s",
            path, dir);
    struct unrecorded_check u = {dir, &r.first, 0, e};
    config_visit(c, check_unrecorded, &u);
    if (u.status != 0)
        return -1;
    if (r.first.found)
        return fail_user(e, "%s is a checkpoint of another run: %s; change it back, or set another run.dir",
                         dir, r.first.text);
    bool val_changed = requested->val_fingerprint[0] && found->val_fingerprint[0] &&
                       strcmp(requested->val_fingerprint, found->val_fingerprint) != 0;
    if (val_changed)
        return fail_user(
            e,
            "%s: the validation data has changed since this checkpoint, so its losses are not comparable; "
            "give the same shards, or set another run.dir",
            dir);
    if (strcmp(requested->train_fingerprint, found->train_fingerprint) != 0)
        return fail_user(
            e,
            "%s: the training data has changed since this checkpoint; give the same shards, or set "
            "another run.dir",
            dir);
    return 0;
}

int checkpoint_compare(const char *dir, const struct model_config *now, int64_t seq_len,
                       struct model_config *then, struct model_comparison *c, struct error *e) {
    if (checkpoint_read_config(dir, then, e) != 0)
        return -1;
    config_compare(then, now, seq_len, c);
    if (!c->misfits[0])
        return 0;
    return fail_user(e, "train.init_from: %.300s is of another model: %s; make them equal", dir, c->misfits);
}

/* ---- the newest that loads ---- */

int checkpoint_resume(const char *run_dir, struct model *m, const struct config *c, struct trainer_state *p,
                      char dir[MAX_TEXT], bool warns, struct error *e) {
    int64_t *steps;
    int count = checkpoint_list_steps(run_dir, &steps, e), status = count == 0 ? 0 : -1;
    struct trainer_state requested = *p;
    for (int i = 0; i < count && status < 0; i++) {
        char name[CHECKPOINT_NAME];
        checkpoint_name(name, steps[i]);
        snprintf(dir, MAX_TEXT, "%.*s/%s", MAX_TEXT - 40, run_dir, name);
        if (checkpoint_read_trainer_state(dir, p, e) == 0) {
            /* Before the weights, since those of another model would be reported as damaged. */
            if (check_same_run(dir, c, &requested, p, e) != 0)
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
                    i + 1 < count ? "; trying the previous one" : "");
        if (i + 1 == count)
            fail_user(
                e, "%s: none of its %d checkpoints loads; set another run.dir, or remove them to start again",
                run_dir, count);
    }
    free(steps);
    if (status == 1)
        snprintf(p->val_fingerprint, sizeof p->val_fingerprint, "%s", requested.val_fingerprint);
    if (status == 1 && p->best_by != c->train.best_by) { /* the checkpoint is older than train.best_by */
        p->best_by = c->train.best_by;
        p->best_value = (double)NAN;
        p->evals_since_best = 0;
    }
    return status;
}

#include "model/train/init_from.h"

#include <string.h>

#include "model/state_dict.h"

/* The mean loss of the batch by a model with the weights of `dir`, whose own model is *then. */
static int loss_of(const char *dir, const struct config *c, const struct model_config *then,
                   const struct kernels *k, struct device *dev, struct batch batch, double *loss,
                   struct error *e) {
    struct model m;
    struct model_options options = {.shape = pass_shape_of(c, false), .mix_lr_scale = 1};
    if (model_create(&m, &c->model, k, dev, &options, e) != 0)
        return -1;
    int status = model_initialize(&m, (uint64_t)c->train.seed, e);
    if (status == 0)
        status = checkpoint_load_from(dir, &m, then, false, e);
    if (status == 0) {
        struct step_state state;
        k->step_begin(dev, m.state, 0, 0);
        model_evaluate(&m, batch, 1, NULL);
        k->step_read(dev, m.state, &state);
        *loss = state.loss / state.targets;
    }
    model_free(&m);
    return status;
}

static int show_losses(const char *dir, const struct config *c, const struct model_config *then,
                       const struct kernels *k, struct device *dev, struct batch batch, FILE *out,
                       struct error *e) {
    struct config source = *c;
    double before, after;
    source.model = *then;
    if (loss_of(dir, &source, then, k, dev, batch, &before, e) != 0 ||
        loss_of(dir, c, then, k, dev, batch, &after, e) != 0)
        return -1;
    if (out)
        fprintf(out, "loss of one batch: %.7f by the checkpoint's model, %.7f by this one\n", before, after);
    return 0;
}

/* The moments of one optimizer mean nothing to another. */
static int check_optimizer(const struct config *c, const char *dir, struct error *e) {
    static const char *const names[] = {[OPTIMIZER_ADAMW] = "adamw", [OPTIMIZER_MUON] = "muon"};
    char recorded[MAX_TEXT];
    if (checkpoint_setting(dir, "train.optimizer", recorded, e) != 0)
        return -1;
    const char *then = recorded[0] ? recorded : names[OPTIMIZER_ADAMW]; /* before there was a choice */
    if (strcmp(then, names[c->train.optimizer]) == 0)
        return 0;
    return fail_user(
        e,
        "train.init_optimizer = keep: %s was trained with train.optimizer = %s, and this run has %s; make "
        "them equal, or set train.init_optimizer = fresh",
        dir, then, names[c->train.optimizer]);
}

/* What else keeps the run from starting with these weights. */
static int check_keys(const char *dir, const struct config *c, const struct model_config *then, int upcycled,
                      struct error *e) {
    long long from = then->vocab_size, to = c->model.vocab_size;
    if (from != to && !c->train.resize_vocab)
        return fail_user(e,
                         "train.init_from: %s has vocab_size %lld, and model.vocab_size is %lld; make them "
                         "equal, or set train.resize_vocab = true: %s",
                         dir, from, to,
                         to > from ? "the new rows of the embedding become the mean of the old"
                                   : "the last rows of the embedding are left out");
    if (c->train.init_optimizer == OPTIMIZER_KEEP && upcycled)
        return fail_user(
            e,
            "train.init_optimizer = keep: %s has no moments of alpha and collapse for the layers that "
            "become IHA; set train.init_optimizer = fresh",
            dir);
    return c->train.init_optimizer == OPTIMIZER_KEEP ? check_optimizer(c, dir, e) : 0;
}

int init_from_report(const char *dir, const struct config *c, const struct kernels *k, struct device *dev,
                     struct batch batch, FILE *out, struct error *e) {
    struct model_config then;
    struct model_comparison found;
    if (checkpoint_compare(dir, &c->model, c->train.seq_len, &then, &found, e) != 0 ||
        check_keys(dir, c, &then, found.upcycled, e) != 0)
        return -1;
    if (out && found.upcycled)
        fprintf(out, "%d layer%s that %s MHA in %s: alpha and collapse are new\n", found.upcycled,
                found.upcycled == 1 ? "" : "s", found.upcycled == 1 ? "was" : "were", dir);
    if (out && found.changes[0])
        fprintf(out, "function changed: %s\n", found.changes);
    else if (out)
        fprintf(out, "function preserved, for sequences of up to %lld tokens\n", (long long)c->train.seq_len);
    bool shows =
        (found.upcycled || found.changes[0]) && batch.tokens && then.vocab_size == c->model.vocab_size;
    return shows ? show_losses(dir, c, &then, k, dev, batch, out, e) : 0;
}

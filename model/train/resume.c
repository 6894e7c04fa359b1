#include "model/train/resume.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/train/rank_checks.h"
#include "model/state_dict.h"

static bool is_rank0(const struct model *m) {
    return m->comm->rank == 0;
}

/* Weights, and moments if `optimizer`, of a checkpoint whose vocabulary is of another size. */
static int load_resized(struct model *m, const struct config *c, const struct model_config *then,
                        bool optimizer, const char *dir, struct error *e) {
    long long from = then->vocab_size, to = c->model.vocab_size;
    if (checkpoint_load_from(dir, m, then, optimizer, e) != 0)
        return -1;
    if (is_rank0(m) && to > from)
        fprintf(stderr,
                "weights from %s: vocab_size %lld is now %lld; the %lld new rows%s are the mean of the old\n",
                dir, from, to, to - from, c->model.tie_word_embeddings ? "" : " of embedding and lm_head");
    else if (is_rank0(m))
        fprintf(stderr, "weights from %s: vocab_size %lld is now %lld; the last %lld rows are left out\n",
                dir, from, to, from - to);
    return 0;
}

/* Load the weights of another run, which init_from_report has checked, and with init_optimizer = keep its optimizer
 * state. */
static int load_from(struct model *m, const struct config *c, struct trainer_state *p, const char *dir,
                     struct error *e) {
    bool optimizer = c->train.init_optimizer == OPTIMIZER_KEEP;
    struct model_config then;
    struct model_comparison found;
    struct trainer_state from;
    if (checkpoint_compare(dir, &c->model, c->train.seq_len, &then, &found, e) != 0)
        return -1;
    if (optimizer && checkpoint_read_trainer_state(dir, &from, e) != 0)
        return -1;
    if (optimizer)
        p->history.updates = from.history.updates; /* for the bias correction of the moments */
    if (then.vocab_size != c->model.vocab_size)
        return load_resized(m, c, &then, optimizer, dir, e);
    if (checkpoint_load_from(dir, m, &then, false, e) != 0)
        return -1;
    if (is_rank0(m))
        fprintf(stderr, "weights from %s\n", dir);
    return optimizer ? checkpoint_load_optimizer(dir, m, e) : 0;
}

static int initialize_from(struct model *m, const struct config *c, struct trainer_state *p, const char *path,
                           struct error *e) {
    char dir[MAX_TEXT];
    return ranks_find_checkpoint(m->comm, path, dir, e) != 0 ||
                   comm_agree(m->comm, load_from(m, c, p, dir, e), e) != 0
               ? -1
               : 0;
}

/* Load the newest checkpoint that loads, which must be the same on all ranks. 1: resumed; 0: there is none. */
static int resume(struct model *m, const struct config *c, struct trainer_state *p, struct error *e) {
    char dir[MAX_TEXT] = "";
    int status = checkpoint_resume(c->run.dir, m, c, p, dir, is_rank0(m), e);
    if (comm_agree(m->comm, status < 0 ? -1 : 0, e) != 0)
        return -1;
    const char *rank0_dir = comm_all_gather_small(m->comm, dir, MAX_TEXT);
    if (strcmp(rank0_dir, dir) != 0)
        status = fail_user(
            e,
            "found checkpoint \"%s\", and rank 0 found \"%s\"; run.dir must be the same directory on "
            "all ranks",
            dir, rank0_dir);
    if (status == 1 && is_rank0(m)) {
        fprintf(stderr, "resuming from %s\n", dir);
        status = checkpoint_prune(c->run.dir, c, p, e) == 0 ? 1 : -1;
    }
    return comm_agree(m->comm, status < 0 ? -1 : 0, e) == 0 ? status : -1;
}

int resume_or_initialize(struct model *m, const struct config *c, struct trainer_state *p, struct error *e) {
    int status = resume(m, c, p, e);
    if (status < 0)
        return -1;
    if (status == 0 && comm_agree(m->comm, model_initialize(m, (uint64_t)c->train.seed, e), e) != 0)
        return -1;
    if (status == 0 && c->train.init_from[0] && initialize_from(m, c, p, c->train.init_from, e) != 0)
        return -1;
    struct step_state state = {.history = p->history};
    m->k->step_write(m->dev, m->state, &state);
    return 0;
}

/* ---- precision ---- */

/* How one rank would compute. */
struct precision_choice {
    bool found;              /* a checkpoint; rank 0 looks for it */
    enum precision recorded; /* in it; PRECISION_AUTO: nothing */
    enum precision fastest;
};

/* What the newest checkpoint of run_dir with a readable trainer.json records. */
static int find_recorded(const char *run_dir, struct precision_choice *choice, struct error *e) {
    int64_t *steps = NULL;
    int count = checkpoint_list_steps(run_dir, &steps, e);
    for (int i = 0; i < count && !choice->found; i++) {
        char dir[PATH_BYTES], value[MAX_TEXT];
        struct error unreadable; /* resuming reports it */
        checkpoint_path(dir, run_dir, steps[i]);
        choice->found = checkpoint_setting(dir, "system.precision", value, &unreadable) == 0;
        if (choice->found)
            choice->recorded = strcmp(value, "bf16") == 0   ? PRECISION_BF16
                               : strcmp(value, "fp32") == 0 ? PRECISION_FP32
                                                            : PRECISION_AUTO;
    }
    free(steps);
    return count < 0 ? -1 : 0;
}

int resolve_precision(struct comm *comm, struct config *c, bool cuda, enum precision fastest,
                      struct error *e) {
    struct precision_choice choice = {.fastest = fastest};
    if (c->system.precision != PRECISION_AUTO)
        return 0;
    if (comm_agree(comm, comm->rank == 0 ? find_recorded(c->run.dir, &choice, e) : 0, e) != 0)
        return -1;
    const struct precision_choice *all = comm_all_gather_small(comm, &choice, sizeof choice);
    bool bf16 = all[0].recorded == PRECISION_BF16;
    if (all[0].found && all[0].recorded == PRECISION_AUTO)
        bf16 = cuda;
    for (int i = 0; i < comm->ranks && !all[0].found; i++)
        bf16 = (i == 0 || bf16) && all[i].fastest == PRECISION_BF16;
    c->system.precision = bf16 ? PRECISION_BF16 : PRECISION_FP32;
    return 0;
}

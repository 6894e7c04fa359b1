#include "model/train/banner.h"

#include <stdio.h>

#include "model/checkpoint/saver.h"
#include "model/info/info.h"
#include "model/train/evaluation.h"

void banner_print_ignored(const struct config *c, int ranks) {
    if (ranks == 1 && c->system.comm != COMM_AUTO)
        fprintf(stderr, "system.comm ignored: single-process run\n");
}

void banner_print(const struct config *c, const struct model *m, int64_t data_tokens, int data_files,
                  bool async_saving) {
    if (m->comm->ranks > 1)
        fprintf(stderr, "%d ranks over %s, zero_stage %d; each ", m->comm->ranks, m->comm->ops->name,
                m->partition.zero_stage);
    fprintf(stderr, "%s\n", m->k->describe(m->dev));
    fprintf(stderr,
            "model: %.2fM parameters, %lld layers; data: %lld tokens in %d file%s; %lld tokens a step",
            (double)m->params.num_params / 1e6, (long long)c->model.num_hidden_layers, (long long)data_tokens,
            data_files, data_files == 1 ? "" : "s", (long long)c->train.batch_tokens);
    if (c->train.epochs > 0)
        fprintf(stderr, "; %lld steps (train.epochs = %g)", (long long)c->train.total_steps, c->train.epochs);
    if (c->train.tokens_per_param > 0)
        fprintf(stderr, "; %lld steps (train.tokens_per_param = %g)", (long long)c->train.total_steps,
                c->train.tokens_per_param);
    fputc('\n', stderr);
    banner_print_ignored(c, m->comm->ranks);
    if (c->system.deterministic)
        info_print_determinism(stderr, m);
    if (!async_saving)
        fprintf(stderr, "checkpointing synchronously: not enough host memory for a snapshot (%.2f GB)\n",
                (double)saver_snapshot_bytes(m) / 1e9);
}

void banner_print_end(const struct config *c, const struct trainer_state *trainer, int stop) {
    bool out_of_patience = patience_is_over(trainer, c->train.patience);
    if (out_of_patience)
        fprintf(stderr, "train.patience = %lld: validation %s has not improved since step %lld (%.7g)\n",
                (long long)c->train.patience, best_by_names[trainer->best_by], (long long)trainer->best_step,
                trainer->best_value);
    if (stop && !out_of_patience)
        fprintf(stderr, "stopped by signal %d after step %lld; run the same command to continue\n", stop,
                (long long)trainer->step);
    else
        fprintf(stderr, "done: %lld steps, %lld tokens in %.1f s of training; %s\n", (long long)trainer->step,
                (long long)trainer->tokens, trainer->seconds, c->run.dir);
}

void banner_print_finished(const struct config *c, const struct trainer_state *trainer) {
    const struct train_config *t = &c->train;
    printf("%s: already finished: it is at step %lld, and ", c->run.dir, (long long)trainer->step);
    if (trainer->step < t->total_steps)
        printf("validation %s has not improved in train.patience = %lld evaluations since step %lld; raise "
               "it to continue\n",
               best_by_names[t->best_by], (long long)t->patience, (long long)trainer->best_step);
    else if (t->epochs > 0)
        printf("train.epochs = %g are %lld steps; raise it to continue\n", t->epochs,
               (long long)t->total_steps);
    else if (t->tokens_per_param > 0)
        printf("train.tokens_per_param = %g are %lld steps; raise it to continue\n", t->tokens_per_param,
               (long long)t->total_steps);
    else
        printf("train.steps is %lld; raise it to continue\n", (long long)t->total_steps);
}

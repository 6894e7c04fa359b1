#include "model/train/banner.h"

#include <stdio.h>

#include "model/checkpoint/saver.h"
#include "model/info/info.h"

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
    fputc('\n', stderr);
    banner_print_ignored(c, m->comm->ranks);
    if (c->system.deterministic)
        info_print_determinism(stderr, m);
    if (!async_saving)
        fprintf(stderr, "checkpointing synchronously: not enough host memory for a snapshot (%.2f GB)\n",
                (double)saver_snapshot_bytes(m) / 1e9);
}

#include "cli/banner.h"

#include <stdio.h>

#include "model/info/info.h"

void banner_print_ignored(const struct run *r) {
    if (single_rank(r) && r->config.system.comm != COMM_AUTO)
        fprintf(stderr, "system.comm ignored: single-process run\n");
}

void banner_print(const struct run *r, bool async_saving) {
    const struct config *c = &r->config;
    if (!is_rank0(r))
        return;
    if (!single_rank(r))
        fprintf(stderr, "%d ranks over %s, zero_stage %d; each ", r->comm->ranks, r->model.comm->ops->name,
                r->model.partition.zero_stage);
    fprintf(stderr, "%s\n", r->k->describe(r->dev));
    fprintf(stderr,
            "model: %.2fM parameters, %lld layers; data: %lld tokens in %d file%s; %lld tokens a step\n",
            (double)r->model.params.num_params / 1e6, (long long)c->model.num_hidden_layers,
            (long long)shards_tokens(r->train), shards_files(r->train),
            shards_files(r->train) == 1 ? "" : "s", (long long)c->train.batch_tokens);
    banner_print_ignored(r);
    if (c->system.deterministic)
        info_print_determinism(stderr, &r->model);
    if (!async_saving)
        fprintf(stderr, "checkpointing synchronously: not enough host memory for a snapshot (%.2f GB)\n",
                (double)saver_snapshot_bytes(&r->model) / 1e9);
}

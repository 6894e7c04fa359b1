#include "cli/run.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "model/flops.h"

void run_release(struct run *r) {
    saver_close(r->saver);
    metrics_close(r->metrics);
    if (r->decoder.m)
        decoder_free(&r->decoder);
    model_free(&r->model);
    shards_close(r->train);
    shards_close(r->val);
    tokenizer_close(r->tokenizer);
    free(r->tokenizer_text);
    free(r->tokens);
    free(r->targets);
    if (r->device_comm && r->device_comm != r->comm)
        r->device_comm->ops->close(r->device_comm);
    if (r->dev)
        r->k->close(r->dev);
    if (r->lock > 0)
        close(r->lock);
    if (r->comm)
        r->comm->ops->close(r->comm);
}

/* ---- devices ---- */

int run_open_device(struct run *r, struct error *e) {
    const struct system_config *s = &r->config.system;
    bool cuda = s->device == DEVICE_CUDA || (s->device == DEVICE_AUTO && cuda_devices() > 0);
    bool bf16 = s->precision == PRECISION_BF16 || (s->precision == PRECISION_AUTO && cuda);
    struct device_options options = {.threads = (int)s->threads,
                                     .precision = bf16 ? DEVICE_BF16 : DEVICE_FP32,
                                     .deterministic = s->deterministic,
                                     .graphs = s->graph == GRAPH_AUTO && r->profile_steps == 0,
                                     .comm = r->comm};
    r->k = cuda ? kernels_cuda() : kernels_cpu();
    if (!r->k)
        return fail_user(e, "system.device = cuda, but this program was built without CUDA; use auto or cpu");
    if (s->comm == COMM_MPI && !single_rank(r) && strcmp(r->comm->ops->name, "mpi") != 0)
        return fail_user(e, "system.comm = mpi, but mpirun did not start these ranks; start them with "
                            "scripts/launch.sh, or use auto");
    if (r->profile_steps > 0)
        r->k = kernels_traced(r->k);
    r->dev = r->k->open(&options, e);
    return r->dev ? 0 : -1;
}

static void progress_comm(void *comm) {
    ((struct comm *)comm)->ops->progress(comm);
}

int run_join_devices(struct run *r, struct error *e) {
    static const enum comm_backend backends[] = {
        [COMM_AUTO] = COMM_BACKEND_AUTO, [COMM_MPI] = COMM_BACKEND_HOST, [COMM_NCCL] = COMM_BACKEND_NCCL};
    if (comm_agree(r->comm, run_open_device(r, e), e) != 0)
        return -1;
    if (!single_rank(r))
        r->device_comm = r->k->open_comm(r->dev, r->comm, backends[r->config.system.comm], e);
    if (comm_agree(r->comm, r->device_comm || single_rank(r) ? 0 : -1, e) != 0)
        return -1;
    if (r->device_comm)
        r->k->set_progress_callback(r->dev, progress_comm, r->device_comm);
    return 0;
}

/* ---- the model, the tokenizer ---- */

int run_build_model(struct run *r, bool training, struct error *e) {
    const struct train_config *t = &r->config.train;
    struct model_options options = {
        .shape = {t->micro_batch, t->seq_len, r->config.system.recompute, training},
        .weight_decay = t->weight_decay,
        .mix_lr_scale = t->mix_lr_scale,
        .comm = r->device_comm,
        .zero_stage = (int)r->config.system.zero_stage,
        .reduce_dtype = r->config.system.reduce_dtype == REDUCE_BF16 ? DTYPE_BF16 : DTYPE_F32};
    r->host_memory = kernels_cpu()->memory_available(NULL);
    if (model_create(&r->model, &r->config.model, r->k, r->dev, &options, e) != 0)
        return -1;
    size_t bytes = (size_t)(t->micro_batch * t->seq_len) * sizeof(int32_t);
    r->tokens = malloc(bytes);
    r->targets = malloc(bytes);
    if (!r->tokens || !r->targets)
        return fail_run(e, "out of memory for a batch of tokens");
    struct flops f = flops_per_token(&r->config.model, t->seq_len);
    r->flops_per_token = f.matmul + f.attention + f.mixing;
    return 0;
}

int run_open_tokenizer(struct run *r, const char *name, struct error *e) {
    if (strcmp(name, "none") == 0 || name[0] == '\0')
        return 0;
    if (strcmp(name, "bytes") != 0 &&
        checkpoint_tokenizer(name, &r->tokenizer_text, &r->tokenizer_bytes, e) != 0)
        return -1;
    r->tokenizer = tokenizer_open(name, r->config.model.vocab_size, e);
    return r->tokenizer ? 0 : -1;
}

/* ---- evaluation ---- */

double run_evaluate(struct run *r, int64_t batches, int64_t *tokens) {
    const struct train_config *t = &r->config.train;
    int64_t B = t->micro_batch, T = t->seq_len, sequences = shards_sequences(r->val);
    if (batches > 0 && batches * B < sequences)
        sequences = batches * B;
    struct step_state before, after;
    r->k->step_read(r->dev, r->model.state, &before);
    r->k->step_begin(r->dev, r->model.state, before.step, before.lr);
    for (int64_t i = r->model.comm->rank * B; i < sequences; i += r->model.comm->ranks * B) {
        for (int64_t b = 0; b < B; b++) {
            int32_t *targets = r->targets + b * T;
            shards_read(r->val, i + b < sequences ? i + b : i, r->tokens + b * T, targets);
            for (int64_t j = 0; j < T && i + b >= sequences; j++)
                targets[j] = -1; /* the last batch is padded with sequences that do not count */
        }
        model_evaluate(&r->model, r->tokens, r->targets, 1);
    }
    r->model.comm->ops->all_reduce(r->model.comm, &r->model.state->loss, 1);
    r->k->step_read(r->dev, r->model.state, &after);
    r->k->step_write(r->dev, r->model.state, &before);
    *tokens = sequences * T;
    return after.loss / (double)*tokens;
}

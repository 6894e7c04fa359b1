/* train_iha: pretrain and fine-tune GPTs with Interleaved Head Attention. Plain C; the name marks the entry
 * point.
 *
 * A training run is train(): read the configuration, open the data, build the model, resume or initialise,
 * then step by step train, evaluate, sample and save. The other commands read a checkpoint. */
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "data/chat.h"
#include "data/check.h"
#include "data/choices.h"
#include "data/dataset.h"
#include "data/loader.h"
#include "data/text.h"
#include "data/tokenizer.h"
#include "data/tokenizer_export.h"
#include "data/turns.h"
#include "kernels/clock.h"
#include "kernels/comm.h"
#include "kernels/limits.h"
#include "model/checkpoint/checkpoint.h"
#include "model/checkpoint/files.h"
#include "model/checkpoint/saver.h"
#include "model/config/command_line.h"
#include "model/config/config.h"
#include "model/flops.h"
#include "model/generate/attention_weights.h"
#include "model/generate/chat.h"
#include "model/generate/decode.h"
#include "model/generate/generate.h"
#include "model/info/info.h"
#include "model/info/info_estimate.h"
#include "model/model.h"
#include "model/train/banner.h"
#include "model/train/choice_scores.h"
#include "model/train/evaluation.h"
#include "model/train/init_from.h"
#include "model/train/metrics.h"
#include "model/train/profile.h"
#include "model/train/rank_checks.h"
#include "model/train/resume.h"
#include "model/train/run_dir.h"
#include "model/train/schedule.h"
#include "model/train/signals.h"
#include "model/train/skips.h"
#include "model/train/start_record.h"
#include "model/train/status.h"
#include "model/train/validation.h"

enum { DEFAULT_TIMEOUT = 300 }; /* seconds to wait for a rank before the configuration has been read */
enum { DECODE_CHUNK = 64 };     /* tokens of a prompt that are fed at a time */
enum { STEPS_KNOWN = 4 };       /* at least the steps in flight and the next one */

/* release frees every pointer that is not NULL. */
struct run {
    struct config config;
    struct comm *comm; /* between the ranks' hosts; NULL in commands that run on one rank */
    const struct kernels *k;
    struct device *dev;
    struct comm *device_comm; /* between the ranks' devices, the same as comm on the CPU; NULL on one rank */
    size_t host_memory;       /* bytes free before the model was created */
    bool trains;              /* in run.dir */
    struct model model;
    struct loader *train, *val;
    struct loader_step batch; /* this rank's sequences of the next step */
    struct tokenizer *tokenizer;
    char *tokenizer_text; /* of tokenizer.json, for checkpoints; NULL: none */
    size_t tokenizer_bytes;
    char *saved_tokenizer;   /* the same of the byte tokenizer */
    char *tokenizer_config;  /* of tokenizer_config.json, for checkpoints; NULL: none */
    struct end_ids ends;     /* a text ends at these ids, and begins after the first */
    char *generation_config; /* them, for checkpoints; NULL: none */
    struct chat *chat;       /* the chat template of the data or the checkpoint; NULL: none */
    char *chat_json;         /* its text, for checkpoints */
    struct decoder decoder;
    struct metrics *metrics; /* on rank 0 */
    struct status status;
    struct trainer_state trainer;
    struct saver *saver;
    int steps_in_flight;                 /* begun, and their state not collected yet */
    double step_start;                   /* clock_seconds() from which the next collected step is timed */
    int64_t profile_steps;               /* to trace; 0: none */
    int64_t profile_from;                /* the first of them */
    int lock;                            /* descriptor of run.dir/lock */
    struct validation_buffers evaluated; /* of an evaluation */
    double val_bytes_per_token;          /* 0: not known */
    struct choice_set tasks[MAX_CHOICE_SETS];
    int task_count;
    struct flops flops;     /* per token; with segments without attention */
    double attention_flops; /* with segments: of the sequences that read_step has read, on this rank */
    double step_attention_flops[STEPS_KNOWN]; /* and on all ranks, of step n at [n % STEPS_KNOWN] */
    struct part_norms norms[STEPS_KNOWN];     /* likewise, of the steps that log_norms_every is due at */
};

static bool is_rank0(const struct run *r) {
    return !r->comm || r->comm->rank == 0;
}

static bool single_rank(const struct run *r) {
    return !r->comm || r->comm->ranks == 1;
}

static void release(struct run *r) {
    saver_close(r->saver);
    metrics_close(r->metrics);
    if (r->decoder.m)
        decoder_free(&r->decoder);
    model_free(&r->model);
    loader_close(r->train);
    loader_close(r->val);
    choices_close(r->tasks, r->task_count);
    tokenizer_close(r->tokenizer);
    free(r->tokenizer_text);
    free(r->saved_tokenizer);
    free(r->tokenizer_config);
    free(r->generation_config);
    validation_buffers_free(&r->evaluated);
    chat_close(r->chat);
    free(r->chat_json);
    if (r->device_comm && r->device_comm != r->comm)
        r->device_comm->ops->close(r->device_comm);
    if (r->dev)
        r->k->close(r->dev);
    if (r->lock > 0)
        close(r->lock);
    if (r->comm)
        r->comm->ops->close(r->comm);
}

/* ---- phases that several commands share ---- */

static bool uses_cuda(const struct run *r) {
    enum device_kind device = r->config.system.device;
    return device == DEVICE_CUDA || (device == DEVICE_AUTO && cuda_devices(NULL) > 0);
}

/* What system.precision = auto is on this machine. */
static enum precision fastest_precision(const struct run *r) {
    return uses_cuda(r) || cpu_multiplies_bf16() ? PRECISION_BF16 : PRECISION_FP32;
}

/* That GPUs of this machine cannot be used. One of its ranks says it. */
static void warn_of_unused_gpus(const struct run *r) {
    struct error why;
    if (r->config.system.device == DEVICE_AUTO && (!r->comm || r->comm->local_rank == 0) &&
        cuda_devices(&why) == 0 && why.text[0])
        fprintf(stderr,
                "warning: system.device = auto takes the CPU: %s; set system.device = cpu to leave this warning out\n",
                why.text);
}

/* Open this rank's device as [system] asks. */
static int open_device(struct run *r, struct error *e) {
    const struct system_config *s = &r->config.system;
    bool cuda = uses_cuda(r);
    bool bf16 = (s->precision == PRECISION_AUTO ? fastest_precision(r) : s->precision) == PRECISION_BF16;
    char plans[MAX_TEXT + 32];
    if (r->trains)
        snprintf(plans, sizeof plans, "%s/plans-%05d.txt", r->config.run.dir, r->comm->rank);
    struct device_options options = {.threads = (int)s->threads,
                                     .precision = bf16 ? DEVICE_BF16 : DEVICE_FP32,
                                     .deterministic = s->deterministic,
                                     .graphs = s->graph == GRAPH_AUTO && r->profile_steps == 0,
                                     .comm = r->comm,
                                     .plan_file = r->trains ? plans : NULL};
    if (!cuda)
        warn_of_unused_gpus(r);
    r->k = cuda ? kernels_cuda() : bf16 ? kernels_cpu_bf16() : kernels_cpu();
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

/* Open the devices of all ranks and the communicator between them. All ranks call it. */
static int join_devices(struct run *r, struct error *e) {
    static const enum comm_backend backends[] = {
        [COMM_AUTO] = COMM_BACKEND_AUTO, [COMM_MPI] = COMM_BACKEND_HOST, [COMM_NCCL] = COMM_BACKEND_NCCL};
    if ((!single_rank(r) && ranks_check_same_device(r->comm, uses_cuda(r), e) != 0) ||
        comm_agree(r->comm, open_device(r, e), e) != 0)
        return -1;
    if (!single_rank(r))
        r->device_comm = r->k->open_comm(r->dev, r->comm, backends[r->config.system.comm], e);
    if (comm_agree(r->comm, r->device_comm || single_rank(r) ? 0 : -1, e) != 0)
        return -1;
    if (r->device_comm)
        r->k->set_progress_callback(r->dev, progress_comm, r->device_comm);
    return 0;
}

static int64_t passes_per_step(const struct run *r) {
    const struct train_config *t = &r->config.train;
    return t->batch_tokens / (r->comm->ranks * t->micro_batch * t->seq_len);
}

/* Create the model, with uninitialised weights, and the buffers of an evaluation. */
static int build_model(struct run *r, bool training, struct error *e) {
    const struct train_config *t = &r->config.train;
    struct model_options options = {.shape = pass_shape_of(&r->config, training),
                                    .weight_decay = t->weight_decay,
                                    .mix_lr_scale = t->mix_lr_scale,
                                    .muon_lr_scale = config_muon_lr_scale(&r->config),
                                    .scores = r->task_count > 0,
                                    .comm = r->device_comm,
                                    .zero_stage = (int)r->config.system.zero_stage,
                                    .reduce_dtype = r->config.system.reduce_dtype == REDUCE_BF16 ? DTYPE_BF16
                                                                                                 : DTYPE_F32};
    if (is_rank0(r) && r->k->dtypes(r->dev).compute == DTYPE_BF16 && !uses_cuda(r) && !cpu_multiplies_bf16())
        fprintf(stderr, "warning: system.precision = bf16, but this processor has neither avx512_bf16 nor "
                        "amx_bf16: bf16 is converted to fp32, which is slower than fp32 itself\n");
    r->host_memory = kernels_cpu()->memory_available(NULL);
    if (model_create(&r->model, &r->config.model, r->k, r->dev, &options, e) != 0)
        return -1;
    bool labelled = r->val && loader_has_labels(r->val);
    if (r->val && validation_buffers_create(&r->evaluated, &options.shape, labelled, e) != 0)
        return -1;
    r->flops = flops_per_token(&r->config.model, t->seq_len);
    if (r->config.data.segments != SEGMENTS_NONE)
        r->flops.attention = 0;
    return 0;
}

/* name: "none", "bytes" or a tokenizer file. */
static int open_tokenizer(struct run *r, const char *name, struct error *e) {
    if (strcmp(name, "none") == 0 || name[0] == '\0')
        return 0;
    if (strcmp(name, "bytes") != 0 &&
        checkpoint_tokenizer(name, &r->tokenizer_text, &r->tokenizer_bytes, e) != 0)
        return -1;
    r->tokenizer = tokenizer_open(name, r->config.model.vocab_size, e);
    return r->tokenizer ? 0 : -1;
}

static int read_sequence(void *loader, int64_t i, int32_t *tokens, int32_t *targets, int32_t *segments,
                         struct error *e) {
    return loader_read(loader, i, tokens, targets, segments, e);
}

/* The first run.eval_batches batches of data.val (0: all of it). */
static int validation_data(const struct run *r, struct validation_data *data, struct error *e) {
    int64_t some = r->config.run.eval_batches * r->config.train.micro_batch;
    *data = (struct validation_data){
        .labelled = loader_has_labels(r->val), .source = r->val, .read = read_sequence};
    return loader_count(r->val, some > 0 ? some : INT64_MAX, &data->sequences, e);
}

/* Check that a target counts in what an evaluation reads. Without labels all do. */
static int check_validation(const struct run *r, struct error *e) {
    struct validation_data data;
    bool found;
    if (!loader_has_labels(r->val))
        return 0;
    if (validation_data(r, &data, e) != 0 ||
        validation_find_target(&data, r->config.train.seq_len, &found, e) != 0)
        return -1;
    if (!found)
        return fail_user(
            e,
            "data.val = %s: no label counts in the %lld sequences that an evaluation reads; give "
            "other shards, or raise run.eval_batches",
            r->config.data.val, (long long)data.sequences);
    return 0;
}

/* All ranks call it, and fail together. */
static int run_validation(struct run *r, struct evaluation *v, struct error *e) {
    struct validation_data data;
    if (comm_agree(r->comm, validation_data(r, &data, e), e) != 0)
        return -1;
    int status = validate(&r->model, &data, &r->evaluated, v, e);
    v->bytes_per_token = data.labelled ? 0 : r->val_bytes_per_token;
    return status;
}

/* ---- choices ---- */

/* Open eval.tasks, on every rank. */
static int open_tasks(struct run *r, struct error *e) {
    const struct config *c = &r->config;
    if (!c->eval.tasks[0])
        return 0;
    if (!c->model.causal)
        return fail_user(e,
                         "eval.tasks needs a model that predicts the next token, and model.causal is false");
    r->task_count = choices_open(c->eval.tasks, c->model.vocab_size, c->train.seq_len, r->tasks, e);
    if (r->task_count >= 0)
        return 0;
    r->task_count = 0;
    return -1;
}

_Static_assert((int)MAX_ENDINGS == (int)MAX_CHOICE_ENDINGS, "data/ and model/ do not know each other");

static void read_choice(const void *set, int64_t i, struct choice *choice) {
    struct choice_item item;
    choices_get(set, i, &item);
    *choice = (struct choice){.label = item.label,
                              .endings = item.endings,
                              .context = item.context,
                              .context_length = item.context_length};
    memcpy(choice->ids, item.ids, sizeof choice->ids);
    memcpy(choice->lengths, item.lengths, sizeof choice->lengths);
    memcpy(choice->characters, item.characters, sizeof choice->characters);
}

/* Score all tasks, and print a table on rank 0; in a run (step >= 0) also write them to metrics.jsonl. All ranks call
 * it, and fail together. */
static int run_tasks(struct run *r, FILE *out, int64_t step, struct error *e) {
    struct choice_data data[MAX_CHOICE_SETS];
    struct choice_scores scores[MAX_CHOICE_SETS];
    int64_t most = r->config.eval.task_items;
    for (int i = 0; i < r->task_count; i++) {
        const struct choice_set *set = &r->tasks[i];
        data[i] = (struct choice_data){.name = set->name,
                                       .items = most > 0 && most < set->items ? most : set->items,
                                       .start = set->start,
                                       .source = set,
                                       .read = read_choice};
        if (score_choices(&r->model, &data[i], &scores[i], e) != 0)
            return -1;
    }
    if (!is_rank0(r) || r->task_count == 0)
        return 0;
    choice_scores_print(out, step, data, scores, r->task_count);
    for (int i = 0; i < r->task_count && step >= 0; i++)
        if (metrics_choices(r->metrics, step, &data[i], &scores[i], e) != 0)
            return -1;
    return 0;
}

/* ---- train: one step ---- */

static bool is_due(int64_t every, int64_t step) {
    return every > 0 && step % every == 0;
}

/* Get this rank's sequences of the next step, which a thread reads ahead. */
static int read_step(struct run *r, struct error *e) {
    const struct config *c = &r->config;
    if (loader_next(r->train, &r->batch, e) != 0)
        return -1;
    if (r->batch.segments)
        r->attention_flops = flops_segments(&c->model, c->train.seq_len, r->batch.segments,
                                            passes_per_step(r) * c->train.micro_batch);
    if (is_rank0(r) && loader_epoch_began(r->train)) {
        status_break(&r->status);
        loader_print_epochs(r->train, stderr, r->trainer.step + 1);
    }
    return 0;
}

_Static_assert(MAX_DATA_POSITION == (int)LOADER_POSITION, "a checkpoint holds any position of the loader");

/* Start to read the steps that are left. */
static int start_reading(struct run *r, struct error *e) {
    const struct trainer_state *trainer = &r->trainer;
    struct loader_share share = {r->comm->rank, r->comm->ranks, r->config.train.micro_batch,
                                 passes_per_step(r)};
    struct loader_position position = {.count = trainer->data_position_count};
    memcpy(position.values, trainer->data_position, sizeof position.values);
    return loader_start(r->train, &share, r->config.train.total_steps - trainer->step, trainer->sequences,
                        &position, e);
}

/* Forward and backward over the sequences that read_step has read, then the update. Returns while the device may
 * still work. */
static void train_step(struct run *r) {
    const struct train_config *t = &r->config.train;
    int64_t B = t->micro_batch, T = t->seq_len, passes = passes_per_step(r);
    r->k->step_begin(r->dev, r->model.state, r->trainer.step, schedule_lr(t, r->trainer.step));
    for (int64_t pass = 0; pass < passes; pass++) {
        int64_t offset = pass * B * T;
        struct batch batch = {r->batch.tokens + offset, r->batch.targets + offset,
                              r->batch.segments ? r->batch.segments + offset : NULL};
        model_train_pass(&r->model, batch, 1.0 / (double)t->batch_tokens, (int)pass, (int)passes);
    }
    struct update_hyper hyper = {t->beta1,
                                 t->beta2,
                                 t->eps,
                                 t->grad_clip,
                                 t->skip_zscore,
                                 (double)t->batch_tokens,
                                 schedule_muon_momentum(t, r->trainer.step)};
    bool due = is_due(r->config.run.log_norms_every, r->trainer.step + 1);
    r->model.norms = due ? &r->norms[r->trainer.step % STEPS_KNOWN] : NULL;
    model_update(&r->model, &hyper);
    r->k->step_post(r->dev, r->model.state);
    r->steps_in_flight++;
    r->trainer.sequences += passes * r->comm->ranks * B;
    r->trainer.data_position_count = r->batch.position.count;
    memcpy(r->trainer.data_position, r->batch.position.values, sizeof r->trainer.data_position);
    r->trainer.tokens += t->batch_tokens;
    r->trainer.step++;
}

/* What MFU counts of a step, on all ranks. */
static double step_flops(const struct run *r, int64_t step) {
    double per_token = r->flops.matmul + r->flops.attention + r->flops.mixing;
    return per_token * (double)r->config.train.batch_tokens + r->step_attention_flops[step % STEPS_KNOWN];
}

static bool evaluates(const struct run *r) {
    return (r->val || r->task_count > 0) && r->config.run.eval_every > 0;
}

/* Steps from the end of `step` to the next evaluation, that of the last step included; -1: none. */
static int64_t until_evaluation(const struct run *r, int64_t step) {
    if (!evaluates(r))
        return -1;
    int64_t every = r->config.run.eval_every, left = r->config.train.total_steps - step;
    int64_t next = (every - step % every) % every;
    return next < left ? next : left;
}

/* Collect the state of the oldest step in flight, record it in metrics.jsonl, and fail after too many skipped
 * steps in a row. Every rank has the same state; rank 0 writes. */
static int record_step(struct run *r, struct error *e) {
    const struct config *c = &r->config;
    struct trainer_state *trainer = &r->trainer;
    struct step_state state;
    r->k->step_collect(r->dev, &state);
    r->steps_in_flight--;
    double seconds = clock_seconds() - r->step_start;
    r->step_start += seconds;
    trainer->history = state.history;
    trainer->seconds += seconds;
    double rate = (double)c->train.batch_tokens / seconds, peak = r->k->peak_flops(r->dev) * r->comm->ranks;
    struct step_record record = {
        .step = state.step + 1,
        .steps = c->train.total_steps,
        .tokens = trainer->tokens - r->steps_in_flight * c->train.batch_tokens,
        .targets = state.targets,
        .some_ignored = loader_has_labels(r->train) || c->data.packing == PACKING_FIT,
        .loss = state.loss,
        .lr = state.lr,
        .grad_norm = state.grad_norm,
        .norms = is_due(c->run.log_norms_every, state.step + 1) ? &r->norms[state.step % STEPS_KNOWN] : NULL,
        .seconds = seconds,
        .tokens_per_second = rate,
        .mfu = peak > 0 ? step_flops(r, state.step) / seconds / peak : 0,
        .skipped = state.skip != STEP_APPLIED && state.skip != STEP_EMPTY,
        .until_evaluation = until_evaluation(r, state.step + 1)};
    int status = is_rank0(r) ? metrics_step(r->metrics, &record, e) : 0;
    if (is_rank0(r) && is_due(c->run.log_every, record.step))
        status_step(&r->status, &record);
    /* skips_fail is collective: a rank whose write failed calls it too. */
    return state.history.skips_run > c->train.max_skips
               ? skips_fail(&r->model, &state, c->train.skip_zscore, e)
               : status;
}

/* Record steps until at most max_in_flight are left. */
static int record_steps(struct run *r, int max_in_flight, struct error *e) {
    int status = 0;
    while (status == 0 && r->steps_in_flight > max_in_flight)
        status = record_step(r, e);
    return status;
}

/* ---- between steps: evaluate, sample, save ---- */

/* What to do after the current step. The run's last step, and one at which a signal stops it, are saved. */
struct step_actions {
    bool ends, evaluates, samples, saves;
};

/* Evaluate on data.val. A new best may have to be saved, and the patience that is over ends the run: added to *actions. */
static int evaluate_loss(struct run *r, struct step_actions *actions, struct error *e) {
    struct trainer_state *trainer = &r->trainer;
    int64_t patience = r->config.train.patience;
    struct evaluation v;
    if (run_validation(r, &v, e) != 0)
        return -1;
    actions->saves |= evaluation_note(trainer, &v, patience, actions->saves);
    if (patience_is_over(trainer, patience))
        actions->ends = actions->saves = true;
    if (!is_rank0(r))
        return 0;
    status_break(&r->status);
    fprintf(stderr, "step %lld: val_loss %.4f over %lld tokens", (long long)trainer->step, v.loss,
            (long long)v.targets);
    if (v.labelled)
        fprintf(stderr, ", accuracy %.4f, exact %.4f of %lld segments", evaluation_accuracy(&v),
                evaluation_exact(&v), (long long)v.segments);
    if (v.bytes_per_token > 0)
        fprintf(stderr, ", %.4f bits per byte", evaluation_bits_per_byte(&v));
    fputc('\n', stderr);
    return metrics_eval(r->metrics, trainer->step, &v, e);
}

static int evaluate(struct run *r, struct step_actions *actions, struct error *e) {
    if (r->val && comm_agree(r->comm, evaluate_loss(r, actions, e), e) != 0)
        return -1;
    if (is_rank0(r))
        status_break(&r->status);
    return run_tasks(r, stderr, r->trainer.step, e);
}

enum { SAMPLE_TOKENS = 256 };

static bool is_not_end(void *ends, int32_t token) {
    return !end_ids_has(ends, token);
}

/* A sample from the start of a document, to stdout and appended to run.dir/samples.txt. The other ranks generate
 * it too, since waiting for rank 0 might take longer than peer_timeout. */
static int print_sample(struct run *r, struct error *e) {
    char path[MAX_TEXT + 32];
    snprintf(path, sizeof path, "%s/samples.txt", r->config.run.dir);
    int32_t start = r->ends.count ? r->ends.ids[0] : 0;
    struct sampling sampling = {0.8, 0, 1, (uint64_t)(r->config.train.seed + r->trainer.step)};
    if (!is_rank0(r))
        return generate(&r->decoder, &start, 1, r->decoder.capacity - 1, &sampling, is_not_end, &r->ends, e);
    FILE *file = fopen(path, "a");
    if (!file)
        return fail_run(e, "%s: cannot write: %s; %s", path, strerror(errno), files_advice(errno));
    struct text_writer w = {.tokenizer = r->tokenizer, .out = stdout, .copy = file, .ends = &r->ends};
    status_break(&r->status);
    printf("---- sample at step %lld\n", (long long)r->trainer.step);
    fprintf(file, "---- step %lld\n", (long long)r->trainer.step);
    int status = generate(&r->decoder, &start, 1, r->decoder.capacity - 1, &sampling, text_emit, &w, e);
    printf("\n----\n");
    fflush(stdout);
    fprintf(file, "\n");
    int err = files_sync_stream(file);
    if (fclose(file) != 0 && !err)
        err = errno;
    if (status == 0 && err)
        return fail_run(e, "%s: cannot write: %s; %s", path, strerror(err), files_advice(err));
    return status;
}

/* The metrics that precede a checkpoint are on the disk before it is. */
static int save(struct run *r, bool wait, struct error *e) {
    bool bytes = r->saved_tokenizer != NULL;
    const struct checkpoint_job job = {.run_dir = r->config.run.dir,
                                       .config = &r->config,
                                       .tokenizer = bytes ? r->saved_tokenizer : r->tokenizer_text,
                                       .tokenizer_bytes =
                                           bytes ? strlen(r->saved_tokenizer) : r->tokenizer_bytes,
                                       .tokenizer_config = r->tokenizer_config,
                                       .generation_config = r->generation_config,
                                       .chat = r->chat_json,
                                       .trainer = r->trainer,
                                       .model = &r->model};
    if (comm_agree(r->comm, is_rank0(r) ? metrics_sync(r->metrics, e) : 0, e) != 0)
        return -1;
    return saver_save(r->saver, &job, wait, e);
}

static struct step_actions actions_after_step(const struct run *r, bool stop) {
    const struct run_config *c = &r->config.run;
    int64_t step = r->trainer.step;
    bool last = step == r->config.train.total_steps, ends = last || stop;
    return (struct step_actions){.ends = ends,
                                 .evaluates = evaluates(r) && (last || is_due(c->eval_every, step)),
                                 .samples = is_due(c->sample_every, step),
                                 .saves = ends ||
                                          (is_due(c->save_every, step) && r->trainer.history.skips_run == 0)};
}

/* The checkpoint comes last: a run that is resumed from it repeats nothing of this step. */
static int run_actions(struct run *r, struct step_actions actions, struct error *e) {
    if (actions.evaluates && comm_agree(r->comm, evaluate(r, &actions, e), e) != 0)
        return -1;
    if (actions.samples && comm_agree(r->comm, print_sample(r, e), e) != 0)
        return -1;
    return actions.saves ? save(r, actions.ends, e) : 0;
}

static int between_steps(struct run *r, bool stop, struct error *e) {
    struct step_actions actions = actions_after_step(r, stop);
    if (!actions.evaluates && !actions.samples && !actions.saves)
        return 0;
    if (comm_agree(r->comm, record_steps(r, 0, e), e) != 0)
        return -1;
    model_await_params(&r->model); /* collective: on all ranks, before any of them may fail below */
    r->k->range_begin(r->dev, PROFILE_BETWEEN_STEPS, -1);
    int status = run_actions(r, actions, e);
    r->k->range_end(r->dev);
    r->step_start = clock_seconds();
    return status;
}

/* ---- --profile ---- */

enum { PROFILE_WARM_UP = 3 }; /* steps before the first that is traced */

/* Check that the run, now at `step`, has enough steps left to warm up and to trace. */
static int check_profile(struct run *r, int64_t step, struct error *e) {
    r->profile_from = step + PROFILE_WARM_UP;
    if (r->profile_steps == 0 || r->profile_from + r->profile_steps <= r->config.train.total_steps)
        return 0;
    return fail_user(
        e, "--profile %lld traces steps after %d warm-up steps, and the run has %lld left; raise train.steps",
        (long long)r->profile_steps, PROFILE_WARM_UP, (long long)(r->config.train.total_steps - step));
}

/* Print and write rank 0's trace, after the last traced step or when the run stops before it. A failure is only
 * a warning. */
static void end_profile(struct run *r) {
    int64_t steps = r->trainer.step - r->profile_from;
    struct trace *t = steps > 0 ? r->k->trace_end(r->dev) : NULL;
    struct error e;
    if (is_rank0(r))
        status_break(&r->status);
    if (is_rank0(r) && !t)
        fprintf(stderr, steps > 0 ? "warning: --profile: out of memory for the trace\n"
                                  : "--profile: the run stops before the first traced step; no table\n");
    if (is_rank0(r) && t && profile_report(stderr, t, r->config.run.dir, r->profile_from, steps, &e) != 0)
        fprintf(stderr, "warning: %s\n", e.text);
    trace_free(t);
    r->profile_steps = 0;
    r->step_start = clock_seconds();
}

/* ---- the loop ---- */

/* All-gathered after every step. */
struct rank_status {
    int stop;        /* the signal that asked this rank to stop, or 0 */
    int failed;      /* recording the step failed */
    int read_failed; /* reading the sequences of the next step failed */
    enum saver_state saver;
    double attention_flops; /* of the next step: see struct run */
};

/* The status of all ranks together: any signal, any failure, the state of the checkpoint being written, the sum of
 * FLOPs, which is also noted in *r. */
static struct rank_status merge_rank_status(struct run *r, struct rank_status own) {
    const struct rank_status *gathered = comm_all_gather_small(r->comm, &own, sizeof own);
    struct rank_status all = gathered[0];
    for (int i = 1; i < r->comm->ranks; i++) {
        all.stop = all.stop ? all.stop : gathered[i].stop;
        all.failed |= gathered[i].failed;
        all.read_failed |= gathered[i].read_failed;
        all.saver = saver_state_merge(all.saver, gathered[i].saver);
        all.attention_flops += gathered[i].attention_flops;
    }
    r->step_attention_flops[r->trainer.step % STEPS_KNOWN] = all.attention_flops;
    return all;
}

static bool ended_by_patience(const struct run *r) {
    return patience_is_over(&r->trainer, r->config.train.patience);
}

static void print_end(struct run *r, int stop) {
    struct error e;
    if (!is_rank0(r))
        return;
    status_break(&r->status);
    if (start_record_end(&r->config, r->trainer.step, &e) != 0)
        fprintf(stderr, "warning: %s\n", e.text);
    banner_print_end(&r->config, &r->trainer, stop);
    loader_print_sources(r->train, stderr);
    loader_print_packing(r->train, stderr);
}

static int train_loop(struct run *r, struct error *e) {
    const int64_t steps = r->config.train.total_steps;
    struct rank_status all = {0};
    struct error read_error = {0};
    if (r->batch.segments)
        merge_rank_status(r, (struct rank_status){.attention_flops = r->attention_flops});
    r->step_start = clock_seconds();
    while (r->trainer.step < steps && !all.stop && !ended_by_patience(r)) {
        if (r->profile_steps > 0 && r->trainer.step == r->profile_from)
            r->k->trace_begin(r->dev);
        train_step(r);
        /* Read the next step's sequences before the ranks exchange their status, so that all end where one fails. */
        int read_status = r->trainer.step < steps ? read_step(r, &read_error) : 0;
        int status = record_steps(r, r->k->run_ahead, e);
        /* Signals are polled once a step: one that arrives while saving ends the next step. */
        all =
            merge_rank_status(r, (struct rank_status){signals_stop_requested(), status != 0, read_status != 0,
                                                      saver_state(r->saver), r->attention_flops});
        if (all.failed && comm_agree(r->comm, status, e) != 0)
            return -1;
        if (r->profile_steps > 0 && (all.stop || r->trainer.step == r->profile_from + r->profile_steps))
            end_profile(r);
        if (saver_advance(r->saver, all.saver, e) != 0 ||
            between_steps(r, all.stop || all.read_failed, e) != 0)
            return -1;
        if (all.read_failed && !all.stop &&
            !ended_by_patience(r)) { /* what was trained until here is saved */
            *e = read_error;
            return comm_agree(r->comm, read_status, e);
        }
    }
    if (r->profile_steps > 0)
        end_profile(r);
    print_end(r, all.stop);
    return 0;
}

/* ---- preparing a run ---- */

/* The threads start before MPI, so that MPI's threads inherit the blocked signals. Their errors are reported once
 * the ranks can agree on them. */
static int open_comm(struct run *r, struct error *e) {
    struct error thread_error;
    int status = signals_watch(&thread_error) != 0 || !(r->saver = saver_open(&thread_error)) ? -1 : 0;
    if (!(r->comm = comm_open(DEFAULT_TIMEOUT, e)))
        return -1;
    signals_enable_graceful_stop(); /* not before: a rank that waits for others has nothing to save */
    if (status != 0)
        *e = thread_error;
    return comm_agree(r->comm, status, e);
}

/* Validation data must fit train.best_by, and something in it must count. */
static int check_labels(const struct run *r, struct error *e) {
    const struct train_config *t = &r->config.train;
    if (t->best_by != BEST_BY_LOSS && !loader_has_labels(r->val))
        return fail_user(
            e, "train.best_by = %s needs labels, and the shards of data.val = %s have none; use loss",
            best_by_names[t->best_by], r->config.data.val);
    return r->config.run.eval_every > 0 && is_rank0(r) ? check_validation(r, e) : 0;
}

/* data: data.train or data.val. */
static struct loader *open_loader(const struct run *r, const char *data, struct error *e) {
    const struct config *c = &r->config;
    struct loader_options options = {.data = data,
                                     .seq_len = c->train.seq_len,
                                     .vocab_size = c->model.vocab_size,
                                     .fit = c->data.packing == PACKING_FIT,
                                     .shuffle = c->data.shuffle,
                                     .seed = (uint64_t)c->train.seed,
                                     .segments = c->data.segments == SEGMENTS_DOCUMENTS,
                                     .comm = r->comm};
    if (data == c->data.val && mixture_is(data)) {
        fail_user(e, "data.val = %s: only data.train can be a mixture; evaluate each of its globs alone",
                  data);
        return NULL;
    }
    return loader_open(&options, e);
}

/* Set r->ends, and where documents begin. data.separator = auto becomes an id if it is needed, so that a checkpoint
 * records it. */
static int find_documents(struct run *r, struct error *e) {
    struct data_config *d = &r->config.data;
    const char *globs[2 * MAX_SOURCES + 1];
    int count = 0;
    int64_t separator = d->separator;
    struct loader *const loaders[] = {r->train, r->val};
    for (int i = 0; i < 2; i++)
        count += loaders[i] ? loader_globs(loaders[i], globs + count) : 0;
    if (r->task_count > 0)
        globs[count++] = r->config.eval.tasks;
    if (dataset_end_ids(globs, count, r->tokenizer, r->tokenizer_text, r->tokenizer_bytes,
                        r->config.model.vocab_size, &separator, &r->ends, e) != 0)
        return -1;
    if (d->segments == SEGMENTS_NONE && d->packing == PACKING_STREAM)
        return 0;
    if (separator < 0)
        return fail_user(e,
                         "data.separator = auto: neither a dataset.json beside the shards nor data.tokenizer "
                         "gives the id between documents; set data.separator to it");
    d->separator = separator;
    struct document_rule rule = {(int32_t)separator, d->separator_at == SEPARATOR_AT_START};
    for (int i = 0; i < 2; i++)
        if (loaders[i] && loader_set_documents(loaders[i], rule, e) != 0)
            return -1;
    return 0;
}

/* train.epochs needs to know how many sequences there are. */
static int set_total_steps(struct run *r, struct error *e) {
    int64_t sequences = 0;
    if (!(r->config.train.epochs > 0))
        return 0;
    if (r->config.data.packing == PACKING_FIT || mixture_is(r->config.data.train))
        return fail_user(e, "train.epochs is not defined for %s; set train.steps instead",
                         mixture_is(r->config.data.train) ? "several data sets in data.train"
                                                          : "data.packing = fit");
    if (loader_count(r->train, INT64_MAX, &sequences, e) != 0)
        return -1;
    return epochs_to_steps(&r->config.train, sequences, e);
}

/* The chat template beside the training data, and what checkpoints say about it and about the ends of texts. */
static int find_chat(struct run *r, struct error *e) {
    const char *globs[MAX_SOURCES];
    struct end_ids ends = r->ends;
    if (chat_of_shards(globs, loader_globs(r->train, globs), r->config.model.vocab_size, &r->chat, e) != 0 ||
        (r->chat && r->tokenizer &&
         chat_check_tokenizer(r->chat, r->tokenizer_text, r->tokenizer_bytes, e) != 0))
        return -1;
    /* Generation stops there; samples of the training go on, since they begin with a user's turn. */
    if (r->chat && !chat_refusal(r->chat))
        end_ids_add(&ends, chat_end(r->chat));
    r->chat_json = r->chat ? chat_json(r->chat) : NULL;
    r->generation_config = ends.count ? end_ids_json(&ends) : NULL;
    if ((ends.count && !r->generation_config) || (r->chat && !r->chat_json))
        return fail_run(e, "out of memory for a checkpoint's files");
    return 0;
}

/* What a checkpoint has of the tokenizer for Transformers. */
static int describe_tokenizer(struct run *r, struct error *e) {
    const struct config *c = &r->config;
    if (!r->tokenizer)
        return 0;
    bool bytes = !r->tokenizer_text;
    if (bytes && !(r->saved_tokenizer = tokenizer_bytes_json()))
        return fail_run(e, "out of memory for a checkpoint's tokenizer.json");
    r->tokenizer_config = tokenizer_config_json(
        bytes ? NULL : c->data.tokenizer, bytes ? r->saved_tokenizer : r->tokenizer_text,
        r->ends.count ? r->ends.ids[0] : -1, c->model.max_position_embeddings, e);
    return r->tokenizer_config ? 0 : -1;
}

static int open_data(struct run *r, struct error *e) {
    const struct config *c = &r->config;
    r->train = open_loader(r, c->data.train, e);
    if (!r->train || set_total_steps(r, e) != 0)
        return -1;
    loader_fingerprint(r->train, r->trainer.train_fingerprint);
    if (c->data.val[0]) {
        r->val = open_loader(r, c->data.val, e);
        if (!r->val)
            return -1;
        loader_fingerprint(r->val, r->trainer.val_fingerprint);
        r->val_bytes_per_token = dataset_bytes_per_token(c->data.val);
    }
    if (open_tasks(r, e) != 0)
        return -1;
    if (open_tokenizer(r, c->data.tokenizer, e) != 0 || find_documents(r, e) != 0 ||
        (r->val && check_labels(r, e) != 0) || describe_tokenizer(r, e) != 0)
        return -1;
    return find_chat(r, e);
}

static int open_sampler(struct run *r, struct error *e) {
    if (r->config.run.sample_every == 0)
        return 0;
    int64_t capacity = r->config.model.max_position_embeddings;
    return decoder_create(&r->decoder, &r->model, capacity < SAMPLE_TOKENS ? capacity : SAMPLE_TOKENS,
                          DECODE_CHUNK, e);
}

static int load_config(struct run *r, const struct command_line *line, struct error *e) {
    if (config_load(&r->config, line->path, line->override_count, line->overrides, r->comm->ranks, e) != 0)
        return -1;
    comm_set_timeout(r->comm, r->config.system.peer_timeout);
    r->trainer.best_by = r->config.train.best_by;
    return 0;
}

/* What comes before any device is opened. The ranks check the data together, with the same configuration. */
static int prepare_rank(struct run *r, struct error *e) {
    if (open_data(r, e) != 0)
        return -1;
    /* A new run starts at step 0: refuse it before run.dir is created. */
    if (r->profile_steps > 0 && access(r->config.run.dir, F_OK) != 0 && check_profile(r, 0, e) != 0)
        return -1;
    if (!is_rank0(r))
        return 0;
    r->lock = run_dir_open(r->config.run.dir, e);
    return r->lock < 0 ? -1 : 0;
}

/* The first sequences of the data, [micro_batch, seq_len] each, in *buffer, which the caller frees; no tokens where a
 * sequence cannot be read alone. */
static int read_first_batch(struct run *r, int32_t **buffer, struct batch *batch, struct error *e) {
    const struct config *c = &r->config;
    bool alone = c->data.packing == PACKING_STREAM && !mixture_is(c->data.train);
    struct loader *l = alone ? r->train : r->val;
    int64_t B = c->train.micro_batch, T = c->train.seq_len, count = 0;
    *batch = (struct batch){NULL, NULL, NULL};
    if (!l)
        return 0;
    if (loader_count(l, B, &count, e) != 0)
        return -1;
    if (count == 0)
        return 0;
    if (!(*buffer = malloc((size_t)(3 * B * T) * sizeof **buffer)))
        return fail_run(e, "out of memory for a batch of tokens");
    int32_t *tokens = *buffer, *targets = tokens + B * T, *segments = targets + B * T;
    for (int64_t b = 0; b < B; b++)
        if (loader_read(l, b % count, tokens + b * T, targets + b * T, segments + b * T, e) != 0)
            return -1;
    *batch = (struct batch){tokens, targets, c->data.segments == SEGMENTS_NONE ? NULL : segments};
    return 0;
}

/* Before the model and its optimizer take their memory. A run that goes on has its own checkpoint. */
static int report_init_from(struct run *r, struct error *e) {
    const struct config *c = &r->config;
    char dir[MAX_TEXT];
    int64_t *steps = NULL;
    int resumes = checkpoint_list_steps(c->run.dir, &steps, e);
    free(steps);
    if (!c->train.init_from[0] || *(const int *)comm_all_gather_small(r->comm, &resumes, sizeof resumes) != 0)
        return 0;
    int32_t *buffer = NULL;
    struct batch batch;
    if (ranks_find_checkpoint(r->comm, c->train.init_from, dir, e) != 0)
        return -1;
    int status = read_first_batch(r, &buffer, &batch, e);
    if (status == 0)
        status = init_from_report(dir, c, r->k, r->dev, batch, is_rank0(r) ? stderr : NULL, e);
    free(buffer);
    return comm_agree(r->comm, status, e);
}

static int prepare_training(struct run *r, const struct command_line *line, struct error *e) {
    if (comm_agree(r->comm, load_config(r, line, e), e) != 0 ||
        ranks_check_same_config(r->comm, &r->config, e) != 0 ||
        comm_agree(r->comm, prepare_rank(r, e), e) != 0 ||
        (!single_rank(r) && ranks_check_run_dir(r->comm, r->config.run.dir, e) != 0) ||
        resolve_precision(r->comm, &r->config, uses_cuda(r), fastest_precision(r), e) != 0 ||
        join_devices(r, e) != 0 || report_init_from(r, e) != 0 ||
        comm_agree(r->comm, build_model(r, true, e), e) != 0)
        return -1;
    return resume_or_initialize(&r->model, &r->config, &r->trainer, e);
}

/* Settings that the user may have meant otherwise. */
static void print_warnings(const struct run *r) {
    const struct train_config *t = &r->config.train;
    int32_t separator = r->ends.count ? r->ends.ids[0] : -1;
    int32_t eos_token = r->tokenizer ? tokenizer_eos_token(r->tokenizer) : -1;
    if (eos_token >= 0 && eos_token != separator)
        fprintf(stderr,
                "warning: documents of data.train end with id %d (dataset.json), and the "
                "tokenizer_config.json beside "
                "data.tokenizer names id %d as eos_token; generation stops at %d\n",
                separator, eos_token, separator);
    if (r->task_count > 0 && !evaluates(r))
        fprintf(stderr, "warning: eval.tasks has no effect without run.eval_every\n");
    if (t->resize_vocab && !t->init_from[0])
        fprintf(stderr, "warning: train.resize_vocab = true has no effect without train.init_from\n");
}

/* What only a run with steps left needs. */
static int prepare_loop(struct run *r, const struct command_line *line, struct error *e) {
    const char *dir = r->config.run.dir;
    if (check_profile(r, r->trainer.step, e) != 0 ||
        (is_rank0(r) && run_dir_check_space(dir, r->model.params.num_params, e) != 0) ||
        open_sampler(r, e) != 0)
        return -1;
    if (is_rank0(r) && (!(r->metrics = metrics_open(dir, r->trainer.step, e)) ||
                        start_record_write(&r->config, &r->model, &r->flops, line, r->trainer.step, e) != 0))
        return -1;
    return start_reading(r, e) == 0 ? read_step(r, e) : -1;
}

/* Host memory left for a snapshot of the model, on this rank. Calculated from the memory plan, since the system
 * counts pages as free until a step touches them. */
static size_t host_memory_left(const struct run *r) {
    size_t have = r->host_memory / (size_t)r->comm->local_ranks;
    size_t need = strcmp(r->k->name, "cpu") == 0 ? memory_total(&r->model.plan) : 0;
    return have > need ? have - need : 0;
}

static int train(struct run *r, const struct command_line *line, struct error *e) {
    r->trains = true;
    r->profile_steps = line->profile_steps;
    r->trainer.best_value = (double)NAN;
    if (open_comm(r, e) != 0 || prepare_training(r, line, e) != 0)
        return -1;
    if (r->trainer.step >= r->config.train.total_steps || ended_by_patience(r)) {
        if (is_rank0(r))
            banner_print_finished(&r->config, &r->trainer);
        return 0;
    }
    if (comm_agree(r->comm, prepare_loop(r, line, e), e) != 0)
        return -1;
    bool async_saving = saver_reserve(r->saver, &r->model, host_memory_left(r));
    if (is_rank0(r)) {
        banner_print(&r->config, &r->model, loader_tokens(r->train), loader_files(r->train), async_saving);
        loader_print_packing(r->train, stderr);
        print_warnings(r);
    }
    int status = train_loop(r, e);
    struct error ignored; /* after a failure, still finish the checkpoint that is being written */
    if (status != 0)
        saver_finish(r->saver, &ignored);
    return status;
}

/* ---- commands on a checkpoint ---- */

/* The model of a checkpoint and the settings it was trained with, then the overrides. */
static int read_checkpoint(struct run *r, const char *dir, const struct command_line *line, struct error *e) {
    return checkpoint_read_settings(dir, &r->config, e) == 0
               ? config_override(&r->config, line->override_count, line->overrides, e)
               : -1;
}

/* data.tokenizer if it is set, else the tokenizer saved with the checkpoint. */
static int find_tokenizer(struct run *r, const char *dir, struct error *e) {
    char path[MAX_TEXT + 32], recorded[MAX_TEXT];
    snprintf(path, sizeof path, "%s/tokenizer.json", dir);
    if (strcmp(r->config.data.tokenizer, "none") != 0)
        return open_tokenizer(r, r->config.data.tokenizer, e);
    if (checkpoint_setting(dir, "data.tokenizer", recorded, e) != 0)
        return -1;
    if (strcmp(recorded, "bytes") == 0) /* its tokenizer.json is for other programs */
        return open_tokenizer(r, recorded, e);
    return access(path, R_OK) == 0 || errno != ENOENT ? open_tokenizer(r, path, e) : 0;
}

/* ---- eval ---- */

static bool is_given(const struct command_line *line, const char *key) {
    size_t length = strlen(key);
    for (int i = 0; i < line->override_count; i++)
        if (strncmp(line->overrides[i], key, length) == 0 && line->overrides[i][length] == '=')
            return true;
    return false;
}

/* After an error about data.val: add where the path comes from, if the command line does not give it. */
static void name_recorded_data(const char *dir, const struct command_line *line, struct error *e) {
    if (is_given(line, "data.val"))
        return;
    size_t used = strlen(e->text);
    snprintf(e->text + used, sizeof e->text - used,
             " (%s recorded this path; data.val=GLOB gives another one)", dir);
}

static int load_eval_config(struct run *r, const char *dir, const struct command_line *line,
                            struct error *e) {
    if (read_checkpoint(r, dir, line, e) != 0)
        return -1;
    struct config *c = &r->config;
    if (!is_given(line, "eval.tasks") || strcmp(c->eval.tasks, "none") == 0)
        c->eval.tasks[0] = '\0';
    else if (!is_given(line, "data.val"))
        c->data.val[0] = '\0';
    if (!is_given(line, "eval.task_items"))
        c->eval.task_items = 0; /* not the run's, which would score fewer items without a word */
    if ((!c->data.val[0] || strcmp(c->data.val, "none") == 0) && !c->eval.tasks[0])
        return fail_user(e, "eval needs data: add data.val=GLOB or eval.tasks=GLOB");
    if (c->system.precision == PRECISION_AUTO)
        r->config.system.precision = PRECISION_FP32; /* eval's default, on GPUs as well */
    comm_set_timeout(r->comm, c->system.peer_timeout);
    return 0;
}

/* As find_documents; the checkpoint's tokenizer is needed only where data.separator was not recorded. */
static int find_separator(struct run *r, const char *dir, struct error *e) {
    const struct data_config *d = &r->config.data;
    bool needed = d->segments != SEGMENTS_NONE || d->packing == PACKING_FIT;
    if (needed && d->separator < 0 && !r->tokenizer && find_tokenizer(r, dir, e) != 0)
        return -1;
    return needed ? find_documents(r, e) : 0;
}

/* Whether the choices are of the checkpoint's tokenizer. */
static int check_tasks(struct run *r, const char *dir, struct error *e) {
    const char *glob = r->config.eval.tasks;
    struct end_ids ends;
    int64_t separator = -1;
    if (r->task_count == 0)
        return 0;
    if (!r->tokenizer && find_tokenizer(r, dir, e) != 0)
        return -1;
    return dataset_end_ids(&glob, 1, r->tokenizer, r->tokenizer_text, r->tokenizer_bytes,
                           r->config.model.vocab_size, &separator, &ends, e);
}

static int open_eval_data(struct run *r, const char *dir, const struct command_line *line, struct error *e) {
    const char *val = r->config.data.val;
    if (open_tasks(r, e) != 0 || check_tasks(r, dir, e) != 0)
        return -1;
    if (!val[0])
        return 0;
    r->val = open_loader(r, val, e);
    if (!r->val)
        name_recorded_data(dir, line, e);
    if (!r->val || find_separator(r, dir, e) != 0)
        return -1;
    r->val_bytes_per_token = dataset_bytes_per_token(val);
    return is_rank0(r) ? check_validation(r, e) : 0;
}

static int eval_command(struct run *r, const struct command_line *line, struct error *e) {
    char dir[MAX_TEXT];
    if (!(r->comm = comm_open(DEFAULT_TIMEOUT, e)) ||
        ranks_find_checkpoint(r->comm, line->path, dir, e) != 0 ||
        comm_agree(r->comm, load_eval_config(r, dir, line, e), e) != 0 ||
        ranks_check_same_config(r->comm, &r->config, e) != 0 ||
        comm_agree(r->comm, open_eval_data(r, dir, line, e), e) != 0 || join_devices(r, e) != 0 ||
        comm_agree(r->comm, build_model(r, false, e), e) != 0 ||
        comm_agree(r->comm, checkpoint_load_weights(dir, &r->model, 0, e), e) != 0)
        return -1;
    banner_print_ignored(&r->config, r->comm->ranks);
    struct evaluation v;
    if (run_tasks(r, stdout, -1, e) != 0)
        return -1;
    if (!r->val)
        return 0;
    if (run_validation(r, &v, e) != 0)
        return -1;
    if (!isfinite(v.loss))
        return fail_run(e, "%s: the loss is not finite: the weights have diverged; use an earlier checkpoint",
                        dir);
    if (is_rank0(r))
        loader_print_packing(r->val, stderr);
    if (is_rank0(r) && v.labelled)
        printf("val_accuracy %.7f %lld\nval_exact %.7f %lld\n", evaluation_accuracy(&v), (long long)v.targets,
               evaluation_exact(&v), (long long)v.segments);
    if (is_rank0(r) && v.bytes_per_token > 0)
        printf("bits_per_byte %.7f\n", evaluation_bits_per_byte(&v));
    if (is_rank0(r))
        printf("val_loss %.7f %lld\n", v.loss, (long long)v.targets);
    return 0;
}

/* ---- generate ---- */

/* Where generation stops: at the ids saved with the checkpoint, and at the tokenizer's. */
static int find_end_ids(struct run *r, const char *dir, struct error *e) {
    if (read_generation_config(dir, r->config.model.vocab_size, &r->ends, e) != 0)
        return -1;
    /* The checkpoint records the data's separator, which replaces what the tokenizer alone would suggest: the first. */
    int first = r->tokenizer && r->ends.count > 0 && tokenizer_end_of_text(r->tokenizer) >= 0;
    for (int i = first; r->tokenizer && i < tokenizer_end_ids(r->tokenizer)->count; i++)
        end_ids_add(&r->ends, tokenizer_end_ids(r->tokenizer)->ids[i]);
    return 0;
}

enum { MAX_PROMPT = 1 << 28 }; /* bytes of --prompt-file */

/* The prompt's tokens: a malloc'd array in *ids, to be freed also after an error, and its length, or -1. */
static int64_t read_prompt(struct run *r, const struct command_line *line, int32_t **ids, struct error *e) {
    const char *option = line->prompt_file ? "--prompt-file" : "--prompt";
    const char *text = line->prompt ? line->prompt : "";
    char *file = NULL;
    size_t bytes = strlen(text);
    if (line->prompt_file) {
        if (files_read_input(line->prompt_file, MAX_PROMPT, &file, &bytes, e) != 0)
            return -1;
        text = file;
        if (bytes >= 3 && memcmp(text, "\xef\xbb\xbf", 3) == 0) { /* a byte order mark is no text */
            text += 3;
            bytes -= 3;
        }
    }
    int64_t length = r->tokenizer ? tokenizer_encode(r->tokenizer, text, bytes, ids, e)
                                  : text_parse_ids(option, text, bytes, r->config.model.vocab_size, ids, e);
    free(file);
    return length;
}

static void warn_of_length(const struct model_config *m, int64_t prompt, int64_t tokens) {
    if (prompt + tokens > m->max_position_embeddings)
        fprintf(stderr,
                "warning: %lld tokens of prompt and up to %lld generated ones are more than the model's "
                "max_position_embeddings = %lld, beyond which its text may get worse; lower --tokens or "
                "shorten the prompt\n",
                (long long)prompt, (long long)tokens, (long long)m->max_position_embeddings);
}

static int generate_text(struct run *r, const struct command_line *line, struct error *e) {
    int32_t *ids = NULL;
    if (line->stop && !r->tokenizer)
        return fail_user(e, "--stop needs a tokenizer, and the checkpoint has none; name one: "
                            "data.tokenizer=FILE, or leave --stop out");
    int64_t length = read_prompt(r, line, &ids, e);
    struct text_writer w = {.tokenizer = r->tokenizer, .out = stdout, .ends = &r->ends, .stop = line->stop};
    struct sampling sampling = {line->temperature, line->top_k, line->top_p, (uint64_t)line->seed};
    int status = length < 0 ? -1 : 0;
    if (status == 0 && length == 0) { /* no prompt: start a document */
        free(ids);
        ids = malloc(sizeof *ids);
        if (!ids)
            return fail_run(e, "out of memory for the prompt");
        ids[0] = r->ends.count ? r->ends.ids[0] : 0;
        length = 1;
    }
    if (status == 0)
        status = decoder_create(&r->decoder, &r->model, length + line->tokens, DECODE_CHUNK, e);
    if (status == 0)
        warn_of_length(&r->config.model, length, line->tokens);
    for (int64_t i = 0; status == 0 && i < length; i++)
        if (!end_ids_has(&r->ends, ids[i]))
            text_write(&w, ids[i]);
    fflush(stdout);
    if (status == 0)
        status = generate(&r->decoder, ids, length, line->tokens, &sampling, text_emit, &w, e);
    text_finish(&w);
    if (status == 0)
        printf("\n");
    free(ids);
    return status;
}

/* ---- generate --chat ---- */

struct terminal {
    struct run *r;
    const char *system;
    struct turns turns;
    struct text_writer writer;
};

_Static_assert((int)CHAT_FIRST == CHAT_BEGINS && (int)CHAT_ENDED == CHAT_ANSWER_ENDED &&
                   (int)CHAT_CUT == CHAT_ANSWER_CUT,
               "data/ and model/ do not know each other");

static int64_t next_turn(void *context, enum chat_state state, int32_t **tokens, struct error *e) {
    struct terminal *t = context;
    struct chat_turn turn = {.before = (enum chat_before)state, .system = t->system};
    int status = turns_read(&t->turns, &turn.text, &turn.length, e);
    if (status <= 0)
        return status;
    t->writer.decoding = (struct decoding){0};
    return chat_encode_turn(t->r->chat, t->r->tokenizer, &turn, tokens, e);
}

static bool is_answer_end(void *context, int32_t token) {
    const struct terminal *t = context;
    return end_ids_has(&t->r->ends, token);
}

static bool print_token(void *context, int32_t token) {
    struct terminal *t = context;
    return text_emit(&t->writer, token) && !turns_interrupted(&t->turns);
}

static void end_answer(void *context) {
    struct terminal *t = context;
    text_finish(&t->writer);
    putchar('\n');
    fflush(stdout);
}

/* The checkpoint's chat template, and the tokenizer it belongs to. */
static int open_chat(struct run *r, const char *dir, struct error *e) {
    char path[MAX_TEXT + 32];
    snprintf(path, sizeof path, "%s/chat.json", dir);
    if (access(path, F_OK) != 0 && errno == ENOENT)
        return fail_user(
            e,
            "%s: it has no chat.json, since it was not trained on conversations; prepare some with "
            "data/prepare.py --chat and train on them, or give --prompt in place of --chat",
            dir);
    if (!(r->chat = chat_open(path, r->config.model.vocab_size, e)))
        return -1;
    if (chat_refusal(r->chat))
        return fail_user(e, "%s: --chat cannot use this model's chat template: %s; give --prompt", path,
                         chat_refusal(r->chat));
    if (!r->tokenizer)
        return fail_user(e,
                         "%s: --chat needs a tokenizer, and the checkpoint has none; name one: "
                         "data.tokenizer=FILE",
                         dir);
    end_ids_add(&r->ends, chat_end(r->chat));
    return chat_check_tokenizer(r->chat, r->tokenizer_text, r->tokenizer_bytes, e);
}

static int talk(struct run *r, struct turns turns, const struct command_line *line, struct error *e) {
    struct terminal t = {.r = r, .system = line->system, .turns = turns};
    t.writer = (struct text_writer){.tokenizer = r->tokenizer, .out = stdout, .stop = line->stop};
    struct chat_hooks hooks = {&t, next_turn, is_answer_end, print_token, end_answer};
    struct sampling sampling = {line->temperature, line->top_k, line->top_p, (uint64_t)line->seed};
    int status = 0;
    if (line->system && !chat_knows_system(r->chat))
        status =
            fail_user(e, "generate: the model's chat template knows no system message; leave --system out");
    if (status == 0)
        status =
            decoder_create(&r->decoder, &r->model, r->config.model.max_position_embeddings, DECODE_CHUNK, e);
    if (status == 0)
        status = chat(&r->decoder, &hooks, line->tokens, &sampling, e);
    turns_close(&t.turns);
    return status;
}

static int generate_command(struct run *r, const struct command_line *line, struct error *e) {
    if (comm_launch_rank() > 0)
        return 0; /* only the first process generates */
    char dir[MAX_TEXT];
    struct turns turns = {0};
    if (line->chat)
        turns_open(&turns);
    if (checkpoint_find(line->path, dir, e) != 0 || read_checkpoint(r, dir, line, e) != 0)
        return -1;
    r->config.train.micro_batch = r->config.train.seq_len = 1; /* the decoder has its own buffers */
    if (open_device(r, e) != 0 || find_tokenizer(r, dir, e) != 0 || find_end_ids(r, dir, e) != 0 ||
        (line->chat && open_chat(r, dir, e) != 0) || build_model(r, false, e) != 0 ||
        checkpoint_load_weights(dir, &r->model, 0, e) != 0)
        return -1;
    return line->chat ? talk(r, turns, line, e) : generate_text(r, line, e);
}

/* ---- attention ---- */

/* What each token is as text. *memory is to be freed, also after an error. */
static int decode_tokens(const struct run *r, const int32_t *ids, int64_t count, char **memory,
                         struct token_texts *texts, struct error *e) {
    size_t length, used = 0, size = 0;
    struct decoding decoding = {0};
    for (int64_t t = 0; r->tokenizer && t < count; t++) {
        tokenizer_decode_next(r->tokenizer, &decoding, ids[t], &length);
        size += length;
    }
    int64_t *ends = (int64_t *)(*memory = malloc((size_t)count * sizeof *ends + size));
    if (!ends)
        return fail_run(e, "out of memory for the text of %lld tokens", (long long)count);
    char *bytes = *memory + (size_t)count * sizeof *ends;
    decoding = (struct decoding){0};
    for (int64_t t = 0; t < count; t++) {
        length = 0;
        const char *text =
            r->tokenizer ? tokenizer_decode_next(r->tokenizer, &decoding, ids[t], &length) : "";
        memcpy(bytes + used, text, length);
        ends[t] = (int64_t)(used += length);
    }
    *texts = (struct token_texts){bytes, ends};
    return 0;
}

static int check_attention(const struct model_config *m, const struct command_line *line, int64_t length,
                           struct error *e) {
    if (line->layer >= m->num_hidden_layers)
        return fail_user(e, "attention: --layer %lld: the model has %lld layers, the last is %lld",
                         (long long)line->layer, (long long)m->num_hidden_layers,
                         (long long)m->num_hidden_layers - 1);
    if (length == 0)
        return fail_user(e, "attention: the prompt is empty; give a text");
    if (length > m->max_position_embeddings)
        return fail_user(
            e, "attention: the prompt has %lld tokens, more than max_position_embeddings = %lld; shorten it",
            (long long)length, (long long)m->max_position_embeddings);
    return 0;
}

static int write_attention(struct run *r, const char *dir, const struct command_line *line, struct error *e) {
    const char *path = line->out ? line->out : "attention.safetensors";
    struct token_texts texts;
    char *memory = NULL;
    int32_t *ids = NULL;
    int64_t length = read_prompt(r, line, &ids, e);
    int status = length < 0 ? -1 : check_attention(&r->config.model, line, length, e);
    r->config.train.micro_batch = 1;
    r->config.train.seq_len = length;
    if (status == 0 && (build_model(r, false, e) != 0 || checkpoint_load_weights(dir, &r->model, 0, e) != 0 ||
                        decode_tokens(r, ids, length, &memory, &texts, e) != 0 ||
                        attention_weights_write(&r->model, ids, (int)line->layer, &texts, path, e) != 0))
        status = -1;
    if (status == 0)
        printf("%s: layer %lld (%s), %lld tokens\n", path, (long long)line->layer,
               layer_type_name(r->config.model.layer_types[line->layer]), (long long)length);
    free(memory);
    free(ids);
    return status;
}

static int attention_command(struct run *r, const struct command_line *line, struct error *e) {
    if (comm_launch_rank() > 0)
        return 0; /* one process is enough */
    char dir[MAX_TEXT];
    if (checkpoint_find(line->path, dir, e) != 0 || read_checkpoint(r, dir, line, e) != 0)
        return -1;
    r->config.data.segments = SEGMENTS_NONE; /* the prompt is one */
    if (r->config.system.precision == PRECISION_AUTO)
        r->config.system.precision = PRECISION_FP32;
    return open_device(r, e) != 0 || find_tokenizer(r, dir, e) != 0 ? -1 : write_attention(r, dir, line, e);
}

/* ---- info ---- */

static bool is_directory(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

/* The configuration of a run, with the steps of train.epochs where the data is on this machine. */
static int load_info_config(struct run *r, const struct command_line *line, int ranks, struct error *e) {
    struct config *c = &r->config;
    struct error missing;
    if (config_load(c, line->path, line->override_count, line->overrides, ranks, e) != 0)
        return -1;
    if (c->train.epochs > 0 && !(r->train = open_loader(r, c->data.train, &missing)))
        return 0;
    return set_total_steps(r, e);
}

/* info --gpus: a configuration for as many ranks, on GPUs that this machine need not have. */
static int estimate_training(struct run *r, const struct command_line *line, const struct info_options *o,
                             struct error *e) {
    if (is_directory(line->path))
        return fail_user(e, "info --gpus estimates a run: give its configuration, not the checkpoint %s",
                         line->path);
    if (load_info_config(r, line, o->gpus, e) != 0)
        return -1;
    return info_print_estimate(stdout, &r->config, o, e);
}

static int info_command(struct run *r, const struct command_line *line, struct error *e) {
    if (comm_launch_rank() > 0)
        return 0;
    char dir[MAX_TEXT];
    struct info_options o;
    if (info_options_set(&o, (int)line->gpus, line->gpu, line->link, line->launches, e) != 0)
        return -1;
    if (o.gpus > 0)
        return estimate_training(r, line, &o, e);
    int status = -1;
    if (!is_directory(line->path))
        status = load_info_config(r, line, 1, e);
    else if (checkpoint_find(line->path, dir, e) == 0)
        status = read_checkpoint(r, dir, line, e);
    /* The configuration may be for another machine: count for this one's device. */
    r->config.system.device = DEVICE_AUTO;
    if (status != 0 || open_device(r, e) != 0)
        return -1;
    return info_print(stdout, &r->config, r->k, r->dev, e);
}

/* ---- main ---- */

static int run_command(struct run *r, const struct command_line *line, struct error *e) {
    switch (line->command) {
    case COMMAND_TRAIN:
        return train(r, line, e);
    case COMMAND_EVAL:
        return eval_command(r, line, e);
    case COMMAND_GENERATE:
        return generate_command(r, line, e);
    case COMMAND_ATTENTION:
        return attention_command(r, line, e);
    case COMMAND_INFO:
        return info_command(r, line, e);
    case COMMAND_CHECK:
        /* One process checks everything. */
        return comm_launch_rank() > 0 ? 0 : check_data(stdout, line->path, line->vocab, e);
    case COMMAND_HELP:
        command_line_print_help(stdout, line->help_topic);
        break;
    case COMMAND_HELP_MARKDOWN:
        config_print_markdown(stdout);
        break;
    case COMMAND_VERSION:
        command_line_print_version(stdout);
        break;
    }
    return 0;
}

/* Print an error once: on rank 0 where ranks have agreed on it, and before there are ranks, if the arguments are
 * wrong, in the process that was started first. */
static bool should_print(const struct run *r, const struct error *e) {
    return r->comm ? is_rank0(r) : e->exit_code != EXIT_USER || comm_launch_rank() == 0;
}

/* In one write; fprintf would take 8 KiB of a stack that may be too small. */
static void print_error(const struct error *e) {
    static char line[sizeof e->text + 16];
    snprintf(line, sizeof line, "train_iha: %s\n", e->text);
    fputs(line, stderr);
}

/* Not inlined: main checks the stack before this takes its part of it. */
static __attribute__((noinline)) int parse_and_run(struct run *r, int argc, char **argv, struct error *e) {
    struct command_line line;
    signal(SIGXFSZ, SIG_IGN); /* a write beyond the limit of `ulimit -f` fails with EFBIG instead */
    return command_line_parse(&line, argc - 1, argv + 1, e) == 0 ? run_command(r, &line, e) : -1;
}

/* A file that takes the number of a closed standard stream would receive what is printed. Using the stream still fails:
 * the input cannot be read, the outputs cannot be written. */
static void hold_standard_streams(void) {
    for (int fd = 0; fd <= 2; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", fd == 0 ? O_WRONLY : O_RDONLY) < 0)
            return;
}

int main(int argc, char **argv) {
    static struct run r;
    static struct error e;
    hold_standard_streams();
    int status = limits_check_stack(&e) == 0 ? parse_and_run(&r, argc, argv, &e) : -1;
    if (status == 0 && (fflush(stdout) != 0 || ferror(stdout)))
        status =
            fail_run(&e, "cannot write to the standard output: %s; %s", strerror(errno), files_advice(errno));
    status_break(&r.status);
    if (status != 0 && should_print(&r, &e))
        print_error(&e);
    else if (status != 0 && !r.comm)
        clock_sleep(1); /* or mpirun may kill the rank that prints before it has printed */
    release(&r);        /* after printing: mpirun kills the other ranks once one has exited with an error */
    if (status == 0)
        return EXIT_OK;
    return e.exit_code ? e.exit_code : EXIT_RUN;
}

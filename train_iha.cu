/* train_iha: pretrain and fine-tune GPTs with Interleaved Head Attention. Plain C; the name marks the entry
 * point.
 *
 * A training run is train(): read the configuration, open the data, build the model, resume or initialise,
 * then step by step train, evaluate, sample and save. The other commands read a checkpoint. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "data/shards.h"
#include "data/text.h"
#include "data/tokenizer.h"
#include "kernels/clock.h"
#include "kernels/comm.h"
#include "kernels/kernels.h"
#include "model/checkpoint/checkpoint.h"
#include "model/config/config.h"
#include "model/generate/decode.h"
#include "model/info/determinism.h"
#include "model/checkpoint/files.h"
#include "model/flops.h"
#include "model/generate/generate.h"
#include "model/generate/generate_options.h"
#include "model/info/info.h"
#include "model/info/info_estimate.h"
#include "model/train/metrics.h"
#include "model/model.h"
#include "model/config/options.h"
#include "model/train/profile.h"
#include "model/train/rank_checks.h"
#include "model/checkpoint/saver.h"
#include "model/train/schedule.h"
#include "model/train/signals.h"
#include "model/train/skips.h"
#include "model/train/resume.h"

static const char VERSION[] = "0.1.0";

enum { DEFAULT_TIMEOUT = 300 }; /* seconds to wait for a rank until the configuration says */

/* All that a command holds. Whatever is not NULL is released at the end. */
struct run {
    struct config config;
    struct comm *comm; /* how the processes talk; NULL in commands that run on one rank */
    const struct kernels *k;
    struct device *dev;
    struct comm *tensors; /* how their devices do; the same on the CPU */
    size_t host_memory;   /* free before the model was there */
    struct model model;
    struct shards *train, *val;
    struct tokenizer *tokenizer;
    char *tokenizer_text; /* of tokenizer.json, for checkpoints; NULL: none */
    size_t tokenizer_bytes;
    struct decoder decoder;
    struct metrics *metrics;
    struct trainer_state trainer;
    struct saver *saver;
    int posted;            /* steps whose state has not been collected yet */
    double clock;          /* when the last was, or training went on after something else */
    int64_t profile_steps; /* to trace; 0: none */
    int64_t profile_from;  /* the first of them */
    int lock;
    int32_t *tokens, *targets; /* one pass, [micro_batch, seq_len] */
    double flops_per_token;
};

static void release(struct run *r) {
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
    if (r->tensors && r->tensors != r->comm)
        r->tensors->ops->close(r->tensors);
    if (r->dev)
        r->k->close(r->dev);
    if (r->lock > 0)
        close(r->lock);
    if (r->comm)
        r->comm->ops->close(r->comm);
}

/* Rank 0 speaks for all, and writes what exists once. */
static bool is_rank0(const struct run *r) {
    return !r->comm || r->comm->rank == 0;
}

static bool single_rank(const struct run *r) {
    return !r->comm || r->comm->ranks == 1;
}

/* ---- phases shared by the commands ---- */

static int open_device(struct run *r, struct error *e) {
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

/* The devices of all ranks. */
static int join_devices(struct run *r, struct error *e) {
    static const enum comm_backend how[] = {
        [COMM_AUTO] = COMM_BACKEND_AUTO, [COMM_MPI] = COMM_BACKEND_HOST, [COMM_NCCL] = COMM_BACKEND_NCCL};
    if (comm_agree(r->comm, open_device(r, e), e) != 0)
        return -1;
    if (!single_rank(r))
        r->tensors = r->k->open_comm(r->dev, r->comm, how[r->config.system.comm], e);
    if (comm_agree(r->comm, r->tensors || single_rank(r) ? 0 : -1, e) != 0)
        return -1;
    if (r->tensors)
        r->k->set_progress_callback(r->dev, progress_comm, r->tensors);
    return 0;
}

static void say_what_is_ignored(const struct run *r) {
    enum comm_kind comm = r->config.system.comm;
    if (single_rank(r) && comm != COMM_AUTO)
        fprintf(stderr, "system.comm = %s has no effect: a single process has nobody to talk to\n",
                comm == COMM_MPI ? "mpi" : "nccl");
}

static int build_model(struct run *r, bool training, struct error *e) {
    const struct train_config *t = &r->config.train;
    struct model_options options = {
        .shape = {t->micro_batch, t->seq_len, r->config.system.recompute, training},
        .weight_decay = t->weight_decay,
        .mix_lr_scale = t->mix_lr_scale,
        .comm = r->tensors,
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

static int open_tokenizer(struct run *r, const char *name, struct error *e) {
    if (strcmp(name, "none") == 0 || name[0] == '\0')
        return 0;
    if (strcmp(name, "bytes") != 0 &&
        checkpoint_tokenizer(name, &r->tokenizer_text, &r->tokenizer_bytes, e) != 0)
        return -1;
    r->tokenizer = tokenizer_open(name, r->config.model.vocab_size, e);
    return r->tokenizer ? 0 : -1;
}

/* Mean loss in nats over the first `batches` batches of the validation set (0: all of it). Ranks take turns;
 * the batches are the same however many there are. */
static double evaluate(struct run *r, int64_t batches, int64_t *tokens) {
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
                targets[j] = -1; /* the last batch is filled up with sequences that do not count */
        }
        model_evaluate(&r->model, r->tokens, r->targets, 1);
    }
    r->model.comm->ops->all_reduce(r->model.comm, &r->model.state->loss, 1);
    r->k->step_read(r->dev, r->model.state, &after);
    r->k->step_write(r->dev, r->model.state, &before);
    *tokens = sequences * T;
    return after.loss / (double)*tokens;
}

/* ---- printing samples ---- */

enum { SAMPLE_TOKENS = 256, DECODE_CHUNK = 64 };

/* A sample that nobody reads: the other ranks make it too, rather than wait for rank 0 past their deadline.
 */
static bool ignore(void *context, int32_t token) {
    return token != *(const int32_t *)context;
}

/* A sample from the start of a document, onto the terminal and into run.dir/samples.txt. */
static int print_sample(struct run *r, struct error *e) {
    char path[MAX_TEXT + 32];
    snprintf(path, sizeof path, "%s/samples.txt", r->config.run.dir);
    int32_t end = r->tokenizer ? tokenizer_end_of_text(r->tokenizer) : -1, start = end >= 0 ? end : 0;
    struct sampling how = {0.8, 0, (uint64_t)(r->config.train.seed + r->trainer.step)};
    if (!is_rank0(r))
        return generate(&r->decoder, &start, 1, r->decoder.capacity - 1, &how, ignore, &end, e);
    FILE *file = fopen(path, "a");
    if (!file)
        return fail_run(e, "%s: cannot write: %s; %s", path, strerror(errno), files_advice(errno));
    struct text_writer w = {r->tokenizer, stdout, file, end};
    status_break(r->metrics);
    printf("---- sample at step %lld\n", (long long)r->trainer.step);
    fprintf(file, "---- step %lld\n", (long long)r->trainer.step);
    int status = generate(&r->decoder, &start, 1, r->decoder.capacity - 1, &how, text_emit, &w, e);
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

/* ---- train ---- */

static int open_data(struct run *r, struct error *e) {
    const struct config *c = &r->config;
    int64_t T = c->train.seq_len, V = c->model.vocab_size;
    r->train = shards_open(c->data.train, T, V, e);
    if (!r->train)
        return -1;
    shards_fingerprint(r->train, r->trainer.train_fingerprint);
    if (c->data.val[0]) {
        r->val = shards_open(c->data.val, T, V, e);
        if (!r->val)
            return -1;
        shards_fingerprint(r->val, r->trainer.val_fingerprint);
    }
    return open_tokenizer(r, c->data.tokenizer, e);
}

/* The run's directory, for this run alone. */
static int open_run_dir(struct run *r, struct error *e) {
    char path[MAX_TEXT + 32];
    const char *dir = r->config.run.dir;
    if (!is_rank0(r))
        return 0;
    if (files_make_dirs(dir, e) != 0)
        return -1;
    snprintf(path, sizeof path, "%s/lock", dir);
    r->lock = files_lock(path, e);
    if (r->lock < 0)
        return -1;
    checkpoint_clean(dir);
    return 0;
}

static int check_disk(const struct run *r, struct error *e) {
    if (!is_rank0(r))
        return 0;
    double need = (double)CHECKPOINT_PARAM_BYTES * (double)r->model.params.num_params;
    int64_t have = files_free_bytes(r->config.run.dir);
    if (have >= 0 && (double)have < need)
        return fail_user(
            e, "%s: a checkpoint takes %.1f MB and %.1f MB is free; free some, or set another run.dir",
            r->config.run.dir, need / 1e6, (double)have / 1e6);
    return 0;
}

static int open_sampler(struct run *r, struct error *e) {
    if (r->config.run.sample_every == 0)
        return 0;
    int64_t capacity = r->config.model.max_position_embeddings;
    return decoder_create(&r->decoder, &r->model, capacity < SAMPLE_TOKENS ? capacity : SAMPLE_TOKENS,
                          DECODE_CHUNK, e);
}

static void announce(struct run *r, bool saves_behind) {
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
    say_what_is_ignored(r);
    if (c->system.deterministic)
        determinism_print(stderr, &r->model);
    if (!saves_behind)
        fprintf(stderr, "saving: no memory for a copy of %.2f GB, so training waits while it saves\n",
                (double)saver_copy_bytes(&r->model) / 1e9);
}

/* Forward and backward over the step's sequences, then the update. */
static void train_step(struct run *r) {
    const struct config *c = &r->config;
    const struct train_config *t = &c->train;
    int64_t B = t->micro_batch, T = t->seq_len, ranks = r->comm->ranks;
    int64_t passes = t->batch_tokens / (ranks * B * T);
    r->k->step_begin(r->dev, r->model.state, r->trainer.step, schedule_lr(t, r->trainer.step));
    for (int64_t pass = 0; pass < passes; pass++) {
        for (int64_t b = 0; b < B; b++) {
            int64_t draw = r->trainer.sequences + (pass * ranks + r->comm->rank) * B + b;
            int64_t i = shards_draw(r->train, draw, c->data.shuffle, (uint64_t)t->seed);
            shards_read(r->train, i, r->tokens + b * T, r->targets + b * T);
        }
        model_train_pass(&r->model, r->tokens, r->targets, 1.0 / (double)t->batch_tokens, (int)pass,
                         (int)passes);
    }
    struct update_hyper hyper = {t->beta1, t->beta2, t->eps, t->grad_clip, t->skip_zscore};
    model_update(&r->model, &hyper);
    r->k->step_post(r->dev, r->model.state);
    r->posted++;
    r->trainer.sequences += passes * ranks * B;
    r->trainer.tokens += t->batch_tokens;
    r->trainer.step++;
}

static bool due(int64_t every, int64_t step) {
    return every > 0 && step % every == 0;
}

/* Collect the oldest posted step, record it, and stop a run whose numbers have gone wrong for good. Every
 * rank has the same state; rank 0 writes it down. */
static int record_step(struct run *r, struct error *e) {
    const struct config *c = &r->config;
    struct trainer_state *p = &r->trainer;
    struct step_state state;
    r->k->step_collect(r->dev, &state);
    r->posted--;
    double seconds = clock_seconds() - r->clock;
    r->clock += seconds;
    p->history = state.history;
    p->seconds += seconds;
    double rate = (double)c->train.batch_tokens / seconds, peak = r->k->peak_flops(r->dev) * r->comm->ranks;
    struct step_record record = {.step = state.step + 1,
                                 .steps = c->train.steps,
                                 .tokens = p->tokens - r->posted * c->train.batch_tokens,
                                 .loss = state.loss,
                                 .lr = state.lr,
                                 .grad_norm = state.grad_norm,
                                 .seconds = seconds,
                                 .tokens_per_second = rate,
                                 .mfu = peak > 0 ? rate * r->flops_per_token / peak : 0,
                                 .skipped = state.skip != STEP_APPLIED};
    int status = is_rank0(r) ? metrics_step(r->metrics, &record, e) : 0;
    if (is_rank0(r) && due(c->run.log_every, record.step))
        status_step(r->metrics, &record);
    /* All ranks look for the worst gradient together, so one that could not write looks too. */
    return state.history.skips_run > c->train.max_skips
               ? skips_fail(&r->model, &state, c->train.skip_zscore, e)
               : status;
}

/* Until so many steps at most are under way. */
static int record_steps(struct run *r, int ahead, struct error *e) {
    int status = 0;
    while (status == 0 && r->posted > ahead)
        status = record_step(r, e);
    return status;
}

/* ---- between steps ---- */

/* What led up to a checkpoint is on the disk before it. */
static int save(struct run *r, bool wait, struct error *e) {
    const struct checkpoint_job job = {.run_dir = r->config.run.dir,
                                       .config = &r->config,
                                       .tokenizer = r->tokenizer_text,
                                       .tokenizer_bytes = r->tokenizer_bytes,
                                       .trainer = r->trainer,
                                       .from = {.model = &r->model}};
    if (comm_agree(r->comm, is_rank0(r) ? metrics_sync(r->metrics, e) : 0, e) != 0)
        return -1;
    return saver_save(r->saver, &job, wait, e);
}

static int evaluate_now(struct run *r, bool saves, struct error *e) {
    struct trainer_state *p = &r->trainer;
    int64_t tokens;
    double loss = evaluate(r, r->config.run.eval_batches, &tokens);
    if (saves && isfinite(loss) && !(loss >= p->best_val_loss)) {
        p->best_val_loss = loss;
        p->best_step = p->step;
    }
    if (!is_rank0(r))
        return 0;
    status_break(r->metrics);
    fprintf(stderr, "step %lld: val_loss %.4f over %lld tokens\n", (long long)p->step, loss,
            (long long)tokens);
    return metrics_eval(r->metrics, p->step, loss, e);
}

/* What comes after a step: the last one, or one on which a signal came, saves. */
struct pause {
    bool ends, evaluates, saves, samples;
};

static struct pause pause_after(const struct run *r, bool stop) {
    const struct run_config *c = &r->config.run;
    int64_t step = r->trainer.step;
    bool last = step == r->config.train.steps, ends = last || stop;
    return (struct pause){.ends = ends,
                          .evaluates = r->val && c->eval_every > 0 && (last || due(c->eval_every, step)),
                          .saves = ends || (due(c->save_every, step) && r->trainer.history.skips_run == 0),
                          .samples = due(c->sample_every, step)};
}

/* Evaluate, sample, save. The checkpoint comes last: a run that is resumed from it does nothing of this step
 * again. */
static int do_between_steps(struct run *r, struct pause now_due, struct error *e) {
    if (now_due.evaluates && comm_agree(r->comm, evaluate_now(r, now_due.saves, e), e) != 0)
        return -1;
    if (now_due.samples && comm_agree(r->comm, print_sample(r, e), e) != 0)
        return -1;
    return now_due.saves ? save(r, now_due.ends, e) : 0;
}

static int between_steps(struct run *r, bool stop, struct error *e) {
    struct pause now_due = pause_after(r, stop);
    if (!now_due.evaluates && !now_due.saves && !now_due.samples)
        return 0;
    if (comm_agree(r->comm, record_steps(r, 0, e), e) != 0)
        return -1;
    model_await_params(&r->model); /* on all ranks alike, before each goes its own way through what follows */
    r->k->range_begin(r->dev, PROFILE_BETWEEN_STEPS, -1);
    int status = do_between_steps(r, now_due, e);
    r->k->range_end(r->dev);
    r->clock = clock_seconds();
    return status;
}

static int finish_run(struct run *r, int stop) {
    if (!is_rank0(r))
        return 0;
    status_break(r->metrics);
    if (stop)
        fprintf(stderr, "stopped by signal %d after step %lld; the same command continues\n", stop,
                (long long)r->trainer.step);
    else
        fprintf(stderr, "done: %lld steps, %lld tokens in %.1f s of training; %s\n",
                (long long)r->trainer.step, (long long)r->trainer.tokens, r->trainer.seconds,
                r->config.run.dir);
    return 0;
}

/* ---- --profile ---- */

enum { PROFILE_WARM_UP = 3 }; /* steps before the first that is traced */

/* Take "--profile N" out of the arguments that follow the configuration. */
static int take_profile_option(struct run *r, int *argc, char **argv, struct error *e) {
    static const char *const known[] = {"--profile", NULL};
    int kept = 1;
    for (int i = 1; i < *argc; i++) {
        char *end;
        if (argv[i][0] != '-') {
            argv[kept++] = argv[i];
            continue;
        }
        if (option_find("train", known, argv, i, *argc, e) < 0)
            return -1;
        r->profile_steps = strtol(argv[++i], &end, 10);
        if (r->profile_steps < 1 || r->profile_steps > 1000 || *end)
            return fail_user(e, "--profile needs the number of steps to trace, 1 to 1000");
    }
    *argc = kept;
    return 0;
}

/* Traced steps must be left after those that warm up, counted from `step`. */
static int check_profile(struct run *r, int64_t step, struct error *e) {
    r->profile_from = step + PROFILE_WARM_UP;
    if (r->profile_steps == 0 || r->profile_from + r->profile_steps <= r->config.train.steps)
        return 0;
    return fail_user(
        e, "--profile %lld traces steps after %d others, and the run has %lld left; raise train.steps",
        (long long)r->profile_steps, PROFILE_WARM_UP, (long long)(r->config.train.steps - step));
}

/* After the last traced step, or where the run stops before: the trace as a table on the terminal and as a
 * file; of rank 0, the others do much the same. The run goes on whether or not it can be written. */
static void end_profile(struct run *r) {
    int64_t steps = r->trainer.step - r->profile_from;
    struct trace *t = steps > 0 ? r->k->trace_end(r->dev) : NULL;
    struct error e;
    if (is_rank0(r))
        status_break(r->metrics);
    if (is_rank0(r) && !t)
        fprintf(stderr, steps > 0 ? "warning: --profile: out of memory for the trace\n"
                                  : "--profile: the run stops before the first traced step; no table\n");
    if (is_rank0(r) && t && profile_report(stderr, t, r->config.run.dir, r->profile_from, steps, &e) != 0)
        fprintf(stderr, "warning: %s\n", e.text);
    trace_free(t);
    r->profile_steps = 0;
    r->clock = clock_seconds();
}

/* ---- the loop ---- */

/* What ranks tell each other after every step. */
struct rank_status {
    int stop;   /* the signal that asks for an end */
    int failed; /* the step, or what came with it */
    enum saver_state saver;
};

/* Of all ranks: any signal, any failure, and how far the checkpoint under way is. */
static struct rank_status merge_rank_status(struct run *r, struct rank_status mine) {
    const struct rank_status *told = comm_all_gather_small(r->comm, &mine, sizeof mine);
    struct rank_status all = told[0];
    for (int i = 1; i < r->comm->ranks; i++) {
        all.stop = all.stop ? all.stop : told[i].stop;
        all.failed |= told[i].failed;
        all.saver = saver_together(all.saver, told[i].saver);
    }
    return all;
}

static int train_loop(struct run *r, struct error *e) {
    const int64_t steps = r->config.train.steps;
    struct rank_status pulse = {0};
    r->clock = clock_seconds();
    while (r->trainer.step < steps && !pulse.stop) {
        if (r->profile_steps > 0 && r->trainer.step == r->profile_from)
            r->k->trace_begin(r->dev);
        train_step(r);
        int status = record_steps(r, r->k->run_ahead, e);
        /* A signal is looked for once a step: one that comes while saving ends the next step. */
        pulse = merge_rank_status(
            r, (struct rank_status){signals_stop_requested(), status != 0, saver_state(r->saver)});
        if (pulse.failed && comm_agree(r->comm, status, e) != 0)
            return -1;
        if (r->profile_steps > 0 && (pulse.stop || r->trainer.step == r->profile_from + r->profile_steps))
            end_profile(r);
        if (saver_advance(r->saver, pulse.saver, e) != 0 || between_steps(r, pulse.stop, e) != 0)
            return -1;
    }
    return finish_run(r, pulse.stop);
}

/* What each rank does for itself, and on which all must agree before any memory is shared. */
static int prepare_alone(struct run *r, int argc, char **argv, struct error *e) {
    if (config_load(&r->config, argv[0], argc - 1, argv + 1, r->comm->ranks, e) != 0)
        return -1;
    comm_set_timeout(r->comm, r->config.system.peer_timeout);
    if (open_data(r, e) != 0)
        return -1;
    /* A new run is at step 0, so what is refused need not leave a directory. */
    if (r->profile_steps > 0 && access(r->config.run.dir, F_OK) != 0 && check_profile(r, 0, e) != 0)
        return -1;
    return open_run_dir(r, e);
}

static int prepare_training(struct run *r, int argc, char **argv, struct error *e) {
    if (comm_agree(r->comm, prepare_alone(r, argc, argv, e), e) != 0 ||
        (!single_rank(r) && (ranks_check_alike(r->comm, &r->config, &r->trainer, e) != 0 ||
                             ranks_check_run_dir(r->comm, r->config.run.dir, e) != 0)) ||
        join_devices(r, e) != 0 || comm_agree(r->comm, build_model(r, true, e), e) != 0)
        return -1;
    return resume_or_initialize(&r->model, &r->config, &r->trainer, e);
}

/* What only a run that has steps to do needs. */
static int prepare_loop(struct run *r, struct error *e) {
    if (check_profile(r, r->trainer.step, e) != 0 || check_disk(r, e) != 0 || open_sampler(r, e) != 0)
        return -1;
    if (is_rank0(r) && !(r->metrics = metrics_open(r->config.run.dir, r->trainer.step, e)))
        return -1;
    return 0;
}

/* Threads of our own first: MPI's are to have the same signals blocked. What went wrong with them is said by
 * a rank. */
static int open_ranks(struct run *r, struct error *e) {
    struct error own;
    int status = signals_watch(&own) != 0 || !(r->saver = saver_open(&own)) ? -1 : 0;
    if (!(r->comm = comm_open(DEFAULT_TIMEOUT, e)))
        return -1;
    signals_enable_graceful_stop(); /* ranks that wait for others in vain have nothing to save */
    if (status != 0)
        *e = own;
    return comm_agree(r->comm, status, e);
}

/* What the run leaves of the host's memory, for a copy to save from. Not what the system says is free now:
 * pages that no step has touched yet still count as free. */
static size_t host_memory_left(const struct run *r) {
    size_t have = r->host_memory / (size_t)r->comm->local_ranks;
    size_t need = strcmp(r->k->name, "cpu") == 0 ? memory_total(&r->model.plan) : 0;
    return have > need ? have - need : 0;
}

static int train(struct run *r, int argc, char **argv, struct error *e) {
    r->trainer.best_val_loss = (double)NAN;
    if (take_profile_option(r, &argc, argv, e) != 0 || open_ranks(r, e) != 0 ||
        prepare_training(r, argc, argv, e) != 0)
        return -1;
    if (r->trainer.step >= r->config.train.steps) {
        if (is_rank0(r))
            printf("%s: already finished: it is at step %lld, and train.steps is %lld; raise it to go on\n",
                   r->config.run.dir, (long long)r->trainer.step, (long long)r->config.train.steps);
        return 0;
    }
    if (comm_agree(r->comm, prepare_loop(r, e), e) != 0)
        return -1;
    announce(r, saver_reserve(r->saver, &r->model, host_memory_left(r)));
    int status = train_loop(r, e);
    struct error ignored; /* a checkpoint under way is worth finishing whatever ended the run */
    if (status != 0)
        saver_finish(r->saver, &ignored);
    return status;
}

/* ---- commands on a checkpoint ---- */

/* The model of a checkpoint and the settings it was trained with; overrides come on top. */
static int read_checkpoint(struct run *r, const char *dir, int argc, char **argv, struct error *e) {
    struct config *c = &r->config;
    config_defaults(c);
    if (checkpoint_read_config(dir, &c->model, e) != 0)
        return -1;
    c->train.seq_len = c->model.max_position_embeddings;
    c->train.micro_batch = 1;
    static const char *const recorded[] = {"train.seq_len", "train.micro_batch", "data.val"};
    for (size_t i = 0; i < sizeof recorded / sizeof *recorded; i++) {
        char value[MAX_TEXT], text[MAX_TEXT + 64], *setting = text;
        if (checkpoint_setting(dir, recorded[i], value, e) != 0)
            return -1;
        snprintf(text, sizeof text, "%s=%s", recorded[i], value);
        if (value[0] && config_override(c, 1, &setting, e) != 0)
            return -1;
    }
    return config_override(c, argc, argv, e);
}

static int prepare_eval(struct run *r, const char *dir, int argc, char **argv, struct error *e) {
    if (read_checkpoint(r, dir, argc - 1, argv + 1, e) != 0)
        return -1;
    const struct config *c = &r->config;
    if (!c->data.val[0] || strcmp(c->data.val, "none") == 0)
        return fail_user(e, "eval needs data: add data.val=GLOB");
    if (c->system.precision == PRECISION_AUTO)
        r->config.system.precision = PRECISION_FP32; /* what eval promises, on a GPU as well */
    comm_set_timeout(r->comm, c->system.peer_timeout);
    r->val = shards_open(c->data.val, c->train.seq_len, c->model.vocab_size, e);
    return r->val ? 0 : -1;
}

static int eval(struct run *r, int argc, char **argv, struct error *e) {
    char dir[MAX_TEXT];
    if (!(r->comm = comm_open(DEFAULT_TIMEOUT, e)) || ranks_find_checkpoint(r->comm, argv[0], dir, e) != 0 ||
        comm_agree(r->comm, prepare_eval(r, dir, argc, argv, e), e) != 0 || join_devices(r, e) != 0 ||
        comm_agree(r->comm, build_model(r, false, e), e) != 0 ||
        comm_agree(r->comm, checkpoint_load_weights(dir, &r->model, 0, e), e) != 0)
        return -1;
    say_what_is_ignored(r);
    int64_t tokens;
    double loss = evaluate(r, r->config.run.eval_batches, &tokens);
    if (!isfinite(loss))
        return fail_run(
            e, "%s: the loss is not finite: the weights have diverged; take an earlier checkpoint", dir);
    if (is_rank0(r))
        printf("val_loss %.7f %lld\n", loss, (long long)tokens);
    return 0;
}

/* The tokenizer that travelled with the checkpoint, unless the user names one. */
static int find_tokenizer(struct run *r, const char *dir, struct error *e) {
    char path[MAX_TEXT + 32], recorded[MAX_TEXT];
    snprintf(path, sizeof path, "%s/tokenizer.json", dir);
    if (strcmp(r->config.data.tokenizer, "none") != 0)
        return open_tokenizer(r, r->config.data.tokenizer, e);
    if (access(path, R_OK) == 0 || errno != ENOENT)
        return open_tokenizer(r, path, e);
    if (checkpoint_setting(dir, "data.tokenizer", recorded, e) != 0)
        return -1;
    return strcmp(recorded, "bytes") == 0 ? open_tokenizer(r, recorded, e) : 0;
}

static int generate_text(struct run *r, const struct generate_options *o, struct error *e) {
    int32_t *ids = NULL, end = r->tokenizer ? tokenizer_end_of_text(r->tokenizer) : -1;
    int64_t vocab = r->config.model.vocab_size;
    int64_t length = r->tokenizer ? tokenizer_encode(r->tokenizer, o->prompt, strlen(o->prompt), &ids, e)
                                  : text_parse_ids(o->prompt, vocab, &ids, e);
    struct text_writer w = {r->tokenizer, stdout, NULL, end};
    int status = length < 0 ? -1 : 0;
    if (status == 0 && length == 0) { /* no prompt: begin a document */
        free(ids);
        ids = malloc(sizeof *ids);
        if (!ids)
            return fail_run(e, "out of memory for the prompt");
        ids[0] = end >= 0 ? end : 0;
        length = 1;
    }
    if (status == 0)
        status = decoder_create(&r->decoder, &r->model, length + o->tokens, DECODE_CHUNK, e);
    for (int64_t i = 0; status == 0 && i < length; i++)
        if (ids[i] != end)
            text_write(&w, ids[i]);
    fflush(stdout);
    if (status == 0)
        status = generate(&r->decoder, ids, length, o->tokens, &o->sampling, text_emit, &w, e);
    if (status == 0)
        printf("\n");
    free(ids);
    return status;
}

static int generate_command(struct run *r, int argc, char **argv, struct error *e) {
    if (comm_launch_rank() > 0)
        return 0; /* one rank's work: the first does it */
    char dir[MAX_TEXT];
    struct generate_options o;
    if (generate_options_parse(argc - 1, argv + 1, &o, e) != 0 || checkpoint_find(argv[0], dir, e) != 0 ||
        read_checkpoint(r, dir, o.override_count, o.overrides, e) != 0)
        return -1;
    r->config.train.micro_batch = r->config.train.seq_len = 1; /* decoding has buffers of its own */
    if (open_device(r, e) != 0 || find_tokenizer(r, dir, e) != 0 || build_model(r, false, e) != 0 ||
        checkpoint_load_weights(dir, &r->model, 0, e) != 0)
        return -1;
    return generate_text(r, &o, e);
}

/* A run that is to be: its configuration for so many ranks, on GPUs that need not be here. */
static int plan_run(struct run *r, const char *path, const struct info_options *o, struct error *e) {
    struct stat st;
    if (stat(path, &st) == 0 && S_ISDIR(st.st_mode))
        return fail_user(e, "info --gpus plans a run: give its configuration, not the checkpoint %s", path);
    if (config_load(&r->config, path, o->override_count, o->overrides, o->gpus, e) != 0)
        return -1;
    return info_print_estimate(stdout, &r->config, o, e);
}

static int info(struct run *r, int argc, char **argv, struct error *e) {
    if (comm_launch_rank() > 0)
        return 0;
    char dir[MAX_TEXT];
    struct stat st;
    struct info_options o;
    if (info_parse(argc - 1, argv + 1, &o, e) != 0)
        return -1;
    if (o.gpus > 0)
        return plan_run(r, argv[0], &o, e);
    bool directory = stat(argv[0], &st) == 0 && S_ISDIR(st.st_mode);
    int status = directory ? checkpoint_find(argv[0], dir, e) != 0
                                 ? -1
                                 : read_checkpoint(r, dir, o.override_count, o.overrides, e)
                           : config_load(&r->config, argv[0], o.override_count, o.overrides, 1, e);
    /* The question is asked before the machine is there: count for the device at hand, in its precision. */
    r->config.system.device = DEVICE_AUTO;
    r->config.system.precision = PRECISION_AUTO;
    if (status != 0 || open_device(r, e) != 0)
        return -1;
    return info_print(stdout, &r->config, r->k, r->dev, e);
}

/* ---- the command line ---- */

struct command {
    const char *name;
    int (*run)(struct run *r, int argc, char **argv, struct error *e);
    const char *usage, *help;
};

static const struct command COMMANDS[] = {
    {"train", train, "CONFIG [section.key=value ...] [--profile N]",
     "Train the model of an INI file. When run.dir holds a checkpoint of the same run, continue it; a "
     "finished\n"
     "run says so. SIGINT, SIGTERM or SIGUSR1: finish the step, save, exit.\n"
     "--profile N: trace N steps, print where their time went, and leave run.dir/profile.json, a time line.\n"
     "  train_iha train configs/bytes_small.ini train.steps=500 run.dir=runs/try\n"},
    {"eval", eval, "CHECKPOINT data.val=GLOB [section.key=value ...]",
     "Mean loss of a checkpoint on token shards. The last line on stdout: val_loss <nats> <tokens>.\n"
     "CHECKPOINT is a step_... directory, or a run directory: its newest checkpoint.\n"
     "  train_iha eval runs/try data.val='data/bible/val_*.bin'\n"},
    {"generate", generate_command,
     "CHECKPOINT --prompt TEXT [--tokens N --temperature X --top-k K --seed S] [section.key=value ...]",
     "Continue a text. Defaults: 256 tokens, temperature 0.8 (0: always the likeliest token), top-k 0 (all), "
     "seed 1.\n"
     "Without a tokenizer the prompt is token ids.\n"
     "  train_iha generate runs/try --prompt 'In the beginning' --tokens 200\n"},
    {"info", info,
     "CONFIG|CHECKPOINT [--gpus N --gpu h200|h100|a100 --link nvlink|ib400] [section.key=value ...]",
     "Parameters by group, memory by family, FLOPs per token with the formula, the layer schedule.\n"
     "With --gpus, a plan of the run on N GPUs, which need not be here: time of a step and where it goes, "
     "MFU,\n"
     "what of the communication is not hidden, days, memory of each GPU. Predicted from published figures.\n"
     "--gpu: h200 unless given. --link: nvlink joins up to 8; ib400, the default beyond, joins nodes of 8 "
     "by\n"
     "400 Gb/s a GPU.\n"
     "  train_iha info configs/iha_paper_2.4b.ini\n"
     "  train_iha info configs/iha_paper_2.4b.ini --gpus 128 --gpu h200 --link ib400\n"},
};
enum { COMMAND_COUNT = sizeof COMMANDS / sizeof *COMMANDS };

static void print_help(void) {
    printf("train_iha %s: pretrain and fine-tune GPTs with Interleaved Head Attention\n\n", VERSION);
    for (int i = 0; i < COMMAND_COUNT; i++)
        printf("  train_iha %s %s\n", COMMANDS[i].name, COMMANDS[i].usage);
    printf("\n`train_iha COMMAND --help` explains each. Exit codes: 0 done; 1 the run failed while running;\n"
           "2 what was given is wrong, found before the first step.\n\nConfiguration keys:\n\n");
    config_print_help(stdout);
}

static const struct command *find_command(const char *name, struct error *e) {
    const char *names[COMMAND_COUNT + 1] = {0};
    for (int i = 0; i < COMMAND_COUNT; i++) {
        if (strcmp(COMMANDS[i].name, name) == 0)
            return &COMMANDS[i];
        names[i] = COMMANDS[i].name;
    }
    const char *near = nearest_name(name, names);
    fail_user(e, "unknown command '%s'%s%s; see train_iha --help", name, near ? "; did you mean " : "",
              near ? near : "");
    return NULL;
}

static bool asks_for_help(int argc, char **argv) {
    for (int i = 0; i < argc; i++)
        if (strcmp(argv[i], "--help") == 0)
            return true;
    return false;
}

/* The first argument that is neither an option nor an option's value goes before all others. False: there is
 * none. */
static bool positional_first(int argc, char **argv) {
    int at = 0;
    while (at < argc && argv[at][0] == '-')
        at += 2;
    if (at >= argc)
        return false;
    char *first = argv[at];
    memmove(argv + 1, argv, (size_t)at * sizeof *argv);
    argv[0] = first;
    return true;
}

static int run_command(struct run *r, int argc, char **argv, struct error *e) {
    if (argc == 0)
        return fail_user(e, "no command given; see train_iha --help");
    if (strcmp(argv[0], "--help") == 0) {
        print_help();
        return 0;
    }
    if (strcmp(argv[0], "--version") == 0) {
        printf("train_iha %s\n", VERSION);
        return 0;
    }
    const struct command *command = find_command(argv[0], e);
    if (!command)
        return -1;
    if (asks_for_help(argc - 1, argv + 1)) {
        printf("train_iha %s %s\n\n%s", command->name, command->usage, command->help);
        return 0;
    }
    if (!positional_first(argc - 1, argv + 1))
        return fail_user(e, "train_iha %s %s: the first argument is missing", command->name, command->usage);
    return command->run(r, argc - 1, argv + 1, e);
}

/* Ranks have agreed on an error, and processes that are no ranks yet find the same wrong with what was given.
 */
static bool should_print(const struct run *r, const struct error *e) {
    return r->comm ? is_rank0(r) : e->exit_code != EXIT_USER || comm_launch_rank() == 0;
}

int main(int argc, char **argv) {
    static struct run r;
    struct error e = {0};
    int status = run_command(&r, argc - 1, argv + 1, &e);
    if (status == 0 && (fflush(stdout) != 0 || ferror(stdout)))
        status = fail_run(&e, "cannot write to the standard output: %s", strerror(errno));
    if (status != 0 && r.metrics)
        status_break(r.metrics);
    if (status != 0 && should_print(&r, &e))
        fprintf(stderr, "train_iha: %s\n", e.text);
    release(&r); /* only now: as soon as one rank has ended with an error, mpirun ends the others */
    if (status == 0)
        return EXIT_OK;
    return e.exit_code ? e.exit_code : EXIT_RUN;
}

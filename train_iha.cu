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
#include <time.h>
#include <unistd.h>

#include "data/shards.h"
#include "data/tokenizer.h"
#include "kernels/comm.h"
#include "kernels/kernels.h"
#include "model/checkpoint.h"
#include "model/config.h"
#include "model/decode.h"
#include "model/files.h"
#include "model/flops.h"
#include "model/generate.h"
#include "model/info.h"
#include "model/info_plan.h"
#include "model/metrics.h"
#include "model/model.h"
#include "model/saver.h"
#include "model/schedule.h"
#include "model/signals.h"

static const char VERSION[] = "0.1.0";

enum { DEFAULT_TIMEOUT = 300 }; /* seconds to wait for a rank until the configuration says */

/* All that a command holds. Whatever is not NULL is released at the end. */
struct run {
    struct config config;
    struct comm *comm; /* NULL in commands that run on one rank */
    const struct kernels *k;
    struct device *dev;
    size_t host_memory; /* free before the model was there */
    struct model model;
    struct shards *train, *val;
    struct tokenizer *tokenizer;
    char *tokenizer_text; /* of tokenizer.json, for checkpoints; NULL: none */
    size_t tokenizer_bytes;
    struct decoder decoder;
    struct metrics *metrics;
    struct progress progress;
    struct saver *saver;
    bool saves_behind;            /* saving goes on while the next steps run */
    struct checkpoint_job saving; /* what the saver is at, or was last */
    int posted;                   /* steps whose state has not been collected yet */
    double clock;                 /* when the last was, or training went on after something else */
    int lock;
    int32_t *tokens, *targets; /* one pass, [micro_batch, seq_len] */
    double flops_per_token;
};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

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
    if (r->dev)
        r->k->close(r->dev);
    if (r->lock > 0)
        close(r->lock);
    if (r->comm)
        r->comm->ops->close(r->comm);
}

/* Rank 0 speaks for all, and writes what exists once. */
static bool leads(const struct run *r) {
    return !r->comm || r->comm->rank == 0;
}

static bool alone(const struct run *r) {
    return !r->comm || r->comm->ranks == 1;
}

/* ---- phases shared by the commands ------------------------------------------------------------------ */

static int open_device(struct run *r, struct error *e) {
    const struct system_config *s = &r->config.system;
    bool cuda = s->device == DEVICE_CUDA || (s->device == DEVICE_AUTO && cuda_devices() > 0);
    bool bf16 = s->precision == PRECISION_BF16 || (s->precision == PRECISION_AUTO && cuda);
    struct device_options options = {.threads = (int)s->threads,
                                     .precision = bf16 ? DEVICE_BF16 : DEVICE_FP32,
                                     .deterministic = s->deterministic,
                                     .comm = r->comm};
    r->k = cuda ? kernels_cuda() : kernels_cpu();
    if (!r->k)
        return fail_user(e, "system.device = cuda, but this program was built without CUDA; use auto or cpu");
    if (cuda && !alone(r))
        return fail_user(
            e, "several ranks on GPUs are not there yet; set system.device = cpu, or start one rank");
    if (s->comm == COMM_NCCL)
        return fail_user(e, "system.comm = nccl is not there yet; use auto or mpi");
    r->dev = r->k->open(&options, e);
    return r->dev ? 0 : -1;
}

static int build_model(struct run *r, bool training, struct error *e) {
    const struct train_config *t = &r->config.train;
    struct model_options options = {
        .shape = {t->micro_batch, t->seq_len, r->config.system.recompute, training},
        .weight_decay = t->weight_decay,
        .mix_lr_scale = t->mix_lr_scale,
        .comm = r->comm,
        .zero_stage = (int)r->config.system.zero_stage};
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

/* ---- printing samples -------------------------------------------------------------------------------- */

struct printer {
    const struct tokenizer *tokenizer;
    FILE *out, *copy; /* copy: NULL, or a second place */
    int32_t end_of_text;
};

static void print_to(FILE *out, const struct tokenizer *tokenizer, int32_t token) {
    size_t length;
    if (!tokenizer) {
        fprintf(out, "%d ", token);
        return;
    }
    const char *text = tokenizer_decode(tokenizer, token, &length);
    fwrite(text, 1, length, out);
}

static void print_token(const struct printer *p, int32_t token) {
    print_to(p->out, p->tokenizer, token);
    if (p->copy)
        print_to(p->copy, p->tokenizer, token);
}

static bool emit(void *context, int32_t token) {
    struct printer *p = context;
    if (token == p->end_of_text)
        return false;
    print_token(p, token);
    fflush(p->out);
    return true;
}

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
    struct sampling how = {0.8, 0, (uint64_t)(r->config.train.seed + r->progress.step)};
    if (!leads(r))
        return generate(&r->decoder, &start, 1, r->decoder.capacity - 1, &how, ignore, &end, e);
    FILE *file = fopen(path, "a");
    if (!file)
        return fail_run(e, "%s: cannot write: %s; %s", path, strerror(errno), files_advice(errno));
    struct printer p = {r->tokenizer, stdout, file, end};
    status_break(r->metrics);
    printf("---- sample at step %lld\n", (long long)r->progress.step);
    fprintf(file, "---- step %lld\n", (long long)r->progress.step);
    int status = generate(&r->decoder, &start, 1, r->decoder.capacity - 1, &how, emit, &p, e);
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

/* ---- train ------------------------------------------------------------------------------------------- */

static int open_data(struct run *r, struct error *e) {
    const struct config *c = &r->config;
    int64_t T = c->train.seq_len, V = c->model.vocab_size;
    r->train = shards_open(c->data.train, T, V, e);
    if (!r->train)
        return -1;
    shards_fingerprint(r->train, r->progress.train_fingerprint);
    if (c->data.val[0]) {
        r->val = shards_open(c->data.val, T, V, e);
        if (!r->val)
            return -1;
        shards_fingerprint(r->val, r->progress.val_fingerprint);
    }
    return open_tokenizer(r, c->data.tokenizer, e);
}

/* The run's directory, for this run alone. */
static int open_run_dir(struct run *r, struct error *e) {
    char path[MAX_TEXT + 32];
    const char *dir = r->config.run.dir;
    if (!leads(r))
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
    if (!leads(r))
        return 0;
    double need = 4.0 * (double)r->model.params.learned + 8.0 * (double)r->model.params.learned;
    int64_t have = files_free_bytes(r->config.run.dir);
    if (have >= 0 && (double)have < need)
        return fail_user(
            e, "%s: a checkpoint takes %.1f MB and %.1f MB is free; free some, or set another run.dir",
            r->config.run.dir, need / 1e6, (double)have / 1e6);
    return 0;
}

/* The checkpoint that `path` names: where it is a run that goes on, ranks must not choose each for itself. */
static int find_together(struct run *r, const char *path, char dir[MAX_TEXT], struct error *e) {
    memset(dir, 0, MAX_TEXT);
    if (comm_agree(r->comm, leads(r) ? checkpoint_find(path, dir, e) : 0, e) != 0)
        return -1;
    memmove(dir, comm_tell(r->comm, dir, MAX_TEXT), MAX_TEXT); /* rank 0's */
    return 0;
}

/* Weights of another geometry may fit by their shapes and mean nothing. */
static int check_geometry(const char *dir, const struct model_config *now, struct error *e) {
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

/* Weights, and where asked for the optimizer's state, of another run. */
static int load_from(struct run *r, const char *dir, struct error *e) {
    if (check_geometry(dir, &r->config.model, e) != 0 || checkpoint_load_weights(dir, &r->model, 0, e) != 0)
        return -1;
    if (leads(r))
        fprintf(stderr, "weights from %s\n", dir);
    if (r->config.train.init_optimizer != OPTIMIZER_KEEP)
        return 0;
    struct progress from;
    if (checkpoint_read_progress(dir, &from, e) != 0)
        return -1;
    r->progress.updates = from.updates; /* the moments' age, for their bias correction */
    return checkpoint_load_optimizer(dir, &r->model, e);
}

static int start_from(struct run *r, const char *path, struct error *e) {
    char dir[MAX_TEXT];
    return find_together(r, path, dir, e) != 0 || comm_agree(r->comm, load_from(r, dir, e), e) != 0 ? -1 : 0;
}

/* Every rank loads the newest checkpoint that loads; all must have found the same. 1: resumed, 0: there is
 * none. */
static int resume(struct run *r, struct error *e) {
    char dir[MAX_TEXT] = "";
    int status = checkpoint_resume(r->config.run.dir, &r->model, &r->config, &r->progress, dir, leads(r), e);
    if (comm_agree(r->comm, status < 0 ? -1 : 0, e) != 0)
        return -1;
    const char *first = comm_tell(r->comm, dir, MAX_TEXT);
    if (strcmp(first, dir) != 0)
        status = fail_user(e,
                           "finds \"%s\" where rank 0 finds \"%s\"; run.dir must be the same for all ranks: "
                           "start again",
                           dir, first);
    if (status == 1 && leads(r)) {
        fprintf(stderr, "resuming from %s\n", dir);
        status = checkpoint_settle(r->config.run.dir, &r->config, &r->progress, e) == 0 ? 1 : -1;
    }
    return comm_agree(r->comm, status < 0 ? -1 : 0, e) == 0 ? status : -1;
}

/* Continue the newest checkpoint, or begin. */
static int resume_or_initialize(struct run *r, struct error *e) {
    struct config *c = &r->config;
    struct progress *p = &r->progress;
    int status = resume(r, e);
    if (status < 0)
        return -1;
    if (status == 0 && comm_agree(r->comm, model_initialize(&r->model, (uint64_t)c->train.seed, e), e) != 0)
        return -1;
    if (status == 0 && c->train.init_from[0] && start_from(r, c->train.init_from, e) != 0)
        return -1;
    struct step_state state = {.updates = p->updates,
                               .skips_run = p->skips_run,
                               .norm_count = p->norm_count,
                               .norm_mean = p->norm_mean,
                               .norm_variance = p->norm_variance};
    r->k->step_write(r->dev, r->model.state, &state);
    return 0;
}

static int open_sampler(struct run *r, struct error *e) {
    if (r->config.run.sample_every == 0)
        return 0;
    int64_t capacity = r->config.model.max_position_embeddings;
    return decoder_create(&r->decoder, &r->model, capacity < SAMPLE_TOKENS ? capacity : SAMPLE_TOKENS,
                          DECODE_CHUNK, e);
}

static void announce(struct run *r) {
    const struct config *c = &r->config;
    if (!leads(r))
        return;
    if (!alone(r))
        fprintf(stderr, "%d ranks over %s, zero_stage %d; each ", r->comm->ranks, r->comm->ops->name,
                r->model.partition.zero_stage);
    fprintf(stderr, "%s\n", r->k->describe(r->dev));
    fprintf(stderr,
            "model: %.2fM parameters, %lld layers; data: %lld tokens in %d file%s; %lld tokens a step\n",
            (double)r->model.params.learned / 1e6, (long long)c->model.num_hidden_layers,
            (long long)shards_tokens(r->train), shards_files(r->train),
            shards_files(r->train) == 1 ? "" : "s", (long long)c->train.batch_tokens);
    if (!r->saves_behind)
        fprintf(stderr, "saving: no memory for a copy of %.2f GB, so training waits while it saves\n",
                (double)saver_copy_bytes(&r->model) / 1e9);
}

/* Forward and backward over the step's sequences, then the update. */
static void train_step(struct run *r) {
    const struct config *c = &r->config;
    const struct train_config *t = &c->train;
    int64_t B = t->micro_batch, T = t->seq_len, ranks = r->comm->ranks;
    int64_t passes = t->batch_tokens / (ranks * B * T);
    r->k->step_begin(r->dev, r->model.state, r->progress.step, schedule_lr(t, r->progress.step));
    for (int64_t pass = 0; pass < passes; pass++) {
        for (int64_t b = 0; b < B; b++) {
            int64_t draw = r->progress.sequences + (pass * ranks + r->comm->rank) * B + b;
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
    r->progress.sequences += passes * ranks * B;
    r->progress.tokens += t->batch_tokens;
    r->progress.step++;
}

static bool due(int64_t every, int64_t step) {
    return every > 0 && step % every == 0;
}

/* Too many steps in a row were skipped: say which, and whose gradient it was. */
static int stop_skipping(struct run *r, const struct step_state *state, struct error *e) {
    long long last = (long long)state->step + 1;
    bool finite;
    const struct param *worst = &r->model.params.list[model_worst_gradient(&r->model, &finite)];
    if (state->skip == STEP_OUTLIER)
        return fail_run(
            e,
            "the gradient norm was an outlier (train.skip_zscore = %g) in %d steps in a row, step %lld to "
            "step %lld; in the last it was %.4g, %.1f deviations above its recent mean, the largest part "
            "in %s; lower train.lr, or look at the data of these steps",
            r->config.train.skip_zscore, state->skips_run, last + 1 - state->skips_run,
            (long long)r->progress.step, state->grad_norm, state->zscore, worst->name);
    return fail_run(
        e,
        "the %s was not finite in %d steps in a row, step %lld to step %lld; %s%s; lower train.lr, look at "
        "the data of these steps, or go back: remove the newest step_... directories of the run",
        isfinite(state->loss) ? "gradient" : "loss", state->skips_run, last + 1 - state->skips_run, last,
        finite ? "every parameter's own gradient is finite, the largest " : "backward met it first in ",
        worst->name);
}

/* Collect the oldest posted step, record it, and stop a run whose numbers have gone wrong for good. Every
 * rank has the same state; rank 0 writes it down. */
static int record_step(struct run *r, struct error *e) {
    const struct config *c = &r->config;
    struct progress *p = &r->progress;
    struct step_state state;
    r->k->step_collect(r->dev, &state);
    r->posted--;
    double seconds = now() - r->clock;
    r->clock += seconds;
    p->updates = state.updates;
    p->skips_run = state.skips_run;
    p->norm_count = state.norm_count;
    p->norm_mean = state.norm_mean;
    p->norm_variance = state.norm_variance;
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
    int status = leads(r) ? metrics_step(r->metrics, &record, e) : 0;
    if (leads(r) && due(c->run.log_every, record.step))
        status_step(r->metrics, &record);
    /* All ranks look for the worst gradient together, so one that could not write looks too. */
    return state.skips_run > c->train.max_skips ? stop_skipping(r, &state, e) : status;
}

/* Until so many steps at most are under way. */
static int record_steps(struct run *r, int ahead, struct error *e) {
    int status = 0;
    while (status == 0 && r->posted > ahead)
        status = record_step(r, e);
    return status;
}

/* ---- saving -------------------------------------------------------------------------------------------- */

/* What ranks tell each other after every step. */
struct pulse {
    int stop;   /* the signal that asks for an end */
    int failed; /* the step, or what came with it */
    enum saver_state saver;
};

/* Of all ranks: any signal, any failure, and the saver's state that is furthest from done. */
static void share_pulse(struct run *r, struct pulse *p) {
    p->saver = saver_state(r->saver);
    const struct pulse *all = comm_tell(r->comm, p, sizeof *p);
    *p = all[0];
    for (int i = 1; i < r->comm->ranks; i++) {
        p->stop = p->stop ? p->stop : all[i].stop;
        p->failed |= all[i].failed;
        if (all[i].saver == SAVER_WRITING || (all[i].saver != SAVER_IDLE && p->saver != SAVER_WRITING))
            p->saver = all[i].saver;
    }
}

/* All ranks have written their files. */
static int publish(struct run *r, struct error *e) {
    if (comm_agree(r->comm, saver_collect(r->saver, e), e) == 0 &&
        comm_agree(r->comm, leads(r) ? checkpoint_publish(&r->saving, e) : 0, e) == 0)
        return 0;
    if (leads(r))
        checkpoint_clean(r->config.run.dir);
    e->exit_code = EXIT_RUN;
    return -1;
}

/* Wait for the checkpoint that is being written, if there is one, and make it appear. */
static int finish_save(struct run *r, struct error *e) {
    for (;;) {
        struct pulse pulse = {0};
        share_pulse(r, &pulse);
        if (pulse.saver == SAVER_IDLE)
            return 0;
        if (pulse.saver != SAVER_WRITING)
            return publish(r, e);
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
}

/* What led up to a checkpoint is on the disk before it. */
static int begin_save(struct run *r, struct error *e) {
    return metrics_sync(r->metrics, e) != 0 ? -1 : checkpoint_begin(r->config.run.dir, r->progress.step, e);
}

static int save(struct run *r, bool wait, struct error *e) {
    const struct config *c = &r->config;
    wait = wait || !r->saves_behind;
    if (finish_save(r, e) != 0 || comm_agree(r->comm, leads(r) ? begin_save(r, e) : 0, e) != 0)
        return -1;
    r->saving = (struct checkpoint_job){.run_dir = c->run.dir,
                                        .config = c,
                                        .tokenizer = r->tokenizer_text,
                                        .tokenizer_bytes = r->tokenizer_bytes,
                                        .progress = r->progress,
                                        .from = {.model = &r->model}};
    if (comm_agree(r->comm, saver_start(r->saver, &r->saving, !wait, e), e) != 0)
        return -1;
    return wait ? finish_save(r, e) : 0;
}

/* ---- between steps ------------------------------------------------------------------------------------- */

static int evaluate_now(struct run *r, bool saves, struct error *e) {
    struct progress *p = &r->progress;
    int64_t tokens;
    double loss = evaluate(r, r->config.run.eval_batches, &tokens);
    if (saves && isfinite(loss) && !(loss >= p->best_val_loss)) {
        p->best_val_loss = loss;
        p->best_step = p->step;
    }
    if (!leads(r))
        return 0;
    status_break(r->metrics);
    fprintf(stderr, "step %lld: val_loss %.4f over %lld tokens\n", (long long)p->step, loss,
            (long long)tokens);
    return metrics_eval(r->metrics, p->step, loss, e);
}

/* What comes after a step: the last one, or one on which a signal came, saves. */
struct pause {
    bool evaluates, saves, samples;
};

static struct pause pause_after(const struct run *r, bool stop) {
    const struct run_config *c = &r->config.run;
    int64_t step = r->progress.step;
    bool last = step == r->config.train.steps;
    return (struct pause){.evaluates = r->val && c->eval_every > 0 && (last || due(c->eval_every, step)),
                          .saves = last || stop || (due(c->save_every, step) && r->progress.skips_run == 0),
                          .samples = due(c->sample_every, step)};
}

/* Evaluate, sample, save. */
static int between_steps(struct run *r, bool stop, struct error *e) {
    struct pause now_due = pause_after(r, stop);
    if (!now_due.evaluates && !now_due.saves && !now_due.samples)
        return 0;
    bool ends = stop || r->progress.step == r->config.train.steps;
    if (comm_agree(r->comm, record_steps(r, 0, e), e) != 0)
        return -1;
    if (now_due.evaluates && comm_agree(r->comm, evaluate_now(r, now_due.saves, e), e) != 0)
        return -1;
    if (now_due.samples && comm_agree(r->comm, print_sample(r, e), e) != 0)
        return -1;
    /* The checkpoint comes last: a run that is resumed from it does nothing of this step again. */
    if (now_due.saves && save(r, ends, e) != 0)
        return -1;
    r->clock = now();
    return 0;
}

static int finish_run(struct run *r, int stop) {
    if (!leads(r))
        return 0;
    status_break(r->metrics);
    if (stop)
        fprintf(stderr, "stopped by signal %d after step %lld; the same command continues\n", stop,
                (long long)r->progress.step);
    else
        fprintf(stderr, "done: %lld steps, %lld tokens in %.1f s of training; %s\n",
                (long long)r->progress.step, (long long)r->progress.tokens, r->progress.seconds,
                r->config.run.dir);
    return 0;
}

static int train_loop(struct run *r, struct error *e) {
    const int64_t steps = r->config.train.steps;
    struct pulse pulse = {0};
    r->clock = now();
    while (r->progress.step < steps && !pulse.stop) {
        train_step(r);
        int status = record_steps(r, r->k->run_ahead, e);
        /* A signal is looked for once a step: one that comes while saving ends the next step. */
        pulse = (struct pulse){.stop = signals_asked(), .failed = status != 0};
        share_pulse(r, &pulse);
        if (pulse.failed && comm_agree(r->comm, status, e) != 0)
            return -1;
        if ((pulse.saver == SAVER_WRITTEN || pulse.saver == SAVER_FAILED) && publish(r, e) != 0)
            return -1;
        if (between_steps(r, pulse.stop, e) != 0)
            return -1;
    }
    return finish_run(r, pulse.stop);
}

static void let_messages_move(void *comm) {
    ((struct comm *)comm)->ops->progress(comm);
}

/* A run.dir that only some hosts see would cost the first checkpoint: all must find rank 0's lock there, and
 * be able to write. */
static int check_run_dir(struct run *r, struct error *e) {
    char path[MAX_TEXT + 64];
    long pid = (long)getpid(), found = -1;
    snprintf(path, sizeof path, "%s/lock", r->config.run.dir);
    memcpy(&pid, comm_tell(r->comm, &pid, sizeof pid), sizeof pid); /* rank 0's */
    FILE *f = fopen(path, "r");
    bool same = f && fscanf(f, "%ld", &found) == 1 && found == pid;
    if (f)
        fclose(f);
    int status =
        same && access(r->config.run.dir, W_OK) == 0
            ? 0
            : fail_user(e,
                        "%s: not the directory that rank 0 writes to, or not writable; run.dir must be "
                        "on a file system that all hosts share",
                        r->config.run.dir);
    return comm_agree(r->comm, status, e);
}

struct digest {
    uint64_t settings, data;
};

static void add_text(uint64_t *hash, const char *text) { /* FNV-1a */
    for (; *text; text++)
        *hash = (*hash ^ (unsigned char)*text) * 0x100000001b3u;
}

static void add_setting(void *context, const char *key, const char *value) {
    add_text(context, key);
    add_text(context, value);
}

/* Ranks that were started with different files would train nobody's model. */
static int check_alike(struct run *r, struct error *e) {
    struct digest mine = {1, 1}, first;
    config_visit(&r->config, add_setting, &mine.settings);
    add_text(&mine.data, r->progress.train_fingerprint);
    add_text(&mine.data, r->progress.val_fingerprint);
    memcpy(&first, comm_tell(r->comm, &mine, sizeof mine), sizeof first);
    int status = 0;
    if (first.settings != mine.settings)
        status = fail_user(e, "has another configuration than rank 0; give all the same file and overrides");
    else if (first.data != mine.data)
        status = fail_user(e, "finds other training or validation data than rank 0 under the same names; all "
                              "hosts must have the same shards");
    return comm_agree(r->comm, status, e);
}

/* What each rank does for itself, and on which all must agree before any memory is shared. */
static int prepare_alone(struct run *r, int argc, char **argv, struct error *e) {
    if (config_load(&r->config, argv[0], argc - 1, argv + 1, r->comm->ranks, e) != 0)
        return -1;
    comm_set_timeout(r->comm, r->config.system.peer_timeout);
    return open_data(r, e) != 0 || open_run_dir(r, e) != 0 ? -1 : 0;
}

static int prepare_training(struct run *r, int argc, char **argv, struct error *e) {
    if (comm_agree(r->comm, prepare_alone(r, argc, argv, e), e) != 0 ||
        (!alone(r) && (check_alike(r, e) != 0 || check_run_dir(r, e) != 0)) ||
        comm_agree(r->comm, open_device(r, e), e) != 0 ||
        comm_agree(r->comm, build_model(r, true, e), e) != 0 || resume_or_initialize(r, e) != 0)
        return -1;
    if (!alone(r))
        r->k->set_idle_call(r->dev, let_messages_move, r->comm);
    return 0;
}

/* What only a run that has steps to do needs. */
static int prepare_loop(struct run *r, struct error *e) {
    if (check_disk(r, e) != 0 || open_sampler(r, e) != 0)
        return -1;
    if (leads(r) && !(r->metrics = metrics_open(r->config.run.dir, r->progress.step, e)))
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
    if (status != 0)
        *e = own;
    return comm_agree(r->comm, status, e);
}

/* What the run leaves of the host's memory, for a copy to save from. Not what the system says is free now:
 * pages that no step has touched yet still count as free. */
static size_t host_memory_left(const struct run *r) {
    size_t have = r->host_memory / (size_t)r->comm->local_ranks;
    size_t need = r->k == kernels_cpu() ? memory_total(&r->model.plan) : 0;
    return have > need ? have - need : 0;
}

static int train(struct run *r, int argc, char **argv, struct error *e) {
    r->progress.best_val_loss = (double)NAN;
    if (open_ranks(r, e) != 0 || prepare_training(r, argc, argv, e) != 0)
        return -1;
    if (r->progress.step >= r->config.train.steps) {
        if (leads(r))
            printf("%s: already finished: it is at step %lld, and train.steps is %lld; raise it to go on\n",
                   r->config.run.dir, (long long)r->progress.step, (long long)r->config.train.steps);
        return 0;
    }
    if (comm_agree(r->comm, prepare_loop(r, e), e) != 0)
        return -1;
    r->saves_behind = saver_reserve(r->saver, &r->model, host_memory_left(r));
    r->saves_behind = comm_agree(r->comm, r->saves_behind ? 0 : -1, &(struct error){0}) == 0;
    announce(r);
    int status = train_loop(r, e);
    struct error ignored; /* a checkpoint under way is worth finishing whatever ended the run */
    if (status != 0)
        finish_save(r, &ignored);
    return status;
}

/* ---- commands on a checkpoint ------------------------------------------------------------------------- */

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
    if (!(r->comm = comm_open(DEFAULT_TIMEOUT, e)) || find_together(r, argv[0], dir, e) != 0 ||
        comm_agree(r->comm, prepare_eval(r, dir, argc, argv, e), e) != 0 ||
        comm_agree(r->comm, open_device(r, e), e) != 0 ||
        comm_agree(r->comm, build_model(r, false, e), e) != 0 ||
        comm_agree(r->comm, checkpoint_load_weights(dir, &r->model, 0, e), e) != 0)
        return -1;
    int64_t tokens;
    double loss = evaluate(r, r->config.run.eval_batches, &tokens);
    if (!isfinite(loss))
        return fail_run(
            e, "%s: the loss is not finite: the weights have diverged; take an earlier checkpoint", dir);
    if (leads(r))
        printf("val_loss %.7f %lld\n", loss, (long long)tokens);
    return 0;
}

struct generate_options {
    const char *prompt;
    int64_t tokens;
    struct sampling sampling;
    int override_count;
    char **overrides;
};

static int parse_number(const char *option, const char *text, bool whole, double most, double *out,
                        struct error *e) {
    char *end;
    *out = strtod(text, &end);
    if (end == text || *end || !(*out >= 0 && *out <= most) || (whole && *out != floor(*out)))
        return fail_user(e, "%s %s: not a %snumber from 0 to %.0f", option, text, whole ? "whole " : "",
                         most);
    return 0;
}

static int parse_generate(int argc, char **argv, struct generate_options *o, struct error *e) {
    static const char *const known[] = {"--prompt", "--tokens", "--temperature", "--top-k", "--seed", NULL};
    *o = (struct generate_options){.prompt = "", .tokens = 256, .sampling = {0.8, 0, 1}, .overrides = argv};
    for (int i = 0; i < argc; i++) {
        double number = 0;
        if (argv[i][0] != '-') {
            o->overrides[o->override_count++] = argv[i];
            continue;
        }
        int which = 0;
        while (known[which] && strcmp(argv[i], known[which]) != 0)
            which++;
        const char *near = nearest_name(argv[i], known);
        if (!known[which])
            return fail_user(e, "generate: unknown option %s%s%s; see train_iha generate --help", argv[i],
                             near ? "; did you mean " : "", near ? near : "");
        if (i + 1 == argc)
            return fail_user(e, "generate: %s needs a value", argv[i]);
        const char *value = argv[i + 1];
        double most = which == 1 ? 1e7 : which == 2 ? 100 : 9e15;
        if (which > 0 && parse_number(argv[i], value, which != 2, most, &number, e) != 0)
            return -1;
        i++;
        switch (which) {
        case 0:
            o->prompt = value;
            break;
        case 1:
            o->tokens = (int64_t)number;
            break;
        case 2:
            o->sampling.temperature = number;
            break;
        case 3:
            o->sampling.top_k = (int64_t)number;
            break;
        default:
            o->sampling.seed = (uint64_t)number;
        }
    }
    return 0;
}

/* Without a tokenizer a prompt is token ids. */
static int64_t parse_ids(const char *text, int64_t vocab, int32_t **ids, struct error *e) {
    int64_t count = 0;
    *ids = malloc((strlen(text) + 1) * sizeof **ids);
    if (!*ids)
        return fail_run(e, "out of memory for the prompt");
    for (char *end; *text; text = end) {
        long id = strtol(text, &end, 10);
        if (end == text && strspn(text, " ") == strlen(text))
            break;
        if (end == text || id < 0 || id >= vocab)
            return fail_user(
                e,
                "--prompt: the checkpoint has no tokenizer, so the prompt must be token ids below "
                "%lld; '%.20s' is not one (or name one: data.tokenizer=FILE)",
                (long long)vocab, text);
        (*ids)[count++] = (int32_t)id;
    }
    return count;
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
                                  : parse_ids(o->prompt, vocab, &ids, e);
    struct printer p = {r->tokenizer, stdout, NULL, end};
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
            print_token(&p, ids[i]);
    fflush(stdout);
    if (status == 0)
        status = generate(&r->decoder, ids, length, o->tokens, &o->sampling, emit, &p, e);
    if (status == 0)
        printf("\n");
    free(ids);
    return status;
}

static int generate_command(struct run *r, int argc, char **argv, struct error *e) {
    if (comm_started_rank() > 0)
        return 0; /* one rank's work: the first does it */
    char dir[MAX_TEXT];
    struct generate_options o;
    if (parse_generate(argc - 1, argv + 1, &o, e) != 0 || checkpoint_find(argv[0], dir, e) != 0 ||
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
    if (config_load(&r->config, path, o->override_count, o->overrides, o->gpus, e) != 0 ||
        info_print_counts(stdout, &r->config, e) != 0)
        return -1;
    return info_print_plan(stdout, &r->config, o, e);
}

static int info(struct run *r, int argc, char **argv, struct error *e) {
    if (comm_started_rank() > 0)
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

/* ---- the command line ---------------------------------------------------------------------------------- */

struct command {
    const char *name;
    int (*run)(struct run *r, int argc, char **argv, struct error *e);
    const char *usage, *help;
};

static const struct command COMMANDS[] = {
    {"train", train, "CONFIG [section.key=value ...]",
     "Train the model of an INI file. When run.dir holds a checkpoint of the same run, continue it; a "
     "finished\n"
     "run says so. SIGINT, SIGTERM or SIGUSR1: finish the step, save, exit.\n"
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
    if (argc < 2)
        return fail_user(e, "train_iha %s %s: the first argument is missing", command->name, command->usage);
    return command->run(r, argc - 1, argv + 1, e);
}

/* Ranks have agreed on an error, and processes that are no ranks yet find the same wrong with what was given.
 */
static bool speaks(const struct run *r, const struct error *e) {
    return r->comm ? leads(r) : e->exit_code != EXIT_USER || comm_started_rank() == 0;
}

int main(int argc, char **argv) {
    static struct run r;
    struct error e = {0};
    int status = run_command(&r, argc - 1, argv + 1, &e);
    if (status == 0 && (fflush(stdout) != 0 || ferror(stdout)))
        status = fail_run(&e, "cannot write to the standard output: %s", strerror(errno));
    if (status != 0 && r.metrics)
        status_break(r.metrics);
    if (status != 0 && speaks(&r, &e))
        fprintf(stderr, "train_iha: %s\n", e.text);
    release(&r); /* only now: as soon as one rank has ended with an error, mpirun ends the others */
    if (status == 0)
        return EXIT_OK;
    return e.exit_code ? e.exit_code : EXIT_RUN;
}

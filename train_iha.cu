/* train_iha: pretrain and fine-tune GPTs with Interleaved Head Attention. Plain C; the name marks the entry
 * point.
 *
 * A training run is train(): read the configuration, open the data, build the model, resume or initialise,
 * then step by step train, evaluate, sample and save. The other commands read a checkpoint. */
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "data/shards.h"
#include "data/tokenizer.h"
#include "kernels/kernels.h"
#include "model/checkpoint.h"
#include "model/config.h"
#include "model/decode.h"
#include "model/files.h"
#include "model/flops.h"
#include "model/generate.h"
#include "model/info.h"
#include "model/metrics.h"
#include "model/model.h"
#include "model/schedule.h"

static const char VERSION[] = "0.1.0";

/* All that a command holds. Whatever is not NULL is released at the end. */
struct run {
    struct config config;
    const struct kernels *k;
    struct device *dev;
    struct model model;
    struct shards *train, *val;
    struct tokenizer *tokenizer;
    char tokenizer_file[MAX_TEXT]; /* empty: none to copy into checkpoints */
    struct decoder decoder;
    struct metrics *metrics;
    struct progress progress;
    int lock;
    int32_t *tokens, *targets; /* one pass, [micro_batch, seq_len] */
    double flops_per_token;
};

static volatile sig_atomic_t stop_asked;

/* The signals that ask a run to save and end: those a user sends, and what schedulers send before a time
 * limit. */
static sigset_t stop_signals(void) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGUSR1);
    return set;
}

/* The first signal asks for a checkpoint and an end; a second one ends at once. */
static void *wait_for_signals(void *unused) {
    sigset_t set = stop_signals();
    int number;
    sigwait(&set, &number);
    stop_asked = number;
    sigwait(&set, &number);
    signal(number, SIG_DFL);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    raise(number);
    return unused;
}

/* No handler may run on a thread that computes: oneDNN's matrix products keep their stack pointer inside heap
 * memory at times, where a signal's frame would overwrite what lies below. So all threads block these
 * signals, and one that does nothing else waits for them. To be called before any other thread exists. */
static int watch_signals(struct error *e) {
    sigset_t set = stop_signals();
    pthread_t thread;
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    if (pthread_create(&thread, NULL, wait_for_signals, NULL) != 0)
        return fail_run(e, "cannot start the thread that waits for signals");
    pthread_detach(thread);
    return 0;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void release(struct run *r) {
    metrics_close(r->metrics);
    if (r->decoder.m)
        decoder_free(&r->decoder);
    model_free(&r->model);
    shards_close(r->train);
    shards_close(r->val);
    tokenizer_close(r->tokenizer);
    free(r->tokens);
    free(r->targets);
    if (r->dev)
        r->k->close(r->dev);
    if (r->lock > 0)
        close(r->lock);
}

/* ---- phases shared by the commands ------------------------------------------------------------------ */

static int open_device(struct run *r, struct error *e) {
    const struct system_config *s = &r->config.system;
    bool cuda = s->device == DEVICE_CUDA || (s->device == DEVICE_AUTO && cuda_devices() > 0);
    bool bf16 = s->precision == PRECISION_BF16 || (s->precision == PRECISION_AUTO && cuda);
    struct device_options options = {.threads = (int)s->threads,
                                     .precision = bf16 ? DEVICE_BF16 : DEVICE_FP32,
                                     .deterministic = s->deterministic};
    r->k = cuda ? kernels_cuda() : kernels_cpu();
    if (!r->k)
        return fail_user(e, "system.device = cuda, but this program was built without CUDA; use auto or cpu");
    r->dev = r->k->open(&options, e);
    return r->dev ? 0 : -1;
}

static int build_model(struct run *r, bool training, struct error *e) {
    const struct train_config *t = &r->config.train;
    struct model_options options = {
        {t->micro_batch, t->seq_len, r->config.system.recompute, training}, t->weight_decay, t->mix_lr_scale};
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
    if (strcmp(name, "bytes") != 0)
        snprintf(r->tokenizer_file, sizeof r->tokenizer_file, "%s", name);
    r->tokenizer = tokenizer_open(name, r->config.model.vocab_size, e);
    return r->tokenizer ? 0 : -1;
}

/* Mean loss in nats over the first `batches` batches of the validation set (0: all of it). */
static double evaluate(struct run *r, int64_t batches, int64_t *tokens) {
    const struct train_config *t = &r->config.train;
    int64_t B = t->micro_batch, T = t->seq_len, sequences = shards_sequences(r->val);
    if (batches > 0 && batches * B < sequences)
        sequences = batches * B;
    struct step_state before, after;
    r->k->step_read(r->dev, r->model.state, &before);
    r->k->step_begin(r->dev, r->model.state, before.step, before.lr);
    for (int64_t i = 0; i < sequences; i += B) {
        for (int64_t b = 0; b < B; b++) {
            int32_t *targets = r->targets + b * T;
            shards_read(r->val, i + b < sequences ? i + b : i, r->tokens + b * T, targets);
            for (int64_t j = 0; j < T && i + b >= sequences; j++)
                targets[j] = -1; /* the last batch is filled up with sequences that do not count */
        }
        model_evaluate(&r->model, r->tokens, r->targets, 1);
    }
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

/* A sample from the start of a document, onto the terminal and into run.dir/samples.txt. */
static int print_sample(struct run *r, struct error *e) {
    char path[MAX_TEXT + 32];
    snprintf(path, sizeof path, "%s/samples.txt", r->config.run.dir);
    FILE *file = fopen(path, "a");
    if (!file)
        return fail_run(e, "%s: cannot write: %s; %s", path, strerror(errno), files_advice(errno));
    int32_t end = r->tokenizer ? tokenizer_end_of_text(r->tokenizer) : -1, start = end >= 0 ? end : 0;
    struct printer p = {r->tokenizer, stdout, file, end};
    struct sampling how = {0.8, 0, (uint64_t)(r->config.train.seed + r->progress.step)};
    status_break(r->metrics);
    printf("---- sample at step %lld\n", (long long)r->progress.step);
    fprintf(file, "---- step %lld\n", (long long)r->progress.step);
    int status = generate(&r->decoder, &start, 1, r->decoder.capacity - 1, &how, emit, &p, e);
    printf("\n----\n");
    fflush(stdout);
    fprintf(file, "\n");
    fclose(file);
    return status;
}

/* ---- train ------------------------------------------------------------------------------------------- */

/* Ranks come with MPI; until this build has it, several processes would train the same model side by side. */
static int check_single_process(struct error *e) {
    const char *ranks = getenv("OMPI_COMM_WORLD_SIZE");
    if (ranks && atoi(ranks) > 1)
        return fail_user(
            e, "started as %s ranks, but this build runs as one process; start it without mpirun", ranks);
    return 0;
}

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

/* The run's directory, for this process alone. */
static int open_run_dir(struct run *r, struct error *e) {
    char path[MAX_TEXT + 32];
    const char *dir = r->config.run.dir;
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
    double need = 4.0 * (double)r->model.params.learned + 8.0 * (double)r->model.params.elements;
    int64_t have = files_free_bytes(r->config.run.dir);
    if (have >= 0 && (double)have < need)
        return fail_user(
            e, "%s: a checkpoint takes %.2f GB and %.2f GB is free; free some, or set another run.dir",
            r->config.run.dir, need / 1e9, (double)have / 1e9);
    return 0;
}

static int start_from(struct run *r, const char *path, struct error *e) {
    char dir[MAX_TEXT];
    if (checkpoint_find(path, dir, e) != 0 || checkpoint_load_weights(dir, &r->model, e) != 0)
        return -1;
    fprintf(stderr, "weights from %s\n", dir);
    if (r->config.train.init_optimizer != OPTIMIZER_KEEP)
        return 0;
    struct progress from;
    if (checkpoint_read_progress(dir, &from, e) != 0)
        return -1;
    r->progress.updates = from.updates; /* the moments' age, for their bias correction */
    return checkpoint_load_optimizer(dir, &r->model, e);
}

/* Continue the newest checkpoint, or begin. */
static int resume_or_initialize(struct run *r, struct error *e) {
    struct config *c = &r->config;
    char dir[MAX_TEXT];
    int status = checkpoint_resume(c->run.dir, &r->model, c, &r->progress, dir, e);
    if (status < 0)
        return -1;
    if (status == 1)
        fprintf(stderr, "resuming from %s\n", dir);
    else if (model_initialize(&r->model, (uint64_t)c->train.seed, e) != 0)
        return -1;
    else if (c->train.init_from[0] && start_from(r, c->train.init_from, e) != 0)
        return -1;
    struct step_state state = {.updates = r->progress.updates, .skips_run = r->progress.skips_run};
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
    fprintf(stderr, "%s\n", r->k->describe(r->dev));
    fprintf(stderr,
            "model: %.2fM parameters, %lld layers; data: %lld tokens in %d file%s; %lld tokens a step\n",
            (double)r->model.params.learned / 1e6, (long long)c->model.num_hidden_layers,
            (long long)shards_tokens(r->train), shards_files(r->train),
            shards_files(r->train) == 1 ? "" : "s", (long long)c->train.batch_tokens);
}

/* Forward and backward over the step's sequences, then the update. */
static void train_step(struct run *r) {
    const struct config *c = &r->config;
    const struct train_config *t = &c->train;
    int64_t B = t->micro_batch, T = t->seq_len, passes = t->batch_tokens / (B * T);
    r->k->step_begin(r->dev, r->model.state, r->progress.step, schedule_lr(t, r->progress.step));
    for (int64_t pass = 0; pass < passes; pass++) {
        for (int64_t b = 0; b < B; b++) {
            int64_t draw = r->progress.sequences + pass * B + b;
            int64_t i = shards_draw(r->train, draw, c->data.shuffle, (uint64_t)t->seed);
            shards_read(r->train, i, r->tokens + b * T, r->targets + b * T);
        }
        model_forward_backward(&r->model, r->tokens, r->targets, 1.0 / (double)t->batch_tokens, pass > 0,
                               NULL, NULL);
    }
    model_update(&r->model, t->beta1, t->beta2, t->eps, t->grad_clip);
    r->progress.sequences += passes * B;
    r->progress.tokens += t->batch_tokens;
    r->progress.step++;
}

static bool due(int64_t every, int64_t step) {
    return every > 0 && step % every == 0;
}

/* Read the step's state back, record it, and stop a run whose numbers have gone wrong for good. */
static int record_step(struct run *r, double seconds, struct error *e) {
    const struct config *c = &r->config;
    struct progress *p = &r->progress;
    struct step_state state;
    r->k->step_read(r->dev, r->model.state, &state);
    p->updates = state.updates;
    p->skips_run = state.skips_run;
    p->seconds += seconds;
    double rate = (double)c->train.batch_tokens / seconds, peak = r->k->peak_flops(r->dev);
    struct step_record record = {.step = p->step,
                                 .steps = c->train.steps,
                                 .tokens = p->tokens,
                                 .loss = state.loss,
                                 .lr = state.lr,
                                 .grad_norm = state.grad_norm,
                                 .seconds = seconds,
                                 .tokens_per_second = rate,
                                 .mfu = peak > 0 ? rate * r->flops_per_token / peak : 0,
                                 .skipped = state.skip};
    if (metrics_step(r->metrics, &record, e) != 0)
        return -1;
    if (due(c->run.log_every, p->step))
        status_step(r->metrics, &record);
    if (state.skips_run > c->train.max_skips)
        return fail_run(
            e,
            "the loss or its gradient was not finite in %d steps in a row, the last being step %lld; "
            "lower train.lr, or look at the data of these steps",
            state.skips_run, (long long)p->step);
    return 0;
}

/* What happens between steps: evaluate, save, sample. */
static int between_steps(struct run *r, bool last, struct error *e) {
    struct config *c = &r->config;
    struct progress *p = &r->progress;
    bool save = last || due(c->run.save_every, p->step);
    bool evaluates = due(c->run.eval_every, p->step) || (c->run.eval_every > 0 && p->step == c->train.steps);
    if (r->val && evaluates) {
        int64_t tokens;
        double loss = evaluate(r, c->run.eval_batches, &tokens);
        status_break(r->metrics);
        fprintf(stderr, "step %lld: val_loss %.4f over %lld tokens\n", (long long)p->step, loss,
                (long long)tokens);
        if (metrics_eval(r->metrics, p->step, loss, e) != 0)
            return -1;
        if (save && isfinite(loss) && !(loss >= p->best_val_loss)) {
            p->best_val_loss = loss;
            p->best_step = p->step;
        }
    }
    if (save &&
        checkpoint_save(c->run.dir, &r->model, c, p, r->tokenizer_file[0] ? r->tokenizer_file : NULL, e) != 0)
        return -1;
    if (due(c->run.sample_every, p->step) && print_sample(r, e) != 0)
        return -1;
    return 0;
}

static int train_loop(struct run *r, struct error *e) {
    const int64_t steps = r->config.train.steps;
    while (r->progress.step < steps) {
        double start = now();
        train_step(r);
        if (record_step(r, now() - start, e) != 0)
            return -1;
        int stop = stop_asked; /* read once: a signal that comes while saving ends the next step */
        if (between_steps(r, r->progress.step == steps || stop, e) != 0)
            return -1;
        if (stop) {
            status_break(r->metrics);
            fprintf(stderr, "stopped by signal %d after step %lld; the same command continues\n", stop,
                    (long long)r->progress.step);
            return 0;
        }
    }
    status_break(r->metrics);
    fprintf(stderr, "done: %lld steps, %lld tokens in %.1f s of training; %s\n", (long long)steps,
            (long long)r->progress.tokens, r->progress.seconds, r->config.run.dir);
    return 0;
}

static int prepare_training(struct run *r, int argc, char **argv, struct error *e) {
    if (check_single_process(e) != 0 || config_load(&r->config, argv[0], argc - 1, argv + 1, 1, e) != 0 ||
        open_device(r, e) != 0 || open_data(r, e) != 0 || open_run_dir(r, e) != 0 ||
        build_model(r, true, e) != 0 || resume_or_initialize(r, e) != 0)
        return -1;
    return 0;
}

static int train(struct run *r, int argc, char **argv, struct error *e) {
    r->progress.best_val_loss = (double)NAN;
    if (watch_signals(e) != 0 || prepare_training(r, argc, argv, e) != 0)
        return -1;
    if (r->progress.step >= r->config.train.steps) {
        printf("%s: already finished, at step %lld of %lld; raise train.steps to go on\n", r->config.run.dir,
               (long long)r->progress.step, (long long)r->config.train.steps);
        return 0;
    }
    if (check_disk(r, e) != 0 || open_sampler(r, e) != 0)
        return -1;
    r->metrics = metrics_open(r->config.run.dir, r->progress.step, e);
    if (!r->metrics)
        return -1;
    announce(r);
    return train_loop(r, e);
}

/* ---- commands on a checkpoint ------------------------------------------------------------------------- */

/* The model of a checkpoint and the settings it was trained with; overrides come on top. */
static int read_checkpoint(struct run *r, const char *path, char dir[MAX_TEXT], int argc, char **argv,
                           struct error *e) {
    struct config *c = &r->config;
    config_defaults(c);
    if (checkpoint_find(path, dir, e) != 0 || checkpoint_read_config(dir, &c->model, e) != 0)
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

static int eval(struct run *r, int argc, char **argv, struct error *e) {
    char dir[MAX_TEXT];
    if (read_checkpoint(r, argv[0], dir, argc - 1, argv + 1, e) != 0)
        return -1;
    const struct config *c = &r->config;
    if (!c->data.val[0] || strcmp(c->data.val, "none") == 0)
        return fail_user(e, "eval needs data: add data.val=GLOB");
    if (open_device(r, e) != 0)
        return -1;
    r->val = shards_open(c->data.val, c->train.seq_len, c->model.vocab_size, e);
    if (!r->val || build_model(r, false, e) != 0 || checkpoint_load_weights(dir, &r->model, e) != 0)
        return -1;
    int64_t tokens;
    double loss = evaluate(r, c->run.eval_batches, &tokens);
    if (!isfinite(loss))
        return fail_run(
            e, "%s: the loss is not finite: the weights have diverged; take an earlier checkpoint", dir);
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
        return fail_user(e, "%s %s: not a %snumber from 0 to %g", option, text, whole ? "whole " : "", most);
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
    if (access(path, R_OK) == 0)
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
    char dir[MAX_TEXT];
    struct generate_options o;
    if (parse_generate(argc - 1, argv + 1, &o, e) != 0 ||
        read_checkpoint(r, argv[0], dir, o.override_count, o.overrides, e) != 0)
        return -1;
    r->config.train.micro_batch = r->config.train.seq_len = 1; /* decoding has buffers of its own */
    if (open_device(r, e) != 0 || find_tokenizer(r, dir, e) != 0 || build_model(r, false, e) != 0 ||
        checkpoint_load_weights(dir, &r->model, e) != 0)
        return -1;
    return generate_text(r, &o, e);
}

static int info(struct run *r, int argc, char **argv, struct error *e) {
    char dir[MAX_TEXT];
    struct stat st;
    bool directory = stat(argv[0], &st) == 0 && S_ISDIR(st.st_mode);
    int status = directory ? read_checkpoint(r, argv[0], dir, argc - 1, argv + 1, e)
                           : config_load(&r->config, argv[0], argc - 1, argv + 1, 1, e);
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
    {"info", info, "CONFIG|CHECKPOINT [section.key=value ...]",
     "Parameters by group, memory by family, FLOPs per token with the formula, the layer schedule.\n"
     "  train_iha info configs/iha_paper_2.4b.ini\n"},
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

int main(int argc, char **argv) {
    static struct run r;
    struct error e = {0};
    int status = run_command(&r, argc - 1, argv + 1, &e);
    if (status != 0 && r.metrics)
        status_break(r.metrics);
    release(&r);
    if (status == 0 && (fflush(stdout) != 0 || ferror(stdout)))
        status = fail_run(&e, "cannot write to the standard output: %s", strerror(errno));
    if (status == 0)
        return EXIT_OK;
    fprintf(stderr, "train_iha: %s\n", e.text);
    return e.exit_code ? e.exit_code : EXIT_RUN;
}

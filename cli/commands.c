#include "cli/commands.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cli/banner.h"
#include "data/text.h"
#include "model/generate/generate.h"
#include "model/info/info.h"
#include "model/info/info_estimate.h"
#include "model/train/rank_checks.h"

/* The model of a checkpoint and the settings it was trained with, then the overrides. */
static int read_checkpoint(struct run *r, const char *dir, const struct command_line *line, struct error *e) {
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
    return config_override(c, line->override_count, line->overrides, e);
}

/* ---- eval ---- */

static int prepare_eval(struct run *r, const char *dir, const struct command_line *line, struct error *e) {
    if (read_checkpoint(r, dir, line, e) != 0)
        return -1;
    const struct config *c = &r->config;
    if (!c->data.val[0] || strcmp(c->data.val, "none") == 0)
        return fail_user(e, "eval needs data: add data.val=GLOB");
    if (c->system.precision == PRECISION_AUTO)
        r->config.system.precision = PRECISION_FP32; /* eval's default, on GPUs as well */
    comm_set_timeout(r->comm, c->system.peer_timeout);
    r->val = shards_open(c->data.val, c->train.seq_len, c->model.vocab_size, e);
    return r->val ? 0 : -1;
}

int eval_command(struct run *r, const struct command_line *line, struct error *e) {
    char dir[MAX_TEXT];
    if (!(r->comm = comm_open(DEFAULT_TIMEOUT, e)) ||
        ranks_find_checkpoint(r->comm, line->path, dir, e) != 0 ||
        comm_agree(r->comm, prepare_eval(r, dir, line, e), e) != 0 || run_join_devices(r, e) != 0 ||
        comm_agree(r->comm, run_build_model(r, false, e), e) != 0 ||
        comm_agree(r->comm, checkpoint_load_weights(dir, &r->model, 0, e), e) != 0)
        return -1;
    banner_print_ignored(r);
    int64_t tokens;
    double loss = run_evaluate(r, r->config.run.eval_batches, &tokens);
    if (!isfinite(loss))
        return fail_run(e, "%s: the loss is not finite: the weights have diverged; use an earlier checkpoint",
                        dir);
    if (is_rank0(r))
        printf("val_loss %.7f %lld\n", loss, (long long)tokens);
    return 0;
}

/* ---- generate ---- */

/* data.tokenizer if it is set, else the tokenizer saved with the checkpoint. */
static int find_tokenizer(struct run *r, const char *dir, struct error *e) {
    char path[MAX_TEXT + 32], recorded[MAX_TEXT];
    snprintf(path, sizeof path, "%s/tokenizer.json", dir);
    if (strcmp(r->config.data.tokenizer, "none") != 0)
        return run_open_tokenizer(r, r->config.data.tokenizer, e);
    if (access(path, R_OK) == 0 || errno != ENOENT)
        return run_open_tokenizer(r, path, e);
    if (checkpoint_setting(dir, "data.tokenizer", recorded, e) != 0)
        return -1;
    return strcmp(recorded, "bytes") == 0 ? run_open_tokenizer(r, recorded, e) : 0;
}

static int generate_text(struct run *r, const struct command_line *line, struct error *e) {
    int32_t *ids = NULL, end = r->tokenizer ? tokenizer_end_of_text(r->tokenizer) : -1;
    int64_t vocab = r->config.model.vocab_size;
    int64_t length = r->tokenizer
                         ? tokenizer_encode(r->tokenizer, line->prompt, strlen(line->prompt), &ids, e)
                         : text_parse_ids(line->prompt, vocab, &ids, e);
    struct text_writer w = {r->tokenizer, stdout, NULL, end};
    struct sampling sampling = {line->temperature, line->top_k, (uint64_t)line->seed};
    int status = length < 0 ? -1 : 0;
    if (status == 0 && length == 0) { /* no prompt: start a document */
        free(ids);
        ids = malloc(sizeof *ids);
        if (!ids)
            return fail_run(e, "out of memory for the prompt");
        ids[0] = end >= 0 ? end : 0;
        length = 1;
    }
    if (status == 0)
        status = decoder_create(&r->decoder, &r->model, length + line->tokens, DECODE_CHUNK, e);
    for (int64_t i = 0; status == 0 && i < length; i++)
        if (ids[i] != end)
            text_write(&w, ids[i]);
    fflush(stdout);
    if (status == 0)
        status = generate(&r->decoder, ids, length, line->tokens, &sampling, text_emit, &w, e);
    if (status == 0)
        printf("\n");
    free(ids);
    return status;
}

int generate_command(struct run *r, const struct command_line *line, struct error *e) {
    if (comm_launch_rank() > 0)
        return 0; /* only the first process generates */
    char dir[MAX_TEXT];
    if (checkpoint_find(line->path, dir, e) != 0 || read_checkpoint(r, dir, line, e) != 0)
        return -1;
    r->config.train.micro_batch = r->config.train.seq_len = 1; /* the decoder has its own buffers */
    if (run_open_device(r, e) != 0 || find_tokenizer(r, dir, e) != 0 || run_build_model(r, false, e) != 0 ||
        checkpoint_load_weights(dir, &r->model, 0, e) != 0)
        return -1;
    return generate_text(r, line, e);
}

/* ---- info ---- */

static bool is_directory(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

/* info --gpus: a configuration for as many ranks, on GPUs that this machine need not have. */
static int estimate_training(struct run *r, const struct command_line *line, const struct info_options *o,
                             struct error *e) {
    if (is_directory(line->path))
        return fail_user(e, "info --gpus estimates a run: give its configuration, not the checkpoint %s",
                         line->path);
    if (config_load(&r->config, line->path, line->override_count, line->overrides, o->gpus, e) != 0)
        return -1;
    return info_print_estimate(stdout, &r->config, o, e);
}

int info_command(struct run *r, const struct command_line *line, struct error *e) {
    if (comm_launch_rank() > 0)
        return 0;
    char dir[MAX_TEXT];
    struct info_options o;
    if (info_options_set(&o, (int)line->gpus, line->gpu, line->link, e) != 0)
        return -1;
    if (o.gpus > 0)
        return estimate_training(r, line, &o, e);
    int status = -1;
    if (!is_directory(line->path))
        status = config_load(&r->config, line->path, line->override_count, line->overrides, 1, e);
    else if (checkpoint_find(line->path, dir, e) == 0)
        status = read_checkpoint(r, dir, line, e);
    /* The configuration may be for another machine: count for this one's device and its default precision. */
    r->config.system.device = DEVICE_AUTO;
    r->config.system.precision = PRECISION_AUTO;
    if (status != 0 || run_open_device(r, e) != 0)
        return -1;
    return info_print(stdout, &r->config, r->k, r->dev, e);
}

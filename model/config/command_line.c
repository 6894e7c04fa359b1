/* The tables of commands and options, and the parser. To add an option: add a field to struct command_line, a
 * row to the command's options, and a sentence to its help. */
#include "model/config/command_line.h"

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/estimate/hardware.h"
#include "model/config/config.h"

static const char VERSION[] = "0.1.0";

enum option_kind { OPTION_TEXT, OPTION_INTEGER, OPTION_REAL, OPTION_NAME, OPTION_FLAG };
enum { MAX_OPTIONS = 10, NAME_LIST = 128 };

struct option {
    const char *name;
    enum option_kind kind;
    size_t offset;            /* of its field in struct command_line */
    double min, max;          /* OPTION_INTEGER, OPTION_REAL: both included */
    const char *const *names; /* OPTION_NAME: the legal values, NULL-terminated */
};

struct command_row {
    const char *name;
    const char *argument; /* the positional argument, as usage and errors show it */
    const char *usage;    /* what may follow it */
    struct option options[MAX_OPTIONS];
    const char *help;
};

#define AT(field) offsetof(struct command_line, field)

static const struct command_row COMMANDS[] = {
    [COMMAND_TRAIN] =
        {"train",
         "CONFIG",
         "[section.key=value ...] [--profile N]",
         {{"--profile", OPTION_INTEGER, AT(profile_steps), 1, 1000, NULL}},
         "Train the model that an INI file describes. If run.dir holds a checkpoint of the same run, "
         "continue\n"
         "from it; if the run is finished, say so.\n"
         "On SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGALRM or SIGXCPU: finish the step, save, exit.\n"
         "--profile N: trace N steps, print the time of each operation, and write run.dir/profile.json for\n"
         "ui.perfetto.dev.\n"
         "  train_iha train configs/bytes_small.ini train.steps=500 run.dir=runs/try\n"},
    [COMMAND_EVAL] =
        {"eval",
         "CHECKPOINT",
         "data.val=GLOB | eval.tasks=GLOB [section.key=value ...]",
         {{0}},
         "Compute the mean loss of a checkpoint on token shards. Last line on stdout: val_loss <nats> "
         "<tokens>.\n"
         "With eval.tasks, score choices; without data.val= beside it, these alone.\n"
         "CHECKPOINT is a step_... directory, or a run directory, whose newest checkpoint is used.\n"
         "  train_iha eval runs/try data.val='data/bible/val_*.bin'\n"},
    [COMMAND_GENERATE] =
        {"generate",
         "CHECKPOINT",
         "--prompt TEXT | --prompt-file FILE | --chat [--OPTION VALUE ...] [section.key=value ...]",
         {{"--prompt", OPTION_TEXT, AT(prompt), 0, 0, NULL},
          {"--prompt-file", OPTION_TEXT, AT(prompt_file), 0, 0, NULL},
          {"--tokens", OPTION_INTEGER, AT(tokens), 0, 1e7, NULL},
          {"--temperature", OPTION_REAL, AT(temperature), 0, 100, NULL},
          {"--top-k", OPTION_INTEGER, AT(top_k), 0, 9e15, NULL},
          {"--top-p", OPTION_REAL, AT(top_p), 0, 1, NULL},
          {"--seed", OPTION_INTEGER, AT(seed), 0, 9e15, NULL},
          {"--stop", OPTION_TEXT, AT(stop), 0, 0, NULL},
          {"--chat", OPTION_FLAG, AT(chat), 0, 0, NULL},
          {"--system", OPTION_TEXT, AT(system), 0, 0, NULL}},
         "Continue a text. Without a tokenizer, the prompt is a list of token ids.\n"
         "  --chat               talk with a model trained on conversations (data/prepare.py --chat): a line "
         "of\n"
         "                       the standard input is a turn. Ctrl-C ends an answer, then the program\n"
         "  --system TEXT        with --chat: a system message\n"
         "  --prompt-file FILE   the prompt is the whole file, its last newline included; -: standard input\n"
         "  --tokens N           generate at most N tokens, in each answer; default 256\n"
         "  --temperature X      default 0.8; 0: always the most likely token\n"
         "  --top-k K            sample among the K most likely tokens; default 0: all\n"
         "  --top-p P            then among the fewest whose probabilities sum to P or more; default 1: all\n"
         "  --seed S             default 1\n"
         "  --stop TEXT          end before this text is generated\n"
         "  train_iha generate runs/try --prompt 'In the beginning' --tokens 200\n"
         "  train_iha generate runs/finetune_chat --chat\n"},
    [COMMAND_ATTENTION] =
        {"attention",
         "CHECKPOINT",
         "--prompt TEXT | --prompt-file FILE [--layer N --out FILE] [section.key=value ...]",
         {{"--prompt", OPTION_TEXT, AT(prompt), 0, 0, NULL},
          {"--prompt-file", OPTION_TEXT, AT(prompt_file), 0, 0, NULL},
          {"--layer", OPTION_INTEGER, AT(layer), 0, MAX_LAYERS - 1, NULL},
          {"--out", OPTION_TEXT, AT(out), 0, 0, NULL}},
         "Write the attention weights of one layer for a text as a safetensors file: weights [H,P,P,T,T], by "
         "head,\n"
         "pseudo-head of the query, pseudo-head of the key, token and token. scripts/plot_attention.py draws "
         "them.\n"
         "  --layer N    default 0, the first\n"
         "  --out FILE   default attention.safetensors\n"
         "  train_iha attention runs/try --prompt 'In the beginning' --layer 1\n"},
    [COMMAND_INFO] =
        {"info",
         "CONFIG|CHECKPOINT",
         "[--gpus N --gpu h200|h100|a100 --link nvlink|ib400 --launches] [section.key=value ...]",
         {{"--gpus", OPTION_INTEGER, AT(gpus), 1, 1 << 20, NULL},
          {"--gpu", OPTION_NAME, AT(gpu), 0, 0, gpu_names},
          {"--link", OPTION_NAME, AT(link), 0, 0, link_names},
          {"--launches", OPTION_FLAG, AT(launches), 0, 0, NULL}},
         "Print the parameters by group, the memory by family, the FLOPs per token and the layer schedule.\n"
         "--gpus N: estimate a training run on N GPUs, which this machine need not have: the time of a step "
         "by\n"
         "operation, MFU, communication time that is not overlapped, days, and memory of each GPU. "
         "Calculated\n"
         "from published hardware figures, not measured.\n"
         "--gpu: default h200. --link: nvlink, one node of up to 8 GPUs; ib400, nodes of 8 GPUs joined by\n"
         "400 Gb/s per GPU; default nvlink up to 8 GPUs, ib400 above.\n"
         "--launches: with --gpus, print instead every kernel of a step, with its bytes and FLOPs and the "
         "time "
         "that\n"
         "these take at least.\n"
         "  train_iha info configs/paper/2.4b_iha.ini\n"
         "  train_iha info configs/paper/2.4b_iha.ini --gpus 128 --gpu h200 --link ib400\n"},
    [COMMAND_CHECK] =
        {"check",
         "GLOB",
         "--vocab N",
         {{"--vocab", OPTION_INTEGER, AT(vocab), 1, 2147483648.0, NULL}},
         "Check the shards that GLOB matches, and their labels: every header, every size, every id. Before "
         "its\n"
         "first step `train` checks ids beyond the first GB only at some places. Quote the glob, so that "
         "the\n"
         "shell does not expand it. A line on stderr for each bad file; exit code 2 if there is one.\n"
         "  --vocab N   the model's vocab_size, which all ids must be below\n"
         "  train_iha check 'data/bible/*.bin' --vocab 257\n"},
};
enum { COMMAND_COUNT = sizeof COMMANDS / sizeof *COMMANDS };

/* ---- help ---- */

static void print_usage(FILE *out, const struct command_row *c) {
    fprintf(out, "train_iha %s %s %s\n", c->name, c->argument, c->usage);
}

void command_line_print_help(FILE *out, int help_topic) {
    if (help_topic >= 0) {
        print_usage(out, &COMMANDS[help_topic]);
        fprintf(out, "\n%s", COMMANDS[help_topic].help);
        return;
    }
    fprintf(out, "train_iha %s: pretrain and fine-tune GPTs with Interleaved Head Attention\n\n", VERSION);
    for (int i = 0; i < COMMAND_COUNT; i++) {
        fputs("  ", out);
        print_usage(out, &COMMANDS[i]);
    }
    fputs(
        "\n`train_iha COMMAND --help` explains each command. Exit codes: 0 done; 1 the run failed while "
        "running;\n"
        "2 an argument, a file or the data is wrong, found before the first step.\n\nConfiguration keys:\n\n",
        out);
    config_print_help(out);
}

void command_line_print_version(FILE *out) {
    fprintf(out, "train_iha %s\n", VERSION);
}

/* ---- options ---- */

static int parse_number(double *number, const struct command_row *c, const struct option *o, const char *text,
                        struct error *e) {
    char *end;
    bool whole = o->kind == OPTION_INTEGER;
    *number = strtod(text, &end);
    if (end == text || *end || !(*number >= o->min && *number <= o->max) ||
        (whole && *number != floor(*number)))
        return fail_user(e, "%s: %s %.60s: not a %snumber from %.0f to %.0f", c->name, o->name, text,
                         whole ? "whole " : "", o->min, o->max);
    return 0;
}

static int check_name(const struct command_row *c, const struct option *o, const char *text,
                      struct error *e) {
    char list[NAME_LIST] = "";
    size_t used = 0;
    for (const char *const *name = o->names; *name; name++) {
        if (strcmp(text, *name) == 0)
            return 0;
        if (used < sizeof list)
            used += (size_t)snprintf(list + used, sizeof list - used, "%s%s", used ? ", " : "", *name);
    }
    const char *near = nearest_name(text, o->names);
    return fail_user(e, "%s: %s %.60s is unknown; the known values are %s%s%s%s", c->name, o->name, text,
                     list, near ? "; did you mean '" : "", near ? near : "", near ? "'?" : "");
}

static int set_option(struct command_line *line, const struct command_row *c, const struct option *o,
                      const char *text, struct error *e) {
    void *field = (char *)line + o->offset;
    double number = 0;
    switch (o->kind) {
    case OPTION_INTEGER:
        if (parse_number(&number, c, o, text, e) != 0)
            return -1;
        memcpy(field, &(int64_t){(int64_t)number}, sizeof(int64_t));
        return 0;
    case OPTION_REAL:
        if (parse_number(&number, c, o, text, e) != 0)
            return -1;
        memcpy(field, &number, sizeof number);
        return 0;
    case OPTION_NAME:
        if (check_name(c, o, text, e) != 0)
            return -1;
        break;
    case OPTION_TEXT:
    case OPTION_FLAG:
        break;
    }
    memcpy(field, &text, sizeof text);
    return 0;
}

/* The index of an option in the command's table, or -1 and *e. */
static int find_option(const struct command_row *c, const char *name, struct error *e) {
    const char *names[MAX_OPTIONS + 1] = {0};
    for (int i = 0; i < MAX_OPTIONS && c->options[i].name; i++) {
        if (strcmp(name, c->options[i].name) == 0)
            return i;
        names[i] = c->options[i].name;
    }
    const char *near = nearest_name(name, names);
    return fail_user(e, "%s: unknown option %s%s%s; see train_iha %s --help", c->name, name,
                     near ? "; did you mean " : "", near ? near : "", c->name);
}

/* ---- the arguments of a command ---- */

static bool is_flag(const struct command_row *c, const char *name) {
    for (int i = 0; i < MAX_OPTIONS && c->options[i].name; i++)
        if (strcmp(name, c->options[i].name) == 0)
            return c->options[i].kind == OPTION_FLAG;
    return false;
}

/* The index of the first argument that is neither an option nor the value of one; argc or more: there is none. */
static int find_positional(const struct command_row *c, int argc, char **argv) {
    int i = 0;
    while (i < argc && argv[i][0] == '-')
        i += is_flag(c, argv[i]) ? 1 : 2;
    return i;
}

static int check_generate(const struct command_line *line, const struct command_row *c, struct error *e) {
    if (line->prompt && line->prompt_file)
        return fail_user(e, "%s: --prompt and --prompt-file are both given; give one", c->name);
    if (line->chat && (line->prompt || line->prompt_file))
        return fail_user(e, "%s: --chat reads its turns from the standard input; leave %s out", c->name,
                         line->prompt ? "--prompt" : "--prompt-file");
    if (line->system && !line->chat)
        return fail_user(e, "%s: --system belongs to --chat", c->name);
    if (line->stop && !*line->stop)
        return fail_user(e, "%s: --stop is empty; give the text to stop at, or leave it out", c->name);
    return 0;
}

static int parse_arguments(struct command_line *line, const struct command_row *c, int argc, char **argv,
                           struct error *e) {
    unsigned given = 0; /* a bit for each option */
    int positional = find_positional(c, argc, argv);
    if (positional >= argc)
        return fail_user(e, "%s: %s is missing; usage: train_iha %s %s %s", c->name, c->argument, c->name,
                         c->argument, c->usage);
    line->path = argv[positional];
    line->overrides = argv;
    for (int i = 0; i < argc; i++) {
        if (i == positional)
            continue;
        if (argv[i][0] != '-') {
            line->overrides[line->override_count++] = argv[i];
            continue;
        }
        int option = find_option(c, argv[i], e);
        if (option < 0)
            return -1;
        if (given & 1u << option)
            return fail_user(e, "%s: %s is given twice", c->name, argv[i]);
        given |= 1u << option;
        if (c->options[option].kind == OPTION_FLAG) {
            memcpy((char *)line + c->options[option].offset, &(bool){true}, sizeof(bool));
            continue;
        }
        if (++i == argc)
            return fail_user(e, "%s: %s needs a value", c->name, argv[i - 1]);
        if (set_option(line, c, &c->options[option], argv[i], e) != 0)
            return -1;
    }
    if (check_generate(line, c, e) != 0)
        return -1;
    if (line->command == COMMAND_ATTENTION && !line->prompt && !line->prompt_file)
        return fail_user(e, "attention: give a text: --prompt TEXT or --prompt-file FILE");
    if (line->command == COMMAND_CHECK && line->override_count > 0)
        return fail_user(
            e, "check: '%.200s' comes after GLOB; quote the glob, so that the shell does not expand it",
            line->overrides[0]);
    if (line->command == COMMAND_CHECK && line->vocab == 0)
        return fail_user(e, "check: --vocab N is missing: the vocab_size of the model");
    return 0;
}

static int find_command(const char *name, struct error *e) {
    const char *names[COMMAND_COUNT + 1] = {0};
    for (int i = 0; i < COMMAND_COUNT; i++) {
        if (strcmp(COMMANDS[i].name, name) == 0)
            return i;
        names[i] = COMMANDS[i].name;
    }
    const char *near = nearest_name(name, names);
    return fail_user(e, "unknown command '%s'%s%s; see train_iha --help", name, near ? "; did you mean " : "",
                     near ? near : "");
}

int command_line_parse(struct command_line *line, int argc, char **argv, struct error *e) {
    *line = (struct command_line){
        .command = COMMAND_HELP, .help_topic = -1, .tokens = 256, .temperature = 0.8, .top_p = 1, .seed = 1};
    if (argc == 0)
        return fail_user(e, "no command given; see train_iha --help");
    if (strcmp(argv[0], "--help") == 0)
        return 0;
    if (strcmp(argv[0], "--help=markdown") == 0) {
        line->command = COMMAND_HELP_MARKDOWN;
        return 0;
    }
    if (strcmp(argv[0], "--version") == 0) {
        line->command = COMMAND_VERSION;
        return 0;
    }
    int command = find_command(argv[0], e);
    if (command < 0)
        return -1;
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], "--help") == 0) {
            line->help_topic = command;
            return 0;
        }
    line->command = (enum command)command;
    return parse_arguments(line, &COMMANDS[command], argc - 1, argv + 1, e);
}

/* The program behind `make bench`: measures, asserts nothing, and prints a Markdown table.
 *
 * Progress goes to stderr, the table to stdout. How times become numbers is in bench_measure.h; the work is
 * in bench_ops.h and bench_models.h. To measure one more thing, write its function and add a line to ITEMS.
 */
#include "tests/bench/bench_measure.h"
#include "tests/bench/bench_models.h"
#include "tests/bench/bench_ops.h"
#include "tests/bench/bench_steps.h"
#include "tests/bench/bench_table.h"

/* The ceilings by themselves; every other item adds to their samples. */
static void bench_ceilings(struct bench *b, struct table *t) {
    (void)t;
    for (int i = 0; i < b->repeats; i++)
        ceilings_sample(b);
    fprintf(stderr, "ceilings: sgemm %.1f GFLOP/s, copy %.2f GB/s\n", sgemm_rate(b, 0) / 1e9,
            copy_rate(b, 0) / 1e9);
}

struct item {
    const char *name;
    void (*run)(struct bench *b, struct table *t);
    const char *help;
};

static const struct item ITEMS[] = {
    {"ceilings", bench_ceilings, "rates of a matrix product and of a copy"},
    {"gpt2", bench_gpt2, "an optimizer step of GPT-2 124M"},
    {"muon", bench_muon, "an update of GPT-2 124M by Muon, next to AdamW's"},
    {"attention", bench_attention, "attention on short sequences"},
    {"window", bench_window, "windowed IHA attention from 1k to 16k tokens"},
    {"mixing", bench_mixing, "qkv_mix and collapse at five sizes"},
    {"bf16", bench_bf16, "attention and mixing in bf16, next to fp32"},
    {"divide", bench_divide, "operations on one thread and on all"},
    {"quickstart", bench_quickstart, "an optimizer step of the quickstart model"},
    {"steps", bench_steps, "optimizer steps in fp32 and bf16, next to PyTorch's with --torch"},
    {"memory", bench_memory, "peak memory of training, and what the memory plan says"},
};
enum { ITEM_COUNT = sizeof ITEMS / sizeof *ITEMS };

struct options {
    const char *only; /* NULL: all */
    const char *quickstart;
    const char *torch; /* a Python with PyTorch; NULL: without */
    int repeats;
};

static void print_help(void) {
    printf("bench [--only NAME] [--repeats N] [--quickstart CONFIG] [--torch PYTHON] [--help]\n\n"
           "Measure, and print a Markdown table. Times are medians over N repeats (5). PYTHON has PyTorch,\n"
           "whose optimizer steps are measured in turn with ours.\n\n");
    for (int i = 0; i < ITEM_COUNT; i++)
        printf("  %-12s %s\n", ITEMS[i].name, ITEMS[i].help);
}

/* An error about a word that is not among `names`, with the nearest name. */
static int fail_word(struct error *e, const char *what, const char *word, const char *const *names) {
    const char *near = nearest_name(word, names);
    return fail_user(e, "%s '%s'%s%s; see bench --help", what, word, near ? "; did you mean " : "",
                     near ? near : "");
}

static int parse_only(struct options *o, const char *value, struct error *e) {
    const char *names[ITEM_COUNT + 1] = {0};
    for (int i = 0; i < ITEM_COUNT; i++) {
        names[i] = ITEMS[i].name;
        if (strcmp(value, ITEMS[i].name) == 0)
            o->only = ITEMS[i].name;
    }
    return o->only ? 0 : fail_word(e, "--only: unknown item", value, names);
}

static int parse_repeats(struct options *o, const char *value, struct error *e) {
    char *end;
    long n = strtol(value, &end, 10);
    if (end == value || *end || n < 1 || n > MAX_REPEATS)
        return fail_user(e, "--repeats %s: not a whole number from 1 to %d", value, MAX_REPEATS);
    o->repeats = (int)n;
    return 0;
}

/* Fill *o from the command line. *help: --help was given. */
static int parse(struct options *o, bool *help, int argc, char **argv, struct error *e) {
    static const char *const known[] = {"--only", "--repeats", "--quickstart", "--torch", "--help", NULL};
    *o = (struct options){.quickstart = "configs/quickstart.ini", .repeats = 5};
    for (int i = 1; i < argc; i++) {
        const char *option = argv[i], *value = argv[i + 1];
        int which = 0;
        while (known[which] && strcmp(option, known[which]) != 0)
            which++;
        if (!known[which])
            return fail_word(e, "unknown option", option, known);
        *help = *help || which == 4;
        if (which == 4)
            continue;
        if (!value)
            return fail_user(e, "%s needs a value; see bench --help", option);
        if ((which == 0 && parse_only(o, value, e) != 0) || (which == 1 && parse_repeats(o, value, e) != 0))
            return -1;
        if (which == 2)
            o->quickstart = value;
        if (which == 3)
            o->torch = value;
        i++;
    }
    return 0;
}

static bool wanted(const struct options *o, const struct item *item) {
    return !o->only || strcmp(o->only, item->name) == 0;
}

/* A configuration that cannot be read is found now, not after minutes. */
static void check_quickstart(const struct options *o) {
    static struct config c;
    for (int i = 0; i < ITEM_COUNT; i++)
        if (wanted(o, &ITEMS[i]) && (ITEMS[i].run == bench_quickstart || ITEMS[i].run == bench_steps))
            read_config(&c, o->quickstart, 0, NULL);
}

/* The rows of the ceilings, over all their samples. */
static void ceiling_rows(const struct bench *b, struct table *t) {
    if (b->sgemm.count == 0)
        return;
    struct row *row = table_row(t, "ceiling: sgemm %d x %d x %d, %d samples over the run", SGEMM_SIZE,
                                SGEMM_SIZE, SGEMM_SIZE, b->sgemm.count);
    cell_seconds(row->took, samples_summary(&b->sgemm, 0));
    cell(row->rate, "%.1f GFLOP/s", sgemm_rate(b, 0) / 1e9);
    row = table_row(t, "ceiling: copy of %d MiB, read and written, %d samples over the run",
                    (int)(COPY_BYTES >> 20), b->copy.count);
    cell_seconds(row->took, samples_summary(&b->copy, 0));
    cell(row->rate, "%.2f GB/s", copy_rate(b, 0) / 1e9);
}

/* Date, processor, threads, compiler. */
static void print_head(const struct bench *b) {
    char date[32];
    time_t now = time(NULL);
    struct tm local;
    strftime(date, sizeof date, "%Y-%m-%d", localtime_r(&now, &local));
#ifdef __clang__
    const char *family = ""; /* __VERSION__ says Clang itself */
#else
    const char *family = "GCC ";
#endif
    printf("%s; %s; compiled by %s%s; medians over %d repeat%s\n\n", date, b->k->describe(b->dev), family,
           __VERSION__, b->repeats, b->repeats == 1 ? "" : "s");
}

/* Everything that may start threads, and the table. */
static void run_items(struct bench *b, const struct options *o, const struct table *memory) {
    static struct table ceilings, work;
    ceilings_open(b);
    run_sgemm(b);
    run_copy(b);
    for (int i = 0; i < ITEM_COUNT; i++)
        if (wanted(o, &ITEMS[i]) && ITEMS[i].run != bench_memory)
            ITEMS[i].run(b, &work);
    ceiling_rows(b, &ceilings);
    ceilings_close(b);
    print_head(b);
    table_print_head(stdout);
    table_print(stdout, &ceilings);
    table_print(stdout, &work);
    table_print(stdout, memory);
}

int main(int argc, char **argv) {
    static struct bench b;
    static struct table memory;
    struct options o;
    struct error e = {0};
    bool help = false;
    if (parse(&o, &help, argc, argv, &e) != 0)
        bench_fail(&e);
    if (help) {
        print_help();
        return EXIT_OK;
    }
    check_quickstart(&o);
    b.k = kernels_cpu();
    b.repeats = o.repeats;
    b.quickstart = o.quickstart;
    for (int i = 0; i < ITEM_COUNT; i++) /* forks, so it comes before any thread */
        if (wanted(&o, &ITEMS[i]) && ITEMS[i].run == bench_memory)
            bench_memory(&b, &memory);
    static struct torch torch;
    b.torch = &torch;
    if (o.torch)
        torch_start(&torch, o.torch, o.quickstart);
    struct device_options options = {.precision = DEVICE_FP32};
    b.dev = b.k->open(&options, &e);
    if (!b.dev)
        bench_fail(&e);
    run_items(&b, &o, &memory);
    b.k->close(b.dev);
    return EXIT_OK;
}

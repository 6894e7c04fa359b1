/* Labels beside a shard: exactly the files that the format allows are accepted, by training and by `train_iha check`,
 * and read as they are.
 *
 * Input: a byte of form, a byte that picks the vocabulary's size, then the file of labels. Form's bits: those of
 * shard_file.h, and OTHER: the shard has a token more than the file has labels. The rest is seq_len - 1. */
#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/shard_file.h"

#include "data/check.h"
#include "data/shards.h"

enum { OTHER = 16 };

static char shard_path[256], labels_path[256];
static FILE *nowhere;

static size_t width_of_labels(const uint8_t *header) {
    (void)header;
    return 4;
}

static int32_t label(const struct file *f, int64_t i) {
    int32_t x;
    memcpy(&x, f->bytes + HEADER + 4 * i, 4);
    return x;
}

/* Whether the format allows the file beside a shard of so many tokens. */
static bool is_good(const struct file *f, int64_t tokens, int64_t vocab) {
    int32_t header[3];
    if (f->size < HEADER)
        return false;
    memcpy(header, f->bytes, sizeof header);
    if (header[0] != 20261129 || header[1] != 1 || header[2] != tokens ||
        (int64_t)f->size != HEADER + 4 * tokens)
        return false;
    for (int64_t i = 0; i < tokens; i++)
        if (label(f, i) < -2 || label(f, i) >= vocab)
            return false;
    return true;
}

static void write_file(const char *path, const void *bytes, size_t size) {
    FILE *f = fopen(path, "wb");
    CHECK(f && fwrite(bytes, 1, size, f) == size && fclose(f) == 0);
}

/* A shard whose tokens are all 0. */
static void write_tokens(int64_t tokens) {
    size_t size = HEADER + 2 * (size_t)tokens;
    int32_t *bytes = calloc(1, size);
    CHECK(bytes);
    bytes[0] = 20240520;
    bytes[1] = 1;
    bytes[2] = (int32_t)tokens;
    write_file(shard_path, bytes, size);
    free(bytes);
}

static void check_labels(struct shards *s, const struct file *f, int64_t tokens, int64_t T) {
    int32_t x[32], targets[32];
    CHECK(shards_have_labels(s) && shards_sequences(s) == (tokens - 1) / T);
    for (int64_t i = 0; i < shards_sequences(s); i++) {
        CHECK(shards_read(s, i, x, targets, NULL) == 0);
        CHECK(memcmp(targets, f->bytes + HEADER + 4 * i * T, (size_t)(4 * T)) == 0);
    }
    int32_t *all = malloc(8 * (size_t)tokens);
    CHECK(all && shards_read_range(s, 0, 0, tokens, all, all + tokens, NULL) == 0);
    CHECK(memcmp(all + tokens, f->bytes + HEADER, (size_t)(4 * tokens)) == 0);
    free(all);
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    char dir[200];
    const char *tmp = getenv("TMPDIR");
    snprintf(dir, sizeof dir, "%s/fuzz_labels_XXXXXX", tmp ? tmp : "/tmp");
    CHECK(mkdtemp(dir));
    snprintf(shard_path, sizeof shard_path, "%s/s.bin", dir);
    snprintf(labels_path, sizeof labels_path, "%s/s.labels", dir);
    CHECK((nowhere = fopen("/dev/null", "w")));
    stderr = nowhere; /* the check's lines; descriptor 2 stays as it is */
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const int64_t sizes[] = {1, 2, 257, 50257, 1 << 20, INT32_MAX, INT32_MAX - 2, INT64_C(1) << 31};
    if (size < 2)
        return 0;
    int64_t T = 1 + data[0] % 16, vocab = sizes[data[1] % 8];
    struct file f = build_file(data[0], data + 2, size - 2, width_of_labels);
    int64_t tokens = (f.size > HEADER ? (int64_t)(f.size - HEADER) / 4 : 0) + (data[0] & OTHER ? 1 : 0);
    struct error e = {0}, check_error = {0};
    write_tokens(tokens);
    write_file(labels_path, f.bytes, f.size);
    const struct shards_options o = {.seq_len = T, .vocab_size = vocab};
    struct shards *s = shards_open(shard_path, &o, &e);
    CHECK((s != NULL) == (tokens > T && is_good(&f, tokens, vocab)));
    if (s)
        check_labels(s, &f, tokens, T);
    else
        check_user_error(&e);
    shards_close(s);
    int status = check_data(nowhere, shard_path, vocab, &check_error);
    CHECK((status == 0) == (tokens > 1 && is_good(&f, tokens, vocab)));
    if (status != 0)
        check_user_error(&check_error);
    free(f.bytes);
    return 0;
}

/* Token shards: exactly the files that the format allows are accepted, and read with their tokens.
 *
 * Input: a byte of form, a byte that picks the vocabulary's size, then the file. Form's bits: those of
 * shard_file.h; what is repeated ends in many of the first token, so that another may stand in whole blocks
 * alone. The rest is seq_len - 1. */
#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/shard_file.h"

#include "data/shards.h"

static size_t width_of_tokens(const uint8_t *header) {
    static const int32_t wide = 20240801;
    return memcmp(header, &wide, 4) == 0 ? 4 : 2;
}

/* Where the tokens are repeated, they end in many of the first. */
static struct file build(uint8_t form, const uint8_t *data, size_t size) {
    struct file f = build_file(form, data, size, width_of_tokens);
    size_t first = size >= FIELDS ? width_of_tokens(data) : 2;
    for (size_t i = HEADER + 2 * ENOUGH; i + first <= f.size && f.copies > 1; i += first)
        memcpy(f.bytes + i, data + FIELDS, first);
    return f;
}

static uint32_t token(const struct file *f, int64_t width, int64_t i) {
    uint32_t x = 0;
    memcpy(&x, f->bytes + HEADER + i * width, (size_t)width);
    return x;
}

/* The number of tokens if the format allows the file, or -1. */
static int64_t tokens_of(const struct file *f, int64_t seq_len, int64_t vocab, int64_t *width) {
    int32_t header[3];
    if (f->size < HEADER)
        return -1;
    memcpy(header, f->bytes, sizeof header);
    *width = header[0] == 20240801 && header[1] == 7 ? 4 : header[0] == 20240520 && header[1] == 1 ? 2 : 0;
    if (*width == 0 || header[2] < 0 || (int64_t)f->size != HEADER + header[2] * *width ||
        header[2] <= seq_len)
        return -1;
    for (int64_t i = 0; i < header[2]; i++)
        if (token(f, *width, i) >= vocab || token(f, *width, i) > INT32_MAX)
            return -1;
    return header[2];
}

static void check_sequences(struct shards *s, const struct file *f, int64_t width, int64_t T) {
    int32_t tokens[32], targets[32];
    for (int64_t i = 0; i < shards_sequences(s); i++) {
        CHECK(shards_read(s, i, tokens, targets, NULL) == 0);
        for (int64_t k = 0; k < T; k++) {
            CHECK((uint32_t)tokens[k] == token(f, width, i * T + k));
            CHECK((uint32_t)targets[k] == token(f, width, i * T + k + 1));
        }
    }
}

/* Every epoch visits each sequence once. */
static void check_draws(const struct shards *s, uint64_t seed) {
    bool seen[64] = {false};
    int64_t n = shards_sequences(s);
    for (int64_t g = 0; g < n && n <= 64; g++) {
        int64_t i = shards_draw(s, 3 * n + g, true, seed);
        CHECK(i >= 0 && i < n && !seen[i]);
        seen[i] = true;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const int64_t sizes[] = {1,      2, 257, 50257, 65535, 65536, 100000, INT32_MAX, INT64_C(1) << 31,
                                    1 << 20};
    if (size < 2)
        return 0;
    int64_t T = 1 + data[0] % 32, vocab = sizes[data[1] % 10], width = 0;
    struct file f = build(data[0], data + 2, size - 2);
    struct error e = {0};
    const struct shards_options o = {.seq_len = T, .vocab_size = vocab};
    struct shards *s = shards_open(fuzz_file(0, f.bytes, f.size), &o, &e);
    int64_t expected = tokens_of(&f, T, vocab, &width);
    CHECK((s != NULL) == (expected > 0));
    if (s) {
        char print[17];
        CHECK(shards_files(s) == 1 && shards_tokens(s) == expected);
        CHECK(shards_sequences(s) == (expected - 1) / T);
        check_sequences(s, &f, width, T);
        check_draws(s, data[1]);
        shards_fingerprint(s, print);
        CHECK(strlen(print) == 16 && strspn(print, "0123456789abcdef") == 16);
        shards_close(s);
    } else {
        check_user_error(&e);
    }
    free(f.bytes);
    return 0;
}

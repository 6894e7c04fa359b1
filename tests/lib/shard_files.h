/* Shards for tests of the reader: written into a fresh directory under /tmp that is removed afterwards. Included after
 * cmocka.h and what it needs, by each test that uses it. */
#ifndef IHA_TESTS_LIB_SHARD_FILES_H
#define IHA_TESTS_LIB_SHARD_FILES_H

#include <glob.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "data/shards.h"

enum { U16 = 20240520, U32 = 20240801, LABELS = 20261129 };

static char dir[64];
static char path_buffer[4][256];

static inline const char *in_dir(const char *name) {
    static int next;
    char *path = path_buffer[next++ % 4];
    snprintf(path, sizeof path_buffer[0], "%s/%s", dir, name);
    return path;
}

static inline int make_dir(void **state) {
    (void)state;
    strcpy(dir, "/tmp/iha_shards_XXXXXX");
    return mkdtemp(dir) ? 0 : -1;
}

static inline int remove_dir(void **state) {
    (void)state;
    glob_t found = {0};
    if (glob(in_dir("*"), 0, NULL, &found) == 0)
        for (size_t i = 0; i < found.gl_pathc; i++)
            remove(found.gl_pathv[i]);
    globfree(&found);
    return rmdir(dir);
}

/* A shard whose header promises `promised` tokens and that holds `count` of them: base, base+1, ... mod
 * `mod`. */
static inline void write_shard_header(const char *name, int32_t magic, int32_t version, int32_t promised,
                                      int count, int base, int mod) {
    FILE *f = fopen(in_dir(name), "wb");
    assert_non_null(f);
    int32_t header[256] = {magic, version, promised};
    assert_int_equal(fwrite(header, sizeof header, 1, f), 1);
    for (int i = 0; i < count; i++) {
        uint32_t id = (uint32_t)((base + i) % mod); /* little-endian: the low bytes come first */
        assert_int_equal(fwrite(&id, magic == U32 ? 4 : 2, 1, f), 1);
    }
    assert_int_equal(fclose(f), 0);
}

static inline void write_shard(const char *name, int32_t magic, int count, int base, int mod) {
    write_shard_header(name, magic, magic == U32 ? 7 : 1, count, count, base, mod);
}

static inline void overwrite_token(const char *name, int token_bytes, long position, uint32_t id) {
    FILE *f = fopen(in_dir(name), "r+b");
    assert_non_null(f);
    assert_int_equal(fseek(f, 1024 + position * token_bytes, SEEK_SET), 0);
    assert_int_equal(fwrite(&id, (size_t)token_bytes, 1, f), 1);
    assert_int_equal(fclose(f), 0);
}

/* NAME.labels: `count` of them, first, first + 1, ... */
static inline void write_labels_header(const char *name, int32_t magic, int32_t version, int32_t promised,
                                       int count, int32_t first) {
    FILE *f = fopen(in_dir(name), "wb");
    assert_non_null(f);
    int32_t header[256] = {magic, version, promised};
    assert_int_equal(fwrite(header, sizeof header, 1, f), 1);
    for (int i = 0; i < count; i++)
        assert_int_equal(fwrite(&(int32_t){first + i}, 4, 1, f), 1);
    assert_int_equal(fclose(f), 0);
}

static inline void write_labels(const char *name, int count, int32_t first) {
    write_labels_header(name, LABELS, 1, count, count, first);
}

static inline struct shards *open_as(const char *pattern, int64_t seq_len, int64_t vocab_size,
                                     struct error *e) {
    const struct shards_options o = {.seq_len = seq_len, .vocab_size = vocab_size};
    return shards_open(pattern, &o, e);
}

static inline struct shards *open_good(const char *pattern, int64_t seq_len, int64_t vocab_size) {
    struct error e = {0};
    struct shards *s = open_as(in_dir(pattern), seq_len, vocab_size, &e);
    if (!s)
        fail_msg("%s", e.text);
    return s;
}

/* The open must fail, as the user's error, on one line that contains every given word. */
static inline void refuses(const char *pattern, int64_t seq_len, int64_t vocab_size, const char *word1,
                           const char *word2) {
    struct error e = {0};
    assert_null(open_as(in_dir(pattern), seq_len, vocab_size, &e));
    assert_int_equal(e.exit_code, EXIT_USER);
    assert_null(strchr(e.text, '\n'));
    if (!strstr(e.text, word1) || !strstr(e.text, word2))
        fail_msg("'%s' should contain '%s' and '%s'", e.text, word1, word2);
    assert_null(open_as(in_dir(pattern), seq_len, vocab_size, NULL)); /* without an error to fill */
}

#define IN_DIR(test) cmocka_unit_test_setup_teardown(test, make_dir, remove_dir)

#endif

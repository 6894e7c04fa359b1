#include "data/dataset.h"

#include <cjson/cJSON.h>
#include <glob.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "data/sha256.h"
#include "data/tokenizer_internal.h"

struct check {
    bool has_tokenizer;
    char sha256[SHA256_HEX]; /* of the tokenizer's file; "" for bytes */
    int64_t vocab_size;
    int32_t separator; /* -1: none seen yet */
    char *first;       /* the file that said so */
    struct error *e;
};

static int64_t number(const cJSON *root, const char *name) {
    const cJSON *item = json_member(root, name);
    double value = cJSON_IsNumber(item) ? item->valuedouble : -1;
    return value >= 0 && value <= INT32_MAX && value == (double)(int64_t)value ? (int64_t)value : -1;
}

static int check_tokenizer(const struct check *c, const cJSON *root, const char *path) {
    const char *sha256 = NULL;
    if (json_text(root, "tokenizer_sha256", &sha256, path, c->e))
        return -1;
    if (!c->has_tokenizer || strcmp(sha256 ? sha256 : "", c->sha256) == 0)
        return 0;
    return fail_user(
        c->e,
        "%s: these shards were made with another tokenizer (%s%.12s) than data.tokenizer (%s%.12s): "
        "name the tokenizer.json beside the shards",
        path, sha256 ? "SHA-256 " : "bytes", sha256 ? sha256 : "", *c->sha256 ? "SHA-256 " : "bytes",
        c->sha256);
}

static int check_root(struct check *c, const cJSON *root, const char *path) {
    int64_t separator = number(root, "separator"), vocab_size = number(root, "vocab_size");
    if (separator < 0 || vocab_size < 0)
        return fail_user(
            c->e, "%s: it has no \"separator\" and \"vocab_size\"; prepare the data again, or remove it",
            path);
    if (vocab_size > c->vocab_size || separator >= c->vocab_size)
        return fail_user(
            c->e,
            "%s: these shards have a vocabulary of %lld but model.vocab_size is %lld: set it to %lld or "
            "more",
            path, (long long)vocab_size, (long long)c->vocab_size, (long long)vocab_size);
    if (c->separator >= 0 && c->separator != separator)
        return fail_user(
            c->e,
            "%s: documents end with id %lld here and with %d in %s: prepare both with the same separator",
            path, (long long)separator, c->separator, c->first);
    if (check_tokenizer(c, root, path))
        return -1;
    if (c->separator < 0 && !(c->first = strdup(path)))
        return fail_run(c->e, "out of memory for a file name");
    c->separator = (int32_t)separator;
    return 0;
}

static int check_file(struct check *c, const char *path) {
    cJSON *root = json_read(path, "prepare the data again, or remove it", c->e);
    int rc = root ? check_root(c, root, path) : -1;
    cJSON_Delete(root);
    return rc;
}

/* The dataset.json in each folder that the glob of shards reaches. */
static int check_glob(struct check *c, const char *shards) {
    const char *slash = strrchr(shards, '/');
    size_t folder = slash ? (size_t)(slash + 1 - shards) : 0, size = folder + sizeof "dataset.json";
    char *pattern = malloc(size);
    glob_t found;
    int rc = 0;
    if (!pattern)
        return fail_run(c->e, "out of memory for a file name");
    snprintf(pattern, size, "%.*sdataset.json", (int)folder, shards);
    if (glob(pattern, 0, NULL, &found) == 0) {
        for (size_t i = 0; i < found.gl_pathc && rc == 0; i++)
            rc = check_file(c, found.gl_pathv[i]);
        globfree(&found);
    }
    free(pattern);
    return rc;
}

int dataset_end_ids(const char *const *globs, int count, const struct tokenizer *tokenizer, const char *text,
                    size_t bytes, int64_t vocab_size, int64_t *separator, struct end_ids *ends,
                    struct error *e) {
    struct check c = {.has_tokenizer = tokenizer != NULL, .vocab_size = vocab_size, .separator = -1, .e = e};
    int rc = 0;
    if (text)
        sha256_hex(text, bytes, c.sha256);
    for (int i = 0; i < count && rc == 0; i++)
        rc = check_glob(&c, globs[i]);
    free(c.first);
    *ends = (struct end_ids){0};
    int32_t own = tokenizer ? tokenizer_end_of_text(tokenizer) : -1;
    if (*separator < 0)
        *separator = c.separator >= 0 ? c.separator : own;
    if (*separator >= 0)
        end_ids_add(ends, (int32_t)*separator);
    for (int i = own >= 0 ? 1 : 0; tokenizer && i < tokenizer_end_ids(tokenizer)->count; i++)
        end_ids_add(ends, tokenizer_end_ids(tokenizer)->ids[i]);
    return rc;
}

static double size_of(const cJSON *shard, const char *name) {
    const cJSON *item = json_member(shard, name);
    return cJSON_IsNumber(item) && item->valuedouble > 0 ? item->valuedouble : 0;
}

double dataset_bytes_per_token(const char *shards) {
    double bytes = 0, tokens = 0;
    bool known = true;
    cJSON *root = NULL; /* of `folder` */
    char *folder = NULL;
    glob_t found;
    if (glob(shards, 0, NULL, &found) != 0)
        return 0;
    for (size_t i = 0; i < found.gl_pathc && known; i++) {
        const char *path = found.gl_pathv[i], *slash = strrchr(path, '/');
        size_t length = slash ? (size_t)(slash + 1 - path) : 0, size = length + sizeof "dataset.json";
        char *name = malloc(size);
        if (!name)
            break;
        snprintf(name, size, "%.*sdataset.json", (int)length, path);
        if (!folder || strcmp(folder, name) != 0) {
            struct error ignored;
            cJSON_Delete(root);
            root = json_read(name, "", &ignored);
            free(folder);
            folder = name;
        } else {
            free(name);
        }
        const cJSON *shard = root ? json_member(json_member(root, "shards"), path + length) : NULL;
        known = size_of(shard, "tokens") > 0;
        bytes += size_of(shard, "bytes");
        tokens += size_of(shard, "tokens");
    }
    known = known && folder;
    globfree(&found);
    cJSON_Delete(root);
    free(folder);
    return known && tokens > 0 ? bytes / tokens : 0;
}

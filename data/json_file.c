/* JSON files beside tokenizers and shards, read whole. A key that an object has twice is refused: readers differ in
 * which of the two they take. */
#include "data/tokenizer_internal.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    MAX_FILE_BYTES = 128 << 20
}; /* the largest published files have 40 MB; far larger is damaged or hostile */

/* ---- members ---- */

const cJSON *json_member(const cJSON *object, const char *name) {
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, name);
    return cJSON_IsNull(item) ? NULL : item;
}

int json_bool(const cJSON *object, const char *name, bool missing, bool *out, const char *path,
              struct error *e) {
    const cJSON *item = json_member(object, name);
    if (item && !cJSON_IsBool(item))
        return fail_user(e, "%s: \"%s\" must be true or false; is this a tokenizer.json?", path, name);
    *out = item ? cJSON_IsTrue(item) : missing;
    return 0;
}

int json_text(const cJSON *object, const char *name, const char **out, const char *path, struct error *e) {
    const cJSON *item = json_member(object, name);
    if (item && !cJSON_IsString(item))
        return fail_user(e, "%s: \"%s\" must be text; is this a tokenizer.json?", path, name);
    *out = item ? item->valuestring : NULL;
    return 0;
}

bool json_is_type(const cJSON *node, const char *type) {
    const cJSON *item = json_member(node, "type");
    return cJSON_IsString(item) && strcmp(item->valuestring, type) == 0;
}

/* ---- keys ---- */

static int compare_texts(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* Fail if an object has a key twice; all keys of one object. */
static int check_object(const cJSON *object, const char *path, struct error *e) {
    size_t count = 0;
    for (const cJSON *item = object->child; item; item = item->next)
        count++;
    const char **keys = malloc((count ? count : 1) * sizeof *keys), *twice = NULL;
    if (!keys)
        return fail_run(e, "%s: out of memory", path);
    count = 0;
    for (const cJSON *item = object->child; item; item = item->next)
        keys[count++] = item->string;
    qsort(keys, count, sizeof *keys, compare_texts);
    for (size_t i = 1; i < count && !twice; i++)
        twice = strcmp(keys[i - 1], keys[i]) == 0 ? keys[i] : NULL;
    free(keys);
    return twice ? fail_user(e, "%s: the key \"%.40s\" stands twice in one object; remove one of them", path,
                             twice)
                 : 0;
}

/* Not in a vocabulary, where cJSON ends a token's text at a zero byte, so that two may look alike. cJSON limits how
 * deep values nest. */
static int check_keys(const cJSON *node, const char *path, struct error *e) {
    if (cJSON_IsObject(node) && !(node->string && strcmp(node->string, "vocab") == 0) &&
        check_object(node, path, e) != 0)
        return -1;
    for (const cJSON *item = node->child; item; item = item->next)
        if (item->child && check_keys(item, path, e) != 0)
            return -1;
    return 0;
}

/* ---- the file ---- */

static int read_all(int fd, char *out, size_t length) {
    while (length > 0) {
        ssize_t n = read(fd, out, length);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return -1;
        out += n;
        length -= (size_t)n;
    }
    return 0;
}

static char *read_open_file(int fd, const char *path, const char *what, size_t *length, struct error *e) {
    struct stat st;
    if (fstat(fd, &st) || !S_ISREG(st.st_mode)) {
        fail_user(e, "%s: not a regular file; %s", path, what);
        return NULL;
    }
    if (st.st_size > MAX_FILE_BYTES) {
        fail_user(e, "%s: %lld bytes are too many for such a file; is it the right one?", path,
                  (long long)st.st_size);
        return NULL;
    }
    char *text = malloc((size_t)st.st_size + 1);
    if (!text) {
        fail_run(e, "%s: out of memory", path);
        return NULL;
    }
    if (read_all(fd, text, (size_t)st.st_size)) {
        fail_user(e, "%s: could not be read whole: %s", path, errno ? strerror(errno) : "it is changing");
        free(text);
        return NULL;
    }
    text[st.st_size] = 0;
    *length = (size_t)st.st_size;
    return text;
}

cJSON *json_read(const char *path, const char *what, struct error *e) {
    size_t length = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO must not hang us */
    if (fd < 0) {
        fail_user(e, "%s: cannot be opened: %s; %s", path, strerror(errno), what);
        return NULL;
    }
    char *text = read_open_file(fd, path, what, &length, e);
    close(fd);
    if (!text)
        return NULL;
    const char *end = text;
    cJSON *root = cJSON_ParseWithLengthOpts(text, length + 1, &end, true);
    if (!root)
        fail_user(e, "%s: not valid JSON at byte %td of %zu; is it the right file, and whole?", path,
                  end - text, length);
    free(text);
    if (root && check_keys(root, path, e)) {
        cJSON_Delete(root);
        return NULL;
    }
    return root;
}

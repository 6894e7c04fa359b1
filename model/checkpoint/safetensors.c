/* Reading safetensors, from files that may be damaged or malicious. The header is copied and terminated with a NUL,
 * so that the JSON parser cannot read past it; every number in it is checked before it is used; and the tensors, in
 * the order of their offsets, must cover the data exactly: no overlap, no gap, nothing after the last. Entries are
 * sorted by name, to find duplicates and for binary search. */
#include <cjson/cJSON.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "model/checkpoint/files.h"
#include "model/checkpoint/safetensors_internal.h"

static const uint64_t MAX_HEADER_BYTES = 100000000; /* the limit of the reference implementation */

const struct safetensors_dtype_row safetensors_dtypes[ST_DTYPES] = {
    [ST_F32] = {"F32", 4}, [ST_F64] = {"F64", 8}, [ST_BF16] = {"BF16", 2}, [ST_I32] = {"I32", 4},
    [ST_I64] = {"I64", 8}, [ST_U16] = {"U16", 2}, [ST_U8] = {"U8", 1},
};

int safetensors_shape_bytes(const struct safetensors_entry *t, size_t *bytes) {
    int64_t product = safetensors_dtypes[t->dtype].bytes;
    int empty = 0;
    for (int i = 0; i < t->ndim; i++) {
        if (t->shape[i] < 0)
            return -1;
        if (t->shape[i] == 0)
            empty = 1;
        else if (__builtin_mul_overflow(product, t->shape[i], &product))
            return -1;
    }
    *bytes = empty ? 0 : (size_t)product;
    return 0;
}

int safetensors_by_name(const void *a, const void *b) {
    const struct safetensors_entry *x = a, *y = b;
    return strcmp(x->name, y->name);
}

/* ---- reading: the header ---- */

/* Context of the functions that check a header. */
struct reading {
    const char *path;
    const char *data; /* the bytes after the header */
    size_t data_bytes;
    struct error *error;
};

/* A name from the file, for a one-line message: cut, control characters replaced. */
static const char *printable(const char *name, char text[static 100]) {
    size_t i = 0;
    for (; name[i] && i < 96; i++)
        text[i] = (name[i] >= ' ' && name[i] <= '~') ? name[i] : '?';
    strcpy(text + i, name[i] ? "..." : "");
    return text;
}

/* Fill the error: EXIT_USER, naming the file, and the tensor if not NULL. */
__attribute__((format(printf, 3, 4))) static int refuse(const struct reading *r, const char *tensor,
                                                        const char *format, ...) {
    char what[400], name[100];
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
    const char *advice = "the file is damaged or not safetensors: copy or export it again, or use another";
    if (tensor)
        return fail_user(r->error, "\"%s\": tensor \"%s\" %s; %s", r->path, printable(tensor, name), what,
                         advice);
    return fail_user(r->error, "\"%s\" %s; %s", r->path, what, advice);
}

static int fail_memory(const struct reading *r) {
    return fail_run(r->error, "cannot read \"%s\": %s; %s", r->path, strerror(ENOMEM), files_advice(ENOMEM));
}

/* The member of an object, or NULL and an error if it is missing or given twice. */
static const cJSON *member_once(const struct reading *r, const cJSON *object, const char *key) {
    const cJSON *found = NULL, *item;
    cJSON_ArrayForEach(item, object) {
        if (strcmp(item->string, key) != 0)
            continue;
        if (found) {
            refuse(r, object->string, "has %s twice", key);
            return NULL;
        }
        found = item;
    }
    if (!found)
        refuse(r, object->string, "has no %s", key);
    return found;
}

/* A whole number, at least 0 and below 2^53, to which the parser's doubles are exact. The comparisons are false for
 * NaN. */
static int read_count(const cJSON *number, int64_t *count) {
    double value = number->valuedouble;
    if (!cJSON_IsNumber(number) || !(value >= 0 && value < 0x1p53) || value != (double)(int64_t)value)
        return -1;
    *count = (int64_t)value;
    return 0;
}

static int read_dtype(const struct reading *r, const cJSON *tensor, struct safetensors_entry *t) {
    const cJSON *dtype = member_once(r, tensor, "dtype");
    if (!dtype)
        return -1;
    if (!cJSON_IsString(dtype))
        return refuse(r, t->name, "has a dtype that is not a string");
    for (int i = 0; i < ST_DTYPES; i++)
        if (strcmp(dtype->valuestring, safetensors_dtypes[i].name) == 0) {
            t->dtype = (enum safetensors_dtype)i;
            return 0;
        }
    char name[100];
    return refuse(r, t->name, "has dtype \"%s\", which is none of F32, F64, BF16, I32, I64, U16, U8",
                  printable(dtype->valuestring, name));
}

static int read_shape(const struct reading *r, const cJSON *tensor, struct safetensors_entry *t) {
    const cJSON *shape = member_once(r, tensor, "shape"), *size;
    if (!shape)
        return -1;
    if (!cJSON_IsArray(shape))
        return refuse(r, t->name, "has a shape that is not a list");
    cJSON_ArrayForEach(size, shape) {
        if (t->ndim == ST_MAX_DIMS)
            return refuse(r, t->name, "has more than %d dimensions", ST_MAX_DIMS);
        if (read_count(size, &t->shape[t->ndim]))
            return refuse(r, t->name, "has a size in its shape that is not a whole number from 0 to 2^53");
        t->ndim++;
    }
    return 0;
}

static int read_offsets(const struct reading *r, const cJSON *tensor, struct safetensors_entry *t) {
    const cJSON *pair = member_once(r, tensor, "data_offsets");
    if (!pair)
        return -1;
    int64_t begin, end;
    if (!cJSON_IsArray(pair) || !pair->child || !pair->child->next || pair->child->next->next ||
        read_count(pair->child, &begin) || read_count(pair->child->next, &end))
        return refuse(r, t->name, "has data_offsets that are not two whole numbers from 0 to 2^53");
    if (begin > end)
        return refuse(r, t->name, "has its data_offsets reversed: [%" PRId64 ", %" PRId64 "]", begin, end);
    if ((uint64_t)end > r->data_bytes)
        return refuse(r, t->name, "ends at byte %" PRId64 " of the data, past their end at %zu", end,
                      r->data_bytes);
    t->data = r->data + begin;
    t->bytes = (size_t)(end - begin);
    return 0;
}

static int read_tensor(const struct reading *r, const cJSON *tensor, struct safetensors_entry *t) {
    t->name = strdup(tensor->string);
    if (!t->name)
        return fail_memory(r);
    if (!cJSON_IsObject(tensor))
        return refuse(r, t->name, "is not described by a JSON object");
    if (read_dtype(r, tensor, t) || read_shape(r, tensor, t) || read_offsets(r, tensor, t))
        return -1;
    size_t bytes;
    if (safetensors_shape_bytes(t, &bytes))
        return refuse(r, t->name, "has a shape whose bytes do not fit in 63 bits");
    if (bytes != t->bytes)
        return refuse(r, t->name, "takes %zu bytes by its shape but %zu by its data_offsets", bytes,
                      t->bytes);
    return 0;
}

/* ---- reading: the tensors together ---- */

/* Empty tensors before others at the same offset. */
static int by_offset(const void *a, const void *b) {
    const struct safetensors_entry *x = a, *y = b;
    const char *p = x->data, *q = y->data;
    if (p != q)
        return p < q ? -1 : 1;
    return (x->bytes > y->bytes) - (x->bytes < y->bytes);
}

/* Entries, sorted by offset, must follow each other without gap or overlap up to the end of the file. */
static int check_tiling(const struct reading *r, const struct safetensors *s) {
    const char *next = r->data;
    for (int i = 0; i < s->count; i++) {
        const struct safetensors_entry *t = &s->entries[i];
        const char *begin = t->data;
        char before[100];
        if (begin < next)
            return refuse(r, t->name, "overlaps tensor \"%s\"", printable(t[-1].name, before));
        if (begin > next)
            return refuse(r, t->name, "follows a gap of %td bytes in the data", begin - next);
        next = begin + t->bytes;
    }
    size_t rest = r->data_bytes - (size_t)(next - r->data);
    return rest ? refuse(r, NULL, "has %zu bytes at its end that belong to no tensor", rest) : 0;
}

static int check_names(const struct reading *r, const struct safetensors *s) {
    for (int i = 1; i < s->count; i++)
        if (strcmp(s->entries[i - 1].name, s->entries[i].name) == 0)
            return refuse(r, s->entries[i].name, "is there twice");
    return 0;
}

static void sort_entries(struct safetensors *s, int (*order)(const void *, const void *)) {
    qsort(s->entries, (size_t)s->count, sizeof *s->entries, order);
}

/* Fill the entries from a parsed header. On error they are left for safetensors_close. */
static int read_entries(const struct reading *r, const cJSON *root, struct safetensors *s) {
    int capacity = 1, metadata = 0; /* at least one, since qsort needs an address */
    const cJSON *item;
    cJSON_ArrayForEach(item, root) capacity++;
    s->entries = calloc((size_t)capacity, sizeof *s->entries);
    if (!s->entries)
        return fail_memory(r);
    cJSON_ArrayForEach(item, root) {
        if (strcmp(item->string, ST_METADATA) == 0) {
            if (metadata++)
                return refuse(r, NULL, "has %s twice", ST_METADATA);
            continue;
        }
        if (read_tensor(r, item, &s->entries[s->count++]))
            return -1;
    }
    /* Names before offsets, since duplicates usually overlap too. */
    sort_entries(s, safetensors_by_name);
    if (check_names(r, s))
        return -1;
    sort_entries(s, by_offset);
    if (check_tiling(r, s))
        return -1;
    sort_entries(s, safetensors_by_name);
    return 0;
}

/* Parse a copy of the header that ends in a NUL. Escaped NULs are refused, since cJSON would end a name there and
 * two names could become equal. */
static int read_header(const struct reading *r, const char *header, size_t bytes, struct safetensors *s) {
    if (bytes == 0 || header[0] != '{')
        return refuse(r, NULL, "has a header that is not a JSON object");
    char *text = malloc(bytes + 1);
    if (!text)
        return fail_memory(r);
    memcpy(text, header, bytes);
    text[bytes] = '\0';
    int result;
    cJSON *root = NULL;
    if (memchr(text, '\0', bytes) || strstr(text, "\\u0000"))
        result = refuse(r, NULL, "has a NUL in its header");
    else if (!(root = cJSON_ParseWithOpts(text, NULL, 1)))
        result = refuse(r, NULL, "has a header that is not JSON");
    else
        result = read_entries(r, root, s);
    cJSON_Delete(root);
    free(text);
    return result;
}

/* Find the header and the data in the mapped file. */
static int read_map(struct reading *r, struct safetensors *s) {
    const unsigned char *map = s->map;
    uint64_t header_bytes = 0;
    for (int i = 0; i < ST_LENGTH_BYTES; i++)
        header_bytes |= (uint64_t)map[i] << (8 * i);
    size_t after_length = s->map_bytes - ST_LENGTH_BYTES;
    if (header_bytes > after_length)
        return refuse(r, NULL, "is truncated: a header of %" PRIu64 " bytes in a file of %zu", header_bytes,
                      s->map_bytes);
    if (header_bytes > MAX_HEADER_BYTES)
        return refuse(r, NULL, "has a header of %" PRIu64 " bytes, beyond the format's %" PRIu64,
                      header_bytes, MAX_HEADER_BYTES);
    const char *header = (const char *)map + ST_LENGTH_BYTES;
    r->data = header + header_bytes;
    r->data_bytes = after_length - header_bytes;
    return read_header(r, header, header_bytes, s);
}

/* ---- reading: the file ---- */

static int map_file(const struct reading *r, int fd, struct safetensors *s) {
    struct stat status;
    if (fstat(fd, &status)) {
        int err = errno;
        return fail_run(r->error, "cannot read \"%s\": %s; %s", r->path, strerror(err), files_advice(err));
    }
    if (!S_ISREG(status.st_mode))
        return fail_user(r->error, "\"%s\" is not a file; give the path of a .safetensors file", r->path);
    if (status.st_size < ST_LENGTH_BYTES)
        return refuse(r, NULL, "is truncated: %" PRId64 " bytes", (int64_t)status.st_size);
    void *map = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (map == MAP_FAILED) {
        int err = errno;
        return fail_run(r->error, "cannot map \"%s\": %s; %s", r->path, strerror(err), files_advice(err));
    }
    s->map = map;
    s->map_bytes = (size_t)status.st_size;
    return 0;
}

int safetensors_open(struct safetensors *s, const char *path, struct error *e) {
    *s = (struct safetensors){0};
    struct reading r = {.path = path, .error = e};
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* do not block on a pipe */
    if (fd < 0) {
        int err = errno;
        return fail_user(e, "cannot read \"%s\": %s; %s", path, strerror(err), files_advice(err));
    }
    int result = map_file(&r, fd, s);
    close(fd);
    if (result == 0)
        result = read_map(&r, s);
    if (result)
        safetensors_close(s);
    return result;
}

void safetensors_close(struct safetensors *s) {
    for (int i = 0; i < s->count; i++)
        free(s->entries[i].name);
    free(s->entries);
    if (s->map)
        munmap(s->map, s->map_bytes);
    *s = (struct safetensors){0};
}

const struct safetensors_entry *safetensors_find(const struct safetensors *s, const char *name) {
    if (s->count == 0)
        return NULL;
    struct safetensors_entry key = {.name = (char *)name};
    return bsearch(&key, s->entries, (size_t)s->count, sizeof key, safetensors_by_name);
}

/* The safetensors format, read and written: see safetensors.h.
 *
 * Reading trusts nothing. The header is copied out of the map and closed with a NUL, so that the JSON parser
 * cannot run past it; every number in it is checked before it is used; and in the end the tensors, in the
 * order of their offsets, must tile the data exactly: no overlap, no hole, no rest. Entries are kept sorted
 * by name, which finds duplicates and makes looking up a binary search.
 *
 * Writing knows all shapes beforehand, so the header goes first and the data stream after it through one
 * buffer; a piece that is larger than the buffer goes straight to the file. */
#include "model/checkpoint/safetensors.h"

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

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "tensors are little-endian and used in place");
_Static_assert(sizeof(size_t) == 8, "offsets are 64-bit");

enum { LENGTH_BYTES = 8, DATA_ALIGNMENT = 64 };
static const uint64_t MAX_HEADER_BYTES = 100000000; /* the limit of the reference implementation */
static const size_t BUFFER_BYTES = (size_t)4 << 20;
static const char METADATA[] = "__metadata__";

static const struct {
    const char *name;
    int bytes;
} dtypes[] = {
    [ST_F32] = {"F32", 4}, [ST_F64] = {"F64", 8}, [ST_BF16] = {"BF16", 2}, [ST_I32] = {"I32", 4},
    [ST_I64] = {"I64", 8}, [ST_U16] = {"U16", 2}, [ST_U8] = {"U8", 1},
};
enum { DTYPE_COUNT = sizeof dtypes / sizeof dtypes[0] };

/* Bytes of a tensor; -1 for a negative size or when the product overflows. Zero sizes count as one in the
 * check, so that whoever multiplies the same shape in another order does not overflow either. */
static int shape_bytes(const struct safetensors_entry *t, size_t *bytes) {
    int64_t product = dtypes[t->dtype].bytes;
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

static int by_name(const void *a, const void *b) {
    const struct safetensors_entry *x = a, *y = b;
    return strcmp(x->name, y->name);
}

/* ---- reading: the header ---- */

/* What the functions that check a header share. */
struct reading {
    const char *path;
    const char *data; /* the bytes after the header */
    size_t data_bytes;
    struct error *error;
};

/* A name fit for one line on a terminal, whatever the file holds. */
static const char *printable(const char *name, char text[static 100]) {
    size_t i = 0;
    for (; name[i] && i < 96; i++)
        text[i] = (name[i] >= ' ' && name[i] <= '~') ? name[i] : '?';
    strcpy(text + i, name[i] ? "..." : "");
    return text;
}

/* Refuse the file, because of a tensor when there is one. */
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

/* The member of an object, or NULL with an error when it is absent or there twice. */
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

/* A whole number from 0 up. The parser keeps doubles, so beyond 2^53 they would no longer be exact. The
 * comparisons are false for a NaN. */
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
    for (int i = 0; i < DTYPE_COUNT; i++)
        if (strcmp(dtype->valuestring, dtypes[i].name) == 0) {
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
    if (shape_bytes(t, &bytes))
        return refuse(r, t->name, "has a shape whose bytes do not fit in 63 bits");
    if (bytes != t->bytes)
        return refuse(r, t->name, "takes %zu bytes by its shape but %zu by its data_offsets", bytes,
                      t->bytes);
    return 0;
}

/* ---- reading: the tensors together ---- */

/* Empty tensors first where they share an offset with others. */
static int by_offset(const void *a, const void *b) {
    const struct safetensors_entry *x = a, *y = b;
    const char *p = x->data, *q = y->data;
    if (p != q)
        return p < q ? -1 : 1;
    return (x->bytes > y->bytes) - (x->bytes < y->bytes);
}

/* Entries in the order of their offsets must follow each other exactly, up to the end of the file. */
static int check_tiling(const struct reading *r, const struct safetensors *s) {
    const char *next = r->data;
    for (int i = 0; i < s->count; i++) {
        const struct safetensors_entry *t = &s->entries[i];
        const char *begin = t->data;
        char before[100];
        if (begin < next)
            return refuse(r, t->name, "overlaps tensor \"%s\"", printable(t[-1].name, before));
        if (begin > next)
            return refuse(r, t->name, "follows a hole of %td bytes in the data", begin - next);
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
    int room = 1, metadata = 0; /* room for one even when there are none: qsort wants an address */
    const cJSON *item;
    cJSON_ArrayForEach(item, root) room++;
    s->entries = calloc((size_t)room, sizeof *s->entries);
    if (!s->entries)
        return fail_memory(r);
    cJSON_ArrayForEach(item, root) {
        if (strcmp(item->string, METADATA) == 0) {
            if (metadata++)
                return refuse(r, NULL, "has %s twice", METADATA);
            continue;
        }
        if (read_tensor(r, item, &s->entries[s->count++]))
            return -1;
    }
    /* Names before offsets, since a duplicate usually overlaps too. */
    sort_entries(s, by_name);
    if (check_names(r, s))
        return -1;
    sort_entries(s, by_offset);
    if (check_tiling(r, s))
        return -1;
    sort_entries(s, by_name);
    return 0;
}

/* Parse the header from a copy that ends in a NUL. cJSON would cut a name at an escaped NUL, so that two
 * names could pass for one: such headers are refused outright. */
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

/* Find the header and the data in the map. */
static int read_map(struct reading *r, struct safetensors *s) {
    const unsigned char *map = s->map;
    uint64_t header_bytes = 0;
    for (int i = 0; i < LENGTH_BYTES; i++)
        header_bytes |= (uint64_t)map[i] << (8 * i);
    size_t after_length = s->map_bytes - LENGTH_BYTES;
    if (header_bytes > after_length)
        return refuse(r, NULL, "is truncated: a header of %" PRIu64 " bytes in a file of %zu", header_bytes,
                      s->map_bytes);
    if (header_bytes > MAX_HEADER_BYTES)
        return refuse(r, NULL, "has a header of %" PRIu64 " bytes, beyond the format's %" PRIu64,
                      header_bytes, MAX_HEADER_BYTES);
    const char *header = (const char *)map + LENGTH_BYTES;
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
    if (status.st_size < LENGTH_BYTES)
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
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* not to wait at a pipe */
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
    return bsearch(&key, s->entries, (size_t)s->count, sizeof key, by_name);
}

/* ---- writing ---- */

struct safetensors_writer {
    int fd;
    char *path;
    char *buffer;    /* BUFFER_BYTES */
    size_t used;     /* of the buffer */
    size_t expected; /* bytes of data still to be appended */
};

static int fail_write(struct error *e, const char *path, int err) {
    return fail_run(e, "cannot write \"%s\": %s; %s", path, strerror(err), files_advice(err));
}

/* For what only a mistake in this program can cause. */
static int fail_caller(struct error *e, const char *path, const char *tensor, const char *what) {
    return fail_run(e, "cannot write \"%s\": tensor \"%s\" %s; please report this as a bug", path, tensor,
                    what);
}

/* Close and free; 0, or the errno of close, which may be the first to hear of a full network disk. */
static int writer_free(struct safetensors_writer *w) {
    int err = w->fd >= 0 && close(w->fd) ? errno : 0;
    free(w->buffer);
    free(w->path);
    free(w);
    return err;
}

/* Check the entries as the reader would, so that no file is written that cannot be read. */
static int check_writable(const char *path, const struct safetensors_entry *entries, int count,
                          struct error *e) {
    for (int i = 0; i < count; i++) {
        const struct safetensors_entry *t = &entries[i];
        size_t bytes;
        if (strcmp(t->name, METADATA) == 0)
            return fail_caller(e, path, t->name, "has a reserved name");
        if ((unsigned)t->dtype >= DTYPE_COUNT)
            return fail_caller(e, path, t->name, "has no known dtype");
        if (t->ndim < 0 || t->ndim > ST_MAX_DIMS || shape_bytes(t, &bytes))
            return fail_caller(e, path, t->name, "has an impossible shape");
    }
    return 0;
}

static int check_unique(const char *path, const struct safetensors_entry *entries, int count,
                        struct error *e) {
    if (count < 2)
        return 0;
    struct safetensors_entry *sorted = malloc((size_t)count * sizeof *sorted);
    if (!sorted)
        return fail_write(e, path, ENOMEM);
    memcpy(sorted, entries, (size_t)count * sizeof *sorted);
    qsort(sorted, (size_t)count, sizeof *sorted, by_name);
    int result = 0;
    for (int i = 1; i < count && result == 0; i++)
        if (strcmp(sorted[i - 1].name, sorted[i].name) == 0)
            result = fail_caller(e, path, sorted[i].name, "is there twice");
    free(sorted);
    return result;
}

static void print_string(FILE *out, const char *text) {
    fputc('"', out);
    for (const unsigned char *c = (const unsigned char *)text; *c; c++) {
        if (*c == '"' || *c == '\\')
            fprintf(out, "\\%c", *c);
        else if (*c < ' ')
            fprintf(out, "\\u%04x", *c);
        else
            fputc(*c, out);
    }
    fputc('"', out);
}

/* One member of the header; returns the offset after it. By hand, since cJSON prints numbers as doubles and
 * a large one in a form ("1e+15") that other readers refuse. */
static int print_entry(FILE *out, const struct safetensors_entry *t, size_t *offset) {
    size_t bytes = 0, begin = *offset;
    shape_bytes(t, &bytes);
    if (__builtin_add_overflow(begin, bytes, offset) || *offset > INT64_MAX)
        return -1;
    fputc(',', out);
    print_string(out, t->name);
    fprintf(out, ":{\"dtype\":\"%s\",\"shape\":[", dtypes[t->dtype].name);
    for (int i = 0; i < t->ndim; i++)
        fprintf(out, "%s%" PRId64, i ? "," : "", t->shape[i]);
    fprintf(out, "],\"data_offsets\":[%zu,%zu]}", begin, *offset);
    return 0;
}

/* The whole header, length and padding included, in memory that the caller frees. 0, or the errno. */
static int print_header(const struct safetensors_entry *entries, int count, char **header, size_t *bytes,
                        size_t *data_bytes) {
    *header = NULL;
    FILE *out = open_memstream(header, bytes);
    if (!out)
        return ENOMEM;
    fprintf(out, "%*s{\"%s\":{\"format\":\"pt\"}", LENGTH_BYTES, "", METADATA);
    int err = 0;
    *data_bytes = 0;
    for (int i = 0; i < count && !err; i++)
        err = print_entry(out, &entries[i], data_bytes) ? EFBIG : 0;
    fputc('}', out);
    long end = ftell(out);
    long padding = (DATA_ALIGNMENT - end % DATA_ALIGNMENT) % DATA_ALIGNMENT;
    fprintf(out, "%*s", (int)padding, "");
    int unwritten = ferror(out);
    if (fclose(out) || unwritten)
        err = ENOMEM;
    for (int i = 0; i < LENGTH_BYTES && !err; i++)
        (*header)[i] = (char)((*bytes - LENGTH_BYTES) >> (8 * i));
    return err;
}

/* Through the buffer, or past it when the piece is larger. 0, or the errno. */
static int put(struct safetensors_writer *w, const char *data, size_t bytes) {
    if (bytes > BUFFER_BYTES - w->used) {
        int err = files_write_fd(w->fd, w->buffer, w->used);
        if (err)
            return err;
        w->used = 0;
    }
    if (bytes > BUFFER_BYTES)
        return files_write_fd(w->fd, data, bytes);
    memcpy(w->buffer + w->used, data, bytes);
    w->used += bytes;
    return 0;
}

/* Open the file and put the header. 0, or the errno. */
static int writer_start(struct safetensors_writer *w, const char *path,
                        const struct safetensors_entry *entries, int count) {
    w->path = strdup(path);
    w->buffer = malloc(BUFFER_BYTES);
    if (!w->path || !w->buffer)
        return ENOMEM;
    char *header;
    size_t bytes;
    int err = print_header(entries, count, &header, &bytes, &w->expected);
    if (!err) {
        w->fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
        err = w->fd < 0 ? errno : put(w, header, bytes);
    }
    free(header);
    return err;
}

struct safetensors_writer *safetensors_create(const char *path, const struct safetensors_entry *entries,
                                              int count, struct error *e) {
    if (check_writable(path, entries, count, e) || check_unique(path, entries, count, e))
        return NULL;
    struct safetensors_writer *w = calloc(1, sizeof *w);
    if (!w) {
        fail_write(e, path, ENOMEM);
        return NULL;
    }
    w->fd = -1;
    int err = writer_start(w, path, entries, count);
    if (err) {
        writer_free(w);
        fail_write(e, path, err);
        return NULL;
    }
    return w;
}

int safetensors_append(struct safetensors_writer *w, const void *data, size_t bytes, struct error *e) {
    if (bytes == 0)
        return 0;
    int err = 0;
    if (bytes > w->expected)
        fail_run(e, "cannot write \"%s\": %zu bytes more than its header tells; please report this as a bug",
                 w->path, bytes - w->expected);
    else if ((err = put(w, data, bytes)))
        fail_write(e, w->path, err);
    if (err || bytes > w->expected) {
        writer_free(w);
        return -1;
    }
    w->expected -= bytes;
    return 0;
}

void safetensors_abandon(struct safetensors_writer *w) {
    writer_free(w);
}

int safetensors_finish(struct safetensors_writer *w, struct error *e) {
    int result = 0;
    if (w->expected > 0) {
        result = fail_run(e, "cannot write \"%s\": %zu bytes are missing; please report this as a bug",
                          w->path, w->expected);
    } else {
        int err = files_write_fd(w->fd, w->buffer, w->used);
        if (err || (fsync(w->fd) && (err = errno)))
            result = fail_write(e, w->path, err);
    }
    char *path = w->path; /* for the error of close, which comes after the rest is freed */
    w->path = NULL;
    int err = writer_free(w);
    if (err && result == 0)
        result = fail_write(e, path, err);
    free(path);
    return result;
}

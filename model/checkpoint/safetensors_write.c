/* Writing safetensors. All shapes are known beforehand, so the header is written first, and the data after it
 * through one buffer; a piece that is larger than the buffer is written directly. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "model/checkpoint/files.h"
#include "model/checkpoint/safetensors_internal.h"

enum { DATA_ALIGNMENT = 64 };
static const size_t BUFFER_BYTES = (size_t)4 << 20;

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

/* For errors that only a bug in this program can cause. */
static int fail_caller(struct error *e, const char *path, const char *tensor, const char *what) {
    return fail_run(e, "cannot write \"%s\": tensor \"%s\" %s; please report this as a bug", path, tensor,
                    what);
}

/* Close and free. 0, or the errno of close: network file systems may report a full disk only then. */
static int writer_free(struct safetensors_writer *w) {
    int err = w->fd >= 0 && close(w->fd) ? errno : 0;
    free(w->buffer);
    free(w->path);
    free(w);
    return err;
}

/* Check the entries as the reader does, so that every file written can be read. */
static int check_writable(const char *path, const struct safetensors_entry *entries, int count,
                          struct error *e) {
    for (int i = 0; i < count; i++) {
        const struct safetensors_entry *t = &entries[i];
        size_t bytes;
        if (strcmp(t->name, ST_METADATA) == 0)
            return fail_caller(e, path, t->name, "has a reserved name");
        if ((unsigned)t->dtype >= ST_DTYPES)
            return fail_caller(e, path, t->name, "has no known dtype");
        if (t->ndim < 0 || t->ndim > ST_MAX_DIMS || safetensors_shape_bytes(t, &bytes))
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
    qsort(sorted, (size_t)count, sizeof *sorted, safetensors_by_name);
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

/* One member of the header; returns the offset after it. Not with cJSON, which prints large numbers
 * as "1e+15", which other readers refuse. */
static int print_entry(FILE *out, const struct safetensors_entry *t, size_t *offset) {
    size_t bytes = 0, begin = *offset;
    safetensors_shape_bytes(t, &bytes);
    if (__builtin_add_overflow(begin, bytes, offset) || *offset > INT64_MAX)
        return -1;
    fputc(',', out);
    print_string(out, t->name);
    fprintf(out, ":{\"dtype\":\"%s\",\"shape\":[", safetensors_dtypes[t->dtype].name);
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
    fprintf(out, "%*s{\"%s\":{\"format\":\"pt\"}", ST_LENGTH_BYTES, "", ST_METADATA);
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
    for (int i = 0; i < ST_LENGTH_BYTES && !err; i++)
        (*header)[i] = (char)((*bytes - ST_LENGTH_BYTES) >> (8 * i));
    return err;
}

/* Write through the buffer, or directly if the piece is larger. 0, or the errno. */
static int write_buffered(struct safetensors_writer *w, const char *data, size_t bytes) {
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

/* Open the file and write the header. 0, or the errno. */
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
        err = w->fd < 0 ? errno : write_buffered(w, header, bytes);
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
        fail_run(e, "cannot write \"%s\": %zu bytes more than its header says; please report this as a bug",
                 w->path, bytes - w->expected);
    else if ((err = write_buffered(w, data, bytes)))
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
    char *path = w->path; /* kept for the error of close, which writer_free returns */
    w->path = NULL;
    int err = writer_free(w);
    if (err && result == 0)
        result = fail_write(e, path, err);
    free(path);
    return result;
}

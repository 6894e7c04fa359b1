/* safetensors files: the entries of a file that opens describe it exactly, and are the same when written again. */
#include "tests/fuzz/safetensors_mutator.h"

#include "model/checkpoint/safetensors.h"

static const int64_t widths[] = {
    [ST_F32] = 4, [ST_F64] = 8, [ST_BF16] = 2, [ST_I32] = 4, [ST_I64] = 8, [ST_U16] = 2, [ST_U8] = 1};

static int by_data(const void *a, const void *b) {
    const struct safetensors_entry *x = a, *y = b;
    if (x->data != y->data)
        return (const char *)x->data < (const char *)y->data ? -1 : 1;
    return (x->bytes > y->bytes) - (x->bytes < y->bytes);
}

static void check_entry(const struct safetensors *s, int i) {
    const struct safetensors_entry *t = &s->entries[i];
    CHECK(t->dtype <= ST_U8 && t->ndim >= 0 && t->ndim <= ST_MAX_DIMS);
    __int128 bytes = widths[t->dtype];
    for (int d = 0; d < t->ndim; d++) {
        CHECK(t->shape[d] >= 0);
        bytes = bytes > INT64_MAX ? bytes : bytes * t->shape[d];
    }
    CHECK(bytes == (__int128)t->bytes);
    CHECK(i == 0 || strcmp(s->entries[i - 1].name, t->name) < 0);
    CHECK(safetensors_find(s, t->name) == t);
}

/* The tensors fill the bytes after the header, one after the other, and hold what the file holds there. */
static void check_tiling(struct safetensors_entry *sorted, int count, const uint8_t *data, size_t size) {
    uint64_t length = header_length(data, size);
    CHECK(length != UINT64_MAX);
    size_t at = LENGTH + length;
    const char *next = count ? sorted[0].data : NULL;
    for (int i = 0; i < count; i++) {
        CHECK(sorted[i].data == next && sorted[i].bytes <= size - at);
        CHECK(memcmp(sorted[i].data, data + at, sorted[i].bytes) == 0);
        next += sorted[i].bytes;
        at += sorted[i].bytes;
    }
    CHECK(at == size);
}

static void write_again(const char *path, const struct safetensors_entry *entries, int count) {
    struct error e = {0};
    struct safetensors_writer *w = safetensors_create(path, entries, count, &e);
    CHECK(w);
    for (int i = 0; i < count; i++)
        CHECK(safetensors_append(w, entries[i].data, entries[i].bytes, &e) == 0);
    CHECK(safetensors_finish(w, &e) == 0);
}

static void check_same(const struct safetensors *a, const struct safetensors *b) {
    CHECK(a->count == b->count);
    for (int i = 0; i < a->count; i++) {
        const struct safetensors_entry *x = &a->entries[i], *y = &b->entries[i];
        CHECK(strcmp(x->name, y->name) == 0 && x->dtype == y->dtype && x->ndim == y->ndim);
        CHECK(memcmp(x->shape, y->shape, sizeof x->shape) == 0);
        CHECK(x->bytes == y->bytes && memcmp(x->data, y->data, x->bytes) == 0);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct safetensors s, again;
    struct error e = {0};
    if (safetensors_open(&s, fuzz_file(0, data, size), &e) != 0) {
        check_user_error(&e);
        CHECK(s.count == 0 && !s.entries && !s.map);
        return 0;
    }
    for (int i = 0; i < s.count; i++)
        check_entry(&s, i);
    CHECK(!safetensors_find(&s, "no such tensor") || memmem(data, size, "no such", 7));
    struct safetensors_entry *sorted = calloc((size_t)s.count + 1, sizeof *sorted);
    CHECK(sorted);
    if (s.count)
        memcpy(sorted, s.entries, (size_t)s.count * sizeof *sorted);
    qsort(sorted, (size_t)s.count, sizeof *sorted, by_data);
    check_tiling(sorted, s.count, data, size);
    const char *path = fuzz_file(1, NULL, 0);
    write_again(path, sorted, s.count);
    CHECK(safetensors_open(&again, path, &e) == 0);
    check_same(&s, &again);
    safetensors_close(&again);
    safetensors_close(&s);
    free(sorted);
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed) {
    return mutate_safetensors(data, size, max_size, seed);
}

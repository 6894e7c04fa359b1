/* The safetensors reader and writer: round trip, malformed headers, disk errors.
 *
 * The malformed headers are a table: a JSON text, the number of data bytes after it, and a part of the
 * expected error. Each becomes a file in a temporary directory of the run. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <errno.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "model/checkpoint/safetensors.h"
#include "tests/lib/counted_fsync.h"

static char directory[] = "/tmp/test_safetensors_XXXXXX";
static char path[sizeof directory + 32]; /* the file each test writes */

static int make_directory(void **state) {
    (void)state;
    if (!mkdtemp(directory))
        return -1;
    snprintf(path, sizeof path, "%s/t.safetensors", directory);
    return 0;
}

static int remove_directory(void **state) {
    (void)state;
    unlink(path);
    return rmdir(directory);
}

static void write_bytes(const void *data, size_t bytes) {
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, bytes, f), bytes);
    assert_int_equal(fclose(f), 0);
}

/* A file with the given header, preceded by its true length or a false one, and data_bytes of data. */
static void write_file(const char *header, size_t header_bytes, uint64_t told_bytes, size_t data_bytes) {
    char *file = calloc(1, 8 + header_bytes + data_bytes);
    assert_non_null(file);
    for (int i = 0; i < 8; i++)
        file[i] = (char)(told_bytes >> (8 * i));
    memcpy(file + 8, header, header_bytes);
    write_bytes(file, 8 + header_bytes + data_bytes);
    free(file);
}

/* The file must be refused with EXIT_USER, in one line with its name and `expected`. */
static void check_refused(const char *expected) {
    struct safetensors s;
    struct error e = {.exit_code = -1};
    if (safetensors_open(&s, path, &e) != -1)
        fail_msg("accepted, where \"%s\" was expected", expected);
    assert_int_equal(e.exit_code, EXIT_USER);
    if (!strstr(e.text, expected) || !strstr(e.text, path) || strchr(e.text, '\n'))
        fail_msg("\"%s\" does not say \"%s\"", e.text, expected);
    assert_null(s.entries);
    assert_int_equal(s.count, 0);
    safetensors_close(&s); /* allowed after an error */
}

static void open_well(struct safetensors *s) {
    struct error e = {0};
    if (safetensors_open(s, path, &e))
        fail_msg("%s", e.text);
}

/* ---- round trip ---- */

static const float f32[6] = {0.0f, -1.5f, 3.25f, 1e-30f, 1e30f, -0.0f};
static const double f64[2] = {1.0 / 3.0, -1e300};
static const uint16_t bf16[3] = {0x3f80, 0xc000, 0x7f80};
static const int32_t i32[2] = {INT32_MIN, 7};
static const int64_t i64[1] = {INT64_MIN + 3};
static const uint16_t u16[4] = {0, 1, 65535, 300};
static const uint8_t u8[5] = {0, 255, 3, 4, 5};

static const struct safetensors_entry all_dtypes[] = {
    {.name = "z.f32", .dtype = ST_F32, .ndim = 2, .shape = {2, 3}, .data = f32, .bytes = sizeof f32},
    {.name = "f64", .dtype = ST_F64, .ndim = 1, .shape = {2}, .data = f64, .bytes = sizeof f64},
    {.name = "i64.scalar", .dtype = ST_I64, .ndim = 0, .data = i64, .bytes = sizeof i64},
    {.name = "empty", .dtype = ST_F32, .ndim = 3, .shape = {4, 0, 2}, .data = NULL, .bytes = 0},
    {.name = "i32", .dtype = ST_I32, .ndim = 1, .shape = {2}, .data = i32, .bytes = sizeof i32},
    {.name = "bf16", .dtype = ST_BF16, .ndim = 2, .shape = {3, 1}, .data = bf16, .bytes = sizeof bf16},
    {.name = "u16", .dtype = ST_U16, .ndim = 2, .shape = {2, 2}, .data = u16, .bytes = sizeof u16},
    {.name = "odd \"name\"\\\t\x01 \xc3\xa9",
     .dtype = ST_U8,
     .ndim = 1,
     .shape = {5},
     .data = u8,
     .bytes = 5},
};
enum { ALL_DTYPES = sizeof all_dtypes / sizeof all_dtypes[0] };

static void write_all_dtypes(size_t piece) {
    struct error e = {0};
    struct safetensors_writer *w = safetensors_create(path, all_dtypes, ALL_DTYPES, &e);
    assert_non_null(w);
    for (int i = 0; i < ALL_DTYPES; i++)
        for (size_t at = 0; at < all_dtypes[i].bytes || at == 0; at += piece) {
            size_t left = all_dtypes[i].bytes - at;
            const char *data = all_dtypes[i].data;
            assert_int_equal(safetensors_append(w, data ? data + at : NULL, left < piece ? left : piece, &e),
                             0);
        }
    assert_int_equal(safetensors_finish(w, &e), 0);
}

static void check_same(const struct safetensors_entry *read, const struct safetensors_entry *written) {
    assert_non_null(read);
    assert_string_equal(read->name, written->name);
    assert_int_equal(read->dtype, written->dtype);
    assert_int_equal(read->ndim, written->ndim);
    for (int d = 0; d < written->ndim; d++)
        assert_int_equal(read->shape[d], written->shape[d]);
    assert_int_equal(read->bytes, written->bytes);
    if (written->bytes)
        assert_memory_equal(read->data, written->data, written->bytes);
}

static void test_round_trip(void **state) {
    (void)state;
    static const size_t pieces[] = {1, 3, 1000};
    for (size_t p = 0; p < 3; p++) {
        write_all_dtypes(pieces[p]);
        struct safetensors s;
        open_well(&s);
        assert_int_equal(s.count, ALL_DTYPES);
        for (int i = 0; i < ALL_DTYPES; i++)
            check_same(safetensors_find(&s, all_dtypes[i].name), &all_dtypes[i]);
        assert_null(safetensors_find(&s, "absent"));
        assert_null(safetensors_find(&s, "__metadata__"));
        const struct safetensors_entry *first = safetensors_find(&s, "z.f32");
        assert_int_equal(((uintptr_t)first->data - (uintptr_t)s.map) % 64, 0);
        safetensors_close(&s);
        safetensors_close(&s); /* allowed twice */
        assert_null(safetensors_find(&s, "f64"));
    }
}

static void test_header_text(void **state) {
    (void)state;
    static const char expected[] = "{\"__metadata__\":{\"format\":\"pt\"},"
                                   "\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}";
    const struct safetensors_entry a = {.name = "a", .dtype = ST_F32, .ndim = 1, .shape = {1}};
    struct safetensors_writer *w = safetensors_create(path, &a, 1, NULL);
    assert_int_equal(safetensors_append(w, f32, 4, NULL), 0);
    assert_int_equal(safetensors_finish(w, NULL), 0);
    char file[256];
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    size_t bytes = fread(file, 1, sizeof file, f);
    fclose(f);
    assert_int_equal(bytes, 128 + 4);
    assert_int_equal(file[0], 120);
    assert_memory_equal(file + 1, "\0\0\0\0\0\0\0", 7);
    assert_memory_equal(file + 8, expected, sizeof expected - 1);
    for (size_t i = 8 + sizeof expected - 1; i < 128; i++)
        assert_int_equal(file[i], ' ');
}

static void test_no_tensors(void **state) {
    (void)state;
    struct safetensors_writer *w = safetensors_create(path, NULL, 0, NULL);
    assert_non_null(w);
    assert_int_equal(safetensors_finish(w, NULL), 0);
    struct safetensors s;
    open_well(&s);
    assert_int_equal(s.count, 0);
    assert_null(safetensors_find(&s, "a"));
    safetensors_close(&s);
}

/* Thousands of names, and pieces that are smaller and larger than the writer's buffer. */
static void test_many_and_large(void **state) {
    (void)state;
    enum { COUNT = 5000, LARGE = 9000001 };
    struct safetensors_entry *entries = calloc(COUNT + 1, sizeof *entries);
    uint8_t *large = malloc(LARGE);
    assert_true(entries && large);
    static char names[COUNT + 1][24];
    for (int i = 0; i <= COUNT; i++) {
        snprintf(names[i], sizeof names[i], "layers.%d.w", i * 7919 % 100003);
        entries[i] = (struct safetensors_entry){.name = names[i], .dtype = ST_I32, .ndim = 1, .shape = {1}};
    }
    entries[COUNT].dtype = ST_U8;
    entries[COUNT].shape[0] = LARGE;
    for (int i = 0; i < LARGE; i++)
        large[i] = (uint8_t)(i * 31 + (i >> 12));

    struct error e = {0};
    struct safetensors_writer *w = safetensors_create(path, entries, COUNT + 1, &e);
    assert_non_null(w);
    for (int32_t i = 0; i < COUNT; i++)
        assert_int_equal(safetensors_append(w, &i, sizeof i, &e), 0);
    assert_int_equal(safetensors_append(w, large, 100, &e), 0);
    assert_int_equal(safetensors_append(w, large + 100, LARGE - 3000100, &e), 0);
    assert_int_equal(safetensors_append(w, large + LARGE - 3000000, 3000000, &e), 0);
    assert_int_equal(safetensors_finish(w, &e), 0);

    struct safetensors s;
    open_well(&s);
    for (int32_t i = 0; i < COUNT; i++) {
        const struct safetensors_entry *t = safetensors_find(&s, names[i]);
        assert_non_null(t);
        assert_memory_equal(t->data, &i, sizeof i);
    }
    assert_memory_equal(safetensors_find(&s, names[COUNT])->data, large, LARGE);
    safetensors_close(&s);
    free(entries);
    free(large);
}

/* ---- malformed headers ---- */

#define T(name, dtype, shape, offsets)                                                                       \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"

static const struct {
    const char *header;
    size_t data_bytes;
} legal[] = {
    {"{}", 0},
    {"{}  \n ", 0},
    {"{\"__metadata__\":{\"a\":\"b\"}," T("x", "F32", "[1]", "[0,4]") "}", 4},
    {"{" T("scalar", "F64", "[]", "[0,8]") "}", 8},
    {"{" T("none", "F32", "[0]", "[0,0]") "}", 0},
    {"{" T("a", "F32", "[1]", "[0,4]") "," T("none", "U8", "[0,9]", "[4,4]") "," T("b", "U8", "[1]",
                                                                                   "[4,5]") "}",
     5},
    {"{" T("last", "U8", "[2]", "[3,5]") "," T("first", "U8", "[3]", "[0,3]") "}", 5},
    {"{\"x\":{\"data_offsets\":[0,4],\"later\":[{}],\"shape\":[2,2,1,1,1,1,1,1],\"dtype\":\"U8\"}}", 4},
};

static void test_legal_headers(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof legal / sizeof legal[0]; i++) {
        size_t bytes = strlen(legal[i].header);
        write_file(legal[i].header, bytes, bytes, legal[i].data_bytes);
        struct safetensors s;
        open_well(&s);
        safetensors_close(&s);
    }
}

static const struct {
    const char *header;
    size_t data_bytes;
    const char *expected;
} hostile[] = {
    /* not JSON, or not the right kind */
    {"", 0, "not a JSON object"},
    {"[]", 0, "not a JSON object"},
    {"    {}", 0, "not a JSON object"},
    {"null", 0, "not a JSON object"},
    {"{\"x\":", 0, "not JSON"},
    {"{\"1\":1,", 0, "not JSON"}, /* older cJSON reads past this end */
    {"{} x", 0, "not JSON"},
    {"{}{}", 0, "not JSON"},
    {"{\"x", 0, "not JSON"},
    {"{\"x\":{}}", 0, "tensor \"x\" has no dtype"},
    {"{\"x\":[]}", 0, "tensor \"x\" is not described"},
    {"{\"x\":3}", 0, "tensor \"x\" is not described"},
    {"{\"a\\u0000b\":{}}", 0, "a NUL in its header"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "tensor \"x\" has no data_offsets"},
    {"{\"x\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4, "tensor \"x\" has no shape"},
    /* dtype */
    {"{" T("x", "F16", "[2]", "[0,4]") "}", 4, "dtype \"F16\", which is none of F32"},
    {"{" T("x", "f32", "[1]", "[0,4]") "}", 4, "dtype \"f32\""},
    {"{\"x\":{\"dtype\":1,\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "dtype that is not a string"},
    /* shape */
    {"{" T("x", "F32", "[2]", "[0,4]") "}", 4, "8 bytes by its shape but 4"},
    {"{" T("x", "F32", "[0]", "[0,4]") "}", 4, "0 bytes by its shape but 4"},
    {"{" T("x", "F32", "[]", "[0,0]") "}", 0, "4 bytes by its shape but 0"},
    {"{" T("x", "F32", "4", "[0,4]") "}", 4, "shape that is not a list"},
    {"{" T("x", "F32", "{}", "[0,4]") "}", 4, "shape that is not a list"},
    {"{" T("x", "F32", "[-1]", "[0,4]") "}", 4, "not a whole number"},
    {"{" T("x", "F32", "[0.5]", "[0,4]") "}", 4, "not a whole number"},
    {"{" T("x", "F32", "[\"1\"]", "[0,4]") "}", 4, "not a whole number"},
    {"{" T("x", "F32", "[[1]]", "[0,4]") "}", 4, "not a whole number"},
    {"{" T("x", "F32", "[true]", "[0,4]") "}", 4, "not a whole number"},
    {"{" T("x", "F32", "[1e999]", "[0,4]") "}", 4, "not a whole number"},
    {"{" T("x", "F32", "[9007199254740992]", "[0,4]") "}", 4, "not a whole number"},
    {"{" T("x", "F32", "[NaN]", "[0,4]") "}", 4, "not JSON"},
    {"{" T("x", "U8", "[1,1,1,1,1,1,1,1,1]", "[0,1]") "}", 1, "more than 8 dimensions"},
    {"{" T("x", "U8", "[4294967296,4294967296]", "[0,0]") "}", 0, "do not fit"},
    {"{" T("x", "F32", "[4294967296,1073741824]", "[0,0]") "}", 0, "do not fit"}, /* 2^64: 0 when wrapped */
    {"{" T("x", "F32", "[2305843009213693953]", "[0,4]") "}", 4, "not a whole number"}, /* 2^61 + 1 */
    {"{" T("x", "U8", "[4294967296,4294967296,0]", "[0,0]") "}", 0, "do not fit"},
    {"{" T("x", "U8", "[0,4294967296,4294967296]", "[0,0]") "}", 0, "do not fit"},
    /* offsets of one tensor */
    {"{" T("x", "F32", "[1]", "[4,0]") "}", 4, "reversed: [4, 0]"},
    {"{" T("x", "F32", "[2]", "[0,8]") "}", 4, "past their end at 4"},
    {"{" T("x", "F32", "[0]", "[8,8]") "}", 4, "past their end at 4"},
    {"{" T("x", "F32", "[1]", "[-4,0]") "}", 4, "not two whole numbers"},
    {"{" T("x", "F32", "[1]", "[0,4.5]") "}", 4, "not two whole numbers"},
    {"{" T("x", "F32", "[1]", "[0]") "}", 4, "not two whole numbers"},
    {"{" T("x", "F32", "[1]", "[]") "}", 4, "not two whole numbers"},
    {"{" T("x", "F32", "[1]", "[0,4,8]") "}", 4, "not two whole numbers"},
    {"{" T("x", "F32", "[1]", "{\"a\":0,\"b\":4}") "}", 4, "not two whole numbers"},
    {"{" T("x", "F32", "[1]", "[0,18446744073709551612]") "}", 4, "not two whole numbers"},
    {"{" T("x", "F32", "[1]", "[0,1e300]") "}", 4, "not two whole numbers"},
    {"{" T("x", "F32", "[1]", "[null,4]") "}", 4, "not two whole numbers"},
    /* the tensors together */
    {"{" T("a", "F32", "[2]", "[0,8]") "," T("b", "F32", "[2]", "[4,12]") "}", 12,
     "tensor \"b\" overlaps tensor \"a\""},
    {"{" T("a", "F32", "[1]", "[0,4]") "," T("b", "F32", "[1]", "[0,4]") "}", 4, "overlaps"},
    {"{" T("a", "F32", "[2]", "[0,8]") "," T("b", "F32", "[0]", "[4,4]") "}", 8, "overlaps"},
    {"{" T("a", "F32", "[1]", "[0,4]") "," T("b", "F32", "[1]", "[8,12]") "}", 12,
     "tensor \"b\" follows a gap of 4 bytes"},
    {"{" T("a", "F32", "[1]", "[4,8]") "}", 8, "follows a gap of 4 bytes"},
    {"{" T("a", "F32", "[1]", "[0,4]") "}", 7, "3 bytes at its end"},
    {"{}", 1, "1 bytes at its end"},
    {"{" T("a", "F32", "[1]", "[0,4]") "," T("a", "F32", "[1]", "[4,8]") "}", 8,
     "tensor \"a\" is there twice"},
    {"{" T("a", "F32", "[1]", "[0,4]") "," T("a", "F32", "[1]", "[0,4]") "}", 4,
     "tensor \"a\" is there twice"},
    {"{" T("a", "F32", "[1]", "[0,4]") "," T("\\u0061", "F32", "[1]", "[4,8]") "}", 8, "is there twice"},
    {"{\"__metadata__\":{},\"__metadata__\":{}}", 0, "__metadata__ twice"},
    {"{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1,
     "has dtype twice"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "has shape twice"},
    /* a name with control characters */
    {"{\"a\\nb\\u001b[2J\":{}}", 0, "tensor \"a?b?[2J\" has no dtype"},
};

static void test_hostile_headers(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof hostile / sizeof hostile[0]; i++) {
        size_t bytes = strlen(hostile[i].header);
        write_file(hostile[i].header, bytes, bytes, hostile[i].data_bytes);
        check_refused(hostile[i].expected);
    }
}

static void test_hostile_lengths(void **state) {
    (void)state;
    static const uint64_t lengths[] = {3,         4096, UINT64_C(1) << 63, UINT64_MAX - 8, UINT64_MAX - 7,
                                       UINT64_MAX};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        write_file("{}", 2, lengths[i], 0);
        check_refused("truncated");
    }
    write_file("{}", 2, 1, 0);
    check_refused("not JSON");
    for (size_t bytes = 0; bytes < 8; bytes++) {
        write_bytes("\2\0\0\0\0\0\0\0", bytes);
        check_refused("truncated");
    }
    write_file("", 0, 0, 0);
    check_refused("not a JSON object");
    /* Past the format's limit, in a file long enough to hold it (a sparse one). */
    write_file("{}", 2, 100000001, 0);
    assert_int_equal(truncate(path, 200000000), 0);
    check_refused("beyond the format's 100000000");
}

/* A NUL in the header; and JSON nested deep enough to exhaust a recursive parser's stack. */
static void test_hostile_bytes(void **state) {
    (void)state;
    write_file("{\"a\0b\":{}}", 10, 10, 0);
    check_refused("a NUL in its header");
    enum { DEEP = 1000000 };
    char *header = malloc(DEEP);
    assert_non_null(header);
    memset(header, '[', DEEP);
    memcpy(header, "{\"x\":", 5);
    write_file(header, DEEP, DEEP, 0);
    check_refused("not JSON");
    /* A name of a megabyte is cut in the error. */
    memset(header, 'n', DEEP);
    memcpy(header, "{\"", 2);
    memcpy(header + DEEP - 5, "\":{}}", 5);
    write_file(header, DEEP, DEEP, 0);
    check_refused("nnn...\" has no dtype");
    free(header);
}

/* Every prefix of a good file is refused. With any one byte changed, it is refused or read without a memory
 * error. */
static void test_damaged_file(void **state) {
    (void)state;
    write_all_dtypes(1000);
    static char file[4096], copy[4096];
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    size_t bytes = fread(file, 1, sizeof file, f);
    fclose(f);
    assert_true(bytes > 500 && bytes < sizeof file);
    struct safetensors s;
    for (size_t n = 0; n < bytes; n++) {
        write_bytes(file, n);
        assert_int_equal(safetensors_open(&s, path, NULL), -1);
    }
    unsigned random = 1;
    for (size_t n = 0; n < bytes; n++) {
        memcpy(copy, file, bytes);
        random = random * 1664525 + 1013904223;
        copy[n] = (char)(copy[n] ^ (1 + (random >> 24) % 255));
        write_bytes(copy, bytes);
        if (safetensors_open(&s, path, NULL))
            continue;
        for (int i = 0; i < s.count; i++) {
            const unsigned char *data = s.entries[i].data;
            for (size_t k = 0; k < s.entries[i].bytes; k++)
                random += data[k];
        }
        safetensors_close(&s);
    }
}

static void test_not_a_file(void **state) {
    (void)state;
    static const char *const paths[] = {"/tmp/absent/absent.safetensors", "/tmp", "/dev/null"};
    for (size_t i = 0; i < 3; i++) {
        struct safetensors s;
        struct error e = {0};
        assert_int_equal(safetensors_open(&s, paths[i], &e), -1);
        assert_int_equal(e.exit_code, EXIT_USER);
        assert_non_null(strstr(e.text, paths[i]));
    }
    unlink(path);
    assert_int_equal(mkfifo(path, 0600), 0);
    check_refused("is not a file"); /* and does not block on the pipe */
    unlink(path);
}

/* ---- writing that fails ---- */

static const struct safetensors_entry big = {.name = "big", .dtype = ST_U8, .ndim = 1, .shape = {20000000}};

/* Write `big` to `to` in pieces; the first failing call must explain it as EXIT_RUN. */
static void check_write_fails(const char *to, size_t piece, const char *expected) {
    struct error e = {.exit_code = -1};
    size_t left = (size_t)big.shape[0];
    char *data = calloc(1, piece);
    assert_non_null(data);
    struct safetensors_writer *w = safetensors_create(to, &big, 1, &e);
    while (w && left > 0) {
        size_t n = left < piece ? left : piece;
        if (safetensors_append(w, data, n, &e))
            w = NULL;
        left -= n;
    }
    free(data);
    if (w)
        assert_int_equal(safetensors_finish(w, &e), -1);
    assert_int_equal(e.exit_code, EXIT_RUN);
    if (!strstr(e.text, to) || !strstr(e.text, expected))
        fail_msg("\"%s\" does not name \"%s\" and say \"%s\"", e.text, to, expected);
}

static void test_full_disk(void **state) {
    (void)state;
    check_write_fails("/dev/full", 1000, "No space left on device; free some disk space");
    check_write_fails("/dev/full", (size_t)big.shape[0], "No space left on device");
    /* What fits the buffer fails at the end. */
    struct error e = {0};
    const struct safetensors_entry one = {.name = "one", .dtype = ST_F32, .ndim = 0};
    struct safetensors_writer *w = safetensors_create("/dev/full", &one, 1, &e);
    assert_non_null(w);
    assert_int_equal(safetensors_append(w, f32, 4, &e), 0);
    assert_int_equal(safetensors_finish(w, &e), -1);
    assert_int_equal(e.exit_code, EXIT_RUN);
    assert_non_null(strstr(e.text, "No space left"));
}

/* A limit in the middle of a piece makes a short write first and an error next. */
static void test_file_size_limit(void **state) {
    (void)state;
    struct rlimit before, low;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    low = before;
    low.rlim_cur = 10000001;
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &low), 0);
    check_write_fails(path, 777777, "ulimit -f");
    check_write_fails(path, (size_t)big.shape[0], "ulimit -f");
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
    signal(SIGXFSZ, SIG_DFL);
    struct stat status;
    assert_int_equal(stat(path, &status), 0);
    assert_int_equal(status.st_size, 10000001); /* a short write was continued */
}

static void test_synced(void **state) {
    (void)state;
    sync_calls = 0;
    write_all_dtypes(1000);
    assert_int_equal(sync_calls, 1);
    sync_errno = EIO;
    check_write_fails(path, 1000000, "Input/output error; check the disk");
    sync_errno = 0;
}

static void test_no_such_directory(void **state) {
    (void)state;
    check_write_fails("/tmp/absent/absent.safetensors", 1000, "No such file or directory; check the path");
}

static void check_create_refused(const struct safetensors_entry *entries, int count, const char *expected) {
    struct error e = {0};
    assert_null(safetensors_create(path, entries, count, &e));
    assert_int_equal(e.exit_code, EXIT_RUN);
    if (!strstr(e.text, expected))
        fail_msg("\"%s\" does not say \"%s\"", e.text, expected);
}

static void test_caller_mistakes(void **state) {
    (void)state;
    const struct safetensors_entry reserved = {.name = "__metadata__", .dtype = ST_U8};
    check_create_refused(&reserved, 1, "reserved");
    const struct safetensors_entry twice[] = {{.name = "a", .dtype = ST_U8}, {.name = "a", .dtype = ST_U8}};
    check_create_refused(twice, 2, "twice");
    const struct safetensors_entry negative = {.name = "a", .dtype = ST_U8, .ndim = 1, .shape = {-1}};
    check_create_refused(&negative, 1, "shape");
    const struct safetensors_entry flat = {.name = "a", .dtype = ST_U8, .ndim = ST_MAX_DIMS + 1};
    check_create_refused(&flat, 1, "shape");
    const struct safetensors_entry wide = {
        .name = "a", .ndim = 2, .shape = {INT64_C(1) << 31, INT64_C(1) << 31}};
    check_create_refused(&wide, 1, "shape");
    const struct safetensors_entry unknown = {.name = "a", .dtype = (enum safetensors_dtype)99};
    check_create_refused(&unknown, 1, "dtype");

    struct error e = {0};
    const struct safetensors_entry four = {.name = "a", .dtype = ST_F32};
    struct safetensors_writer *w = safetensors_create(path, &four, 1, &e);
    assert_int_equal(safetensors_append(w, f32, 8, &e), -1);
    assert_non_null(strstr(e.text, "4 bytes more"));
    w = safetensors_create(path, &four, 1, &e);
    assert_int_equal(safetensors_append(w, f32, 3, &e), 0);
    assert_int_equal(safetensors_finish(w, &e), -1);
    assert_non_null(strstr(e.text, "1 bytes are missing"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),      cmocka_unit_test(test_header_text),
        cmocka_unit_test(test_no_tensors),      cmocka_unit_test(test_many_and_large),
        cmocka_unit_test(test_legal_headers),   cmocka_unit_test(test_hostile_headers),
        cmocka_unit_test(test_hostile_lengths), cmocka_unit_test(test_hostile_bytes),
        cmocka_unit_test(test_damaged_file),    cmocka_unit_test(test_not_a_file),
        cmocka_unit_test(test_full_disk),       cmocka_unit_test(test_file_size_limit),
        cmocka_unit_test(test_synced),          cmocka_unit_test(test_no_such_directory),
        cmocka_unit_test(test_caller_mistakes),
    };
    return cmocka_run_group_tests(tests, make_directory, remove_directory);
}

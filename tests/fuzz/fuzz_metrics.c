/* A damaged metrics.jsonl of a resumed run: lines up to the step stay as they are, all others are removed.
 *
 * Input: a byte, the step; then the file. */
#include "tests/fuzz/fuzz.h"

#include <fcntl.h>
#include <sys/stat.h>

#include "model/train/metrics.h"

static char dir[256], path[280];

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    const char *tmp = getenv("TMPDIR");
    snprintf(dir, sizeof dir, "%s/fuzz_metrics_XXXXXX", tmp ? tmp : "/tmp");
    CHECK(mkdtemp(dir));
    snprintf(path, sizeof path, "%s/metrics.jsonl", dir);
    return 0;
}

static void write_file(const void *data, size_t size) {
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    CHECK(fd >= 0 && write(fd, data, size) == (ssize_t)size && close(fd) == 0);
}

static char *read_file(size_t *size) {
    int fd = open(path, O_RDONLY);
    struct stat st;
    CHECK(fd >= 0 && fstat(fd, &st) == 0);
    *size = (size_t)st.st_size;
    char *text = malloc(*size + 1);
    CHECK(text && read(fd, text, *size) == (ssize_t)*size && close(fd) == 0);
    text[*size] = 0;
    return text;
}

static void open_metrics(int64_t step) {
    struct error e = {0};
    struct metrics *m = metrics_open(dir, step, &e);
    CHECK(m);
    metrics_close(m);
}

/* The step of a line, or -1 if it does not begin as the program writes it; *number: any number that it begins with. */
static int64_t step_of(const char *line, size_t length, long long *number) {
    char plain[64], comma = 0, *text = strndup(line, length);
    CHECK(text);
    if (sscanf(text, " { \"step\" : %lld%c", number, &comma) != 2 || comma != ',')
        *number = INT64_MAX;
    snprintf(plain, sizeof plain, "{\"step\": %lld,", *number);
    bool own = *number >= 0 && strncmp(text, plain, strlen(plain)) == 0;
    free(text);
    return own ? *number : -1;
}

/* Check that every line of `before` up to the step is the next line of `after`. */
static void check_lines(const char *before, size_t size, const char *after, size_t left, int64_t step) {
    for (const char *end; (end = memchr(before, '\n', size));) {
        size_t bytes = (size_t)(end - before) + 1;
        long long number;
        int64_t own = step_of(before, bytes - 1, &number);
        bool kept = left >= bytes && memcmp(before, after, bytes) == 0;
        if (own >= 0 && own <= step)
            CHECK(kept);
        if (kept && number <= step) {
            after += bytes;
            left -= bytes;
        }
        before += bytes;
        size -= bytes;
    }
    CHECK(left == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 1)
        return 0;
    int64_t step = data[0];
    size_t left, still;
    write_file(data + 1, size - 1);
    open_metrics(step);
    char *after = read_file(&left);
    CHECK(left == 0 || after[left - 1] == '\n');
    check_lines((const char *)data + 1, size - 1, after, left, step);
    open_metrics(step);
    char *again = read_file(&still);
    CHECK(still == left && memcmp(after, again, left) == 0);
    free(again);
    free(after);
    return 0;
}

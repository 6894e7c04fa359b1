#include "model/checkpoint/checkpoint_dirs.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "model/checkpoint/files.h"

/* ---- names and paths ---- */

void path_join(char out[PATH_BYTES], const char *dir, const char *name) {
    snprintf(out, PATH_BYTES, "%s/%s", dir, name);
}

void checkpoint_name(char out[CHECKPOINT_NAME], int64_t step) {
    snprintf(out, CHECKPOINT_NAME, "step_%08lld", (long long)step);
}

bool path_exists(const char *dir, const char *name) {
    char path[PATH_BYTES];
    path_join(path, dir, name);
    return access(path, F_OK) == 0 || (errno != ENOENT && errno != ENOTDIR);
}

void checkpoint_tmp_path(char out[PATH_BYTES], const char *run_dir, int64_t step) {
    char name[CHECKPOINT_NAME];
    checkpoint_name(name, step);
    snprintf(out, PATH_BYTES, "%s/%s.tmp", run_dir, name);
}

void checkpoint_path(char out[PATH_BYTES], const char *run_dir, int64_t step) {
    char name[CHECKPOINT_NAME];
    checkpoint_name(name, step);
    path_join(out, run_dir, name);
}

/* ---- listing ---- */

/* The step in a directory name "step_00001000", or -1. */
static int64_t step_of(const char *name) {
    if (strncmp(name, "step_", 5) != 0 || name[5] == '\0' ||
        strspn(name + 5, "0123456789") != strlen(name + 5) || strlen(name) > 20)
        return -1;
    return strtoll(name + 5, NULL, 10);
}

static int descending(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x < y) - (x > y);
}

/* The steps in an open directory, in its order. 0, or the errno. */
static int read_steps(DIR *dir, int64_t **steps, int *count) {
    for (int capacity = 0;;) {
        errno = 0;
        struct dirent *item = readdir(dir);
        if (!item)
            return errno;
        int64_t step = step_of(item->d_name);
        if (step < 0)
            continue;
        if (*count == capacity) {
            capacity = capacity ? 2 * capacity : 16;
            int64_t *grown = realloc(*steps, (size_t)capacity * sizeof **steps);
            if (!grown)
                return ENOMEM;
            *steps = grown;
        }
        (*steps)[(*count)++] = step;
    }
}

int checkpoint_list_steps(const char *run_dir, int64_t **steps, struct error *e) {
    int count = 0;
    *steps = NULL;
    DIR *dir = opendir(run_dir);
    if (!dir && (errno == ENOENT || errno == ENOTDIR))
        return 0;
    int err = dir ? read_steps(dir, steps, &count) : errno;
    if (dir)
        closedir(dir);
    if (err) {
        free(*steps);
        *steps = NULL;
        return fail_run(e, "%s: cannot list its checkpoints: %s; %s", run_dir, strerror(err),
                        files_advice(err));
    }
    if (count > 0)
        qsort(*steps, (size_t)count, sizeof **steps, descending);
    return count;
}

/* ---- removing ---- */

int checkpoint_remove(const char *run_dir, int64_t step, struct error *e) {
    char name[CHECKPOINT_NAME], old_name[48], path[PATH_BYTES], old[PATH_BYTES];
    checkpoint_name(name, step);
    snprintf(old_name, sizeof old_name, "%s.old.tmp", name);
    path_join(path, run_dir, name);
    path_join(old, run_dir, old_name);
    if (rename(path, old) != 0)
        return errno == ENOENT
                   ? 0
                   : fail_run(e, "cannot remove \"%s\": %s; %s", path, strerror(errno), files_advice(errno));
    return files_remove_tree(old, e);
}

/* A checkpoint half written or half removed, or a temporary file that was to be renamed. */
static bool is_left_over(const char *name) {
    const char *end = strstr(name, ".tmp");
    if (!end || end[4] != '\0')
        return false;
    return strncmp(name, "step_", 5) == 0 || strcmp(name, "best.tmp") == 0 ||
           strcmp(name, "metrics.jsonl.tmp") == 0 || strcmp(name, "samples.txt.tmp") == 0;
}

void checkpoint_clean(const char *run_dir) {
    DIR *dir = opendir(run_dir);
    struct dirent *item;
    while (dir && (errno = 0, item = readdir(dir))) {
        if (!is_left_over(item->d_name))
            continue;
        char path[PATH_BYTES];
        struct error e;
        path_join(path, run_dir, item->d_name);
        if (files_remove_tree(path, &e) != 0)
            fprintf(stderr, "warning: %s\n", e.text);
    }
    if (!dir || errno != 0)
        fprintf(stderr, "warning: %s: cannot look for temporary files of a killed run: %s\n", run_dir,
                strerror(errno));
    if (dir)
        closedir(dir);
}

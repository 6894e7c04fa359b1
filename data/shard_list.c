#include "data/shard_list.h"

#include <errno.h>
#include <glob.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- finding the files ---- */

/* glob's callback has no context: the first directory that it could not list. */
static _Thread_local struct {
    int error_number; /* 0: none */
    char path[512];
} unlisted;

static int note_unlisted(const char *path, int error_number) {
    const char *name = strrchr(path, '/');
    bool lost_and_found =
        strcmp(name ? name + 1 : path, "lost+found") == 0; /* at the root of a file system, root's */
    if (unlisted.error_number || error_number == ENOENT || error_number == ENOTDIR || lost_and_found)
        return 0;
    unlisted.error_number = error_number;
    snprintf(unlisted.path, sizeof unlisted.path, "%s", path);
    return 0;
}

/* Where a folder matches a wildcard but may not be searched, glob finds no file in it and does not call back: note the
 * first one, for each part of the pattern that ends in a folder. */
static void check_searchable(const char *pattern) {
    char part[PATH_MAX];
    const char *slash = pattern;
    while (*slash && (slash = strchr(slash + 1, '/')) && (size_t)(slash - pattern) < sizeof part) {
        glob_t folders = {0};
        memcpy(part, pattern, (size_t)(slash - pattern));
        part[slash - pattern] = 0;
        if (!strpbrk(part, "*?[") || glob(part, GLOB_NOSORT, NULL, &folders) != 0)
            folders.gl_pathc = 0;
        for (size_t i = 0; i < folders.gl_pathc; i++) {
            struct stat st;
            const char *folder = folders.gl_pathv[i];
            if (stat(folder, &st) == 0 && S_ISDIR(st.st_mode) && access(folder, X_OK) != 0)
                note_unlisted(folder, errno);
        }
        globfree(&folders);
    }
}

static int fail_no_match(const char *pattern, struct error *e) {
    char folder[512], relative[600] = "";
    struct stat st;
    /* A path without wildcards is not listed but looked up, and glob does not tell why that failed. */
    if (stat(pattern, &st) != 0 && errno != ENOENT && errno != ENOTDIR)
        return fail_user(e, "%s: cannot be opened: %s; check its permissions and those of its folders",
                         pattern, strerror(errno));
    if (pattern[0] != '/' && getcwd(folder, sizeof folder))
        snprintf(relative, sizeof relative, " relative to the current directory %s", folder);
    return fail_user(e,
                     "no file matches '%s'%s: check the path, or make shards of a text with data/prepare.py",
                     pattern, relative);
}

static int match_files(const char *pattern, glob_t *paths, struct error *e) {
    unlisted.error_number = 0;
    int status = glob(pattern, 0, note_unlisted, paths); /* sorted by name */
    if (status == GLOB_NOSPACE)
        return fail_run(e, "out of memory listing the files of '%s'", pattern);
    check_searchable(pattern);
    /* Files may be missing from the list even where others match. */
    if (unlisted.error_number)
        return fail_user(e, "the files of '%s' could not be listed: %s: %s; check its permissions", pattern,
                         unlisted.path, strerror(unlisted.error_number));
    if (status == 0)
        return 0;
    return status == GLOB_NOMATCH ? fail_no_match(pattern, e)
                                  : fail_user(e, "the files of '%s' could not be listed", pattern);
}

/* ---- the list ---- */

/* The path of a shard's labels, if they exist, which is freed by the caller; else NULL. */
static int find_labels(const char *path, char **found, struct error *e) {
    static const char bin[] = ".bin", labels[] = ".labels";
    size_t length = strlen(path), stem = length - strlen(bin);
    struct stat st;
    *found = NULL;
    if (length < strlen(bin) || strcmp(path + stem, bin) != 0)
        return 0;
    char *beside = malloc(stem + sizeof labels);
    if (!beside)
        return fail_run(e, "out of memory for a file name");
    memcpy(beside, path, stem);
    memcpy(beside + stem, labels, sizeof labels);
    if (lstat(beside, &st) == 0)
        *found = beside;
    else
        free(beside);
    return 0;
}

static int make_list(struct shard_list *l, const glob_t *paths, struct error *e) {
    l->shards = calloc(paths->gl_pathc, sizeof *l->shards);
    for (size_t i = 0; l->shards && i < paths->gl_pathc; i++) {
        struct shard *s = &l->shards[l->count++];
        s->tokens = (struct shard_file){.path = strdup(paths->gl_pathv[i]), .kind = SHARD_TOKENS, .fd = -1};
        s->labels = (struct shard_file){.kind = SHARD_LABELS, .fd = -1};
        if (!s->tokens.path)
            break;
        if (find_labels(s->tokens.path, &s->labels.path, e) != 0)
            return -1;
    }
    if (!l->shards || !l->shards[l->count - 1].tokens.path)
        return fail_run(e, "out of memory for a list of %zu shards", paths->gl_pathc);
    return 0;
}

int shard_list_find(struct shard_list *l, const char *pattern, struct error *e) {
    glob_t paths = {0};
    *l = (struct shard_list){0};
    int status = match_files(pattern, &paths, e);
    if (status == 0)
        status = make_list(l, &paths, e);
    globfree(&paths);
    return status;
}

void shard_list_free(struct shard_list *l) {
    for (int i = 0; i < l->count; i++) {
        shard_file_close(&l->shards[i].tokens);
        shard_file_close(&l->shards[i].labels);
        free(l->shards[i].tokens.path);
        free(l->shards[i].labels.path);
    }
    free(l->shards);
}

int shard_check_label_count(const struct shard *s, struct error *e) {
    if (s->labels.count == s->tokens.count)
        return 0;
    return fail_user(e, "%s: %" PRId64 " labels for the %" PRId64 " tokens of %s; make the labels again",
                     s->labels.path, s->labels.count, s->tokens.count, s->tokens.path);
}

int shard_list_check_labels(const struct shard_list *l, struct error *e) {
    const char *with = NULL, *without = NULL;
    for (int i = 0; i < l->count; i++) {
        const struct shard *s = &l->shards[i];
        const char **first = s->labels.path ? &with : &without;
        *first = *first ? *first : s->tokens.path;
    }
    if (!with || !without)
        return 0;
    return fail_user(e,
                     "%.300s has no labels, and %.300s has some: make labels for all shards of the glob, or "
                     "remove those there are",
                     without, with);
}

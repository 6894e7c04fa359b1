#include "data/shard_glob.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* glob's callback has no context: the first directory that it could not list. */
static struct {
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

int shard_glob(const char *pattern, glob_t *paths, struct error *e) {
    unlisted.error_number = 0;
    int status = glob(pattern, 0, note_unlisted, paths); /* sorted by name */
    if (status == GLOB_NOSPACE)
        return fail_run(e, "out of memory listing the files of '%s'", pattern);
    /* Files may be missing from the list even where others match. */
    if (unlisted.error_number)
        return fail_user(e, "the files of '%s' could not be listed: %s: %s; check its permissions", pattern,
                         unlisted.path, strerror(unlisted.error_number));
    if (status == 0)
        return 0;
    return status == GLOB_NOMATCH ? fail_no_match(pattern, e)
                                  : fail_user(e, "the files of '%s' could not be listed", pattern);
}

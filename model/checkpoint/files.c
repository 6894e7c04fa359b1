/* File-system routines for crash-safe checkpoints: see files.h.
 *
 * The order is always: sync the bytes, rename, sync the directory. A rename inside one directory is atomic, so a
 * reader, or the machine after a power failure, finds the old state or the new one. A failed fsync is not retried: the
 * kernel may have dropped the dirty pages and would then report success for lost bytes. */
#include "model/checkpoint/files.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

/* ---- errors ---- */

const char *files_advice(int error_number) {
    switch (error_number) {
    case ENOSPC:
    case EDQUOT:
        return "free some disk space or choose another place, then start again";
    case EFBIG:
        return "raise the file size limit (ulimit -f) or use a file system that takes larger files";
    case EACCES:
    case EPERM:
    case EROFS:
        return "check its permissions or choose another place";
    case ENOENT:
    case ENAMETOOLONG:
    case ELOOP:
        return "check the path";
    case ENOTDIR:
    case EISDIR:
        return "check the path: it has a file where a directory should be, or the reverse";
    case EEXIST:
    case ENOTEMPTY:
        return "move what is there out of the way";
    case EMFILE:
    case ENFILE:
        return "raise the limit on open files (ulimit -n)";
    case ENOMEM:
        return "free some memory or raise its limit (ulimit -v), then start again";
    case ENOLCK:
    case ENOSYS:
    case EOPNOTSUPP:
        return "this file system cannot do it: choose another place";
    default:
        return "check the disk and its file system, then start again";
    }
}

static int fail_errno(struct error *e, const char *doing, const char *path, int err) {
    return fail_run(e, "cannot %s \"%s\": %s; %s", doing, path, strerror(err), files_advice(err));
}

static int is_path_error(int err) {
    return err == ENOENT || err == ENOTDIR || err == EISDIR || err == EACCES || err == EPERM ||
           err == EROFS || err == ENAMETOOLONG || err == ELOOP || err == EEXIST;
}

/* For a path that is used for the first time: EXIT_USER if the path is wrong. */
static int fail_first_use(struct error *e, const char *doing, const char *path, int err) {
    fail_errno(e, doing, path, err);
    if (e && is_path_error(err))
        e->exit_code = EXIT_USER;
    return -1;
}

/* ---- reading and writing ---- */

/* Read to the end of fd, or to one byte past max_bytes, into a buffer that grows. 0, or the errno. */
static int read_to_end(int fd, size_t max_bytes, size_t capacity, char **data, size_t *length) {
    char *buffer = NULL;
    size_t used = 0;
    int err = 0;
    for (;;) {
        if (!buffer || used == capacity) {
            capacity = buffer ? 2 * capacity : capacity;
            char *larger = realloc(buffer, capacity + 1);
            if (!larger) {
                err = ENOMEM;
                break;
            }
            buffer = larger;
        }
        ssize_t n = read(fd, buffer + used, capacity - used);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            err = errno;
        if (n <= 0)
            break;
        used += (size_t)n;
        if (used > max_bytes)
            break;
    }
    if (err) {
        free(buffer);
        return err;
    }
    buffer[used] = '\0';
    *data = buffer;
    *length = used;
    return 0;
}

int files_read_all(const char *path, size_t max_bytes, char **data, size_t *length, struct error *e) {
    *data = NULL;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return fail_first_use(e, "read", path, errno);
    /* The size is only a hint that avoids reallocations: pipes and /proc have none, and files may grow. One byte
     * more, so that the read after the last byte finds the end without growing the buffer. */
    struct stat status;
    size_t capacity = 4096;
    if (fstat(fd, &status) == 0 && status.st_size > 0 && (size_t)status.st_size <= max_bytes)
        capacity = (size_t)status.st_size + 1;
    size_t used = 0;
    int err = read_to_end(fd, max_bytes, capacity, data, &used);
    close(fd);
    if (err)
        return fail_first_use(e, "read", path, err);
    if (used > max_bytes) {
        free(*data);
        *data = NULL;
        return fail_user(e, "\"%s\" is larger than the %zu bytes expected at most; check the path", path,
                         max_bytes);
    }
    if (length)
        *length = used;
    return 0;
}

int files_read_input(const char *path, size_t max_bytes, char **data, size_t *length, struct error *e) {
    if (strcmp(path, "-") != 0)
        return files_read_all(path, max_bytes, data, length, e);
    *data = NULL;
    int err = read_to_end(STDIN_FILENO, max_bytes, 4096, data, length);
    if (err == EBADF)
        return fail_user(
            e, "the standard input is closed; give it a file or a pipe, or name a file instead of -");
    if (err)
        return fail_user(e, "cannot read the standard input: %s; %s", strerror(err), files_advice(err));
    if (*length <= max_bytes)
        return 0;
    free(*data);
    *data = NULL;
    return fail_user(e, "the standard input is larger than the %zu bytes expected at most", max_bytes);
}

int files_write_fd(int fd, const void *data, size_t length) {
    const char *next = data;
    while (length > 0) {
        ssize_t n = write(fd, next, length);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return errno;
        next += n;
        length -= (size_t)n;
    }
    return 0;
}

int files_sync_stream(FILE *stream) {
    if (fflush(stream) != 0)
        return errno;
    if (ferror(stream))
        return EIO; /* the errno of the failed write is not known here */
    return fsync(fileno(stream)) && errno != EINVAL ? errno : 0;
}

int files_write_synced(const char *path, const void *data, size_t length, struct error *e) {
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0)
        return fail_errno(e, "create", path, errno);
    int err = files_write_fd(fd, data, length);
    if (!err && fsync(fd))
        err = errno;
    /* Network file systems may report a full disk only when the file is closed. */
    if (close(fd) && !err)
        err = errno;
    return err ? fail_errno(e, "write", path, err) : 0;
}

/* ---- directories ---- */

int files_sync_dir(const char *path, struct error *e) {
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return fail_errno(e, "open the directory", path, errno);
    int err = fsync(fd) ? errno : 0;
    close(fd);
    /* File systems that cannot sync a directory order its entries by other means. */
    if (err && err != EINVAL && err != EOPNOTSUPP)
        return fail_errno(e, "sync the directory", path, err);
    return 0;
}

static int sync_parent(const char *path, struct error *e) {
    char *copy = strdup(path); /* dirname writes into its argument */
    if (!copy)
        return fail_errno(e, "sync the directory of", path, ENOMEM);
    int result = files_sync_dir(dirname(copy), e);
    free(copy);
    return result;
}

static int make_dir(const char *path, struct error *e) {
    if (mkdir(path, 0777) == 0)
        return sync_parent(path, e);
    /* For a directory that exists, mkdir fails with EEXIST, or with EROFS or EACCES. */
    int err = errno;
    struct stat status;
    if (stat(path, &status) == 0) {
        if (S_ISDIR(status.st_mode))
            return 0;
        err = ENOTDIR;
    }
    return fail_first_use(e, "make the directory", path, err);
}

int files_make_dirs(const char *path, struct error *e) {
    char *copy = strdup(path);
    if (!copy)
        return fail_errno(e, "make the directory", path, ENOMEM);
    int result = 0;
    for (char *slash = strchr(copy, '/'); slash && result == 0; slash = strchr(slash + 1, '/')) {
        if (slash == copy || slash[-1] == '/')
            continue;
        *slash = '\0';
        result = make_dir(copy, e);
        *slash = '/';
    }
    if (result == 0)
        result = make_dir(copy, e);
    free(copy);
    return result;
}

/* ---- removing a tree ---- */

/* Why a removal failed: the errno and the name at which it did. */
struct removal_error {
    int err;
    char name[NAME_MAX + 1];
};

static int removal_failed(struct removal_error *o, const char *name, int err) {
    o->err = err;
    snprintf(o->name, sizeof o->name, "%s", name);
    return -1;
}

static int remove_at(int parent, const char *name, struct removal_error *o);

/* Remove all entries that one pass over the directory lists. Their number, or -1. */
static int remove_entries(DIR *dir, const char *name, struct removal_error *o) {
    int removed = 0;
    rewinddir(dir);
    for (;;) {
        errno = 0;
        struct dirent *entry = readdir(dir);
        if (!entry)
            return errno ? removal_failed(o, name, errno) : removed;
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        if (remove_at(dirfd(dir), entry->d_name, o))
            return -1;
        removed++;
    }
}

static int empty_dir(int fd, const char *name, struct removal_error *o) {
    DIR *dir = fdopendir(fd);
    if (!dir) {
        int err = errno;
        close(fd);
        return removal_failed(o, name, err);
    }
    /* Some file systems skip entries when others are removed meanwhile: repeat until none are left. */
    int removed;
    do
        removed = remove_entries(dir, name, o);
    while (removed > 0);
    closedir(dir);
    return removed;
}

/* By descriptor and with O_NOFOLLOW, so that a link put in place meanwhile is not followed. */
static int remove_at(int parent, const char *name, struct removal_error *o) {
    int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0 && errno != ENOTDIR && errno != ELOOP)
        return errno == ENOENT ? 0 : removal_failed(o, name, errno);
    if (fd >= 0 && empty_dir(fd, name, o))
        return -1;
    if (unlinkat(parent, name, fd >= 0 ? AT_REMOVEDIR : 0) && errno != ENOENT)
        return removal_failed(o, name, errno);
    return 0;
}

int files_remove_tree(const char *path, struct error *e) {
    char *copy = strdup(path);
    if (!copy)
        return fail_errno(e, "remove", path, ENOMEM);
    /* With a slash at the end, the kernel would follow a link. */
    size_t length = strlen(copy);
    while (length > 0 && copy[length - 1] == '/')
        copy[--length] = '\0';
    const char *slash = strrchr(copy, '/');
    const char *last = slash ? slash + 1 : copy;
    int result = 0;
    struct removal_error o;
    if (!*last || strcmp(last, ".") == 0 || strcmp(last, "..") == 0)
        result = fail_run(e, "cannot remove \"%s\"; name the directory itself, not /, . or ..", path);
    else if (remove_at(AT_FDCWD, copy, &o))
        result = fail_run(e, "cannot remove \"%s\", stopped at \"%s\": %s; %s", path, o.name, strerror(o.err),
                          files_advice(o.err));
    free(copy);
    return result;
}

/* ---- atomic renames ---- */

int files_publish_dir(const char *tmp, const char *final, struct error *e) {
    if (files_sync_dir(tmp, e))
        return -1;
    if (rename(tmp, final)) {
        int err = errno;
        return fail_run(e, "cannot rename \"%s\" to \"%s\": %s; %s", tmp, final, strerror(err),
                        files_advice(err));
    }
    return sync_parent(final, e);
}

/* Make the link `tmp` to target, replacing one that a crash may have left. 0, or the errno. */
static int make_link(const char *target, const char *tmp) {
    if (symlink(target, tmp) == 0)
        return 0;
    if (errno != EEXIST)
        return errno;
    return unlink(tmp) || symlink(target, tmp) ? errno : 0;
}

int files_link_replace(const char *target, const char *linkpath, struct error *e) {
    size_t size = strlen(linkpath) + sizeof ".tmp";
    char *tmp = malloc(size);
    if (!tmp)
        return fail_errno(e, "link", linkpath, ENOMEM);
    snprintf(tmp, size, "%s.tmp", linkpath);
    int err = make_link(target, tmp);
    if (!err && rename(tmp, linkpath)) {
        err = errno;
        unlink(tmp);
    }
    free(tmp);
    return err ? fail_errno(e, "link", linkpath, err) : sync_parent(linkpath, e);
}

/* ---- locking ---- */

static int fail_locked(int fd, const char *path, struct error *e) {
    char text[32] = "";
    ssize_t n = pread(fd, text, sizeof text - 1, 0);
    long pid = n > 0 ? strtol(text, NULL, 10) : 0;
    char owner[32] = "pid unknown"; /* not written yet */
    if (pid > 0)
        snprintf(owner, sizeof owner, "pid %ld", pid);
    return fail_user(
        e, "\"%s\" is in use by another process (%s); wait for it, stop it, or choose another place", path,
        owner);
}

/* Overwrite the old pid, then truncate, so that a reader always finds a complete line. 0, or the errno. */
static int write_pid(int fd) {
    char text[32];
    int length = snprintf(text, sizeof text, "%ld\n", (long)getpid());
    int err = files_write_fd(fd, text, (size_t)length);
    if (err)
        return err;
    return ftruncate(fd, length) ? errno : 0;
}

int files_lock(const char *path, struct error *e) {
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (fd < 0)
        return fail_first_use(e, "open the lock", path, errno);
    int err = flock(fd, LOCK_EX | LOCK_NB) ? errno : 0;
    if (err == EWOULDBLOCK)
        fail_locked(fd, path, e);
    else if (err || (err = write_pid(fd)))
        fail_first_use(e, "lock", path, err);
    if (err) {
        close(fd);
        return -1;
    }
    return fd;
}

/* ---- space ---- */

int64_t files_free_bytes(const char *path) {
    struct statvfs fs;
    if (statvfs(path, &fs))
        return -1;
    uint64_t bytes;
    if (__builtin_mul_overflow((uint64_t)fs.f_bavail, (uint64_t)fs.f_frsize, &bytes) || bytes > INT64_MAX)
        return INT64_MAX;
    return (int64_t)bytes;
}

/* File-system functions for crash-safe checkpoints: writes that are on the disk on return, directories that appear
 * complete or not at all, links replaced atomically, locks that end with their process.
 *
 * Errors name the path, the system's reason and what to do. Writing functions fail with EXIT_RUN; those that use a
 * path for the first time (files_read_all, files_make_dirs, files_lock) fail with EXIT_USER if the path itself is
 * wrong (missing, a file where a directory should be, not permitted). */
#ifndef IHA_MODEL_CHECKPOINT_FILES_H
#define IHA_MODEL_CHECKPOINT_FILES_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "kernels/error.h"

/* Read a file into memory that the caller frees; a NUL follows the last byte. Larger than max_bytes is an
 * EXIT_USER error. Pipes can be read too. `length` (bytes, without the NUL) may be NULL. */
int files_read_all(const char *path, size_t max_bytes, char **data, size_t *length, struct error *e);

/* The same; "-" is the standard input. */
int files_read_input(const char *path, size_t max_bytes, char **data, size_t *length, struct error *e);

/* Create or overwrite a file and return once its bytes are on the disk. For its name, call files_sync_dir on its
 * directory, once for all files in it. After a failure the caller removes the file. */
int files_write_synced(const char *path, const void *data, size_t length, struct error *e);

/* Return once the names in a directory (files created, renamed, removed) are on the disk. */
int files_sync_dir(const char *path, struct error *e);

/* mkdir -p, synced. A directory that exists already is no error. */
int files_make_dirs(const char *path, struct error *e);

/* Remove a directory and all that is in it. Links are removed, not followed, `path` itself too. A
 * path that does not exist is no error; "/", "." and ".." at the end are refused. */
int files_remove_tree(const char *path, struct error *e);

/* Make the finished directory `tmp` appear as `final`, in the same parent, whole or not at all: sync its
 * names, rename, sync the parent. Files in it must have been synced. A non-empty `final` is an error. */
int files_publish_dir(const char *tmp, const char *final, struct error *e);

/* Make the symbolic link `linkpath` point at `target` (relative to the link's directory), atomically
 * replacing an older link. Synced. One caller at a time. */
int files_link_replace(const char *target, const char *linkpath, struct error *e);

/* Take an exclusive lock and return its descriptor, or -1. It is held until the descriptor is closed or the
 * process ends; the file stays and holds the owner's pid. If another process holds it: EXIT_USER,
 * "... is in use by another process (pid N)". */
int files_lock(const char *path, struct error *e);

/* Bytes that an ordinary user can still write on the file system of `path`, or -1 if that is unknown. */
int64_t files_free_bytes(const char *path);

/* Write all bytes to a descriptor, despite signals and short writes. 0, or the errno. */
int files_write_fd(int fd, const void *data, size_t length);

/* Return once what was printed to a stream is on the disk; to a pipe, once it is in the pipe. 0, or the
 * errno, also of an earlier write that failed. */
int files_sync_stream(FILE *stream);

/* What to do about an errno from a file operation, for the end of an error message. */
const char *files_advice(int error_number);

#endif

/* The few file-system routines that a crash-safe checkpoint needs.
 *
 * Each does one thing that the C library leaves half done: a write that survives a power cut, a directory
 * that appears whole or not at all, a link that is never missing, a lock that dies with its process.
 *
 * Errors name the path, the system's reason and what to do. Writing routines fail with EXIT_RUN; those that
 * meet a path for the first time (files_read_all, files_make_dirs, files_lock) fail with EXIT_USER when the
 * path itself is the trouble (absent, a file where a directory should be, not permitted). */
#ifndef IHA_MODEL_CHECKPOINT_FILES_H
#define IHA_MODEL_CHECKPOINT_FILES_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "kernels/error.h"

/* Read a file into memory that the caller frees; a NUL follows the last byte. Larger than max_bytes is an
 * EXIT_USER error. Anything readable will do, a pipe too. `length` (bytes, without the NUL) may be NULL. */
int files_read_all(const char *path, size_t max_bytes, char **data, size_t *length, struct error *e);

/* Create or overwrite a file and return once its bytes are on the disk. Its name is not: that takes
 * files_sync_dir on its directory, once for all files in it. What a failure leaves, the caller removes. */
int files_write_synced(const char *path, const void *data, size_t length, struct error *e);

/* Return once the names in a directory (files created, renamed, removed) are on the disk. */
int files_sync_dir(const char *path, struct error *e);

/* mkdir -p, synced. A directory that is there already is fine, and so is another process making it now. */
int files_make_dirs(const char *path, struct error *e);

/* Remove a directory and all that is in it. Links are removed, never followed, at the top as well. A path
 * that is not there is no error; "/", "." and ".." at the end are refused. */
int files_remove_tree(const char *path, struct error *e);

/* Make the finished directory `tmp` appear as `final`, in the same parent, whole or not at all: sync its
 * names, rename, sync the parent. Files in it must have been synced. A non-empty `final` is an error. */
int files_publish_dir(const char *tmp, const char *final, struct error *e);

/* Make the symbolic link `linkpath` point at `target` (relative to the link's directory, as ever), replacing
 * an older link in one step: a reader sees the old one or the new one. Synced. One caller at a time. */
int files_link_replace(const char *target, const char *linkpath, struct error *e);

/* Take an exclusive lock and return its descriptor, or -1. It is held until the descriptor is closed or the
 * process ends, however it ends; the file stays and holds the owner's pid. When taken: EXIT_USER,
 * "... is in use by another process (pid N)". */
int files_lock(const char *path, struct error *e);

/* Bytes that an ordinary user can still write on the file system of `path`, or -1 if that is unknown. */
int64_t files_free_bytes(const char *path);

/* Write all bytes to a descriptor, whatever signals and short writes come between. 0, or the errno. */
int files_write_fd(int fd, const void *data, size_t length);

/* Return once what was printed to a stream is on the disk; to a pipe, once it is in the pipe. 0, or the
 * errno, also of an earlier write that failed. */
int files_sync_stream(FILE *stream);

/* What to do about an errno from a file operation, to end an error line with. */
const char *files_advice(int error_number);

#endif

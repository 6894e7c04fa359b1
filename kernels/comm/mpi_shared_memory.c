#define _GNU_SOURCE
#include "kernels/comm/mpi_shared_memory.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#define PARENT "/dev/shm"
#define PREFIX "train_iha_mpi."

static const char *const variables[] = {"OMPI_MCA_btl_sm_backing_directory",
                                        "OMPI_MCA_btl_vader_backing_directory"};

static char folder[sizeof PARENT "/" PREFIX "XXXXXX"]; /* "": there is none */
static int lock = -1; /* the folder, locked for as long as this process lives */

/* Open a folder of this user's and lock it: its descriptor, or -1. */
static int open_locked(const char *path, int operation) {
    struct stat opened, named;
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return -1;
    /* The other process may have removed the folder before this one got the lock. */
    if (fstat(fd, &opened) == 0 && opened.st_uid == geteuid() && flock(fd, operation) == 0 &&
        lstat(path, &named) == 0 && named.st_ino == opened.st_ino && named.st_dev == opened.st_dev)
        return fd;
    close(fd);
    return -1;
}

/* Remove the folder and the files in it. */
static void remove_folder(int fd, const char *path) {
    DIR *files = fdopendir(dup(fd));
    for (struct dirent *f; files && (f = readdir(files));)
        unlinkat(fd, f->d_name, 0);
    if (files)
        closedir(files);
    rmdir(path);
}

static void remove_left_folders(void) {
    DIR *all = opendir(PARENT);
    for (struct dirent *d; all && (d = readdir(all));) {
        char path[sizeof PARENT "/" + sizeof d->d_name];
        if (strncmp(d->d_name, PREFIX, strlen(PREFIX)) != 0)
            continue;
        snprintf(path, sizeof path, PARENT "/%s", d->d_name);
        int fd = open_locked(path, LOCK_EX | LOCK_NB);
        if (fd >= 0) {
            remove_folder(fd, path);
            close(fd);
        }
    }
    if (all)
        closedir(all);
}

void mpi_shared_memory_open(void) {
    if (getenv(variables[0]) || getenv(variables[1]))
        return;
    remove_left_folders();
    for (int attempts = 0; attempts < 10 && lock < 0; attempts++) {
        strcpy(folder, PARENT "/" PREFIX "XXXXXX");
        if (!mkdtemp(folder))
            break;
        lock = open_locked(folder, LOCK_EX); /* fails if another process has taken it for a left one */
    }
    if (lock < 0) {
        folder[0] = '\0';
        return;
    }
    for (int i = 0; i < 2; i++)
        setenv(variables[i], folder, 0);
}

void mpi_shared_memory_close(void) {
    if (folder[0])
        remove_folder(lock, folder);
    folder[0] = '\0';
}

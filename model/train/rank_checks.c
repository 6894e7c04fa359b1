#include "model/train/rank_checks.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "kernels/hash.h"
#include "model/checkpoint/checkpoint.h"

static void add_text(uint64_t *hash, const char *text) {
    *hash = fnv1a(*hash, text, strlen(text) + 1);
}

static void add_setting(void *context, const char *key, const char *value) {
    add_text(context, key);
    add_text(context, value);
}

int ranks_check_same_config(struct comm *comm, const struct config *config, struct error *e) {
    uint64_t own = FNV1A_START, rank0;
    int status = 0;
    config_visit(config, add_setting, &own);
    memcpy(&rank0, comm_all_gather_small(comm, &own, sizeof own), sizeof rank0);
    if (rank0 != own)
        status = fail_user(
            e, "its configuration differs from rank 0's; start all ranks with the same file and overrides");
    return comm_agree(comm, status, e);
}

int ranks_check_same_device(struct comm *comm, bool cuda, struct error *e) {
    struct {
        char host[64];
        bool cuda;
    } own = {.cuda = cuda}, rank0;
    gethostname(own.host, sizeof own.host - 1);
    memcpy(&rank0, comm_all_gather_small(comm, &own, sizeof own), sizeof rank0);
    int status = rank0.cuda == cuda
                     ? 0
                     : fail_user(e,
                                 "system.device = auto finds %s GPU on %s and %s on rank 0's host, %s; set "
                                 "system.device = cpu, or start ranks only where there are GPUs",
                                 cuda ? "a" : "no", own.host, rank0.cuda ? "one" : "none", rank0.host);
    return comm_agree(comm, status, e);
}

int ranks_check_run_dir(struct comm *comm, const char *run_dir, struct error *e) {
    char path[MAX_TEXT + 64];
    long pid = (long)getpid(), found = -1;
    snprintf(path, sizeof path, "%s/lock", run_dir);
    memcpy(&pid, comm_all_gather_small(comm, &pid, sizeof pid), sizeof pid); /* rank 0's */
    FILE *f = fopen(path, "r");
    bool is_shared = f && fscanf(f, "%ld", &found) == 1 && found == pid;
    if (f)
        fclose(f);
    int status =
        is_shared && access(run_dir, W_OK) == 0
            ? 0
            : fail_user(e,
                        "%s: not the directory that rank 0 writes to, or not writable; set run.dir to a "
                        "directory that all hosts share",
                        run_dir);
    return comm_agree(comm, status, e);
}

int ranks_find_checkpoint(struct comm *comm, const char *path, char dir[MAX_TEXT], struct error *e) {
    memset(dir, 0, MAX_TEXT);
    if (comm_agree(comm, comm->rank == 0 ? checkpoint_find(path, dir, e) : 0, e) != 0)
        return -1;
    memmove(dir, comm_all_gather_small(comm, dir, MAX_TEXT), MAX_TEXT); /* rank 0's */
    return 0;
}

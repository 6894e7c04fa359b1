#include "model/train/rank_checks.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "kernels/hash.h"
#include "model/checkpoint/checkpoint.h"

struct digest {
    uint64_t settings, data;
};

static void add_text(uint64_t *hash, const char *text) {
    *hash = fnv1a(*hash, text, strlen(text) + 1);
}

static void add_setting(void *context, const char *key, const char *value) {
    add_text(context, key);
    add_text(context, value);
}

int ranks_check_alike(struct comm *comm, const struct config *config, const struct trainer_state *trainer,
                      struct error *e) {
    struct digest mine = {FNV1A_START, FNV1A_START}, first;
    config_visit(config, add_setting, &mine.settings);
    add_text(&mine.data, trainer->train_fingerprint);
    add_text(&mine.data, trainer->val_fingerprint);
    memcpy(&first, comm_all_gather_small(comm, &mine, sizeof mine), sizeof first);
    int status = 0;
    if (first.settings != mine.settings)
        status = fail_user(e, "has another configuration than rank 0; give all the same file and overrides");
    else if (first.data != mine.data)
        status = fail_user(e, "finds other training or validation data than rank 0 under the same names; all "
                              "hosts must have the same shards");
    return comm_agree(comm, status, e);
}

int ranks_check_run_dir(struct comm *comm, const char *run_dir, struct error *e) {
    char path[MAX_TEXT + 64];
    long pid = (long)getpid(), found = -1;
    snprintf(path, sizeof path, "%s/lock", run_dir);
    memcpy(&pid, comm_all_gather_small(comm, &pid, sizeof pid), sizeof pid); /* rank 0's */
    FILE *f = fopen(path, "r");
    bool same = f && fscanf(f, "%ld", &found) == 1 && found == pid;
    if (f)
        fclose(f);
    int status =
        same && access(run_dir, W_OK) == 0
            ? 0
            : fail_user(e,
                        "%s: not the directory that rank 0 writes to, or not writable; run.dir must be "
                        "on a file system that all hosts share",
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

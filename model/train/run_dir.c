#include "model/train/run_dir.h"

#include "model/checkpoint/checkpoint.h"
#include "model/checkpoint/files.h"

int run_dir_open(const char *dir, struct error *e) {
    char path[PATH_BYTES];
    if (files_make_dirs(dir, e) != 0)
        return -1;
    path_join(path, dir, "lock");
    int lock = files_lock(path, e);
    if (lock >= 0)
        checkpoint_clean(dir);
    return lock;
}

int run_dir_check_space(const char *dir, int64_t num_params, struct error *e) {
    double need = (double)CHECKPOINT_PARAM_BYTES * (double)num_params;
    int64_t have = files_free_bytes(dir);
    if (have >= 0 && (double)have < need)
        return fail_user(
            e, "%s: a checkpoint takes %.1f MB and %.1f MB is free; free some, or set another run.dir", dir,
            need / 1e6, (double)have / 1e6);
    return 0;
}

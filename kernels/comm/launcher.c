#include "kernels/comm/launcher.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/hash.h"

enum {
    MAX_RANKS = 1 << 16,
    FIRST_PORT = 15000, /* for Slurm jobs without MASTER_PORT: below the ephemeral ports */
    NUM_PORTS = 15000,
};

/* NULL when unset or empty. */
static const char *env_text(const char *name) {
    const char *text = getenv(name);
    return text && text[0] ? text : NULL;
}

/* -1 when unset, or not a whole number from low to high. */
static int env_int(const char *name, int low, int high) {
    const char *text = env_text(name);
    char *end;
    long number = text ? strtol(text, &end, 10) : -1;
    return text && *end == '\0' && number >= low && number <= high ? (int)number : -1;
}

bool launcher_is_mpi(void) {
    return env_text("OMPI_COMM_WORLD_SIZE") || env_text("PMIX_RANK") || env_text("PMI_RANK");
}

int launcher_mpi_ranks(void) {
    int ranks = env_int("OMPI_COMM_WORLD_SIZE", 0, MAX_RANKS);
    return ranks > 0 ? ranks : 0;
}

int launcher_rank(void) {
    static const char *const variables[] = {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "RANK",
                                            "SLURM_PROCID"};
    int ranks = env_int("WORLD_SIZE", 0, MAX_RANKS);
    for (size_t i = 0; i < sizeof variables / sizeof *variables; i++) {
        int rank = env_int(variables[i], 0, MAX_RANKS);
        if (rank < 0)
            continue;
        if (strcmp(variables[i], "RANK") == 0 && rank >= ranks)
            return 0; /* an invalid rank must report the error itself */
        return rank;
    }
    return 0;
}

int launcher_first_host(const char *list, char *host, size_t bytes) {
    size_t used = 0, length = strcspn(list, "[,");
    while (*list && *list != ',') {
        if (used + length >= bytes)
            return -1;
        memcpy(host + used, list, length);
        used += length;
        list += length;
        if (*list == '[') {
            const char *first = list + 1, *end = strchr(list, ']');
            length = strspn(first, "0123456789");
            if (!end || length == 0 || !strchr("-,]", first[length]) || used + length >= bytes)
                return -1;
            memcpy(host + used, first, length);
            used += length;
            list = end + 1;
        }
        length = strcspn(list, "[,");
    }
    host[used] = '\0';
    return used > 0 && !strpbrk(host, "] ") ? 0 : -1;
}

/* FNV-1a of the port, IHA_TOKEN and the launcher's run id. Without MASTER_ADDR, which may be another name on
 * rank 0 than on other ranks. */
static uint64_t run_token(const struct launcher_env *env) {
    static const char *const variables[] = {"IHA_TOKEN", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID",
                                            "SLURM_STEP_ID"};
    bool slurm = !env_text("RANK");
    uint64_t hash = FNV1A_START ^ (uint64_t)env->master_port;
    for (int i = 0; i < (slurm ? 4 : 2); i++) {
        const char *text = env_text(variables[i]);
        if (text)
            hash = fnv1a(hash, text, strlen(text));
        hash = fnv1a(hash, " ", 1);
    }
    return hash;
}

static int require_int(const char *name, int low, int high, int *out, const char *what, struct error *e) {
    *out = env_int(name, low, high);
    if (*out >= 0)
        return 0;
    const char *text = env_text(name);
    return text ? fail_user(e, "%s = %.40s: not a whole number from %d to %d; it must be %s", name, text, low,
                            high, what)
                : fail_user(e, "%s is not set, though %s is; it must be %s", name,
                            env_text("RANK") ? "RANK" : "WORLD_SIZE", what);
}

/* With TORCHELASTIC_USE_AGENT_STORE torchrun itself listens on MASTER_PORT; rank 0 then uses the next one. */
static int read_port(struct launcher_env *env, struct error *e) {
    const char *agent = env_text("TORCHELASTIC_USE_AGENT_STORE");
    bool in_use = agent && strcmp(agent, "True") == 0;
    if (require_int("MASTER_PORT", 1, 65535 - in_use, &env->master_port, "a free port on rank 0's machine",
                    e) != 0)
        return -1;
    env->master_port += in_use;
    env->port_source = in_use ? "MASTER_PORT + 1, because torchrun listens on MASTER_PORT" : "MASTER_PORT";
    return 0;
}

static int read_torchrun_env(struct launcher_env *env, struct error *e) {
    if (require_int("WORLD_SIZE", 1, MAX_RANKS, &env->ranks, "the number of processes", e) != 0 ||
        require_int("RANK", 0, env->ranks - 1, &env->rank, "this process's rank, below WORLD_SIZE", e) != 0)
        return -1;
    if (env->ranks == 1)
        return 0;
    const char *address = env_text("MASTER_ADDR");
    if (!address || strlen(address) >= sizeof env->master_addr)
        return fail_user(e,
                         "MASTER_ADDR is not set, though WORLD_SIZE = %d is; it must be the address of rank "
                         "0's machine, which all ranks can reach",
                         env->ranks);
    strcpy(env->master_addr, address);
    env->local_rank = env_int("LOCAL_RANK", 0, env->ranks - 1);
    env->local_ranks = env_int("LOCAL_WORLD_SIZE", 1, env->ranks);
    if (env->local_rank < 0 || env->local_ranks <= env->local_rank)
        env->local_rank = env->local_ranks = 0;
    return read_port(env, e);
}

/* Only within a job step: the batch script is a single process, but sees the job's SLURM_NTASKS too. */
static int slurm_tasks(void) {
    int tasks = env_int("SLURM_STEP_NUM_TASKS", 1, MAX_RANKS);
    if (tasks < 0 && env_text("SLURM_STEP_NODELIST"))
        tasks = env_int("SLURM_NTASKS", 1, MAX_RANKS);
    return env_text("SLURM_PROCID") ? tasks : -1;
}

static int read_slurm_env(struct launcher_env *env, struct error *e) {
    const char *list = env_text("SLURM_STEP_NODELIST"), *address = env_text("MASTER_ADDR");
    env->ranks = slurm_tasks();
    env->rank = env_int("SLURM_PROCID", 0, env->ranks - 1);
    list = list ? list : env_text("SLURM_JOB_NODELIST");
    if (env->rank < 0)
        return fail_user(e,
                         "SLURM_PROCID = %.40s is not a number below the step's %d tasks; start the ranks "
                         "with srun",
                         env_text("SLURM_PROCID"), env->ranks);
    if (address ? strlen(address) >= sizeof env->master_addr
                : !list || launcher_first_host(list, env->master_addr, sizeof env->master_addr) != 0)
        return fail_user(e,
                         "SLURM_STEP_NODELIST = %.200s: not a host list; set MASTER_ADDR to the address of "
                         "the first host",
                         list ? list : "");
    if (address)
        strcpy(env->master_addr, address);
    if (env_text("MASTER_PORT"))
        return read_port(env, e);
    const char *job = env_text("SLURM_JOB_ID"), *step = env_text("SLURM_STEP_ID");
    unsigned long id = (job ? strtoul(job, NULL, 10) : 0) * 31 + (step ? strtoul(step, NULL, 10) : 0);
    env->master_port = FIRST_PORT + (int)(id % NUM_PORTS);
    env->port_source = "derived from SLURM_JOB_ID; MASTER_PORT sets another";
    return 0;
}

int launcher_read_env(struct launcher_env *env, struct error *e) {
    *env = (struct launcher_env){.ranks = 1};
    int status = 0;
    if (env_text("RANK") || env_text("WORLD_SIZE"))
        status = read_torchrun_env(env, e);
    else if (slurm_tasks() > 1)
        status = read_slurm_env(env, e);
    env->run_token = run_token(env);
    return status;
}

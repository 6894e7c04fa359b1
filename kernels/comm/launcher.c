#include "kernels/comm/launcher.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/comm.h"
#include "kernels/hash.h"

enum { MOST_RANKS = 1 << 16, PORTS = 15000, FIRST_PORT = 15000 }; /* below those the system gives away */

/* NULL when not set, or empty. */
static const char *variable(const char *name) {
    const char *text = getenv(name);
    return text && text[0] ? text : NULL;
}

/* A whole number from low to high; -1 when it is not set or no such number. */
static int number_in(const char *name, int low, int high) {
    const char *text = variable(name);
    char *end;
    long number = text ? strtol(text, &end, 10) : -1;
    return text && *end == '\0' && number >= low && number <= high ? (int)number : -1;
}

bool start_by_mpi(void) {
    return variable("OMPI_COMM_WORLD_SIZE") || variable("PMIX_RANK") || variable("PMI_RANK");
}

int start_mpi_ranks(void) {
    int ranks = number_in("OMPI_COMM_WORLD_SIZE", 0, MOST_RANKS);
    return ranks > 0 ? ranks : 0;
}

int comm_launch_rank(void) {
    static const char *const variables[] = {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "RANK",
                                            "SLURM_PROCID"};
    int ranks = number_in("WORLD_SIZE", 0, MOST_RANKS);
    for (size_t i = 0; i < sizeof variables / sizeof *variables; i++) {
        int rank = number_in(variables[i], 0, MOST_RANKS);
        if (rank < 0)
            continue;
        if (strcmp(variables[i], "RANK") == 0 && rank >= ranks)
            return 0; /* it is none, and nobody else will find out */
        return rank;
    }
    return 0;
}

int start_first_host(const char *list, char *host, size_t bytes) {
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

/* What tells one run from another: FNV-1a of what their launchers number runs by, and IHA_TOKEN. Not
 * MASTER_ADDR: rank 0 may know itself by another name than the others. */
static uint64_t token_of(const struct start *s) {
    static const char *const variables[] = {"IHA_TOKEN", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID",
                                            "SLURM_STEP_ID"};
    bool slurm = !variable("RANK");
    uint64_t hash = FNV1A_START ^ (uint64_t)s->port;
    for (int i = 0; i < (slurm ? 4 : 2); i++) {
        const char *text = variable(variables[i]);
        if (text)
            hash = fnv1a(hash, text, strlen(text));
        hash = fnv1a(hash, " ", 1);
    }
    return hash;
}

static int need_number(const char *name, int low, int high, int *out, const char *what, struct error *e) {
    *out = number_in(name, low, high);
    if (*out >= 0)
        return 0;
    const char *text = variable(name);
    return text ? fail_user(e, "%s = %.40s: not a whole number from %d to %d; it must be %s", name, text, low,
                            high, what)
                : fail_user(e, "%s is not set, though %s is; it must be %s", name,
                            variable("RANK") ? "RANK" : "WORLD_SIZE", what);
}

/* torchrun itself listens on MASTER_PORT where it says so; then rank 0 takes the next one. */
static int read_port(struct start *s, struct error *e) {
    const char *agent = variable("TORCHELASTIC_USE_AGENT_STORE");
    bool taken = agent && strcmp(agent, "True") == 0;
    if (need_number("MASTER_PORT", 1, 65535 - taken, &s->port, "a free port of rank 0's machine", e) != 0)
        return -1;
    s->port += taken;
    s->port_from = taken ? "MASTER_PORT + 1, as torchrun has MASTER_PORT" : "MASTER_PORT";
    return 0;
}

static int read_torch(struct start *s, struct error *e) {
    if (need_number("WORLD_SIZE", 1, MOST_RANKS, &s->ranks, "the number of processes", e) != 0 ||
        need_number("RANK", 0, s->ranks - 1, &s->rank, "this process's number below WORLD_SIZE", e) != 0)
        return -1;
    if (s->ranks == 1)
        return 0;
    const char *address = variable("MASTER_ADDR");
    if (!address || strlen(address) >= sizeof s->address)
        return fail_user(e,
                         "MASTER_ADDR is not set, though WORLD_SIZE = %d is; it must be the address of rank "
                         "0's machine, which all ranks can reach",
                         s->ranks);
    strcpy(s->address, address);
    s->local_rank = number_in("LOCAL_RANK", 0, s->ranks - 1);
    s->local_ranks = number_in("LOCAL_WORLD_SIZE", 1, s->ranks);
    if (s->local_rank < 0 || s->local_ranks <= s->local_rank)
        s->local_rank = s->local_ranks = 0;
    return read_port(s, e);
}

/* Within a step alone: the script that sbatch runs sees variables of the job's size too, and is one process.
 */
static int slurm_tasks(void) {
    int tasks = number_in("SLURM_STEP_NUM_TASKS", 1, MOST_RANKS);
    if (tasks < 0 && variable("SLURM_STEP_NODELIST"))
        tasks = number_in("SLURM_NTASKS", 1, MOST_RANKS);
    return variable("SLURM_PROCID") ? tasks : -1;
}

static int read_slurm(struct start *s, struct error *e) {
    const char *list = variable("SLURM_STEP_NODELIST"), *address = variable("MASTER_ADDR");
    s->ranks = slurm_tasks();
    s->rank = number_in("SLURM_PROCID", 0, s->ranks - 1);
    list = list ? list : variable("SLURM_JOB_NODELIST");
    if (s->rank < 0)
        return fail_user(e,
                         "SLURM_PROCID = %.40s is not a number below the step's %d tasks; start the ranks "
                         "with srun",
                         variable("SLURM_PROCID"), s->ranks);
    if (address ? strlen(address) >= sizeof s->address
                : !list || start_first_host(list, s->address, sizeof s->address) != 0)
        return fail_user(e,
                         "SLURM_STEP_NODELIST = %.200s: no list of hosts; set MASTER_ADDR to the address of "
                         "the first",
                         list ? list : "");
    if (address)
        strcpy(s->address, address);
    if (variable("MASTER_PORT"))
        return read_port(s, e);
    const char *job = variable("SLURM_JOB_ID"), *step = variable("SLURM_STEP_ID");
    unsigned long id = (job ? strtoul(job, NULL, 10) : 0) * 31 + (step ? strtoul(step, NULL, 10) : 0);
    s->port = FIRST_PORT + (int)(id % PORTS);
    s->port_from = "a port made of SLURM_JOB_ID; MASTER_PORT sets another";
    return 0;
}

int start_read(struct start *s, struct error *e) {
    *s = (struct start){.ranks = 1};
    int status = 0;
    if (variable("RANK") || variable("WORLD_SIZE"))
        status = read_torch(s, e);
    else if (slurm_tasks() > 1)
        status = read_slurm(s, e);
    s->token = token_of(s);
    return status;
}

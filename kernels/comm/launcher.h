/* How this process was launched among others, read from the environment variables that launchers set.
 *
 * Ranks of mpirun find each other through MPI. Without MPI each process reads its rank, the number of ranks
 * and where rank 0 listens from torchrun's variables (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), which can
 * also be set by hand, or from those of Slurm's srun. */
#ifndef IHA_KERNELS_COMM_LAUNCHER_H
#define IHA_KERNELS_COMM_LAUNCHER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/error.h"

struct launcher_env {
    int rank, ranks;
    int local_rank, local_ranks; /* on this machine; local_ranks 0: not set */
    char master_addr[256];       /* where rank 0 listens: a host name, IPv4 or IPv6 address */
    int master_port;
    const char *port_source; /* for messages: which variable the port comes from */
    uint64_t run_token;      /* equal on all ranks of a run; almost certainly another in other runs */
};

/* ranks 1: a single process. -1 and an EXIT_USER error: the variables are incomplete or contradictory. */
int launcher_read_env(struct launcher_env *env, struct error *e);

/* Whether an MPI launcher (mpirun, or srun with PMI) started this process. */
bool launcher_is_mpi(void);
/* The number of processes that mpirun started; 0: unknown. */
int launcher_mpi_ranks(void);

/* This process's rank before ranks are connected; 0 where it is not known. */
int launcher_rank(void);

/* The first host of Slurm's compact host list: node03 of "node[03-07,9],x1". -1: not such a list, or `host`
 * is too small. */
int launcher_first_host(const char *list, char *host, size_t bytes);

#endif

/* How ranks that know only rank 0's address connect: one socket between every two ranks. */
#ifndef IHA_KERNELS_COMM_TCP_RENDEZVOUS_H
#define IHA_KERNELS_COMM_TCP_RENDEZVOUS_H

#include "kernels/comm/launcher.h"

struct tcp_address;

struct tcp_rendezvous {
    const struct launcher_env *env;
    double timeout;                /* seconds to wait for the other ranks */
    int *sockets;                  /* [ranks], -1: not connected */
    int listener;                  /* where higher ranks connect */
    struct tcp_address *addresses; /* [ranks] */
};

/* Step 1: all ranks connect to rank 0, which sends each the addresses of all. A rank that rank 0 rejects ends
 * its process, because rank 0 reports the reason. -1 and *e: EXIT_USER for invalid settings, EXIT_RUN where
 * ranks are missing; rank 0 has then notified the ranks that did connect. */
int tcp_rendezvous_gather(struct tcp_rendezvous *rdzv, struct error *e);

/* Step 2: the ranks above 0 connect to each other. -1 and an EXIT_RUN error: all ranks must end. */
int tcp_rendezvous_connect_peers(struct tcp_rendezvous *rdzv, struct error *e);

/* Frees everything but the sockets. */
void tcp_rendezvous_free(struct tcp_rendezvous *rdzv);

#endif

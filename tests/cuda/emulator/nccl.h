/* The emulator's NCCL: calls become tasks (nccl.cc), and tasks transfer data (nccl_tasks.cc). */
#ifndef IHA_TESTS_CUDA_EMULATOR_NCCL_H
#define IHA_TESTS_CUDA_EMULATOR_NCCL_H

#include <nccl.h>

#include "tests/cuda/emulator/internal.h"
#include "tests/cuda/emulator/nccl_shared.h"

struct ncclComm {
    struct nccl_shared *shared;
    int rank, ranks;
    uint64_t collectives;      /* begun so far */
    std::atomic<bool> aborted; /* pending operations end at once */
    std::atomic<bool> closed;  /* finalized or destroyed */
    emulator_chain chain;      /* its tasks run in the order of the calls */
};

enum nccl_kind { REDUCE_SCATTER, ALL_GATHER, ALL_REDUCE, BROADCAST, SEND, RECV };

struct nccl_op {
    enum nccl_kind kind;
    const char *send;
    char *recv;
    size_t count; /* as the call counts */
    ncclDataType_t type;
    int peer; /* or root */
};

/* Bytes of an element, or 0 for types that are not supported. */
size_t nccl_type_bytes(ncclDataType_t type);
const char *nccl_kind_name(enum nccl_kind kind);

/* Bytes that rank's op reads at send and writes at recv. */
size_t nccl_send_bytes(const struct nccl_op &op, const struct ncclComm *comm);
size_t nccl_recv_bytes(const struct nccl_op &op, const struct ncclComm *comm);

/* The calls of one group, as work for the queue. */
emulator_step nccl_task(struct ncclComm *comm, std::vector<struct nccl_op> ops);

#endif

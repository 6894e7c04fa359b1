/* What the ranks of a communicator of the fake NCCL share: memory with a pipe from each rank to each. Ranks
 * are processes of one machine. */
#ifndef IHA_TESTS_CUDA_EMULATOR_NCCL_SHARED_H
#define IHA_TESTS_CUDA_EMULATOR_NCCL_SHARED_H

#include <stddef.h>
#include <stdint.h>

#include <atomic>
#include <string>

enum { NCCL_MAX_RANKS = 16, NCCL_PIPE_BYTES = 64 << 10 };

/* Bytes from one rank to another, in order. */
struct nccl_pipe {
    std::atomic<uint64_t> written, taken; /* since the beginning */
    char data[NCCL_PIPE_BYTES];
};

struct nccl_shared {
    char name[64];
    std::atomic<int> ranks; /* 0: nobody has joined */
    std::atomic<int> joined;
    std::atomic<bool> refused;     /* a rank that came did not fit */
    std::atomic<uint64_t> devices; /* a bit each */
    std::atomic<bool> duplicate;   /* two ranks on one of them */
    std::atomic<bool> present[NCCL_MAX_RANKS];
    std::atomic<int> broken; /* 1 + the rank whose connections broke, or 0 */
    std::atomic<int64_t> broken_seen_ns;
    struct nccl_pipe pipes[NCCL_MAX_RANKS][NCCL_MAX_RANKS]; /* from, to */
};

/* A name for memory that does not exist yet, and the memory, zeros. Empty: it cannot be made; errno says why.
 */
std::string nccl_shared_create();

/* The memory, as one of `ranks`, on that GPU of the machine. NULL: *why says why. Who comes last removes the
 * name, so that nothing is left behind however the ranks end. */
struct nccl_shared *nccl_shared_join(const char *name, int ranks, int rank, int device, std::string *why);

/* 1: all ranks have joined; 0: not yet; -1: one was refused; -2: two are on one GPU. */
int nccl_shared_complete(const struct nccl_shared *shared);

/* This rank is out: remove the name where it is still there, as the others will not become complete. */
void nccl_shared_abandon(struct nccl_shared *shared);

/* The same, and give the memory back. */
void nccl_shared_leave(struct nccl_shared *shared);

/* Move up to `bytes` into or out of the pipe, as many as there is room or are there; returns how many. */
size_t nccl_pipe_write(struct nccl_pipe *pipe, const void *data, size_t bytes);
size_t nccl_pipe_read(struct nccl_pipe *pipe, void *data, size_t bytes);

#endif

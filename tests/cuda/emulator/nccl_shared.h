/* The shared memory of a communicator of the emulator's NCCL, with a pipe from each rank to each. Ranks are
 * processes of one machine. */
#ifndef IHA_TESTS_CUDA_EMULATOR_NCCL_SHARED_H
#define IHA_TESTS_CUDA_EMULATOR_NCCL_SHARED_H

#include <stddef.h>
#include <stdint.h>

#include <atomic>
#include <string>

enum { NCCL_MAX_RANKS = 16, NCCL_PIPE_BYTES = 64 << 10 };

/* Bytes from one rank to another, in order. */
struct nccl_pipe {
    std::atomic<uint64_t> written, taken; /* bytes in all */
    char data[NCCL_PIPE_BYTES];
};

struct nccl_shared {
    char name[64];
    std::atomic<int> ranks; /* 0: no rank has joined */
    std::atomic<int> joined;
    std::atomic<bool> refused;     /* a rank could not join: wrong count, or its number was taken */
    std::atomic<uint64_t> devices; /* a bit for each GPU that a rank uses */
    std::atomic<bool> duplicate;   /* two ranks use the same GPU */
    std::atomic<bool> present[NCCL_MAX_RANKS];
    std::atomic<int> broken; /* 1 + the rank whose connections broke, or 0 */
    std::atomic<int64_t> broken_seen_ns;
    struct nccl_pipe pipes[NCCL_MAX_RANKS][NCCL_MAX_RANKS]; /* from, to */
};

/* Create zeroed shared memory and return its name. Empty: it cannot be created; errno says why. */
std::string nccl_shared_create();

/* Map the memory, as rank `rank` of `ranks`, on GPU `device` of the machine. NULL: *why says why. The last
 * rank to join unlinks the name, so that nothing is left behind however the ranks end. */
struct nccl_shared *nccl_shared_join(const char *name, int ranks, int rank, int device, std::string *why);

/* 1: all ranks have joined; 0: not yet; -1: one was refused; -2: two are on one GPU. */
int nccl_shared_complete(const struct nccl_shared *shared);

/* This rank leaves early: unlink the name if not all ranks have joined, as they never will. */
void nccl_shared_abandon(struct nccl_shared *shared);

/* The same, and unmap the memory. */
void nccl_shared_leave(struct nccl_shared *shared);

/* Copy up to `bytes` into or out of the pipe, as many as fit or are there; returns how many. */
size_t nccl_pipe_write(struct nccl_pipe *pipe, const void *data, size_t bytes);
size_t nccl_pipe_read(struct nccl_pipe *pipe, void *data, size_t bytes);

#endif

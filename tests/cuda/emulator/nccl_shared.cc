/* The memory that ranks of the emulator's NCCL share. */
#include "tests/cuda/emulator/nccl_shared.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

std::string nccl_shared_create() {
    uint64_t random = 0;
    char name[64];
    if (getrandom(&random, sizeof random, 0) != sizeof random)
        return "";
    snprintf(name, sizeof name, "/emulator-nccl-%d-%016llx", (int)getpid(), (unsigned long long)random);
    int fd = shm_open(name, O_RDWR | O_CREAT | O_EXCL, 0600);
    if (fd < 0)
        return "";
    bool made = ftruncate(fd, sizeof(struct nccl_shared)) == 0;
    close(fd);
    if (!made)
        shm_unlink(name);
    return made ? name : "";
}

struct nccl_shared *nccl_shared_join(const char *name, int ranks, int rank, int device, std::string *why) {
    int fd = shm_open(name, O_RDWR, 0);
    if (fd < 0) {
        *why = std::string(name) + ": " + strerror(errno) + "; is every rank there already?";
        return nullptr;
    }
    void *memory = mmap(nullptr, sizeof(struct nccl_shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (memory == MAP_FAILED) {
        *why = std::string(name) + ": " + strerror(errno);
        return nullptr;
    }
    struct nccl_shared *shared = (struct nccl_shared *)memory;
    snprintf(shared->name, sizeof shared->name, "%s", name);
    int before = 0;
    if (!shared->ranks.compare_exchange_strong(before, ranks) && before != ranks)
        *why = "ranks do not agree how many they are, " + std::to_string(before) + " or " +
               std::to_string(ranks);
    else if (shared->present[rank].exchange(true))
        *why = "two ranks with number " + std::to_string(rank);
    if (!why->empty()) {
        shared->refused = true;
        shm_unlink(name);
        munmap(memory, sizeof(struct nccl_shared));
        return nullptr;
    }
    uint64_t bit = (uint64_t)1 << device;
    if (shared->devices.fetch_or(bit) & bit)
        shared->duplicate = true;
    if (++shared->joined == ranks)
        shm_unlink(name);
    return shared;
}

int nccl_shared_complete(const struct nccl_shared *shared) {
    if (shared->refused)
        return -1;
    return shared->joined < shared->ranks ? 0 : shared->duplicate ? -2 : 1;
}

void nccl_shared_abandon(struct nccl_shared *shared) {
    if (nccl_shared_complete(shared) != 1)
        shm_unlink(shared->name);
}

void nccl_shared_leave(struct nccl_shared *shared) {
    nccl_shared_abandon(shared);
    munmap(shared, sizeof *shared);
}

/* Copy `bytes` from `position` on, wrapping around at the end of the ring buffer. */
template <typename Copy> static void copy_ring(uint64_t position, size_t bytes, Copy copy) {
    size_t offset = position % NCCL_PIPE_BYTES, first = NCCL_PIPE_BYTES - offset;
    if (first > bytes)
        first = bytes;
    copy(offset, 0, first);
    copy(0, first, bytes - first);
}

size_t nccl_pipe_write(struct nccl_pipe *pipe, const void *data, size_t bytes) {
    uint64_t written = pipe->written.load(std::memory_order_relaxed), taken = pipe->taken;
    size_t room = NCCL_PIPE_BYTES - (size_t)(written - taken);
    if (bytes > room)
        bytes = room;
    copy_ring(written, bytes, [&](size_t offset, size_t from, size_t n) {
        memcpy(pipe->data + offset, (const char *)data + from, n);
    });
    pipe->written = written + bytes;
    return bytes;
}

size_t nccl_pipe_read(struct nccl_pipe *pipe, void *data, size_t bytes) {
    uint64_t taken = pipe->taken.load(std::memory_order_relaxed), written = pipe->written;
    if (bytes > written - taken)
        bytes = (size_t)(written - taken);
    copy_ring(taken, bytes,
              [&](size_t offset, size_t to, size_t n) { memcpy((char *)data + to, pipe->data + offset, n); });
    pipe->taken = taken + bytes;
    return bytes;
}

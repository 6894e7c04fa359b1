/* What the emulator's files share. */
#ifndef IHA_TESTS_CUDA_EMULATOR_INTERNAL_H
#define IHA_TESTS_CUDA_EMULATOR_INTERNAL_H

#include "tests/cuda/emulator/emulator.h"

#include <memory>
#include <vector>

/* Run one launch now, block after block. */
void emulator_run_grid(dim3 grid, dim3 block, size_t dynamic_shared, const std::function<void()> &thread);

/* Indices 0..n-1 in the order that the seed asks for. */
std::vector<int64_t> emulator_order(int64_t n);

/* Bytes beside an allocation that may not be written or, under AddressSanitizer, read. */
enum { EMULATOR_SENTINEL = 256 };
void emulator_write_sentinel(void *p);
void emulator_remove_sentinel(void *p);
bool emulator_sentinel_intact(const void *p);

/* A random number below `below`, by the seed. For the thread that runs the queue. */
uint64_t emulator_random(uint64_t below);
uint64_t emulator_current_seed();

/* The name of the work that is running, for messages. */
extern const char *emulator_running_name;
bool emulator_on_queue(); /* whether this thread is running queued work */

/* Append to a stream, or to the graph that captures it. */
cudaError_t emulator_enqueue(cudaStream_t stream, std::function<void()> work);

/* The same for work that waits for something outside (other ranks), and is called again until it returns
 * true; it must then be ready to start over, as graphs repeat it. Work of one chain runs in the order in
 * which it was queued, whatever its streams. */
typedef std::function<bool()> emulator_step;
struct emulator_chain {
    std::shared_ptr<struct emulator_work> last;
    int in_graphs; /* its nodes in instantiated graphs */
};
int emulator_chain_in_graphs(const emulator_chain *chain);
cudaError_t emulator_enqueue_steps(cudaStream_t stream, emulator_step step, emulator_chain *chain);

/* Wait for a chain's work. */
void emulator_wait_chain(emulator_chain *chain);

/* Called around work: otherwise device memory is inaccessible (unless the queue has a thread of its own). */
void emulator_open_memory();
void emulator_close_memory();

/* Abort if something was written beside an allocation. */
void emulator_check_sentinels();

/* Abort unless [p, p + bytes) lies within one live allocation of the device. */
void emulator_check_device(const void *p, size_t bytes, const char *what);

/* Called by work that runs: see emulator_seconds. */
void emulator_pass_time(const char *kernel, int candidate);

#endif

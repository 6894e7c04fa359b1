/* What the harness's own files share. */
#ifndef IHA_TESTS_CUDA_EMULATOR_INTERNAL_H
#define IHA_TESTS_CUDA_EMULATOR_INTERNAL_H

#include "tests/cuda/emulator/emulator.h"

#include <memory>
#include <vector>

/* Run one launch now, block after block. */
void emulator_run_grid(dim3 grid, dim3 block, size_t dynamic_shared, const std::function<void()> &thread);

/* Indices 0..n-1 in the order that the seed asks for. */
std::vector<int64_t> emulator_order(int64_t n);

/* Bytes beside an allocation that nobody may write; under AddressSanitizer, nor read. */
enum { EMULATOR_SENTINEL = 256 };
void emulator_guard(void *p);
void emulator_unguard(void *p);
bool emulator_guard_intact(const void *p);

/* Below `below`, by the seed. For the thread that runs the queue. */
uint64_t emulator_random(uint64_t below);
uint64_t emulator_current_seed();

/* What the queue runs at present, for messages. */
extern const char *emulator_running_name;
bool emulator_on_queue(); /* is this the thread that runs it? */

/* Append to a stream, or to the graph that captures it. */
cudaError_t emulator_enqueue(cudaStream_t stream, std::function<void()> work);

/* The same for work that takes part in something larger, and is called again and again until it returns true;
 * afterwards it must be ready to begin anew, as graphs repeat it. Work of one chain runs in the order in
 * which it was queued, whatever its streams. */
typedef std::function<bool()> emulator_step;
struct emulator_chain {
    std::shared_ptr<struct emulator_work> last;
    int in_graphs; /* its nodes in graphs that can still be launched */
};
int emulator_chain_in_graphs(const emulator_chain *chain);
cudaError_t emulator_enqueue_steps(cudaStream_t stream, emulator_step step, emulator_chain *chain);

/* Wait for a chain's work. */
void emulator_wait_chain(emulator_chain *chain);

/* Around the work: outside it, device memory is out of reach (unless the queue has a thread of its own). */
void emulator_open_memory();
void emulator_close_memory();

/* Abort where something lies beside an allocation. */
void emulator_check_sentinels();

/* Abort unless [p, p + bytes) lies within one live allocation of the device. */
void emulator_check_device(const void *p, size_t bytes, const char *what);

#endif

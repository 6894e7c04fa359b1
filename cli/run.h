/* The state of a command, and the phases that several commands share. */
#ifndef IHA_CLI_RUN_H
#define IHA_CLI_RUN_H

#include "data/shards.h"
#include "data/tokenizer.h"
#include "kernels/comm.h"
#include "model/checkpoint/checkpoint.h"
#include "model/checkpoint/saver.h"
#include "model/config/config.h"
#include "model/generate/decode.h"
#include "model/model.h"
#include "model/train/metrics.h"

enum { DEFAULT_TIMEOUT = 300 }; /* seconds to wait for a rank before the configuration has been read */
enum { DECODE_CHUNK = 64 };     /* tokens of a prompt that are fed at a time */

/* run_release frees every pointer that is not NULL. */
struct run {
    struct config config;
    struct comm *comm; /* between the ranks' hosts; NULL in commands that run on one rank */
    const struct kernels *k;
    struct device *dev;
    struct comm *device_comm; /* between the ranks' devices, the same as comm on the CPU; NULL on one rank */
    size_t host_memory;       /* bytes free before the model was created */
    struct model model;
    struct shards *train, *val;
    struct tokenizer *tokenizer;
    char *tokenizer_text; /* of tokenizer.json, for checkpoints; NULL: none */
    size_t tokenizer_bytes;
    struct decoder decoder;
    struct metrics *metrics; /* on rank 0 */
    struct trainer_state trainer;
    struct saver *saver;
    int steps_in_flight;       /* begun, and their state not collected yet */
    double step_start;         /* clock_seconds() from which the next collected step is timed */
    int64_t profile_steps;     /* to trace; 0: none */
    int64_t profile_from;      /* the first of them */
    int lock;                  /* descriptor of run.dir/lock */
    int32_t *tokens, *targets; /* one pass, [micro_batch, seq_len] */
    double flops_per_token;
};

void run_release(struct run *r);

static inline bool is_rank0(const struct run *r) {
    return !r->comm || r->comm->rank == 0;
}

static inline bool single_rank(const struct run *r) {
    return !r->comm || r->comm->ranks == 1;
}

/* Open this rank's device as [system] asks. */
int run_open_device(struct run *r, struct error *e);

/* Open the devices of all ranks and the communicator between them. All ranks call it. */
int run_join_devices(struct run *r, struct error *e);

/* Create the model, with uninitialised weights, and the buffers for a pass. */
int run_build_model(struct run *r, bool training, struct error *e);

/* name: "none", "bytes" or a tokenizer file. */
int run_open_tokenizer(struct run *r, const char *name, struct error *e);

/* Mean loss in nats over the first `batches` batches of r->val (0: all of it), and the tokens they hold. The
 * batches are distributed over the ranks and do not depend on how many there are. All ranks call it. */
double run_evaluate(struct run *r, int64_t batches, int64_t *tokens);

#endif

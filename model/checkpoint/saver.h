/* Asynchronous checkpointing: a thread that writes one checkpoint at a time, from a snapshot of this rank's weights
 * and moments in host memory; if there is no memory for one, from the model while training waits.
 *
 * The thread only writes this rank's files. The rest happens in the calls below, which are collective over the
 * model's comm: rank 0 begins a checkpoint, every rank's thread writes, and once all have written, as the ranks find
 * by exchanging their states after every step, rank 0 publishes it. */
#ifndef IHA_MODEL_CHECKPOINT_SAVER_H
#define IHA_MODEL_CHECKPOINT_SAVER_H

#include "model/checkpoint/checkpoint.h"

struct saver;

enum saver_state {
    SAVER_IDLE,
    SAVER_WRITING,
    SAVER_WRITTEN, /* and not published yet */
    SAVER_FAILED,
};

/* Call it before opening the device, which binds the calling thread and all that it starts later to processors. */
struct saver *saver_open(struct error *e);
void saver_close(struct saver *s); /* waits until the thread has written */

/* Bytes of this rank's snapshot; 0: out of memory. */
size_t saver_snapshot_bytes(const struct model *m);

/* Allocate the snapshot, if it takes at most half of memory_free (bytes). True if all ranks have one, so that
 * training can go on while checkpoints are written. Call it once, before saving anything. */
bool saver_reserve(struct saver *s, const struct model *m, size_t memory_free);

/* Save job->model as it is now, after finishing the previous checkpoint. With snapshots, and unless `wait`, returns
 * at once; else the checkpoint is published on return. What job points at must stay valid. A failure (EXIT_RUN)
 * leaves earlier checkpoints as they were. */
int saver_save(struct saver *s, const struct checkpoint_job *job, bool wait, struct error *e);

/* Once a step: publish if all ranks have written. `all` is every rank's state, merged. */
enum saver_state saver_state(struct saver *s);
enum saver_state saver_state_merge(enum saver_state a, enum saver_state b);
int saver_advance(struct saver *s, enum saver_state all, struct error *e);

/* Wait for the checkpoint that is being written, if any, and publish it. */
int saver_finish(struct saver *s, struct error *e);

#endif

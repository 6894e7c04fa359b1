/* Saving while training goes on: a thread that writes one checkpoint at a time, from a copy of this rank's
 * numbers where memory allows one, and otherwise from the model itself while training waits.
 *
 * The thread only writes this rank's files. Beginning and publishing need all ranks, and happen in the calls
 * below, which all ranks make together: rank 0 begins, every rank's thread writes, and once all have written,
 * which ranks tell each other after every step, rank 0 publishes. The ranks are those of the model's comm. */
#ifndef IHA_MODEL_CHECKPOINT_SAVER_H
#define IHA_MODEL_CHECKPOINT_SAVER_H

#include "model/checkpoint/checkpoint.h"

struct saver;

enum saver_state {
    SAVER_IDLE,
    SAVER_WRITING,
    SAVER_WRITTEN, /* until it is published */
    SAVER_FAILED,
};

/* To be opened before the device is, which binds the threads it starts from to processors. */
struct saver *saver_open(struct error *e);
void saver_close(struct saver *s); /* waits for what it is writing */

/* Bytes a copy of this rank's numbers takes, on the host; 0: no memory to count them. */
size_t saver_copy_bytes(const struct model *m);

/* Keep memory for a copy of *m, if it leaves half of what is free. Does saving go on in the background? Only
 * if all ranks have a copy. To be called once, before anything is saved. */
bool saver_reserve(struct saver *s, const struct model *m, size_t memory_free);

/* Save the numbers of job->from.model as they are now, once the checkpoint before is there. With copies, and
 * unless asked to wait, training may go on at once; else the checkpoint is there on return. What job points
 * at must stay. A failure (EXIT_RUN) leaves earlier checkpoints as they were. */
int saver_save(struct saver *s, const struct checkpoint_job *job, bool wait, struct error *e);

/* Once a step: publish if all ranks have written. `all` is what saver_state_merge makes of every rank's state.
 */
enum saver_state saver_state(struct saver *s);
enum saver_state saver_state_merge(enum saver_state one, enum saver_state other);
int saver_advance(struct saver *s, enum saver_state all, struct error *e);

/* Wait for the checkpoint that is being written, if there is one, and make it appear. */
int saver_finish(struct saver *s, struct error *e);

#endif

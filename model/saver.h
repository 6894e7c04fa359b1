/* Saving while training goes on: a thread that writes one checkpoint at a time, from a copy of this rank's
 * numbers where memory allows one, and otherwise from the model itself while training waits.
 *
 * The thread only writes files. What needs all ranks, beginning and publishing, stays with the trainer. */
#ifndef IHA_SAVER_H
#define IHA_SAVER_H

#include "model/checkpoint.h"

struct saver;

enum saver_state {
    SAVER_IDLE,
    SAVER_WRITING,
    SAVER_WRITTEN, /* until saver_collect */
    SAVER_FAILED,
};

/* To be opened before the device is, which binds the threads it starts from to processors. */
struct saver *saver_open(struct error *e);
void saver_close(struct saver *s); /* waits for what it is writing */

/* Bytes a copy of this rank's numbers takes, on the host; 0: no memory to count them. */
size_t saver_copy_bytes(const struct model *m);

/* Keep memory for a copy, if it leaves half of what is free. Does saving go on in the background? */
bool saver_reserve(struct saver *s, const struct model *m, size_t memory_free);

/* Write job->from.model's numbers as they are now. With a copy (and memory kept for one), the model may
 * change at once; without, only when saver_state() is no longer SAVER_WRITING. What job points at must stay.
 * The saver must be idle. */
int saver_start(struct saver *s, const struct checkpoint_job *job, bool copy, struct error *e);
enum saver_state saver_state(struct saver *s);

/* How the writing ended; the saver is idle again. */
int saver_collect(struct saver *s, struct error *e);

#endif

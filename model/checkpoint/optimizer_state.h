/* optimizer-RRRRR-of-WWWWW.safetensors: the optimizer's moments, one file per rank.
 *
 * A file holds `ranges` [n,2], the parameters whose moments it has, as begin and end in the order of
 * model.safetensors without padding, and exp_avg and exp_avg_sq, their moments one after the other. So any number
 * of ranks can read what any other number wrote. With Muon, exp_avg is the momentum of its matrices, which have no
 * second moment: `ranges_sq` [n,2] are the parameters of exp_avg_sq. */
#ifndef IHA_MODEL_CHECKPOINT_OPTIMIZER_STATE_H
#define IHA_MODEL_CHECKPOINT_OPTIMIZER_STATE_H

#include "model/model.h"

enum { OPTIMIZER_NAME = 48 };
void optimizer_name(char out[OPTIMIZER_NAME], int rank, int ranks);

/* Moments that this rank writes: two for each of its parameters, one where Muon updates it; -1: out of memory. */
int64_t optimizer_elements(const struct model *m);

/* Those: moments [optimizer_elements], all first moments, then all second. */
int optimizer_copy(struct model *m, float *moments, struct error *e);

/* moments: such a copy, or NULL: they are read from the model, which then must not change meanwhile. */
int optimizer_write(const char *path, struct model *m, const float *moments, struct error *e);

/* Read from all files in `dir` the moments of the parameters that this rank updates. */
int optimizer_read(const char *dir, struct model *m, struct error *e);

/* The same for a checkpoint whose model differs only in its vocabulary. Moments of new rows keep their value, which is
 * zero in a new model; those of rows beyond the model's vocabulary are left out. */
int optimizer_read_resized(const char *dir, struct model *m, int64_t vocab_size, struct error *e);

#endif

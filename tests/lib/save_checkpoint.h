/* Saving a checkpoint in one call, on one rank. */
#ifndef IHA_TESTS_LIB_SAVE_CHECKPOINT_H
#define IHA_TESTS_LIB_SAVE_CHECKPOINT_H

#include <stdlib.h>

#include "model/checkpoint/checkpoint.h"
#include "model/checkpoint/checkpoint_dirs.h"

/* tokenizer: a file, or NULL. */
static int save_checkpoint(const char *run_dir, struct model *m, const struct config *c,
                           const struct trainer_state *p, const char *tokenizer, struct error *e) {
    struct checkpoint_job job = {.run_dir = run_dir, .config = c, .trainer = *p, .model = m};
    char *text = NULL;
    int status = tokenizer ? checkpoint_tokenizer(tokenizer, &text, &job.tokenizer_bytes, e) : 0;
    job.tokenizer = text;
    if (status == 0)
        status = checkpoint_begin(run_dir, p->step, e) == 0 && checkpoint_write(&job, e) == 0 &&
                         checkpoint_publish(&job, e) == 0
                     ? 0
                     : -1;
    free(text);
    if (status == 0)
        return 0;
    checkpoint_clean(run_dir);
    e->exit_code = EXIT_RUN;
    return -1;
}

#endif

/* The status of a training run on stderr: on a terminal one line, rewritten in place, that fits any width; elsewhere a new
 * line every 10 seconds. */
#ifndef IHA_MODEL_TRAIN_STATUS_H
#define IHA_MODEL_TRAIN_STATUS_H

#include <stdbool.h>
#include <stddef.h>

#include "model/train/metrics.h"

struct status {
    bool opened;           /* the fields below are known */
    bool terminal;         /* stderr is one that understands escape sequences */
    bool colour, unicode;  /* of a terminal */
    int shown;             /* columns of the line that the cursor is in; 0: none */
    double last_shown;     /* clock_seconds() */
    double seconds_a_step; /* smoothed */
    double loss;           /* smoothed over about 20 steps */
    int losses;            /* in it, up to 20 */
};

/* Show the step, where the last line is old enough. A zeroed *s is a new one. */
void status_step(struct status *s, const struct step_record *r);

/* End the status line before something else is printed. */
void status_break(struct status *s);

/* The line as text of at most `columns` columns, without escape sequences; 0: without a bar, and as long as it
 * becomes. What is least important goes first. Returns its columns. Uses the smoothed figures of *s. */
enum { STATUS_BYTES = 512 };
int status_line(const struct status *s, const struct step_record *r, int columns, char out[STATUS_BYTES]);

#endif

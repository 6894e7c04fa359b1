#include "model/train/skips.h"

#include <math.h>

int skips_fail(struct model *m, const struct step_state *state, double skip_zscore, struct error *e) {
    /* Steps without targets may lie between these, so the first one's number is not known. */
    long long last = (long long)state->step + 1;
    int count = state->history.skips_run;
    bool finite;
    const struct param *worst = &m->params.list[model_worst_gradient(m, &finite)];
    if (state->skip == STEP_OUTLIER)
        return fail_run(
            e,
            "the gradient norm was an outlier (train.skip_zscore = %g) in %d steps in a row, the last of "
            "them "
            "step %lld; there it was %.4g, %.1f deviations above its recent mean, the largest part "
            "in %s; lower train.lr, or check the data of these steps",
            skip_zscore, count, last, state->grad_norm, state->zscore, worst->name);
    return fail_run(
        e,
        "the %s was not finite in %d steps in a row, the last of them step %lld; %s%s; lower train.lr, check "
        "the data of these steps, or resume from an earlier checkpoint: remove the newest step_... "
        "directories",
        isfinite(state->loss) ? "gradient" : "loss", count, last,
        finite ? "every parameter's gradient is finite, the largest is " : "the first one in backward is ",
        worst->name);
}

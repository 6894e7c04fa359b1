#include "model/train/evaluation.h"

#include <math.h>

void evaluation_count(struct evaluation *v, int64_t B, int64_t T, const int32_t *targets,
                      const int32_t *segments, const int32_t *correct) {
    for (int64_t begin = 0, end; begin < B * T; begin = end) {
        int64_t counted = 0, right = 0, sequence_end = (begin / T + 1) * T;
        for (end = begin; end < sequence_end && (!segments || segments[end] == segments[begin]); end++)
            if (targets[end] >= 0) {
                counted++;
                right += correct[end];
            }
        v->correct += right;
        v->segments += counted > 0;
        v->exact += counted > 0 && right == counted;
    }
}

double evaluation_accuracy(const struct evaluation *v) {
    return (double)v->correct / (double)v->targets;
}

double evaluation_exact(const struct evaluation *v) {
    return (double)v->exact / (double)v->segments;
}

double evaluation_bits_per_byte(const struct evaluation *v) {
    return v->loss / log(2) / v->bytes_per_token;
}

double evaluation_figure(const struct evaluation *v, enum best_by best_by) {
    switch (best_by) {
    case BEST_BY_ACCURACY:
        return evaluation_accuracy(v);
    case BEST_BY_EXACT:
        return evaluation_exact(v);
    case BEST_BY_LOSS:
        break;
    }
    return v->loss;
}

/* True also if there is no best yet (NAN). */
static bool is_better(enum best_by best_by, double figure, double best) {
    return best_by == BEST_BY_LOSS ? !(figure >= best) : !(figure <= best);
}

bool evaluation_note(struct trainer_state *p, const struct evaluation *v, int64_t patience, bool saves) {
    double figure = evaluation_figure(v, p->best_by);
    /* After a loss that is not finite, the model is of no use, whatever its largest logits are. */
    bool better = isfinite(v->loss) && isfinite(figure) && is_better(p->best_by, figure, p->best_value);
    if (patience > 0)
        p->evals_since_best = better ? 0 : p->evals_since_best + 1;
    if (!better || (!saves && patience == 0))
        return false;
    p->best_value = figure;
    p->best_step = p->step;
    return true;
}

bool patience_is_over(const struct trainer_state *p, int64_t patience) {
    return patience > 0 && p->evals_since_best >= patience;
}

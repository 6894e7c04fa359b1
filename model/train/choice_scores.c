#include "model/train/choice_scores.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Rows of a batch, [B,T], which are filled with endings until it is full. */
struct scorer {
    struct model *m;
    const struct choice_data *data;
    int32_t *tokens, *targets, *segments;
    int32_t *ignored; /* [T] all -1 */
    double *nats;     /* [B] */
    int64_t rows;
    /* the endings in the batch, in order: where their log-likelihoods go */
    double **to;
    struct choice_scores *scores;
};

static int create(struct scorer *s, struct error *e) {
    size_t B = (size_t)s->m->shape.batch, T = (size_t)s->m->shape.tokens;
    s->tokens = malloc((3 * B + 1) * T * sizeof *s->tokens);
    s->nats = malloc(B * sizeof *s->nats);
    s->to = malloc(B * sizeof *s->to);
    if (!s->tokens || !s->nats || !s->to)
        return fail_run(e, "out of memory for a batch of choices");
    s->targets = s->tokens + B * T;
    s->segments = s->targets + B * T;
    s->ignored = s->segments + B * T;
    for (size_t t = 0; t < T; t++)
        s->ignored[t] = -1;
    return 0;
}

static void destroy(struct scorer *s) {
    free(s->tokens);
    free(s->nats);
    free(s->to);
}

/* Score the rows that are filled. */
static void flush(struct scorer *s) {
    int64_t B = s->m->shape.batch, T = s->m->shape.tokens;
    if (s->rows == 0)
        return;
    for (int64_t i = s->rows * T; i < B * T; i++) {
        s->tokens[i] = s->segments[i] = 0;
        s->targets[i] = -1;
    }
    model_score(s->m, (struct batch){s->tokens, s->targets, s->segments}, s->ignored, s->rows, s->nats);
    for (int64_t row = 0; row < s->rows; row++)
        *s->to[row] = -s->nats[row];
    s->rows = 0;
}

/* Put start, context and ending k of an item into the next row. The last token is only a target. */
static void add(struct scorer *s, const struct choice *c, int k, double *to) {
    int64_t T = s->m->shape.tokens, ending = c->lengths[k], before = 1 + (int64_t)c->context_length;
    int64_t dropped = before + ending - 1 > T ? before + ending - 1 - T : 0, used = before + ending - dropped;
    int32_t *tokens = s->tokens + s->rows * T, *targets = s->targets + s->rows * T,
            *segments = s->segments + s->rows * T;
    s->scores->cut += dropped > 0;
    for (int64_t t = 0; t < T; t++) {
        int64_t at[2]; /* of the token and the target in start, context, ending */
        int32_t ids[2] = {0, -1};
        for (int i = 0; i < 2; i++) {
            at[i] = t + i + dropped;
            if (t + i < used)
                ids[i] = at[i] == 0       ? s->data->start
                         : at[i] < before ? c->context[at[i] - 1]
                                          : c->ids[k][at[i] - before];
        }
        tokens[t] = t < used - 1 ? ids[0] : 0;
        targets[t] = t < used - 1 && at[1] >= before ? ids[1] : -1;
        segments[t] = t < used - 1 ? 0 : (int32_t)(used - 1);
    }
    s->to[s->rows++] = to;
    if (s->rows == s->m->shape.batch)
        flush(s);
}

static void count(struct choice_scores *v, const struct choice *c, const double *scores) {
    int best = 0, best_norm = 0;
    for (int k = 1; k < c->endings; k++) {
        if (scores[k] > scores[best])
            best = k;
        if (scores[k] / c->characters[k] > scores[best_norm] / c->characters[best_norm])
            best_norm = k;
    }
    v->items++;
    v->correct += best == c->label;
    v->correct_norm += best_norm == c->label;
    v->chance += 1.0 / c->endings;
}

/* Score every ranks-th item, in blocks: an item's endings may lie in two batches, so that items are counted when the whole
 * block has been scored. */
static int score_share(struct scorer *s, struct error *e) {
    int64_t ranks = s->m->comm->ranks, items = s->data->items;
    enum { BLOCK = 256 }; /* items whose scores are kept */
    double(*scores)[MAX_CHOICE_ENDINGS] = malloc(BLOCK * sizeof *scores);
    struct choice item;
    if (!scores)
        return fail_run(e, "out of memory for the scores of choices");
    for (int64_t first = s->m->comm->rank; first < items; first += BLOCK * ranks) {
        for (int64_t n = 0; n < BLOCK && first + n * ranks < items; n++) {
            s->data->read(s->data->source, first + n * ranks, &item);
            for (int k = 0; k < item.endings; k++)
                add(s, &item, k, &scores[n][k]);
        }
        flush(s);
        for (int64_t n = 0; n < BLOCK && first + n * ranks < items; n++) {
            s->data->read(s->data->source, first + n * ranks, &item);
            count(s->scores, &item, scores[n]);
        }
    }
    free(scores);
    return 0;
}

static void merge(struct comm *comm, struct choice_scores *v) {
    const struct choice_scores *all = comm_all_gather_small(comm, v, sizeof *v);
    struct choice_scores sum = {0};
    for (int i = 0; i < comm->ranks; i++) {
        sum.items += all[i].items;
        sum.cut += all[i].cut;
        sum.correct += all[i].correct;
        sum.correct_norm += all[i].correct_norm;
        sum.chance += all[i].chance;
    }
    *v = sum;
    v->chance /= (double)v->items;
}

int score_choices(struct model *m, const struct choice_data *data, struct choice_scores *scores,
                  struct error *e) {
    struct scorer s = {.m = m, .data = data, .scores = scores};
    struct step_state before;
    *scores = (struct choice_scores){0};
    int status = create(&s, e);
    m->k->step_read(m->dev, m->state, &before);
    if (status == 0)
        status = score_share(&s, e);
    m->k->step_write(m->dev, m->state, &before);
    destroy(&s);
    if (comm_agree(m->comm, status, e) != 0)
        return -1;
    merge(m->comm, scores);
    return 0;
}

void choice_scores_print(FILE *out, int64_t step, const struct choice_data *data,
                         const struct choice_scores *scores, int count) {
    int width = 12;
    for (int i = 0; i < count; i++)
        width = (int)strlen(data[i].name) > width ? (int)strlen(data[i].name) : width;
    width = width > 36 ? 36 : width;
    if (step >= 0)
        fprintf(out, "step %lld: ", (long long)step);
    fprintf(out, "choices\n  %-*s %8s %8s %9s %12s\n", width, "", "items", "chance", "accuracy",
            "normalised");
    for (int i = 0; i < count; i++) {
        const struct choice_scores *v = &scores[i];
        double n = (double)v->items / 100;
        fprintf(out, "  %-*.*s %8lld %7.1f%% %8.1f%% %11.1f%%", width, width, data[i].name,
                (long long)v->items, 100 * v->chance, (double)v->correct / n, (double)v->correct_norm / n);
        if (v->cut > 0)
            fprintf(out, "  (%lld contexts cut)", (long long)v->cut);
        fputc('\n', out);
    }
}

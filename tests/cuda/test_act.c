/* mlp_act of the CUDA backend against the CPU backend, forward and backward. */
#include "tests/cuda/op_run.h"

enum { U, GATE, OUT, DOUT, DU, DGATE };

/* In place, as the model calls it: du over dout, dgate over gate. */
static void check_in_place(struct op_run *r) {
    EACH(r->k, b)
    b->k->mlp_act_backward(b->dev, &r->spec.act, on(r->x[DOUT], b), on(r->x[U], b), on(r->x[GATE], b),
                           on(r->x[DOUT], b), on(r->x[GATE], b));
    expect_close("mlp_act, in place", "du", r->k, r->x[DOUT]);
    if (r->info[GATE].name)
        expect_close("mlp_act, in place", "dgate", r->k, r->x[GATE]);
}

/* swiglu of the columns of one product's output [N,2F], and backward over them, as the model calls both. */
static void check_columns(enum device_precision precision, const struct act_spec *s) {
    int64_t N = s->rows, F = s->hidden;
    struct backends *k = backends(precision);
    struct operand both = scaled_input(k, k->compute, 4, 0, N, 2 * F, 0, 0, 0),
                   out = output(k, k->compute, N, F, 0, 0, 0), dout = input(k, k->compute, N, F, 0, 0, 0);
    EACH(k, b) {
        tensor u = tensor_part(on(both, b), 1, 0, F), gate = tensor_part(on(both, b), 1, F, F);
        b->k->mlp_act(b->dev, s, u, gate, on(out, b));
        b->k->mlp_act_backward(b->dev, s, on(dout, b), u, gate, u, gate);
    }
    expect_close("mlp_act of columns", "out", k, out);
    expect_close("mlp_act of columns", "du and dgate", k, both);
    done(k);
}

static void check(enum device_precision precision, const struct op_case *c) {
    struct op_run r;
    run_open(&r, precision, c);
    run_both(&r);
    run_expect_close(&r);
    check_in_place(&r);
    done(r.k);
    if (c->spec.act.type == ACT_SWIGLU)
        check_columns(precision, &c->spec.act);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        EVERY_CASE("act_fp32", OP_ACT, DEVICE_FP32, check),
        EVERY_CASE("act_bf16", OP_ACT, DEVICE_BF16, check),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

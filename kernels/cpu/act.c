/* mlp_act: the activation between the two halves of the MLP.
 *
 *   gelu_tanh  f(u) = u sigma(2z), z = sqrt(2/pi) (u + 0.044715 u^3)      (Hendrycks & Gimpel 2016;
 *              (1 + tanh z) / 2 = sigma(2z), which takes one exponential and one division)
 *   relu2      f(u) = max(u, 0)^2
 *   swiglu     silu(gate) u, silu(g) = g sigma(g) */
#include "kernels/cpu/cpu.h"

static const real GELU_SCALE = (real)1.5957691216057308; /* 2 sqrt(2/pi) */
static const real GELU_CUBE = (real)0.044715;

static inline vreal sigmoid(vreal x) {
    return 1 / (1 + vexp(-x));
}

static inline vreal gelu(vreal u) {
    return u * sigmoid(GELU_SCALE * (u + GELU_CUBE * u * u * u));
}

static inline vreal gelu_derivative(vreal u) {
    vreal s = sigmoid(GELU_SCALE * (u + GELU_CUBE * u * u * u));
    return s + u * s * (1 - s) * GELU_SCALE * (1 + 3 * GELU_CUBE * u * u);
}

static inline vreal relu(vreal u) {
    return vselect(u < 0, vsplat(0), u); /* NaN stays */
}

static inline vreal act_value(enum act_type type, vreal u, vreal gate) {
    switch (type) {
    case ACT_GELU_TANH:
        return gelu(u);
    case ACT_RELU2:
        return relu(u) * relu(u);
    case ACT_SWIGLU:
        break;
    }
    return gate * sigmoid(gate) * u;
}

/* du from dout; for swiglu also dgate. */
static inline vreal act_gradient(enum act_type type, vreal dout, vreal u, vreal gate, vreal *dgate) {
    switch (type) {
    case ACT_GELU_TANH:
        return dout * gelu_derivative(u);
    case ACT_RELU2:
        return dout * 2 * relu(u);
    case ACT_SWIGLU:
        break;
    }
    vreal s = sigmoid(gate);
    *dgate = dout * u * s * (1 + gate * (1 - s));
    return dout * gate * s;
}

void CPU(mlp_act)(struct device *dev, const struct act_spec *s, tensor u, tensor gate, tensor out) {
    (void)dev;
    int64_t F = s->hidden;
    check_elem("mlp_act", "u", u, s->rows, F, 0, 0, 0);
    check_elem("mlp_act", "out", out, s->rows, F, 0, 0, 0);
    bool gated = s->type == ACT_SWIGLU;
    if (gated)
        check_elem("mlp_act", "gate", gate, s->rows, F, 0, 0, 0);
#pragma omp parallel for
    for (int64_t n = 0; n < s->rows; n++) {
        const elem *up = (elem *)u.data + n * u.stride[0];
        const elem *g = gated ? (elem *)gate.data + n * gate.stride[0] : up;
        elem *o = (elem *)out.data + n * out.stride[0];
        int64_t c = 0;
        for (; c + VL <= F; c += VL)
            vstore_elem(o + c, act_value(s->type, vload_elem(up + c), vload_elem(g + c)));
        if (c < F)
            store_part(o + c, act_value(s->type, load_part(up + c, F - c), load_part(g + c, F - c)), F - c);
    }
}

void CPU(mlp_act_backward)(struct device *dev, const struct act_spec *s, tensor dout, tensor u, tensor gate,
                           tensor du, tensor dgate) {
    (void)dev;
    int64_t F = s->hidden;
    check_elem("mlp_act_backward", "dout", dout, s->rows, F, 0, 0, 0);
    check_elem("mlp_act_backward", "u", u, s->rows, F, 0, 0, 0);
    check_elem("mlp_act_backward", "du", du, s->rows, F, 0, 0, 0);
    bool gated = s->type == ACT_SWIGLU;
    if (gated) {
        check_elem("mlp_act_backward", "gate", gate, s->rows, F, 0, 0, 0);
        check_elem("mlp_act_backward", "dgate", dgate, s->rows, F, 0, 0, 0);
    }
#pragma omp parallel for
    for (int64_t n = 0; n < s->rows; n++) {
        const elem *d = (elem *)dout.data + n * dout.stride[0], *up = (elem *)u.data + n * u.stride[0];
        const elem *g = gated ? (elem *)gate.data + n * gate.stride[0] : up;
        elem *out = (elem *)du.data + n * du.stride[0];
        elem *out_gate = gated ? (elem *)dgate.data + n * dgate.stride[0] : NULL;
        vreal dg = {0};
        int64_t c = 0;
        for (; c + VL <= F; c += VL) {
            vstore_elem(out + c,
                        act_gradient(s->type, vload_elem(d + c), vload_elem(up + c), vload_elem(g + c), &dg));
            if (gated)
                vstore_elem(out_gate + c, dg);
        }
        if (c < F) {
            int64_t rest = F - c;
            vreal result = act_gradient(s->type, load_part(d + c, rest), load_part(up + c, rest),
                                        load_part(g + c, rest), &dg);
            store_part(out + c, result, rest);
            if (gated)
                store_part(out_gate + c, dg, rest);
        }
    }
}

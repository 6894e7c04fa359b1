/* mlp_act: the activation between the two halves of the MLP.
 *
 *   gelu_tanh  f(u) = u sigma(2z), z = sqrt(2/pi) (u + 0.044715 u^3)      (Hendrycks & Gimpel 2016; since
 *              (1 + tanh z) / 2 = sigma(2z), one exponential and one division do)
 *   relu2      f(u) = max(u, 0)^2
 *   swiglu     silu(gate) u, silu(g) = g sigma(g)
 *
 * out and dout are one run of n = N F elements; so are the others, or columns of wider rows. Bytes moved: forward 2 n
 * (swiglu 3 n), backward 3 n (swiglu 5 n), times the size of an element. */
#include "kernels/cuda/cuda.cuh"

enum { THREADS = 256, UNROLL = 2 /* vectors a thread has in flight at once, to hide the latency of loads */ };

/* For bf16 results the fast intrinsics are exact enough; the accurate ones would take as long as the memory
 * accesses do. */
template <typename T> static __device__ __forceinline__ float sigmoid(float x) {
    if constexpr (sizeof(T) == 2)
        return __fdividef(1, 1 + __expf(-x));
    else
        return 1 / (1 + expf(-x));
}

static __device__ __forceinline__ float gelu_argument(float u) {
    const float scale = 1.5957691216057308f /* 2 sqrt(2/pi) */, cube = 0.044715f;
    return scale * (u + cube * u * u * u);
}

template <typename T, enum act_type TYPE> static __device__ __forceinline__ float value(float u, float gate) {
    if constexpr (TYPE == ACT_GELU_TANH)
        return u * sigmoid<T>(gelu_argument(u));
    float r = u < 0 ? 0 : u; /* NaN stays */
    if constexpr (TYPE == ACT_RELU2)
        return r * r;
    return gate * sigmoid<T>(gate) * u;
}

/* du from dout; for swiglu also dgate. */
template <typename T, enum act_type TYPE>
static __device__ __forceinline__ float gradient(float dout, float u, float gate, float *dgate) {
    if constexpr (TYPE == ACT_GELU_TANH) {
        const float scale = 1.5957691216057308f, cube = 0.044715f;
        float s = sigmoid<T>(gelu_argument(u));
        return dout * (s + u * s * (1 - s) * scale * (1 + 3 * cube * u * u));
    }
    if constexpr (TYPE == ACT_RELU2)
        return dout * 2 * (u < 0 ? 0 : u);
    float s = sigmoid<T>(gate);
    *dgate = dout * u * s * (1 + gate * (1 - s));
    return dout * gate * s;
}

/* Of u, gate and their gradients: F columns, and the elements from a row's end to the next row. */
struct wide_rows {
    int64_t columns, gap;
};

/* The offset of element i of the run, the first of V in one row. */
template <int V> static __device__ __forceinline__ int64_t row_offset(struct wide_rows rows, int64_t i) {
    if (rows.gap == 0)
        return i;
    if constexpr (V > 1) /* 32 bits divide several times as fast as 64 */
        return i + (int64_t)((uint32_t)(i / V) / (uint32_t)(rows.columns / V)) * rows.gap;
    return i + i / rows.columns * rows.gap;
}

/* Grid: n / (THREADS UNROLL V) blocks; V elements a thread at a time, the last n mod V one by one. */
template <typename T, enum act_type TYPE, int V>
static __global__ void __launch_bounds__(THREADS)
    act_forward(const T *u, const T *gate, T *out, struct wide_rows rows, int64_t n) {
    wait_for_previous();
    int64_t first = ((int64_t)blockIdx.x * UNROLL * THREADS + threadIdx.x) * V;
    /* Not yet converted to fp32: that would wait for one vector before the next is loaded. */
    word_of<V, T> packed_x[UNROLL], packed_g[UNROLL];
#pragma unroll
    for (int k = 0; k < UNROLL; k++) {
        int64_t i = first + k * THREADS * V;
        if (i + V <= n) {
            int64_t at = row_offset<V>(rows, i);
            packed_x[k] = load_word<V>(u + at);
            if (TYPE == ACT_SWIGLU)
                packed_g[k] = load_word<V>(gate + at);
        }
    }
#pragma unroll
    for (int k = 0; k < UNROLL; k++) {
        int64_t i = first + k * THREADS * V;
        if (i + V <= n) {
            float x[V], g[V];
            unpack<V, T>(packed_x[k], x);
            if (TYPE == ACT_SWIGLU)
                unpack<V, T>(packed_g[k], g);
#pragma unroll
            for (int j = 0; j < V; j++)
                x[j] = value<T, TYPE>(x[j], TYPE == ACT_SWIGLU ? g[j] : 0);
            store(out + i, x);
        } else { /* only where all is one run */
            for (; i < n && i < first + k * THREADS * V + V; i++)
                out[i] =
                    from_float<T>(value<T, TYPE>(to_float(u[i]), TYPE == ACT_SWIGLU ? to_float(gate[i]) : 0));
        }
    }
}

/* The same grid. du may be u, or dout where rows have no gap, dgate may be gate: threads read their elements before they write. */
template <typename T, enum act_type TYPE, int V>
static __global__ void __launch_bounds__(THREADS)
    act_backward(const T *dout, const T *u, const T *gate, T *du, T *dgate, struct wide_rows rows,
                 int64_t n) {
    wait_for_previous();
    int64_t first = ((int64_t)blockIdx.x * UNROLL * THREADS + threadIdx.x) * V;
    /* Not yet converted to fp32: that would wait for one vector before the next is loaded. */
    word_of<V, T> packed_d[UNROLL], packed_x[UNROLL], packed_g[UNROLL];
#pragma unroll
    for (int k = 0; k < UNROLL; k++) {
        int64_t i = first + k * THREADS * V;
        if (i + V <= n) {
            packed_d[k] = load_word<V>(dout + i);
            int64_t at = row_offset<V>(rows, i);
            packed_x[k] = load_word<V>(u + at);
            if (TYPE == ACT_SWIGLU)
                packed_g[k] = load_word<V>(gate + at);
        }
    }
#pragma unroll
    for (int k = 0; k < UNROLL; k++) {
        int64_t i = first + k * THREADS * V;
        if (i + V <= n) {
            float d[V], x[V], g[V];
            unpack<V, T>(packed_d[k], d);
            unpack<V, T>(packed_x[k], x);
            if (TYPE == ACT_SWIGLU)
                unpack<V, T>(packed_g[k], g);
#pragma unroll
            for (int j = 0; j < V; j++)
                x[j] = gradient<T, TYPE>(d[j], x[j], TYPE == ACT_SWIGLU ? g[j] : 0, &g[j]);
            int64_t at = row_offset<V>(rows, i);
            store(du + at, x);
            if (TYPE == ACT_SWIGLU)
                store(dgate + at, g);
        } else { /* only where all is one run */
            for (; i < n && i < first + k * THREADS * V + V; i++) {
                float gate_slope = 0, gate_value = TYPE == ACT_SWIGLU ? to_float(gate[i]) : 0;
                float slope = gradient<T, TYPE>(to_float(dout[i]), to_float(u[i]), gate_value, &gate_slope);
                du[i] = from_float<T>(slope);
                if (TYPE == ACT_SWIGLU)
                    dgate[i] = from_float<T>(gate_slope);
            }
        }
    }
}

/* Call f with the activation as a constant, and the vector width that the addresses allow. */
template <typename T, typename F> static void by_type(enum act_type type, bool aligned, F f) {
    auto by_vector = [&](auto type_constant) {
        if (aligned)
            f(type_constant, std::integral_constant<int, VECTOR<T>>());
        else
            f(type_constant, std::integral_constant<int, 1>());
    };
    if (type == ACT_GELU_TANH)
        by_vector(std::integral_constant<enum act_type, ACT_GELU_TANH>());
    else if (type == ACT_RELU2)
        by_vector(std::integral_constant<enum act_type, ACT_RELU2>());
    else
        by_vector(std::integral_constant<enum act_type, ACT_SWIGLU>());
}

static void check(struct device *dev, const struct act_spec *s, const char *op, const char *what, tensor t) {
    check_shape(op, what, t, cuda_compute(dev), s->rows, s->hidden);
    check_contiguous(op, what, t);
}

/* Tensors of the same rows as u. */
static void check_rows(struct device *dev, const char *op, const char *what, tensor u, tensor t) {
    check_shape(op, what, t, cuda_compute(dev), u.shape[0], u.shape[1]);
    check_row_stride(op, what, t, u.stride[0]);
}

static struct wide_rows rows_of(tensor u) {
    return {u.shape[1], u.stride[0] - u.shape[1]};
}

/* Whether no vector of a thread crosses the end of a row. */
template <typename T> static bool whole_vectors(struct wide_rows rows) {
    return rows.gap == 0 || (rows.columns % VECTOR<T> == 0 && rows.gap % VECTOR<T> == 0);
}

void cuda_mlp_act(struct device *dev, const struct act_spec *s, tensor u, tensor gate, tensor out) {
    check_shape("mlp_act", "u", u, cuda_compute(dev), s->rows, s->hidden);
    check(dev, s, "mlp_act", "out", out);
    if (s->type == ACT_SWIGLU)
        check_rows(dev, "mlp_act", "gate", u, gate);
    int64_t n = s->rows * s->hidden;
    struct wide_rows rows = rows_of(u);
    by_dtype(u.dtype, [&](auto number) {
        using T = decltype(number);
        by_type<T>(s->type, whole_vectors<T>(rows) && aligned16({u.data, gate.data, out.data}),
                   [&](auto type, auto width) {
                       constexpr enum act_type TYPE = decltype(type)::value;
                       constexpr int V = decltype(width)::value;
                       launch<act_forward<T, TYPE, V>>(dev, ceil_div(n, THREADS * UNROLL * V), THREADS, 0,
                                                       (const T *)u.data, (const T *)gate.data, (T *)out.data,
                                                       rows, n);
                   });
    });
}

void cuda_mlp_act_backward(struct device *dev, const struct act_spec *s, tensor dout, tensor u, tensor gate,
                           tensor du, tensor dgate) {
    check(dev, s, "mlp_act_backward", "dout", dout);
    check_shape("mlp_act_backward", "u", u, cuda_compute(dev), s->rows, s->hidden);
    check_rows(dev, "mlp_act_backward", "du", u, du);
    if (s->type == ACT_SWIGLU) {
        check_rows(dev, "mlp_act_backward", "gate", u, gate);
        check_rows(dev, "mlp_act_backward", "dgate", u, dgate);
    }
    int64_t n = s->rows * s->hidden;
    struct wide_rows rows = rows_of(u);
    bool aligned = aligned16({dout.data, u.data, gate.data, du.data, dgate.data});
    by_dtype(u.dtype, [&](auto number) {
        using T = decltype(number);
        by_type<T>(s->type, aligned && whole_vectors<T>(rows), [&](auto type, auto width) {
            constexpr enum act_type TYPE = decltype(type)::value;
            constexpr int V = decltype(width)::value;
            launch<act_backward<T, TYPE, V>>(dev, ceil_div(n, THREADS * UNROLL * V), THREADS, 0,
                                             (const T *)dout.data, (const T *)u.data, (const T *)gate.data,
                                             (T *)du.data, (T *)dgate.data, rows, n);
        });
    });
}

/* The only file that knows cuDNN: its frontend's graphs behind attention_cudnn.h. Compiled by g++, since nvcc
 * takes minutes for the frontend's headers. No exception leaves it. */
#include "kernels/cuda/attention/attention_cudnn.h"

#include <cudnn_frontend.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace fe = cudnn_frontend;

/* Names of tensors in a graph. */
enum uid : int64_t { Q = 1, K, V, O, STATISTICS, D_O, DQ, DK, DV };

/* A graph's shape, masks and strides, bit for bit: two graphs of one key are the same. */
typedef std::array<int64_t, 32> graph_key;

struct built_graph {
    std::shared_ptr<fe::graph::Graph> graph;
    std::unordered_map<int64_t, void *> pointers; /* filled anew by every call */
    size_t workspace;
};

struct cudnn_attention {
    cudnnHandle_t handle;                            /* NULL: the GPU is only described */
    std::shared_ptr<fe::DeviceProperties> described; /* NULL: the GPU is the handle's */
    std::map<graph_key, built_graph> graphs;
};

static void say(char *why, const std::string &text) {
    if (text.find("No valid engine configs") != std::string::npos)
        snprintf(why, CUDNN_ATTENTION_REASON,
                 "cuDNN has nothing for this shape on this GPU, or no libnvrtc to compile it with "
                 "(CUDNN_LOGLEVEL_DBG=2 CUDNN_LOGDEST_DBG=stderr tells)");
    else
        snprintf(why, CUDNN_ATTENTION_REASON, "%s", text.substr(0, text.find('\n')).c_str());
}

/* cuDNN compiles its attention with libnvrtc, for which it looks beside itself and where the system looks.
 * The one that was there at the build, once loaded, is the one it finds. */
static void load_compiler(void) {
#ifdef NVRTC_LIBRARY
    dlopen(NVRTC_LIBRARY, RTLD_LAZY);
#endif
}

/* Run f, which throws or returns an error of the frontend; 0, or -1 and why. */
template <typename F> static int guarded(char *why, F f) {
    try {
        fe::error_t status = f();
        if (status.is_good())
            return 0;
        say(why, status.get_message());
    } catch (const std::exception &e) {
        say(why, e.what());
    } catch (...) {
        say(why, "an exception of no known type");
    }
    return -1;
}

size_t cudnn_attention_version(void) {
    return cudnnGetVersion();
}

struct cudnn_attention *cudnn_attention_open(cudaStream_t stream, char *why) {
    struct cudnn_attention *a = nullptr;
    load_compiler();
    int status = guarded(why, [&]() -> fe::error_t {
        cudnnHandle_t handle;
        cudnnStatus_t s = cudnnCreate(&handle);
        if (s == CUDNN_STATUS_SUCCESS && (s = cudnnSetStream(handle, stream)) != CUDNN_STATUS_SUCCESS)
            cudnnDestroy(handle);
        if (s != CUDNN_STATUS_SUCCESS)
            return {fe::error_code_t::HANDLE_ERROR, std::string("cudnnCreate: ") + cudnnGetErrorString(s)};
        a = new cudnn_attention{handle, nullptr, {}};
        return {};
    });
    return status == 0 ? a : nullptr;
}

struct cudnn_attention *cudnn_attention_open_described(const char *json, char *why) {
    struct cudnn_attention *a = nullptr;
    load_compiler();
    int status = guarded(why, [&]() -> fe::error_t {
        auto described = std::make_shared<fe::DeviceProperties>();
        fe::error_t read = described->deserialize(std::vector<uint8_t>(json, json + strlen(json)));
        if (read.is_good())
            a = new cudnn_attention{nullptr, described, {}};
        return read;
    });
    return status == 0 ? a : nullptr;
}

void cudnn_attention_close(struct cudnn_attention *a) {
    if (!a)
        return;
    a->graphs.clear();
    if (a->handle)
        cudnnDestroy(a->handle);
    delete a;
}

/* ---- graphs ---- */

static graph_key key_of(const struct cudnn_attention_shape *s, const struct cudnn_attention_layout *l,
                        bool backward) {
    graph_key key = {};
    size_t at = 0;
    int64_t scale;
    static_assert(sizeof scale == sizeof s->scale, "a double's bits");
    memcpy(&scale, &s->scale, sizeof scale);
    for (int64_t x : {s->batch, s->length, s->heads, s->head_dim, s->window, (int64_t)s->causal,
                      backward ? (int64_t)1 + s->deterministic : (int64_t)0, scale})
        key[at++] = x;
    const struct cudnn_attention_strides *all = &l->q;
    for (int i = 0; i < (backward ? 8 : 4); i++)
        for (int64_t x : {all[i].batch, all[i].token, all[i].head})
            key[at++] = x;
    return key;
}

static fe::graph::Tensor_attributes tensor_named(int64_t uid, const struct cudnn_attention_shape *s,
                                                 struct cudnn_attention_strides t) {
    return fe::graph::Tensor_attributes()
        .set_uid(uid)
        .set_dim({s->batch, s->heads, s->length, s->head_dim})
        .set_stride({t.batch, t.head, t.token, 1})
        .set_data_type(fe::DataType_t::BFLOAT16);
}

static fe::graph::Tensor_attributes statistics_of(const struct cudnn_attention_shape *s) {
    return fe::graph::Tensor_attributes()
        .set_uid(STATISTICS)
        .set_dim({s->batch, s->heads, s->length, 1})
        .set_stride({s->heads * s->length, s->length, 1, 1})
        .set_data_type(fe::DataType_t::FLOAT);
}

/* What an operation's output tensor is: name, shape and place. */
static void place(std::shared_ptr<fe::graph::Tensor_attributes> &output, fe::graph::Tensor_attributes as) {
    output->set_output(true)
        .set_uid(as.get_uid())
        .set_dim(as.get_dim())
        .set_stride(as.get_stride())
        .set_data_type(as.get_data_type());
}

/* Masks and scale, which forward and backward name alike. A left bound of W shows W keys, the query's own
 * among them; without the right bound it would show all later ones too. */
template <typename Attributes> static Attributes masked(const struct cudnn_attention_shape *s, Attributes a) {
    a.set_attn_scale((float)s->scale);
    if (s->causal)
        a.set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT).set_diagonal_band_right_bound(0);
    if (s->window > 0)
        a.set_diagonal_band_left_bound((int)s->window);
    return a;
}

static void describe_forward(fe::graph::Graph &g, const struct cudnn_attention_shape *s,
                             const struct cudnn_attention_layout *l) {
    auto q = g.tensor(tensor_named(Q, s, l->q)), k = g.tensor(tensor_named(K, s, l->k)),
         v = g.tensor(tensor_named(V, s, l->v));
    auto options = masked(s, fe::graph::SDPA_attributes().set_name("attention").set_generate_stats(true));
    auto [o, statistics] = g.sdpa(q, k, v, options);
    place(o, tensor_named(O, s, l->o));
    place(statistics, statistics_of(s));
}

static void describe_backward(fe::graph::Graph &g, const struct cudnn_attention_shape *s,
                              const struct cudnn_attention_layout *l) {
    auto q = g.tensor(tensor_named(Q, s, l->q)), k = g.tensor(tensor_named(K, s, l->k)),
         v = g.tensor(tensor_named(V, s, l->v)), o = g.tensor(tensor_named(O, s, l->o)),
         d_o = g.tensor(tensor_named(D_O, s, l->d_o)), statistics = g.tensor(statistics_of(s));
    auto options = masked(s, fe::graph::SDPA_backward_attributes()
                                 .set_name("attention_backward")
                                 .set_deterministic_algorithm(s->deterministic));
    auto [dq, dk, dv] = g.sdpa_backward(q, k, v, o, d_o, statistics, options);
    place(dq, tensor_named(DQ, s, l->dq));
    place(dk, tensor_named(DK, s, l->dk));
    place(dv, tensor_named(DV, s, l->dv));
}

static fe::error_t build(struct cudnn_attention *a, const struct cudnn_attention_shape *s,
                         const struct cudnn_attention_layout *l, bool backward, struct built_graph *out) {
    auto g = std::make_shared<fe::graph::Graph>();
    g->set_io_data_type(fe::DataType_t::BFLOAT16)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
    if (backward)
        describe_backward(*g, s, l);
    else
        describe_forward(*g, s, l);
    std::vector<fe::HeurMode_t> heuristics = {fe::HeurMode_t::A, fe::HeurMode_t::FALLBACK};
    fe::error_t status = a->described ? g->set_device_properties(a->described).build(heuristics)
                                      : g->build(a->handle, heuristics);
    int64_t workspace = 0;
    if (status.is_good())
        status = g->get_workspace_size(workspace);
    *out = {g, {}, (size_t)workspace};
    for (int64_t uid = Q; uid <= (backward ? DV : STATISTICS); uid++)
        out->pointers[uid] = nullptr;
    return status;
}

int cudnn_attention_plan(struct cudnn_attention *a, const struct cudnn_attention_shape *s,
                         const struct cudnn_attention_layout *l, bool backward, size_t *workspace,
                         char *why) {
    return guarded(why, [&]() -> fe::error_t {
        graph_key key = key_of(s, l, backward);
        auto found = a->graphs.find(key);
        if (found == a->graphs.end()) {
            struct built_graph built;
            fe::error_t status = build(a, s, l, backward, &built);
            if (status.is_bad())
                return status;
            found = a->graphs.emplace(key, std::move(built)).first;
        }
        *workspace = found->second.workspace;
        return {};
    });
}

static int run(struct cudnn_attention *a, const struct cudnn_attention_shape *s,
               const struct cudnn_attention_layout *l, bool backward,
               std::initializer_list<const void *> pointers, void *workspace, char *why) {
    return guarded(why, [&]() -> fe::error_t {
        auto found = a->graphs.find(key_of(s, l, backward));
        if (found == a->graphs.end())
            return {fe::error_code_t::INVALID_VALUE, "no graph was planned for these strides"};
        int64_t uid = Q;
        for (const void *p : pointers)
            found->second.pointers[uid++] = const_cast<void *>(p);
        return found->second.graph->execute(a->handle, found->second.pointers, workspace);
    });
}

int cudnn_attention_forward(struct cudnn_attention *a, const struct cudnn_attention_shape *s,
                            const struct cudnn_attention_layout *l, const void *q, const void *k,
                            const void *v, void *o, void *statistics, void *workspace, char *why) {
    return run(a, s, l, false, {q, k, v, o, statistics}, workspace, why);
}

int cudnn_attention_backward(struct cudnn_attention *a, const struct cudnn_attention_shape *s,
                             const struct cudnn_attention_layout *l, const void *q, const void *k,
                             const void *v, const void *o, const void *d_o, const void *statistics, void *dq,
                             void *dk, void *dv, void *workspace, char *why) {
    return run(a, s, l, true, {q, k, v, o, statistics, d_o, dq, dk, dv}, workspace, why);
}

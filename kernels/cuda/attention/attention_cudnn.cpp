/* The only file that uses cuDNN: builds and runs its frontend's graphs behind the C functions of
 * attention_cudnn.h. Compiled with g++, because nvcc takes minutes over the frontend's headers. No exception
 * leaves this file. */
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

/* Identifiers of tensors in a graph. */
enum uid : int64_t { Q = 1, K, V, O, STATISTICS, D_O, DQ, DK, DV };

/* A graph's shape, masks and strides, bit for bit: graphs with equal keys are the same. */
typedef std::array<int64_t, 40> graph_key;

struct built_graph {
    std::shared_ptr<fe::graph::Graph> graph;
    std::unordered_map<int64_t, void *> pointers; /* by uid; set by every call */
    size_t workspace;
};

struct attention_cudnn {
    cudnnHandle_t handle;                             /* NULL: deviceless, plans only */
    std::shared_ptr<fe::DeviceProperties> properties; /* of the GPU to plan for; NULL: the handle's GPU */
    std::map<graph_key, built_graph> graphs;
};

static void set_reason(char *why, const std::string &text) {
    if (text.find("No valid engine configs") != std::string::npos)
        snprintf(why, ATTENTION_CUDNN_REASON,
                 "cuDNN has no kernel for this shape on this GPU, or no libnvrtc to compile it with "
                 "(CUDNN_LOGLEVEL_DBG=2 CUDNN_LOGDEST_DBG=stderr shows which)");
    else
        snprintf(why, ATTENTION_CUDNN_REASON, "%s", text.substr(0, text.find('\n')).c_str());
}

/* cuDNN compiles its attention kernels with libnvrtc, which it searches for beside itself and on the system's
 * library path. Loading the libnvrtc found at build time first makes cuDNN use that one. */
static void load_nvrtc(void) {
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
        set_reason(why, status.get_message());
    } catch (const std::exception &e) {
        set_reason(why, e.what());
    } catch (...) {
        set_reason(why, "unknown exception");
    }
    return -1;
}

size_t attention_cudnn_version(void) {
    return cudnnGetVersion();
}

struct attention_cudnn *attention_cudnn_open(cudaStream_t stream, char *why) {
    struct attention_cudnn *a = nullptr;
    load_nvrtc();
    int status = guarded(why, [&]() -> fe::error_t {
        cudnnHandle_t handle;
        cudnnStatus_t s = cudnnCreate(&handle);
        if (s == CUDNN_STATUS_SUCCESS && (s = cudnnSetStream(handle, stream)) != CUDNN_STATUS_SUCCESS)
            cudnnDestroy(handle);
        if (s != CUDNN_STATUS_SUCCESS)
            return {fe::error_code_t::HANDLE_ERROR, std::string("cudnnCreate: ") + cudnnGetErrorString(s)};
        a = new attention_cudnn{handle, nullptr, {}};
        return {};
    });
    return status == 0 ? a : nullptr;
}

struct attention_cudnn *attention_cudnn_open_deviceless(const char *json, char *why) {
    struct attention_cudnn *a = nullptr;
    load_nvrtc();
    int status = guarded(why, [&]() -> fe::error_t {
        auto properties = std::make_shared<fe::DeviceProperties>();
        fe::error_t parsed = properties->deserialize(std::vector<uint8_t>(json, json + strlen(json)));
        if (parsed.is_good())
            a = new attention_cudnn{nullptr, properties, {}};
        return parsed;
    });
    return status == 0 ? a : nullptr;
}

void attention_cudnn_close(struct attention_cudnn *a) {
    if (!a)
        return;
    a->graphs.clear();
    if (a->handle)
        cudnnDestroy(a->handle);
    delete a;
}

/* ---- graphs ---- */

static graph_key key_of(const struct attention_cudnn_shape *s, const struct attention_cudnn_layout *l,
                        bool backward) {
    graph_key key = {};
    size_t count = 0;
    int64_t scale;
    static_assert(sizeof scale == sizeof s->scale, "a double's bits");
    memcpy(&scale, &s->scale, sizeof scale);
    for (int64_t x : {s->batch, s->length, s->heads, s->head_dim, s->window, (int64_t)s->causal,
                      backward ? (int64_t)1 + s->deterministic : (int64_t)0, scale, s->kv_heads})
        key[count++] = x;
    const struct attention_cudnn_strides *all = &l->q;
    for (int i = 0; i < (backward ? 8 : 4); i++)
        for (int64_t x : {all[i].batch, all[i].token, all[i].head})
            key[count++] = x;
    return key;
}

static fe::graph::Tensor_attributes tensor_attributes(int64_t uid, const struct attention_cudnn_shape *s,
                                                      struct attention_cudnn_strides t) {
    bool of_keys = uid == K || uid == V || uid == DK || uid == DV;
    return fe::graph::Tensor_attributes()
        .set_uid(uid)
        .set_dim({s->batch, of_keys ? s->kv_heads : s->heads, s->length, s->head_dim})
        .set_stride({t.batch, t.head, t.token, 1})
        .set_data_type(fe::DataType_t::BFLOAT16);
}

static fe::graph::Tensor_attributes statistics_attributes(const struct attention_cudnn_shape *s) {
    return fe::graph::Tensor_attributes()
        .set_uid(STATISTICS)
        .set_dim({s->batch, s->heads, s->length, 1})
        .set_stride({s->heads * s->length, s->length, 1, 1})
        .set_data_type(fe::DataType_t::FLOAT);
}

/* Give an operation's output the identifier, shape, strides and type of `as`. */
static void set_output(std::shared_ptr<fe::graph::Tensor_attributes> &output,
                       fe::graph::Tensor_attributes as) {
    output->set_output(true)
        .set_uid(as.get_uid())
        .set_dim(as.get_dim())
        .set_stride(as.get_stride())
        .set_data_type(as.get_data_type());
}

/* Set masks and scale, which forward and backward call alike. A left bound of W keeps W keys, the query's own
 * position included; without the right bound all later keys would be visible too. */
template <typename Attributes>
static Attributes with_mask(const struct attention_cudnn_shape *s, Attributes a) {
    a.set_attn_scale((float)s->scale);
    if (s->causal)
        a.set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT).set_diagonal_band_right_bound(0);
    if (s->window > 0)
        a.set_diagonal_band_left_bound((int)s->window);
    return a;
}

static void add_forward(fe::graph::Graph &g, const struct attention_cudnn_shape *s,
                        const struct attention_cudnn_layout *l) {
    auto q = g.tensor(tensor_attributes(Q, s, l->q)), k = g.tensor(tensor_attributes(K, s, l->k)),
         v = g.tensor(tensor_attributes(V, s, l->v));
    auto options = with_mask(s, fe::graph::SDPA_attributes().set_name("attention").set_generate_stats(true));
    auto [o, statistics] = g.sdpa(q, k, v, options);
    set_output(o, tensor_attributes(O, s, l->o));
    set_output(statistics, statistics_attributes(s));
}

static void add_backward(fe::graph::Graph &g, const struct attention_cudnn_shape *s,
                         const struct attention_cudnn_layout *l) {
    auto q = g.tensor(tensor_attributes(Q, s, l->q)), k = g.tensor(tensor_attributes(K, s, l->k)),
         v = g.tensor(tensor_attributes(V, s, l->v)), o = g.tensor(tensor_attributes(O, s, l->o)),
         d_o = g.tensor(tensor_attributes(D_O, s, l->d_o)), statistics = g.tensor(statistics_attributes(s));
    auto options = with_mask(s, fe::graph::SDPA_backward_attributes()
                                    .set_name("attention_backward")
                                    .set_deterministic_algorithm(s->deterministic));
    auto [dq, dk, dv] = g.sdpa_backward(q, k, v, o, d_o, statistics, options);
    set_output(dq, tensor_attributes(DQ, s, l->dq));
    set_output(dk, tensor_attributes(DK, s, l->dk));
    set_output(dv, tensor_attributes(DV, s, l->dv));
}

static fe::error_t build(struct attention_cudnn *a, const struct attention_cudnn_shape *s,
                         const struct attention_cudnn_layout *l, bool backward, struct built_graph *out) {
    auto g = std::make_shared<fe::graph::Graph>();
    g->set_io_data_type(fe::DataType_t::BFLOAT16)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
    if (backward)
        add_backward(*g, s, l);
    else
        add_forward(*g, s, l);
    std::vector<fe::HeurMode_t> heuristics = {fe::HeurMode_t::A, fe::HeurMode_t::FALLBACK};
    fe::error_t status = a->properties ? g->set_device_properties(a->properties).build(heuristics)
                                       : g->build(a->handle, heuristics);
    int64_t workspace = 0;
    if (status.is_good())
        status = g->get_workspace_size(workspace);
    *out = {g, {}, (size_t)workspace};
    for (int64_t uid = Q; uid <= (backward ? DV : STATISTICS); uid++)
        out->pointers[uid] = nullptr;
    return status;
}

int attention_cudnn_plan(struct attention_cudnn *a, const struct attention_cudnn_shape *s,
                         const struct attention_cudnn_layout *l, bool backward, size_t *workspace,
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

static int run(struct attention_cudnn *a, const struct attention_cudnn_shape *s,
               const struct attention_cudnn_layout *l, bool backward,
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

int attention_cudnn_forward(struct attention_cudnn *a, const struct attention_cudnn_shape *s,
                            const struct attention_cudnn_layout *l, const void *q, const void *k,
                            const void *v, void *o, void *statistics, void *workspace, char *why) {
    return run(a, s, l, false, {q, k, v, o, statistics}, workspace, why);
}

int attention_cudnn_backward(struct attention_cudnn *a, const struct attention_cudnn_shape *s,
                             const struct attention_cudnn_layout *l, const void *q, const void *k,
                             const void *v, const void *o, const void *d_o, const void *statistics, void *dq,
                             void *dk, void *dv, void *workspace, char *why) {
    return run(a, s, l, true, {q, k, v, o, statistics, d_o, dq, dk, dv}, workspace, why);
}

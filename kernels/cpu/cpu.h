/* What the files of the CPU backend share: the device, scratch memory, shape checks, and the operations that
 * cpu.c gathers into the table. Public contracts are in kernels/kernels.h. */
#ifndef IHA_KERNELS_CPU_CPU_H
#define IHA_KERNELS_CPU_CPU_H

#include <omp.h>

#include "kernels/check.h"
#include "kernels/cpu/real.h"
#include "kernels/kernels.h"

struct device {
    int threads;
    int sharers; /* ranks on this machine */
    char *workspace;
    size_t workspace_bytes;
    char description[256];
    void (*progress_callback)(void *context);
    void *progress_context;
    struct trace *trace; /* NULL: nobody looks */
    double trace_began;
    struct step_state posted; /* nothing is queued here, so one is enough */
};

/* To be called where an operation begins that may take long. */
static inline void call_progress(const struct device *dev) {
    if (dev->progress_callback)
        dev->progress_callback(dev->progress_context);
}

/* Bytes the machine, and the containers around this process, still have: this rank's share of them, or all
 * when dev is NULL. */
size_t cpu_memory_available(struct device *dev);

/* Choose the number of threads (0: this rank's part of the processors) and where they run. */
int cpu_place_threads(int threads, struct comm *comm);

/* The workspace's first bytes, which the running operation may use until it returns. */
void *cpu_workspace(struct device *dev, size_t bytes, const char *op);

/* check_shape for the backend's number type, and for token ids. */
void check_real(const char *op, const char *what, tensor t, int64_t s0, int64_t s1, int64_t s2, int64_t s3,
                int64_t s4);
void check_i32(const char *op, const char *what, tensor t, int64_t s0, int64_t s1);

/* C[m,n] = op(A) op(B) + beta C, row-major; transposed operands are stored [k,m] and [n,k]. */
void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, const real *a, int64_t lda,
          const real *b, int64_t ldb, real beta, real *c, int64_t ldc);

/* out[i] (+)= the sum over parts of shares[part*stride + i], in their order: how threads' partial gradients
 * meet, always in the same way. */
void sum_shares(const real *shares, int parts, int64_t stride, int64_t n, real *out, bool accumulate);

/* Tiles of scores that attention has computed since the program began: what a test counts to see that
 * blocks outside the band are never visited. */
extern int64_t attention_tiles_visited;

/* What each operation's plan says; see kernels.h. */
struct op_cost norm_plan(const struct device *dev, const struct norm_spec *s);
struct op_cost qkv_mix_plan(const struct device *dev, const struct qkv_mix_spec *s);
struct op_cost attention_plan(const struct device *dev, const struct attention_spec *s);
struct op_cost collapse_plan(const struct device *dev, const struct collapse_spec *s);
struct op_cost classifier_plan(const struct device *dev, const struct classifier_spec *s);

void cpu_embed(struct device *, const struct embed_spec *, tensor tokens, tensor w, tensor pos, int64_t first,
               tensor x);
void cpu_embed_backward(struct device *, const struct embed_spec *, tensor tokens, tensor dx, tensor dw,
                        tensor dpos);
void cpu_residual_norm(struct device *, const struct norm_spec *, tensor x, tensor delta, tensor w, tensor b,
                       tensor sum, tensor y, void *saved);
void cpu_residual_norm_recompute(struct device *, const struct norm_spec *, tensor sum, tensor w, tensor b,
                                 tensor y, const void *saved);
void cpu_residual_norm_backward(struct device *, const struct norm_spec *, tensor dy, tensor sum, tensor w,
                                const void *saved, tensor dx, tensor dw, tensor db, bool accumulate);
void cpu_linear(struct device *, const struct linear_spec *, tensor x, tensor w, tensor bias, tensor y);
void cpu_linear_backward(struct device *, const struct linear_spec *, tensor dy, tensor x, tensor w,
                         tensor dx, bool add_dx, tensor dw, tensor dbias, bool accumulate);
void cpu_rope_table(struct device *, tensor table, double theta);
void cpu_qkv_mix(struct device *, const struct qkv_mix_spec *, tensor qkv, tensor alpha_q, tensor alpha_k,
                 tensor alpha_v, tensor table, int64_t first, tensor q, tensor k, tensor v);
void cpu_qkv_mix_backward(struct device *, const struct qkv_mix_spec *, tensor dq, tensor dk, tensor dv,
                          tensor qkv, tensor alpha_q, tensor alpha_k, tensor alpha_v, tensor table,
                          tensor dqkv, tensor dalpha_q, tensor dalpha_k, tensor dalpha_v, bool accumulate);
void cpu_attention(struct device *, const struct attention_spec *, tensor q, tensor k, tensor v, tensor o,
                   void *saved);
void cpu_attention_backward(struct device *, const struct attention_spec *, tensor q, tensor k, tensor v,
                            tensor o, tensor d_o, const void *saved, tensor dq, tensor dk, tensor dv);
void cpu_attention_decode(struct device *, const struct attention_spec *, tensor q, tensor k, tensor v,
                          tensor cache_k, tensor cache_v, int64_t first, tensor o);
void cpu_collapse(struct device *, const struct collapse_spec *, tensor o, tensor r, tensor out);
void cpu_collapse_backward(struct device *, const struct collapse_spec *, tensor dout, tensor o, tensor r,
                           tensor d_o, tensor dr, bool accumulate);
void cpu_mlp_act(struct device *, const struct act_spec *, tensor u, tensor gate, tensor out);
void cpu_mlp_act_backward(struct device *, const struct act_spec *, tensor dout, tensor u, tensor gate,
                          tensor du, tensor dgate);
void cpu_classifier(struct device *, const struct classifier_spec *, tensor h, tensor w, tensor targets,
                    double scale, struct step_state *state, tensor dh, tensor dw, bool accumulate);
void cpu_step_begin(struct device *, struct step_state *, int64_t step, double lr);
void cpu_sumsq(struct device *, tensor g, struct step_state *);
void cpu_step_decide(struct device *, struct step_state *, double grad_clip, double skip_zscore);
void cpu_step_read(struct device *, const struct step_state *, struct step_state *host);
void cpu_step_write(struct device *, struct step_state *, const struct step_state *host);
void cpu_step_post(struct device *, const struct step_state *);
void cpu_step_collect(struct device *, struct step_state *host);
void cpu_adamw(struct device *, const struct adamw_hyper *, const struct param_group *groups, int count,
               int64_t first, tensor master, tensor p, tensor g, tensor m, tensor v,
               const struct step_state *);

#endif

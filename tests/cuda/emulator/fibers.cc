/* The scheduler: a block's threads as fibers, their barriers and warp operations. */
#include "tests/cuda/emulator/internal.h"

#include <link.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>

#if defined __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
const char *emulator_kernel_name = "?";

/* ---- fibers ---- */

enum { STACK_BYTES = 256 << 10, GUARD_BYTES = 4096, MAX_THREADS = 1024 };

enum waiting { RUNNABLE, AT_BARRIER, AT_WARP, RETURNED };

struct pending_copy {
    void *shared;
    const void *global;
    int bytes, valid;
};

struct fiber {
    void *context; /* where it was left: what switch_context saved */
    char *stack;
    void *fake_stack; /* AddressSanitizer's */
    enum waiting waiting;
    uint3 index;
    int number;       /* in the block, x fastest */
    bool waited;      /* for the kernel ahead */
    const char *file; /* of the barrier it waits at */
    int line;
    std::vector<std::vector<pending_copy>> copies; /* groups of cp.async; the last one is not committed */
};

/* A warp operation that some lanes of its mask have reached; they wait for the others. */
struct warp_operation {
    uint32_t mask, arrived;
    const char *operation;
    void *payload[32];
};

static struct {
    struct fiber fibers[MAX_THREADS];
    struct fiber *self; /* NULL: the scheduler */
    void *context, *fake_stack;
    const void *main_stack;
    size_t main_stack_bytes;
    const std::function<void()> *thread;
    int threads, returned, at_barrier;
    int predicates, counted[2], barrier_turn;      /* of __syncthreads_count, _and and _or */
    uint32_t ready_warps, ready[MAX_THREADS / 32]; /* bits of the warps, and of their lanes, that can run */
    int last;                                      /* the warp that ran last */
    std::vector<struct warp_operation> warps[MAX_THREADS / 32];
    char *dynamic_shared;
    uint64_t seed, random;
} S;

/* Save the callee-saved registers, and continue where `to` was saved. */
#if defined __x86_64__

extern "C" void switch_context(void **from, void *to);
asm(R"(
    .text
    .type switch_context, @function
switch_context:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size switch_context, .-switch_context
)");

static void *make_context(char *stack, void (*entry)()) {
    void **top = (void **)(stack + STACK_BYTES) - 4;
    top[0] = (void *)entry; /* where `ret` goes; above it a return address of 0 ends backtraces */
    top[1] = nullptr;
    for (int i = 1; i <= 6; i++)
        top[-i] = nullptr;
    return top - 6;
}

#else

#include <ucontext.h>

static void switch_context(void **from, void *to) {
    ucontext_t here;
    *from = &here;
    swapcontext(&here, (ucontext_t *)to);
}

static void *make_context(char *stack, void (*entry)()) {
    ucontext_t *c = (ucontext_t *)calloc(1, sizeof *c); /* lives as long as the process */
    getcontext(c);
    c->uc_stack.ss_sp = stack;
    c->uc_stack.ss_size = STACK_BYTES;
    makecontext(c, entry, 0);
    return c;
}

#endif

static void switch_to_scheduler() {
    struct fiber *f = S.self;
#if defined __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&f->fake_stack, S.main_stack, S.main_stack_bytes);
#endif
    switch_context(&f->context, S.context);
#if defined __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(f->fake_stack, &S.main_stack, &S.main_stack_bytes);
#endif
}

static void switch_to(struct fiber *f) {
    S.self = f;
    threadIdx = f->index;
#if defined __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&S.fake_stack, f->stack, STACK_BYTES);
#endif
    switch_context(&S.context, f->context);
#if defined __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(S.fake_stack, nullptr, nullptr);
#endif
    S.self = nullptr;
}

/* A fiber lives as long as the process, and runs one thread of a block after another. */
static void fiber_main() {
#if defined __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &S.main_stack, &S.main_stack_bytes);
#endif
    for (;;) {
        (*S.thread)();
        S.self->waiting = RETURNED;
        S.returned++;
        switch_to_scheduler();
    }
}

static void start_fiber(struct fiber *f) {
    char *memory = (char *)mmap(nullptr, STACK_BYTES + GUARD_BYTES, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, GUARD_BYTES, PROT_NONE) != 0)
        emulator_fail("no memory for a fiber's stack");
    f->stack = memory + GUARD_BYTES;
    f->context = make_context(f->stack, fiber_main);
}

/* ---- errors ---- */

void emulator_fail(const char *format, ...) {
    /* A launch is called "... [with auto kernel = name<types>; A = ...]" */
    bool running = emulator_on_queue();
    const char *what = running ? emulator_running_name : emulator_kernel_name;
    const char *name = strstr(what, "kernel = ");
    name = name ? name + 9 : what;
    fprintf(stderr, "emulator: %.*s", (int)strcspn(name, ";]"), name);
    if (running && S.threads > 0)
        fprintf(stderr, ", block (%u, %u, %u)", blockIdx.x, blockIdx.y, blockIdx.z);
    if (running && S.self)
        fprintf(stderr, ", thread (%u, %u, %u)", threadIdx.x, threadIdx.y, threadIdx.z);
    fprintf(stderr, ": ");
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fprintf(stderr, "\n");
    abort();
}

[[noreturn]] static void fail_deadlock() {
    char barrier[128] = "", operation[128] = "";
    int at_warp = 0;
    for (int i = 0; i < S.threads; i++)
        if (S.fibers[i].waiting == AT_BARRIER)
            snprintf(barrier, sizeof barrier, " (%s:%d)", S.fibers[i].file, S.fibers[i].line);
        else if (S.fibers[i].waiting == AT_WARP && ++at_warp)
            snprintf(operation, sizeof operation, " (%s)", S.warps[i / 32][0].operation);
    emulator_fail(
        "deadlock: of %d threads %d wait at a barrier%s, %d at a warp operation%s, %d have returned",
        S.threads, S.at_barrier, barrier, at_warp, operation, S.returned);
}

/* ---- sentinels ---- */

void emulator_write_sentinel(void *p) {
    memset(p, 0xa5, EMULATOR_SENTINEL);
#if defined __SANITIZE_ADDRESS__
    __asan_poison_memory_region(p, EMULATOR_SENTINEL);
#endif
}

void emulator_remove_sentinel(void *p) {
#if defined __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(p, EMULATOR_SENTINEL);
#endif
    (void)p;
}

__attribute__((no_sanitize_address)) bool emulator_sentinel_intact(const void *p) {
    for (int i = 0; i < EMULATOR_SENTINEL; i++)
        if (((const volatile unsigned char *)p)[i] != 0xa5)
            return false;
    return true;
}

/* ---- the order ---- */

void emulator_seed(uint64_t seed) {
    S.seed = seed;
    S.random = seed * 0x9e3779b97f4a7c15u + 1;
}

uint64_t emulator_random(uint64_t below) {
    S.random = S.random * 6364136223846793005u + 1442695040888963407u;
    return (S.random >> 33) % below;
}

uint64_t emulator_current_seed() {
    return S.seed;
}

std::vector<int64_t> emulator_order(int64_t n) {
    std::vector<int64_t> order((size_t)n);
    for (int64_t i = 0; i < n; i++)
        order[(size_t)i] = S.seed == 1 ? n - 1 - i : i;
    if (S.seed > 1)
        for (int64_t i = n - 1; i > 0; i--)
            std::swap(order[(size_t)i], order[emulator_random((uint64_t)i + 1)]);
    return order;
}

static void make_runnable(int number) {
    S.fibers[number].waiting = RUNNABLE;
    S.ready[number / 32] |= 1u << number % 32;
    S.ready_warps |= 1u << number / 32;
}

/* One of the set bits: the lowest for seed 0, the highest for seed 1. */
static int pick_bit(uint32_t bits) {
    if (S.seed == 0)
        return __builtin_ctz(bits);
    if (S.seed == 1)
        return 31 - __builtin_clz(bits);
    unsigned by = (unsigned)emulator_random(32);
    uint32_t turned = bits >> by | bits << (32 - by) % 32;
    return (int)(((unsigned)__builtin_ctz(turned) + by) % 32);
}

/* Even seeds pick any thread, which shows missing barriers between a store and a load. Odd seeds let one warp
 * run as far as it can, so that it is ahead of the others and stores what they have yet to load. */
static int pick() {
    bool same_warp = S.seed % 2 == 1 && (S.ready_warps >> S.last & 1);
    int warp = same_warp ? S.last : pick_bit(S.ready_warps), lane = pick_bit(S.ready[warp]);
    S.ready[warp] &= ~(1u << lane);
    if (S.ready[warp] == 0)
        S.ready_warps &= ~(1u << warp);
    S.last = warp;
    return warp * 32 + lane;
}

/* ---- blocks ---- */

static int poison_thread_local(struct dl_phdr_info *info, size_t, void *) {
    for (int i = 0; i < info->dlpi_phnum; i++)
        if (info->dlpi_phdr[i].p_type == PT_TLS)
            memset(info->dlpi_tls_data, 0xff, info->dlpi_phdr[i].p_memsz);
    return 1; /* stop: the program comes first, libraries after it */
}

static void release_barrier() {
    for (int i = 0; i < S.threads; i++)
        if (S.fibers[i].line != S.fibers[0].line || strcmp(S.fibers[i].file, S.fibers[0].file) != 0)
            emulator_fail("threads wait at different barriers, %s:%d and %s:%d", S.fibers[0].file,
                          S.fibers[0].line, S.fibers[i].file, S.fibers[i].line);
    S.at_barrier = 0;
    for (int i = 0; i < S.threads; i++)
        make_runnable(i);
}

static void run_block(size_t shared_bytes) {
    dl_iterate_phdr(poison_thread_local, nullptr);
    memset(S.dynamic_shared, 0xff, shared_bytes);
    S.returned = S.at_barrier = S.predicates = 0;
    for (int i = 0; i < S.threads; i++) {
        unsigned n = (unsigned)i;
        struct fiber *f = &S.fibers[i];
        f->index = {n % blockDim.x, n / blockDim.x % blockDim.y, n / blockDim.x / blockDim.y};
        f->number = i;
        f->waited = false;
        if (f->copies.size() != 1 || !f->copies[0].empty())
            f->copies.assign(1, {});
        make_runnable(i);
    }
    while (S.returned < S.threads) {
        if (S.ready_warps == 0 && S.at_barrier == S.threads)
            release_barrier();
        if (S.ready_warps == 0)
            fail_deadlock();
        switch_to(&S.fibers[pick()]);
    }
    for (int i = 0; i < S.threads; i++)
        for (const auto &group : S.fibers[i].copies)
            if (!group.empty())
                emulator_fail("thread %d returned without waiting for its cp.async copies", i);
}

void emulator_run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()> &thread) {
    void *shared;
    if (posix_memalign(&shared, 1024, shared_bytes + EMULATOR_SENTINEL) != 0)
        emulator_fail("no memory for shared memory");
    S.dynamic_shared = (char *)shared;
    emulator_write_sentinel(S.dynamic_shared + shared_bytes);
    gridDim = grid;
    blockDim = block;
    S.threads = (int)(block.x * block.y * block.z);
    S.thread = &thread;
    for (int i = 0; i < S.threads; i++)
        if (!S.fibers[i].stack)
            start_fiber(&S.fibers[i]);
    for (int64_t i : emulator_order((int64_t)grid.x * grid.y * grid.z)) {
        blockIdx = {(unsigned)(i % grid.x), (unsigned)(i / grid.x % grid.y), (unsigned)(i / grid.x / grid.y)};
        run_block(shared_bytes);
        if (!emulator_sentinel_intact(S.dynamic_shared + shared_bytes))
            emulator_fail("wrote behind its %zu bytes of dynamic shared memory", shared_bytes);
    }
    emulator_remove_sentinel(S.dynamic_shared + shared_bytes);
    free(S.dynamic_shared);
    S.threads = 0;
}

/* ---- what threads call ---- */

void emulator_yield() {
    make_runnable(S.self->number);
    switch_to_scheduler();
}

int emulator_lane() {
    return S.self->number % 32;
}

void *emulator_dynamic_shared() {
    return S.dynamic_shared;
}

int emulator_barrier(bool predicate, const char *file, int line) {
    struct fiber *f = S.self;
    f->waiting = AT_BARRIER;
    f->file = file;
    f->line = line;
    S.predicates += predicate;
    /* Two counts in turn: a thread may reach the next barrier before another has read this one's. */
    int turn = S.barrier_turn;
    if (++S.at_barrier == S.threads) {
        S.counted[turn] = S.predicates;
        S.barrier_turn ^= 1;
        S.predicates = 0;
    }
    switch_to_scheduler();
    return S.counted[turn];
}

void emulator_warp(uint32_t mask, const char *operation, void *payload, emulator_complete *complete) {
    struct fiber *f = S.self;
    int warp = f->number / 32, lane = f->number % 32, lanes = S.threads - warp * 32;
    if (!(mask >> lane & 1))
        emulator_fail("%s with a mask, %08x, that leaves out the caller", operation, mask);
    if (lanes < 32 && mask >> lanes)
        emulator_fail("%s with a mask, %08x, of more than the warp's %d threads", operation, mask, lanes);
    std::vector<struct warp_operation> &open = S.warps[warp];
    size_t at = 0;
    while (at < open.size() && open[at].mask != mask)
        at++;
    if (at == open.size())
        open.push_back({mask, 0, operation, {}});
    struct warp_operation *r = &open[at];
    if (r->operation != operation && strcmp(r->operation, operation) != 0)
        emulator_fail("lanes of one mask, %08x, meet at %s and at %s", mask, r->operation, operation);
    r->arrived |= 1u << lane;
    r->payload[lane] = payload;
    f->waiting = AT_WARP;
    if (r->arrived == mask) {
        complete(r->payload, mask);
        open.erase(open.begin() + (long)at);
        for (int i = 0; i < 32; i++)
            if (mask >> i & 1)
                make_runnable(warp * 32 + i);
    }
    switch_to_scheduler();
}

void emulator_complete_nothing(void *const *, uint32_t) {}

void emulator_complete_exchange(void *const *lanes, uint32_t mask) {
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) {
            struct emulator_exchange *e = (struct emulator_exchange *)lanes[i];
            if (mask >> e->from & 1)
                e->result = ((struct emulator_exchange *)lanes[e->from])->value;
        }
}

void emulator_complete_ballot(void *const *lanes, uint32_t mask) {
    uint64_t ballot = 0;
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1)
            ballot |= ((struct emulator_exchange *)lanes[i])->value << i;
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1)
            ((struct emulator_exchange *)lanes[i])->result = ballot;
}

/* ---- cp.async ---- */

int64_t emulator_waited;

void emulator_wait_for_previous() {
    emulator_waited += !S.self->waited;
    S.self->waited = true;
}

int64_t emulator_prefetched;

void emulator_prefetch(const void *global, uint32_t bytes) {
    if ((uintptr_t)global % 16 || bytes % 16 || bytes == 0)
        emulator_fail("prefetch of %u bytes at %p: not aligned", bytes, global);
    emulator_check_device(global, bytes, "prefetch");
    emulator_prefetched += bytes;
}

void emulator_copy(void *shared, const void *global, int bytes, int valid) {
    if ((uintptr_t)shared % (unsigned)bytes || (uintptr_t)global % (unsigned)bytes)
        emulator_fail("cp.async of %d bytes from %p to %p: not aligned", bytes, global, shared);
    memset(shared, 0xff, (size_t)bytes); /* the data arrives when it is waited for */
    S.self->copies.back().push_back({shared, global, bytes, valid});
}

void emulator_copy_commit() {
    S.self->copies.push_back({});
}

void emulator_copy_wait(int groups_left) {
    auto &copies = S.self->copies;
    while ((int)copies.size() - 1 > groups_left) {
        for (const struct pending_copy &c : copies.front()) {
            memcpy(c.shared, c.global, (size_t)c.valid);
            memset((char *)c.shared + c.valid, 0, (size_t)(c.bytes - c.valid));
        }
        copies.erase(copies.begin());
    }
}

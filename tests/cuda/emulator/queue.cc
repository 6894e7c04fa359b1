/* Runs the work that streams and graphs have queued, one piece at a time, in any order that what they come
 * after allows.
 *
 * Without a thread of its own the queue moves when the host waits. Even seeds are lazy: only what the host
 * waits for runs, and what that comes after; the rest as late as there is. Odd seeds are eager: whatever is
 * queued may run at once, and a host that waits moves everything. Among what is ready, seed 0 takes what was
 * queued first, 1 what was queued last, others any. So work that lacks a wait meets memory that was not
 * written yet, or was written over, under one seed or another; the order in which the host queued it never
 * helps.
 *
 * Work that waits for something outside (a collective for the other ranks) has begun, but is called again
 * only when nothing else can run, or now and then at random: it is in flight as long as may be. */
#include "tests/cuda/emulator/queue.h"

#include "kernels/clock.h"

#include <unistd.h>

#include <condition_variable>
#include <thread>

std::mutex emulator_mutex;

/* Never destroyed: the thread may be running while the process exits. */
static struct queue {
    std::vector<work> ready;
    uint64_t numbers, left; /* works ever queued, and not done */
    bool busy;              /* a thread runs work */
    pthread_t runner;       /* which one */
    std::condition_variable moved, added;
    bool background;
    int delay_us;
    int64_t limit; /* 0: none */
} &Q = *new struct queue();

const char *emulator_running_name = "?";

bool emulator_on_queue() {
    return Q.busy && pthread_equal(Q.runner, pthread_self());
}

/* ---- order ---- */

bool emulator_done(const work &w) {
    return !w || w->done;
}

static void finish(work first) {
    std::vector<work> finished = {first};
    while (!finished.empty()) {
        work w = finished.back();
        finished.pop_back();
        w->done = true;
        w->done_at = clock_seconds();
        Q.left--;
        for (const work &next : w->then)
            if (--next->missing == 0) {
                if (next->run)
                    Q.ready.push_back(next);
                else
                    finished.push_back(next);
            }
        w->then.clear();
        w->after.clear();
    }
    Q.moved.notify_all();
}

work emulator_add(emulator_step run, const std::vector<work> &after) {
    work w = std::make_shared<emulator_work>();
    w->number = Q.numbers++;
    w->run = std::move(run);
    Q.left++;
    for (const work &before : after)
        if (!emulator_done(before)) {
            w->after.push_back(before);
            before->then.push_back(w);
            w->missing++;
        }
    if (w->missing == 0 && w->run)
        Q.ready.push_back(w);
    else if (w->missing == 0)
        finish(w);
    Q.added.notify_one();
    return w;
}

void emulator_limit_queue(int64_t works) {
    Q.limit = works;
}

void emulator_room(emulator_lock &lock) {
    while (Q.limit > 0 && Q.background && !emulator_on_queue() && (int64_t)Q.left >= Q.limit)
        Q.moved.wait(lock);
}

/* ---- running ---- */

enum progress { NOTHING_READY, OTHERS_AWAITED, MOVED };

/* One call of a piece of work, without the lock. Returns whether that finished it. */
static bool call(emulator_lock &lock, const work &w) {
    Q.busy = true;
    Q.runner = pthread_self();
    w->started = true;
    lock.unlock();
    bool done = w->run();
    if (done)
        emulator_check_sentinels();
    lock.lock();
    Q.busy = false;
    if (done) {
        for (size_t i = 0; i < Q.ready.size(); i++)
            if (Q.ready[i] == w)
                Q.ready.erase(Q.ready.begin() + (long)i);
        finish(w);
    }
    return done;
}

static size_t pick(const std::vector<work> &from) {
    size_t best = 0;
    if (emulator_current_seed() > 1)
        return emulator_random(from.size());
    for (size_t i = 1; i < from.size(); i++)
        if ((from[i]->number < from[best]->number) == (emulator_current_seed() == 0))
            best = i;
    return best;
}

/* Run one piece of what is ready; `needed`: of what a host waits for. */
static enum progress move_on(emulator_lock &lock, bool needed) {
    std::vector<work> fresh, started;
    for (const work &w : Q.ready)
        if (!needed || w->needed)
            (w->started ? started : fresh).push_back(w);
    bool look = !started.empty() && emulator_current_seed() > 1 && emulator_random(8) == 0;
    if (!fresh.empty() && !look) {
        call(lock, fresh[pick(fresh)]);
        return MOVED;
    }
    bool moved = false;
    for (const work &w : started)
        moved = call(lock, w) || moved;
    return moved || !fresh.empty() ? MOVED : started.empty() ? NOTHING_READY : OTHERS_AWAITED;
}

static void pause_without(emulator_lock &lock, int us) {
    lock.unlock();
    usleep((useconds_t)us);
    lock.lock();
}

static void need(const work &w) {
    std::vector<work> open = {w};
    while (!open.empty()) {
        work at = open.back();
        open.pop_back();
        if (at->done || at->needed)
            continue;
        at->needed = true;
        open.insert(open.end(), at->after.begin(), at->after.end());
    }
}

/* Move until `reached`; the host's part of emulator_force. */
template <typename F> static void move_until(emulator_lock &lock, bool needed, F reached) {
    if (emulator_on_queue())
        emulator_fail("queued work waits for the queue");
    emulator_open_memory();
    while (!reached()) {
        if (Q.background || Q.busy) {
            Q.moved.wait(lock);
            continue;
        }
        enum progress p = move_on(lock, needed);
        if (p == NOTHING_READY)
            emulator_fail("the queue is stuck: nothing in it can run");
        if (p == OTHERS_AWAITED)
            pause_without(lock, 50);
    }
    emulator_close_memory();
}

static bool lazy() {
    return emulator_current_seed() % 2 == 0;
}

void emulator_force(emulator_lock &lock, const work &w) {
    if (emulator_done(w))
        return;
    need(w);
    work kept = w;
    move_until(lock, lazy(), [&] { return kept->done; });
}

void emulator_force_all(emulator_lock &lock) {
    move_until(lock, false, [] { return Q.left == 0; });
}

bool emulator_poll(emulator_lock &lock, const work &w) {
    if (emulator_done(w))
        return true;
    if (!Q.background && !Q.busy) {
        need(w);
        emulator_open_memory();
        move_on(lock, lazy());
        emulator_close_memory();
    }
    return false;
}

void emulator_queued(emulator_lock &lock) {
    if (Q.background || lazy() || Q.busy || emulator_random(4) != 0)
        return;
    emulator_open_memory();
    while (move_on(lock, false) == MOVED && emulator_random(2) == 0)
        continue;
    emulator_close_memory();
}

/* ---- the GPU as a thread ---- */

static void run_in_background() {
    emulator_lock lock;
    for (;;) {
        if (Q.ready.empty()) {
            Q.added.wait(lock);
            continue;
        }
        if (Q.delay_us > 0 && emulator_random(16) == 0)
            pause_without(lock, (int)emulator_random((uint64_t)Q.delay_us + 1));
        if (move_on(lock, false) == OTHERS_AWAITED)
            pause_without(lock, 50);
    }
}

void emulator_background(int delay_us) {
    emulator_lock lock;
    if (Q.background || Q.numbers > 0)
        emulator_fail("emulator_background: the queue has been used before");
    emulator_open_memory();
    Q.background = true;
    Q.delay_us = delay_us;
    std::thread(run_in_background).detach();
}

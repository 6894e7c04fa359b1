/* Runs the work that streams and graphs have queued, one piece at a time, in any order that its dependencies
 * allow.
 *
 * Without a thread of its own the queue runs work while the host waits. Even seeds are lazy: only what the
 * host waits for runs, and what that depends on; everything else as late as possible. Odd seeds are eager:
 * whatever is queued may run at once, and while the host waits any ready work runs. Among ready work, seed 0
 * takes what was queued first, 1 what was queued last, others any. So work that lacks a wait reads memory
 * that was not written yet, or was already overwritten, under one seed or another; that the host queued it in
 * the right order does not help.
 *
 * Work that waits for something outside (a collective for the other ranks) has begun, but is called again
 * only when nothing else can run, or at times at random: it stays in flight as long as possible. */
#include "tests/cuda/emulator/queue.h"

#include "kernels/clock.h"

#include <unistd.h>

#include <condition_variable>
#include <thread>

std::mutex emulator_mutex;

/* Never destroyed: the background thread may still run while the process exits. */
static struct queue {
    std::vector<work> ready;
    uint64_t added_count, unfinished; /* works ever queued; of them not done */
    bool busy;                        /* a thread runs work */
    pthread_t runner;                 /* which one */
    std::condition_variable progressed, added;
    bool background;
    int delay_us;
    int64_t limit; /* 0: none */
    double clock;  /* see emulator_pass_time */
} &Q = *new struct queue();

const char *emulator_running_name = "?";

double (*emulator_seconds)(const char *kernel, int candidate);

void emulator_pass_time(const char *kernel, int candidate) {
    if (emulator_seconds)
        Q.clock += emulator_seconds(kernel, candidate);
}

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
        w->done_at = emulator_seconds ? Q.clock : clock_seconds();
        Q.unfinished--;
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
    Q.progressed.notify_all();
}

work emulator_add_work(emulator_step run, const std::vector<work> &after) {
    work w = std::make_shared<emulator_work>();
    w->number = Q.added_count++;
    w->run = std::move(run);
    Q.unfinished++;
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

void emulator_wait_for_space(emulator_lock &lock) {
    while (Q.limit > 0 && Q.background && !emulator_on_queue() && (int64_t)Q.unfinished >= Q.limit)
        Q.progressed.wait(lock);
}

/* ---- running ---- */

enum progress { NOTHING_READY, WAITING_OUTSIDE /* other ranks have to act */, PROGRESSED };

/* Call a piece of work once, without the lock. Returns whether it is done. */
static bool run_step(emulator_lock &lock, const work &w) {
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

/* Run one piece of ready work; with `needed`, only of what the host waits for. */
static enum progress run_ready(emulator_lock &lock, bool needed) {
    std::vector<work> fresh, started;
    for (const work &w : Q.ready)
        if (!needed || w->needed)
            (w->started ? started : fresh).push_back(w);
    bool retry = !started.empty() && emulator_current_seed() > 1 && emulator_random(8) == 0;
    if (!fresh.empty() && !retry) {
        run_step(lock, fresh[pick(fresh)]);
        return PROGRESSED;
    }
    bool progressed = false;
    for (const work &w : started)
        progressed = run_step(lock, w) || progressed;
    return progressed || !fresh.empty() ? PROGRESSED : started.empty() ? NOTHING_READY : WAITING_OUTSIDE;
}

static void sleep_unlocked(emulator_lock &lock, int us) {
    lock.unlock();
    usleep((useconds_t)us);
    lock.lock();
}

static void mark_needed(const work &w) {
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

/* Run work until reached() is true; in the background mode, just wait. */
template <typename F> static void run_until(emulator_lock &lock, bool needed, F reached) {
    if (emulator_on_queue())
        emulator_fail("queued work waits for the queue");
    emulator_open_memory();
    while (!reached()) {
        if (Q.background || Q.busy) {
            Q.progressed.wait(lock);
            continue;
        }
        enum progress p = run_ready(lock, needed);
        if (p == NOTHING_READY)
            emulator_fail("the queue is stuck: nothing in it can run");
        if (p == WAITING_OUTSIDE)
            sleep_unlocked(lock, 50);
    }
    emulator_close_memory();
}

static bool lazy() {
    return emulator_current_seed() % 2 == 0;
}

void emulator_wait_for(emulator_lock &lock, const work &w) {
    if (emulator_done(w))
        return;
    mark_needed(w);
    work kept = w;
    run_until(lock, lazy(), [&] { return kept->done; });
}

void emulator_wait_for_all(emulator_lock &lock) {
    run_until(lock, false, [] { return Q.unfinished == 0; });
}

bool emulator_poll(emulator_lock &lock, const work &w) {
    if (emulator_done(w))
        return true;
    if (!Q.background && !Q.busy) {
        mark_needed(w);
        emulator_open_memory();
        run_ready(lock, lazy());
        emulator_close_memory();
    }
    return false;
}

void emulator_run_some(emulator_lock &lock) {
    if (Q.background || lazy() || Q.busy || emulator_random(4) != 0)
        return;
    emulator_open_memory();
    while (run_ready(lock, false) == PROGRESSED && emulator_random(2) == 0)
        continue;
    emulator_close_memory();
}

/* ---- the background thread ---- */

static void run_in_background() {
    emulator_lock lock;
    for (;;) {
        if (Q.ready.empty()) {
            Q.added.wait(lock);
            continue;
        }
        if (Q.delay_us > 0 && emulator_random(16) == 0)
            sleep_unlocked(lock, (int)emulator_random((uint64_t)Q.delay_us + 1));
        if (run_ready(lock, false) == WAITING_OUTSIDE)
            sleep_unlocked(lock, 50);
    }
}

void emulator_background(int delay_us) {
    emulator_lock lock;
    if (Q.background || Q.added_count > 0)
        emulator_fail("emulator_background: the queue has been used before");
    emulator_open_memory();
    Q.background = true;
    Q.delay_us = delay_us;
    std::thread(run_in_background).detach();
}

#include "model/train/signals.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

#include "kernels/clock.h"

static atomic_int requested; /* the signal */
static atomic_bool graceful;

static sigset_t stop_signals(void) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGUSR1);
    return set;
}

/* timeout(1) and schedulers send one signal twice, to the process and to its group: the second within this time is
 * ignored. */
static const double REPEAT_SECONDS = 1;

static void *wait_for_signals(void *unused) {
    sigset_t set = stop_signals();
    int number;
    sigwait(&set, &number);
    if (atomic_load(&graceful)) {
        double first = clock_seconds();
        atomic_store(&requested, number);
        do
            sigwait(&set, &number);
        while (clock_seconds() - first < REPEAT_SECONDS);
    }
    signal(number, SIG_DFL);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    raise(number);
    return unused;
}

int signals_watch(struct error *e) {
    sigset_t set = stop_signals();
    pthread_t thread;
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    if (pthread_create(&thread, NULL, wait_for_signals, NULL) != 0)
        return fail_run(e, "cannot start the thread that waits for signals");
    pthread_detach(thread);
    return 0;
}

void signals_enable_graceful_stop(void) {
    atomic_store(&graceful, true);
}

int signals_stop_requested(void) {
    return atomic_load(&requested);
}

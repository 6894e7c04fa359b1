#include "model/train/signals.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

#include "kernels/at_start.h"
#include "kernels/clock.h"
#include "kernels/limits.h"

static atomic_int requested; /* the signal */
static atomic_bool graceful;

static sigset_t stop_signals; /* set once by signals_watch */

/* A signal that was ignored at start stays ignored: nohup ignores SIGHUP, and a shell without job control SIGINT in
 * commands started with `&`. */
static void choose_signals(void) {
    static const int numbers[] = {SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGALRM, SIGXCPU};
    sigemptyset(&stop_signals);
    at_start_keep_ignored();
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (!at_start_ignored(numbers[i]))
            sigaddset(&stop_signals, numbers[i]);
}

/* timeout(1) and schedulers send one signal twice, to the process and to its group: the second within this time is
 * ignored. */
static const double REPEAT_SECONDS = 1;

/* The kernel sends SIGXCPU every second from the limit on CPU time on. */
static bool is_repeated(int number, double seconds) {
    return number == SIGXCPU || seconds < REPEAT_SECONDS;
}

static void *wait_for_signals(void *unused) {
    int number;
    sigwait(&stop_signals, &number);
    if (atomic_load(&graceful)) {
        double first = clock_seconds();
        atomic_store(&requested, number);
        do
            sigwait(&stop_signals, &number);
        while (is_repeated(number, clock_seconds() - first));
    }
    signal(number, SIG_DFL);
    pthread_sigmask(SIG_UNBLOCK, &stop_signals, NULL);
    raise(number);
    return unused;
}

int signals_watch(struct error *e) {
    pthread_t thread;
    choose_signals();
    pthread_sigmask(SIG_BLOCK, &stop_signals, NULL);
    int status = pthread_create(&thread, NULL, wait_for_signals, NULL);
    if (status != 0)
        return limits_fail_thread(e, "the thread that waits for signals", status);
    pthread_detach(thread);
    return 0;
}

void signals_enable_graceful_stop(void) {
    atomic_store(&graceful, true);
}

int signals_stop_requested(void) {
    return atomic_load(&requested);
}

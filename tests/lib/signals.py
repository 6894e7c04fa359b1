"""Signals as at a terminal. A test run in the background of a script, or under nohup, is started with SIGINT, SIGQUIT or
SIGHUP ignored, and so would be every program that it starts, for which an ignored signal stays ignored."""

import signal

for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2,
               signal.SIGALRM, signal.SIGXCPU):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

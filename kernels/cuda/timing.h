/* Which of several candidates that compute the same is the fastest on this GPU. */
#ifndef IHA_KERNELS_CUDA_TIMING_H
#define IHA_KERNELS_CUDA_TIMING_H

#include <functional>
#include <initializer_list>

#include "kernels/cuda/cuda.h"

/* What time_fastest() returns instead of an index: there is not enough memory, or no candidate can run. */
enum { NO_MEMORY = -1, NONE_RUNS = -2 };

/* The index of the fastest of `count` candidates. run(i, operands) queues candidate i once on dev->stream;
 * false: it cannot run. operands: so many bytes, which as bf16 and as fp32 are noise between 1 and 2, and -2 and
 * -1. dev->workspace has workspace_bytes meanwhile. Takes about 10 ms a candidate, and before that 100 ms if the
 * GPU was idle. */
int time_fastest(struct device *dev, int count, size_t operand_bytes, size_t workspace_bytes,
                 const std::function<bool(int, char *)> &run);

/* *which: the index among `names` of what the environment variable says, to compare alternatives; -1: it is not set. -1
 * and an EXIT_USER error for another value. */
int choice_of_environment(const char *variable, std::initializer_list<const char *> names, int *which,
                          struct error *e);

/* The index among `names` of what the plan file holds for `what`, or else that which time() gives, or the
 * first where that is negative; it is added to the file. */
int choose_once(struct device *dev, const char *what, std::initializer_list<const char *> names,
                const std::function<int()> &time);

#endif

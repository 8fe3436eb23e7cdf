/* What all C of the package shares: machines, lanes, threads. Plain C, without a header of torch or
 * Python. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__gnu_linux__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define LANES 16
#define ACROSS _Pragma("omp simd") for (int j = 0; j < LANES; j++)
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* A thread's part of n rows of `size` elements, in multiples of `by` rows: from, to. A thread that
 * would have fewer than `least` elements is not woken: that takes longer than they do. */
#define PARTS(n, size, by, least)                                                                  \
  const long most_ = MAX((n) * (size) / (least), 1), woken = MIN(threads, most_);                  \
  _Pragma("omp parallel for num_threads(woken) schedule(static)")                                  \
  for (int t = 0; t < woken; t++)                                                                  \
    for (long all_ = ((n) + (by)-1) / (by), from = all_ * t / woken * (by),                        \
              to = MIN(all_ * (t + 1) / woken * (by), (n)); from < to; from = to)

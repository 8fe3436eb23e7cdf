/* What the C of an optical operation on a CPU shares: its levels, what it sees, its noise.
 *
 * A value is made by the same float32 operations in the same order as in passes.py, which is why
 * nothing here may be contracted to a fused multiply-add, and sums are taken in 16 lanes: machines,
 * vector widths and numbers of threads agree bit by bit. */
#include "../common/native.h"

#define CHUNK 1024 /* elements, a multiple of 16: what is between two loops stays in a cache */

/* levels: lo + step * code, 0 <= code <= top */
typedef struct { float lo, hi, step, per_level, top; } Grid;
/* extremes, NaN where one element is; elements or rows beyond the range, with NaN */
typedef struct { double lowest, highest, clipped; } Seen;

static inline Seen saw(float lowest, float highest, long nans, long clipped) {
  return (Seen){nans ? NAN : lowest, nans ? NAN : highest, clipped};
}

static inline void merge(Seen *all, Seen one) {
  int nan = all->lowest != all->lowest || one.lowest != one.lowest;
  all->lowest = nan ? NAN : MIN(all->lowest, one.lowest);
  all->highest = nan ? NAN : MAX(all->highest, one.highest);
  all->clipped += one.clipped;
}

/* NaN stays NaN. 1.5 * 2^23 leaves no bit for a fraction: rounds to even what is below 2^22. */
static inline float round_even(float c) { return (c + 0x1.8p23f) - 0x1.8p23f; }
static inline float to_code(float c, float top) {
  c = 0.0f > c ? 0.0f : c;
  return round_even(top < c ? top : c);
}
static inline int holds(Grid g, float v) { return (v >= g.lo) & (v <= g.hi); }
static inline float read_out(float v, float u, Grid g) {
  return to_code((v - g.lo) * g.per_level + u, g.top) * g.step + g.lo;
}

static inline float fold(const float *lane) {
  float sum = 0.0f;
  for (int j = 0; j < LANES; j++) sum += lane[j];
  return sum;
}

/* The light on a detector, and what noise is made of: optical/light.py. */
typedef struct {
  const float *normal, *row, *column, *whole;
  float electron, of_reads;
  int is_offset;
} Lit;

/* A row's noise from an even column on, in levels: the integers of common/noise.py; or, by a table of
 * these, normal numbers. */
static inline void draw(uint32_t key, long column, int m, const float *normal, float *u) {
  uint32_t word[CHUNK / 2];
  int16_t half[CHUNK];
  for (int i = 0; i < (m + 1) / 2; i++) {
    uint32_t w = (key ^ (uint32_t)(column / 2 + i)) * 0x7FEB352Du;
    w = (w ^ w >> 15) * 0x846CA68Bu;
    word[i] = w ^ w >> 16;
  }
  memcpy(half, word, (m + 1) / 2 * sizeof *word);
  if (normal) for (int i = 0; i < m; i++) u[i] = normal[half[i] + 32768];
  else for (int i = 0; i < m; i++) u[i] = (half[i] + 0.5f) * 0x1p-16f;
}

#define TELL(mine)                                                                                 \
  _Pragma("omp critical(seen)") merge(seen, mine)

/* The passes over memory of an optical operation on a CPU; native.py calls them, passes.py says
 * what they compute. Plain C, without a header of torch or Python.
 *
 * A value is made by the same float32 operations in the same order as there, which is why nothing
 * here may be contracted to a fused multiply-add, and sums are taken in 16 lanes: machines, vector
 * widths and numbers of threads agree bit by bit. The exponential is the only other function. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__gnu_linux__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define CHUNK 1024 /* elements, a multiple of 16: what is between two loops stays in a cache */
#define LANES 16
#define ACROSS _Pragma("omp simd") for (int j = 0; j < LANES; j++)
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* levels: lo + step * code, 0 <= code <= top */
typedef struct { float lo, hi, step, per_level, top; } Grid;
/* extremes, NaN where one element is; elements or rows beyond the range, with NaN */
typedef struct { double lowest, highest, clipped; } Seen;

const int aixsim_version = 1;

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

/* One bit an element, the first in the lowest: the product gathers eight bits in the top byte. */
static inline void pack(const uint8_t *held, int m, uint8_t *bits) {
  for (int i = 0; i < m; i += 8) {
    uint64_t eight = 0;
    memcpy(&eight, held + i, MIN(8, m - i));
    bits[i / 8] = (eight * 0x0102040810204080u) >> 56;
  }
}

CLONES static void modulate(const float *x, float *value, void *code, int wide, uint8_t *inside,
                            long n, float lut_min, const Grid *grid, Seen *seen) {
  const Grid g = *grid;
  float at[CHUNK], lowest = INFINITY, highest = -INFINITY;
  float largest = MAX(fabsf(g.lo), fabsf(g.hi)), dark = 0x1p-22f * largest;
  float up = lut_min * g.hi, down = -lut_min * fabsf(g.lo);
  uint8_t held[CHUNK];
  long nans = 0, kept = 0;
  for (long from = 0; from < n; from += CHUNK) {
    int m = MIN(n - from, CHUNK), nan = 0, keep = 0;
    const float *in = x + from;
    float *out = value + from;
    #pragma omp simd reduction(min : lowest) reduction(max : highest) reduction(+ : nan)
    for (int i = 0; i < m; i++) {
      float v = in[i];
      lowest = v < lowest ? v : lowest;
      highest = v > highest ? v : highest;
      nan += v != v;
      at[i] = to_code((v - g.lo) * g.per_level, g.top);
      out[i] = at[i] * g.step + g.lo;
    }
    #pragma omp simd reduction(+ : keep)
    for (int i = 0; i < m; i++) keep += held[i] = holds(g, in[i]);
    nans += nan;
    kept += keep;
    if (inside && keep == m && m % 8 == 0) memset(inside + from / 8, 255, m / 8);
    else if (inside) pack(held, m, inside + from / 8);
    if (code && wide)
      for (int i = 0; i < m; i++) ((int32_t *)code)[from + i] = (int32_t)at[i];
    else if (code)
      for (int i = 0; i < m; i++) ((uint8_t *)code)[from + i] = (uint8_t)(int32_t)at[i];
    if (lut_min > 0.0f)
      for (int i = 0; i < m; i++) {
        float v = out[i], lifted = MAX(v, up), lowered = MIN(v, down);
        out[i] = v > dark ? lifted : v < -dark ? lowered : v != v ? v : 0.0f;
      }
  }
  merge(seen, saw(lowest, highest, nans, n - kept));
}

CLONES static void decode(const void *code, int wide, float *value, long n, Grid g) {
  const uint8_t *narrow = code;
  const int32_t *whole = code;
  if (wide) for (long i = 0; i < n; i++) value[i] = whole[i] * g.step + g.lo;
  else for (long i = 0; i < n; i++) value[i] = narrow[i] * g.step + g.lo;
}

CLONES static void mask_range(float *grad, const float *x, long n, Grid g) {
  for (long i = 0; i < n; i++) grad[i] = holds(g, x[i]) ? grad[i] : 0.0f;
}

static void mask_packed(float *grad, const uint8_t *inside, long n) {
  for (long from = 0; from < n; from += 64) {
    uint64_t word = 0;
    int m = MIN(64, n - from);
    memcpy(&word, inside + from / 8, (m + 7) / 8);
    if (m < 64 || ~word)
      for (int i = 0; i < m; i++) grad[from + i] = word >> i & 1 ? grad[from + i] : 0.0f;
  }
}

/* The random word of each row of an output: common/noise.py's row_keys. */
static inline uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15) * 0x846CA68Bu;
  return x ^ x >> 16;
}

CLONES static void row_keys(long from, long to, int64_t key, uint32_t seed, int32_t *keys) {
  uint32_t word = mix((uint32_t)((uint64_t)key >> 32) ^ mix((uint32_t)key ^ seed));
  for (long i = from; i < to; i++)
    keys[i] = mix((uint32_t)((uint64_t)i >> 32) ^ mix((uint32_t)i ^ word));
}

/* A row's noise from an even column on, in levels: the integers of common/noise.py. */
static inline void draw(uint32_t key, long column, int m, float *u) {
  uint32_t word[CHUNK / 2];
  int16_t half[CHUNK];
  for (int i = 0; i < (m + 1) / 2; i++) {
    uint32_t w = (key ^ (uint32_t)(column / 2 + i)) * 0x7FEB352Du;
    w = (w ^ w >> 15) * 0x846CA68Bu;
    word[i] = w ^ w >> 16;
  }
  memcpy(half, word, (m + 1) / 2 * sizeof *word);
  for (int i = 0; i < m; i++) u[i] = (half[i] + 0.5f) * 0x1p-16f;
}

CLONES static void detect(float *acc, const int32_t *keys, long rows, long columns,
                          const Grid *grid, int by_row, Seen *seen) {
  const Grid g = *grid;
  float u[CHUNK] = {0}, lowest = INFINITY, highest = -INFINITY;
  long nans = 0, clipped = 0;
  for (long r = 0; r < rows; r++) {
    long beyond = 0;
    for (long from = 0; from < columns; from += CHUNK) {
      int m = MIN(columns - from, CHUNK), nan = 0, out = 0;
      float *p = acc + r * columns + from;
      if (keys) draw(keys[r], from, m, u);
      #pragma omp simd reduction(min : lowest) reduction(max : highest) reduction(+ : nan, out)
      for (int i = 0; i < m; i++) {
        float v = p[i];
        lowest = v < lowest ? v : lowest;
        highest = v > highest ? v : highest;
        nan += v != v;
        out += !holds(g, v);
        p[i] = read_out(v, u[i], g);
      }
      nans += nan;
      beyond += out;
    }
    clipped += by_row ? beyond > 0 : beyond;
  }
  merge(seen, saw(lowest, highest, nans, clipped));
}

/* e^x of x <= 0, to 2 ulp, 0 below -87; the polynomial of Cephes' expf (S. L. Moshier). */
static inline float exponential(float x) {
  float held = x < -87.0f ? -87.0f : x, n = round_even(held * 1.44269504f);
  float r = held - n * 0.693359375f + n * 2.12194440e-4f, p = 1.9875691500e-4f, power;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits = ((int32_t)n + 127) << 23;
  memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? 0.0f : p * power;
}

/* One row of raw scores becomes exponentials; behind the keys that it sees, zeros. `mask` is bool,
 * or is added, and shuts what is at or below `shut`. `row` has room for the row and LANES more:
 * it is worked on there, in whole groups of lanes, the last of which ends in shut keys. */
CLONES static void softmax(float *p, float *shown, const void *mask, int is_bool, float shut,
                           long visible, long columns, const int32_t *key, const Grid *grid,
                           float scale, int rowmax, float *total, float *kept, float *row,
                           Seen *seen) {
  const Grid g = *grid;
  float u[CHUNK], added[CHUNK], lanes[LANES] = {0}, codes[LANES] = {0};
  float lowest = INFINITY, highest = -INFINITY, peak = -INFINITY;
  long nans = 0, beyond = 0, padded = (visible + LANES - 1) / LANES * LANES;
  if (!mask || is_bool) shut = -INFINITY;
  if (!key) memset(u, 0, MIN(padded, CHUNK) * sizeof *u);
  if (!mask) memset(added, 0, MIN(padded, CHUNK) * sizeof *added);
  memcpy(row, p, visible * sizeof *row);
  for (long from = 0; from < padded; from += CHUNK) {
    int m = MIN(padded - from, CHUNK), real = MIN(visible - from, m), nan = 0, out = 0;
    float *s = row + from;
    if (key) draw(*key, from, m, u);
    if (mask && is_bool)
      for (int i = 0; i < real; i++) added[i] = ((const uint8_t *)mask)[from + i] ? 0 : -INFINITY;
    else if (mask) memcpy(added, (const float *)mask + from, real * sizeof *added);
    for (int i = real; i < m; i++) s[i] = 0.0f, added[i] = -INFINITY;
    #pragma omp simd reduction(min : lowest) reduction(max : highest, peak) reduction(+ : nan, out)
    for (int i = 0; i < m; i++) {
      float v = s[i], read = read_out(v, u[i], g) * scale + added[i];
      int sees = added[i] > shut;
      lowest = sees & (v < lowest) ? v : lowest;
      highest = sees & (v > highest) ? v : highest;
      nan += sees & (v != v);
      out += sees & !holds(g, v);
      s[i] = read = sees ? read : -INFINITY;
      peak = read > peak ? read : peak;
    }
    nans += nan;
    beyond += out;
  }
  peak = nans ? NAN : peak == -INFINITY ? 0.0f : peak;
  for (long i = 0; i < padded; i += LANES)
    ACROSS lanes[j] += row[i + j] = exponential(row[i + j] - peak);
  memcpy(p, row, visible * sizeof *p);
  memset(p + visible, 0, (columns - visible) * sizeof *p);
  float sum = fold(lanes), per_code = 1.0f / g.top;
  float factor = rowmax ? 1.0f : sum == 0.0f ? 0.0f : 1.0f / sum;
  for (long i = 0; i < padded; i += LANES)
    ACROSS codes[j] += row[i + j] = round_even(row[i + j] * factor * g.top) * per_code;
  memcpy(shown, row, visible * sizeof *shown);
  memset(shown + visible, 0, (columns - visible) * sizeof *shown);
  *total = sum;
  *kept = fold(codes);
  merge(seen, saw(lowest, highest, nans, beyond > 0));
}

/* grad -> scale * p * (grad - sum(p * grad)) with p = weights / total, in one row. */
CLONES static void softmax_grad(const float *weights, float *grad, float total, long columns,
                                float scale) {
  float lanes[LANES] = {0}, per_total = 1.0f / (total < 1.0f ? 1.0f : total);
  long whole = columns / LANES * LANES;
  for (long i = 0; i < whole; i += LANES)
    ACROSS lanes[j] += weights[i + j] * per_total * grad[i + j];
  for (long i = whole; i < columns; i++) lanes[i - whole] += weights[i] * per_total * grad[i];
  float sum = fold(lanes);
  for (long i = 0; i < columns; i++) grad[i] = (grad[i] - sum) * (weights[i] * per_total) * scale;
}

/* A thread's part of n elements, in multiples of `by`: from, to. */
#define PARTS(n, by)                                                                               \
  _Pragma("omp parallel for num_threads(threads) schedule(static)")                                \
  for (int t = 0; t < threads; t++)                                                                \
    for (long all_ = ((n) + (by)-1) / (by), from = all_ * t / threads * (by),                      \
              to = MIN(all_ * (t + 1) / threads * (by), (n)); from < to; from = to)
#define TELL(mine)                                                                                 \
  _Pragma("omp critical(seen)") merge(seen, mine)

void aixsim_row_keys(long n, int64_t key, uint32_t seed, int32_t *keys, int threads) {
  PARTS(n, CHUNK) row_keys(from, to, key, seed, keys);
}

void aixsim_modulate(const float *x, float *value, void *code, int wide, uint8_t *inside, long n,
                     float lut_min, const Grid *g, Seen *seen, int threads) {
  PARTS(n, CHUNK) {
    Seen mine = {INFINITY, -INFINITY, 0};
    modulate(x + from, value + from, code ? (char *)code + from * (wide ? 4 : 1) : 0, wide,
             inside ? inside + from / 8 : 0, to - from, lut_min, g, &mine);
    TELL(mine);
  }
}

void aixsim_decode(const void *code, int wide, float *value, long n, const Grid *g, int threads) {
  PARTS(n, CHUNK)
    decode((const char *)code + from * (wide ? 4 : 1), wide, value + from, to - from, *g);
}

void aixsim_mask_range(float *grad, const float *x, long n, const Grid *g, int threads) {
  PARTS(n, CHUNK) mask_range(grad + from, x + from, to - from, *g);
}

void aixsim_mask_packed(float *grad, const uint8_t *inside, long n, int threads) {
  PARTS(n, CHUNK) mask_packed(grad + from, inside + from / 8, to - from);
}

void aixsim_detect(float *acc, const int32_t *keys, long rows, long columns, const Grid *g,
                   int by_row, Seen *seen, int threads) {
  PARTS(rows, 1) {
    Seen mine = {INFINITY, -INFINITY, 0};
    detect(acc + from * columns, keys ? keys + from : 0, to - from, columns, g, by_row, &mine);
    TELL(mine);
  }
}

/* Rows of scores, shape (b, g, R, m); `strides` are those of the mask's rows. With `causal` the
 * row m sees `first + m` keys. */
void aixsim_softmax(float *acc, float *shown, const void *mask, int is_bool, float shut,
                    const long *strides, const long *shape, long columns, long first, int causal,
                    const int32_t *keys, const Grid *g, float scale, int rowmax, float *total,
                    float *kept, Seen *seen, int threads) {
  PARTS(shape[0] * shape[1] * shape[2] * shape[3], 1) {
    Seen mine = {INFINITY, -INFINITY, 0};
    float *scratch = malloc((columns + LANES) * sizeof *scratch);
    for (long row = from; row < to; row++) {
      long offset = 0, rest = row;
      long visible = causal ? MIN(MAX(first + row % shape[3], 0), columns) : columns;
      for (int d = 3; d >= 0; rest /= shape[d--]) offset += rest % shape[d] * strides[d];
      softmax(acc + row * columns, shown + row * columns,
              mask ? (const char *)mask + offset * (is_bool ? 1 : 4) : 0, is_bool, shut, visible,
              columns, keys ? keys + row : 0, g, scale, rowmax, total + row, kept + row, scratch,
              &mine);
    }
    free(scratch);
    TELL(mine);
  }
}

void aixsim_softmax_grad(const float *weights, float *grad, const float *total, long rows,
                         long columns, float scale, int threads) {
  PARTS(rows, 1)
    for (long row = from; row < to; row++)
      softmax_grad(weights + row * columns, grad + row * columns, total[row], columns, scale);
}

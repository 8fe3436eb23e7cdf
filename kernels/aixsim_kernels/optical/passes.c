/* The passes over memory of an optical operation on a CPU; native.py calls them, passes.py says
 * what they compute. Plain C, without a header of torch or Python. */
#include "levels.h"

const int aixsim_version = 7;

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

CLONES static void row_keys(long n, int64_t key, uint32_t seed, int32_t *keys) {
  uint32_t word = mix((uint32_t)((uint64_t)key >> 32) ^ mix((uint32_t)key ^ seed));
  for (long i = 0; i < n; i++)
    keys[i] = mix((uint32_t)((uint64_t)i >> 32) ^ mix((uint32_t)i ^ word));
}

/* Normal numbers become the noise, in levels, of the light on part of row r's detectors. */
static inline void shot(const Lit *lit, const float *acc, long r, long from, long columns, int m,
                        float per_level, float *u) {
  const float e = lit->electron, of_reads = lit->of_reads, *column = lit->column + from;
  float s[CHUNK], row = lit->whole ? 0.0f : lit->row[r];
  if (!lit->whole && !lit->is_offset && of_reads == 0.0f) { /* no root but that of the row's */
    const float of_row = sqrtf(e) * row * per_level;
    for (int i = 0; i < m; i++) u[i] *= of_row * column[i];
    return;
  }
  if (lit->whole) memcpy(s, lit->whole + r * columns + from, m * sizeof *s);
  else if (lit->is_offset) for (int i = 0; i < m; i++) s[i] = acc[i] + row + column[i];
  else for (int i = 0; i < m; i++) s[i] = row * column[i] * (row * column[i]);
  for (int i = 0; i < m; i++) u[i] *= sqrtf(MAX(s[i] * e, 0.0f) + of_reads) * per_level;
}

CLONES static void detect(float *acc, const int32_t *keys, long rows, long columns, long first,
                          const Grid *grid, const Lit *lit, int by_row, Seen *seen) {
  const Grid g = *grid;
  float u[CHUNK] = {0}, lowest = INFINITY, highest = -INFINITY;
  long nans = 0, clipped = 0;
  for (long r = 0; r < rows; r++) {
    long beyond = 0;
    for (long from = 0; from < columns; from += CHUNK) {
      int m = MIN(columns - from, CHUNK), nan = 0, out = 0;
      float *p = acc + r * columns + from;
      if (keys) draw(keys[r], first + from, m, lit ? lit->normal : 0, u);
      if (keys && lit) shot(lit, p, r, from, columns, m, g.per_level, u);
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

void aixsim_row_keys(long n, int64_t key, uint32_t seed, int32_t *keys) {
  row_keys(n, key, seed, keys);
}

void aixsim_modulate(const float *x, float *value, void *code, int wide, uint8_t *inside, long n,
                     float lut_min, const Grid *g, Seen *seen, int threads) {
  PARTS(n, 1, CHUNK, 1 << 17) {
    Seen mine = {INFINITY, -INFINITY, 0};
    modulate(x + from, value + from, code ? (char *)code + from * (wide ? 4 : 1) : 0, wide,
             inside ? inside + from / 8 : 0, to - from, lut_min, g, &mine);
    TELL(mine);
  }
}

void aixsim_decode(const void *code, int wide, float *value, long n, const Grid *g, int threads) {
  PARTS(n, 1, CHUNK, 1 << 18)
    decode((const char *)code + from * (wide ? 4 : 1), wide, value + from, to - from, *g);
}

void aixsim_mask_range(float *grad, const float *x, long n, const Grid *g, int threads) {
  PARTS(n, 1, CHUNK, 1 << 18) mask_range(grad + from, x + from, to - from, *g);
}

void aixsim_mask_packed(float *grad, const uint8_t *inside, long n, int threads) {
  PARTS(n, 1, CHUNK, 1 << 19) mask_packed(grad + from, inside + from / 8, to - from);
}

void aixsim_detect(float *acc, const int32_t *keys, long rows, long columns, long first,
                   const Grid *g, const Lit *lit, int by_row, Seen *seen, int threads) {
  PARTS(rows, columns, 1, 1 << 17) {
    Seen mine = {INFINITY, -INFINITY, 0};
    Lit own = lit ? *lit : (Lit){0};
    if (own.whole) own.whole += from * columns;
    else if (lit) own.row += from;
    detect(acc + from * columns, keys ? keys + from : 0, to - from, columns, first, g,
           lit ? &own : 0, by_row, &mine);
    TELL(mine);
  }
}

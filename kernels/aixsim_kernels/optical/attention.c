/* Optical attention on a CPU, block by block; native.py calls it, attention/cpu.py says what it
 * computes. The products are those of PyTorch's BLAS, one thread each: a thread takes whole blocks. */
#include "levels.h"

#include <omp.h>

#define BLOCK (1 << 16) /* scores that a thread works on at a time: few enough to stay in a cache */

typedef void Sgemm(const char *, const char *, const int *, const int *, const int *, const float *,
                   const float *, const int *, const float *, const int *, const float *, float *,
                   const int *);

/* q (batch, group, repeat, query, width), k (batch, group, key, width), v (…, key, out_width);
 * `noise` a word for each row of scores, or none; `mask` is bool, or is added and shuts what is at
 * or below `shut`, and has these strides. With `causal` query i sees keys up to i + later. */
typedef struct {
  const float *q, *k, *v;
  const int32_t *noise;
  const void *mask;
  Sgemm *sgemm;
  long batches, groups, repeats, queries, keys, width, out_width, later, strides[4];
  int is_bool, is_causal, rowmax, threads;
  float shut, scale, top; /* the last of the modulators' codes */
  Grid grid;
} Attention;

/* Queries from `first` on of one head, the keys that one of them sees, and room for their scores. */
typedef struct { long head, first, rows, keys, stride; } Block;

static inline long in_lanes(long n) { return (n + LANES - 1) / LANES * LANES; }

/* c (m, n) = a (m, k) b (k, n) + beta c by rows; A or B stored the other way round where it says so.
 * BLAS counts by columns: to it this is the product of the transposed. */
static void product(const Attention *in, int m, int n, int k, const char *A, const float *a,
                    int row_a, const char *B, const float *b, int row_b, float beta, float *c,
                    int row_c) {
  const float one = 1.0f;
  /* a matrix without columns has rows of one, or BLAS refuses, and leaves c as it was */
  const int ld_a = MAX(row_a, 1), ld_b = MAX(row_b, 1), ld_c = MAX(row_c, 1);
  in->sgemm(B, A, &n, &m, &k, &one, b, &ld_b, a, &ld_a, &beta, c, &ld_c);
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

/* Detects the `visible` first scores of a row in place, -inf where the mask shuts and up to the next
 * whole group of lanes, where there is room. The largest, 0 if there is none, NaN if one is NaN. */
static inline __attribute__((always_inline)) float read_row(
    const Attention *in, float *row, const void *mask, long visible, const int32_t *key,
    const int looks, Seen *seen) {
  const Grid g = in->grid;
  const float scale = in->scale, shut = mask && !in->is_bool ? in->shut : -INFINITY;
  float u[CHUNK], added[CHUNK], lowest = INFINITY, highest = -INFINITY, peak = -INFINITY;
  long nans = 0, beyond = 0, padded = in_lanes(visible);
  if (!key) memset(u, 0, MIN(padded, CHUNK) * sizeof *u);
  if (!mask) memset(added, 0, MIN(padded, CHUNK) * sizeof *added);
  for (long from = 0; from < padded; from += CHUNK) {
    int m = MIN(padded - from, CHUNK), real = MIN(visible - from, m), nan = 0, out = 0;
    float *s = row + from;
    if (key) draw(*key, from, m, 0, u);
    if (mask && in->is_bool)
      for (int i = 0; i < real; i++) added[i] = ((const uint8_t *)mask)[from + i] ? 0 : -INFINITY;
    else if (mask) memcpy(added, (const float *)mask + from, real * sizeof *added);
    for (int i = real; i < m; i++) s[i] = 0.0f, added[i] = -INFINITY;
    #pragma omp simd reduction(min : lowest) reduction(max : highest, peak) reduction(+ : nan, out)
    for (int i = 0; i < m; i++) {
      float v = s[i], read = read_out(v, u[i], g) * scale + added[i];
      int sees = added[i] > shut;
      if (looks) {
        lowest = sees & (v < lowest) ? v : lowest;
        highest = sees & (v > highest) ? v : highest;
        out += sees & !holds(g, v);
      }
      nan += sees & (v != v);
      s[i] = read = sees ? read : -INFINITY;
      peak = read > peak ? read : peak;
    }
    nans += nan;
    beyond += out;
  }
  if (looks) merge(seen, saw(lowest, highest, nans, beyond > 0));
  return nans ? NAN : peak == -INFINITY ? 0.0f : peak;
}

/* A row of raw scores becomes exp(score - largest), and `shown` (may be the same) what the modulator
 * shows of their softmax; behind the keys that it sees, zeros. Both have room for whole lanes. */
CLONES static void softmax(const Attention *in, float *row, float *shown, const void *mask,
                           long visible, long columns, const int32_t *key, float *total,
                           float *kept, Seen *seen) {
  float lanes[LANES] = {0}, codes[LANES] = {0}, top = in->top, per_code = 1.0f / top;
  float peak = seen ? read_row(in, row, mask, visible, key, 1, seen)
                    : read_row(in, row, mask, visible, key, 0, seen);
  long padded = in_lanes(visible);
  for (long i = 0; i < padded; i += LANES)
    ACROSS lanes[j] += row[i + j] = exponential(row[i + j] - peak);
  float sum = fold(lanes), factor = in->rowmax ? 1.0f : sum == 0.0f ? 0.0f : 1.0f / sum;
  for (long i = 0; i < padded; i += LANES)
    ACROSS codes[j] += shown[i + j] = round_even(row[i + j] * factor * top) * per_code;
  *total = sum;
  *kept = fold(codes);
  long room = in_lanes(columns) - padded;
  memset(row + padded, 0, room * sizeof *row);
  memset(shown + padded, 0, room * sizeof *shown);
}

/* A block's softmax: `scores` (rows, stride) and `shown` (may be the same); the rows' sums. */
static void attend(const Attention *in, Block at, float *scores, float *shown, float *total,
                   float *kept, Seen *seen) {
  long row = at.head * in->queries + at.first, group = at.head / in->repeats;
  long place[] = {group / in->groups, group % in->groups, at.head % in->repeats};
  long offset = at.first * in->strides[3];
  for (int d = 0; d < 3; d++) offset += place[d] * in->strides[d];
  product(in, at.rows, at.keys, in->width, "N", in->q + row * in->width, in->width, "T",
          in->k + group * in->keys * in->width, in->width, 0, scores, at.stride);
  for (long i = 0; i < at.rows; i++, offset += in->strides[3]) {
    long visible = at.first + i + 1 + in->later;
    const char *mask = in->mask;
    softmax(in, scores + i * at.stride, shown + i * at.stride,
            mask ? mask + offset * (in->is_bool ? 1 : 4) : 0,
            in->is_causal ? MIN(MAX(visible, 0), at.keys) : at.keys, at.keys,
            in->noise ? in->noise + row + i : 0, total + i, kept + i, seen);
  }
}

/* grad -> scale * p * (grad - sum(p * grad)) with p = weights / total, in one row of whole lanes. */
CLONES static void softmax_grad(const float *weights, float *grad, float total, long columns,
                                float scale) {
  float lanes[LANES] = {0}, per_total = 1.0f / (total < 1.0f ? 1.0f : total);
  for (long i = 0; i < columns; i += LANES)
    ACROSS lanes[j] += weights[i + j] * per_total * grad[i + j];
  float sum = fold(lanes);
  for (long i = 0; i < columns; i += LANES)
    ACROSS grad[i + j] = (grad[i + j] - sum) * (weights[i + j] * per_total) * scale;
}

/* Rows of scores in memory: whole lanes, and not all at the same place in a cache. */
static long stride_of(long keys) { return in_lanes(keys) + LANES; }
static long height_of(const Attention *in) {
  return MAX(MIN(in->queries, MAX(16, BLOCK / stride_of(in->keys))), 1);
}

static Block block_of(const Attention *in, long head, long index) {
  long first = index * height_of(in), last = MIN(first + height_of(in), in->queries);
  long keys = in->is_causal ? MAX(last + in->later, 0) : in->keys;
  return (Block){head, first, last - first, MIN(keys, in->keys), stride_of(in->keys)};
}

/* How many floats a thread works on: a block's scores and what is shown, its rows' sums, and where
 * heads share keys one head's gradients of these. In whole lanes, as the last bits of BLAS depend on
 * where in 64 bytes a matrix begins, and a thread must not matter. */
static long room_of(const Attention *in) {
  long shared = in->repeats > 1 ? in_lanes(in->keys * in->width) + in->keys * in->out_width : 0;
  return 2 * in_lanes(height_of(in)) + 2 * height_of(in) * stride_of(in->keys) + in_lanes(shared);
}
void aixsim_room(const Attention *in, long *floats) { *floats = room_of(in); }

/* light (batch, group, repeat, query, out_width), zeros before; total and kept (…, query); `room` for
 * each thread. */
void aixsim_attend(const Attention *in, float *light, float *total, float *kept, float *room,
                   Seen *seen) {
  long heads = in->batches * in->groups * in->repeats, height = height_of(in);
  long blocks = (in->queries + height - 1) / height, out = in->out_width;
  #pragma omp parallel num_threads(in->threads)
  {
    float *scores = room + omp_get_thread_num() * room_of(in);
    Seen mine = {INFINITY, -INFINITY, 0};
    #pragma omp for schedule(dynamic)
    for (long unit = 0; unit < heads * blocks; unit++) { /* those that see most keys first */
      Block at = block_of(in, unit % heads, blocks - 1 - unit / heads);
      long row = at.head * in->queries + at.first;
      if (at.keys == 0) continue;
      attend(in, at, scores, scores, total + row, kept + row, &mine);
      product(in, at.rows, out, at.keys, "N", scores, at.stride, "N",
              in->v + at.head / in->repeats * in->keys * out, out, 0, light + row * out, out);
    }
    TELL(mine);
  }
}

/* Gradients of q, k and v, zeros before. Heads that share keys add theirs in order. `grad` is (batch,
 * head, query, out_width) with these strides of the first three. */
void aixsim_attend_grad(const Attention *in, const float *grad, const long *strides, float *grad_q,
                        float *grad_k, float *grad_v, float *room) {
  long heads = in->batches * in->groups * in->repeats, height = height_of(in);
  long width = in->width, out = in->out_width, of_block = height * stride_of(in->keys);
  #pragma omp parallel for ordered schedule(dynamic) num_threads(in->threads)
  for (long head = 0; head < heads; head++) {
    float *scores = room + omp_get_thread_num() * room_of(in), *shown = scores + of_block;
    float *total = shown + of_block, *kept = total + in_lanes(height);
    long group = head / in->repeats, of_keys = in->keys * width, of_values = in->keys * out;
    const float *k = in->k + group * of_keys, *v = in->v + group * of_values;
    float *to_k = grad_k + group * of_keys, *to_v = grad_v + group * of_values;
    int shares = in->repeats > 1, of_batch = in->groups * in->repeats;
    const float *of_head = grad + head / of_batch * strides[0] + head % of_batch * strides[1];
    float *of_k = shares ? kept + in_lanes(height) : to_k;
    float *of_v = shares ? of_k + in_lanes(of_keys) : to_v;
    if (shares) memset(of_k, 0, (in_lanes(of_keys) + of_values) * sizeof *of_k);
    for (long first = 0; first < in->queries; first += height) {
      Block at = block_of(in, head, first / height);
      long row = head * in->queries + first, s = at.stride;
      const float *g = of_head + first * strides[2];
      if (at.keys == 0) continue;
      attend(in, at, scores, shown, total, kept, 0);
      for (long i = 0; in->rowmax && i < at.rows; i++)
        for (long j = 0; j < at.keys; j++)
          shown[i * s + j] *= total[i] > 0 ? 1.0f / MAX(total[i], 1.0f) : 0.0f;
      product(in, at.keys, out, at.rows, "T", shown, s, "N", g, strides[2], 1, of_v, out);
      product(in, at.rows, at.keys, out, "N", g, strides[2], "T", v, out, 0, shown, s);
      for (long i = 0; i < at.rows; i++)
        softmax_grad(scores + i * s, shown + i * s, total[i], at.keys, in->scale);
      product(in, at.rows, width, at.keys, "N", shown, s, "N", k, width, 0, grad_q + row * width,
              width);
      product(in, at.keys, width, at.rows, "T", shown, s, "N", in->q + row * width, width, 1, of_k,
              width);
    }
    #pragma omp ordered
    if (shares) {
      for (long i = 0; i < of_keys; i++) to_k[i] += of_k[i];
      for (long i = 0; i < of_values; i++) to_v[i] += of_v[i];
    }
  }
}

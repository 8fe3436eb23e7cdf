/* Random bit-flips on a CPU; cpu.py calls it, and says how a bit is decided. */
#include "../common/native.h"

#define BLOCK_WORDS (1 << 18) /* words that share a key */

/* triple32 of Chris Wellons' hash-prospector */
static inline uint32_t random_word(uint32_t x) {
  x = (x ^ x >> 17) * 0xED5AD4BBu;
  x = (x ^ x >> 11) * 0xAC4C1B51u;
  x = (x ^ x >> 15) * 0x31848BABu;
  return x ^ x >> 14;
}

/* `kept`, or none, tells of each value whether its magnitude's bits are below `limit`; what is not is
 * zeroed. A group of lanes draws digits until all of its bits are decided. */
CLONES static void flip(const uint32_t *in, uint32_t *out, uint8_t *kept, long from, long to,
                        const uint32_t *keys, uint32_t certain, uint32_t uncertain,
                        const uint32_t *digits, int n_digits, int halves, uint32_t limit) {
  for (long first = from; first < to; first += LANES) {
    uint32_t word[LANES] = {0}, flips[LANES], alive[LANES], key = keys[first / BLOCK_WORDS];
    uint32_t place = first % BLOCK_WORDS;
    int m = MIN(LANES, to - first);
    memcpy(word, in + first, m * sizeof *word);
    ACROSS flips[j] = certain, alive[j] = uncertain;
    for (int i = 0, open = uncertain != 0; i < n_digits && open; i++) {
      uint32_t digit = digits[i], counter = key ^ (uint32_t)i * BLOCK_WORDS, left = 0;
      _Pragma("omp simd reduction(| : left)") for (int j = 0; j < LANES; j++) {
        uint32_t w = random_word((place + j) ^ counter);
        flips[j] |= alive[j] & w & digit;
        alive[j] &= w ^ digit;
        left |= alive[j];
      }
      open = left != 0;
    }
    ACROSS word[j] ^= flips[j];
    if (kept && halves)
      for (int j = 0; j < m; j++) {
        uint32_t low = (word[j] & 0x7FFF) < limit, high = (word[j] >> 16 & 0x7FFF) < limit;
        word[j] &= (low ? 0xFFFFu : 0) | (high ? 0xFFFF0000u : 0);
        kept[2 * (first + j)] = low, kept[2 * (first + j) + 1] = high;
      }
    else if (kept)
      for (int j = 0; j < m; j++) {
        uint32_t low = (word[j] & 0x7FFFFFFF) < limit;
        word[j] = low ? word[j] : 0;
        kept[first + j] = low;
      }
    memcpy(out + first, word, m * sizeof *word);
  }
}

/* n words; `digits`: of each binary digit of the probabilities, the bits that have it set. */
void aixsim_flip(const uint32_t *in, uint32_t *out, uint8_t *kept, long n, const uint32_t *keys,
                 uint32_t certain, uint32_t uncertain, const uint32_t *digits, int n_digits,
                 int halves, uint32_t limit, int threads) {
  PARTS(n, 1, LANES, 1 << 14)
    flip(in, out, kept, from, to, keys, certain, uncertain, digits, n_digits, halves, limit);
}

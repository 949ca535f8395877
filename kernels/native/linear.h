// Rounded rows times packed weights: whole-number products of a block of columns, scaled and summed in float.
//
// A block's product is a whole number, exact whoever computes it, and a row's blocks are summed in their order: a row's result
// never depends on the other rows.
//
// Weights lie in tiles of 16 outputs. A tile's codes come in steps of 64 bytes: 4 bytes an output. 8 bits: the codes of 4
// inputs; 4 bits: low nibbles hold inputs 0 to 3 of 8, high ones 4 to 7. Scales and zeros: [tile, group, 16].
#pragma once
#include "rows.h"

constexpr int TILE = 16;
// columns that are unrolled together; every block is a multiple of it
constexpr int STRIP = 32;
#if defined(__AVX512VNNI__)
constexpr int MAX_ROWS = 8;
#else
constexpr int MAX_ROWS = 4;
#endif

// one tile's weight
template <class Scale>
struct TileWeight {
  const uint8_t* codes;
  const Scale* scales;
  const uint8_t* zeros;
  int64_t num_groups, blocks_per_group, block;
};

static inline int32_t four_bytes(const int8_t* p) {
  int32_t word;
  memcpy(&word, p, 4);
  return word;
}

static inline int32_t both_sums(const BlockScale& block) { return four_bytes((const int8_t*)&block.negative_high_sum); }

#if defined(__AVX512VNNI__)

// products[row] += codes of 4 inputs times the bytes of each row
template <int ROWS>
static inline void multiply_bytes(__m512i* products, __m512i codes, const int8_t* bytes, int64_t stride) {
  for (int row = 0; row < ROWS; ++row)
    products[row] = _mm512_dpbusd_epi32(products[row], codes, _mm512_set1_epi32(four_bytes(bytes + row * stride)));
}

// output[row] = the 16 results of rows first_row to first_row + ROWS
template <int ROWS, int BITS, class Scale>
static inline void multiply_tile(TileWeight<Scale> weight, const RoundedRows& x, int64_t first_row, float* output) {
  const __m512i nibble = _mm512_set1_epi8(15);
  const int64_t stride = 2 * x.num_columns;
  const int8_t *high = x.high(first_row), *low = x.low(first_row);
  const BlockScale* blocks = x.block(first_row);
  __m512 sums[ROWS];
  for (int row = 0; row < ROWS; ++row) sums[row] = _mm512_setzero_ps();
  for (int64_t group = 0; group < weight.num_groups; ++group, weight.scales += TILE, weight.zeros += TILE) {
    const __m512 scales = load(weight.scales);
    const __m512i zeros = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)weight.zeros));
    for (int64_t block = 0; block < weight.blocks_per_group; ++block, ++blocks) {
      __m512i high_products[ROWS], low_products[ROWS];
      for (int row = 0; row < ROWS; ++row) {
        __m512i negative_sums = _mm512_set1_epi32(both_sums(blocks[row * x.num_blocks]));
        high_products[row] = _mm512_madd_epi16(zeros, negative_sums);
        low_products[row] = _mm512_madd_epi16(_mm512_slli_epi32(zeros, 16), negative_sums);
      }
      for (int64_t strip = 0; strip < weight.block; strip += STRIP)
#pragma GCC unroll 8
        for (int step = 0; step < STRIP * BITS / 32; ++step, weight.codes += 64, high += 32 / BITS, low += 32 / BITS) {
          __m512i codes = _mm512_loadu_si512(weight.codes);
          if (BITS == 4) {
            __m512i first = _mm512_and_si512(codes, nibble);
            __m512i second = _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble);
            multiply_bytes<ROWS>(high_products, first, high, stride);
            multiply_bytes<ROWS>(low_products, first, low, stride);
            multiply_bytes<ROWS>(high_products, second, high + 4, stride);
            multiply_bytes<ROWS>(low_products, second, low + 4, stride);
          } else {
            multiply_bytes<ROWS>(high_products, codes, high, stride);
            multiply_bytes<ROWS>(low_products, codes, low, stride);
          }
        }
      for (int row = 0; row < ROWS; ++row) {
        __m512i product = _mm512_add_epi32(_mm512_slli_epi32(high_products[row], 3), low_products[row]);
        __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(blocks[row * x.num_blocks].scale));
        sums[row] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), scale, sums[row]);
      }
    }
  }
  for (int row = 0; row < ROWS; ++row) _mm512_storeu_ps(output + row * TILE, sums[row]);
}

#else

// 8 of the tile's outputs. Pairs of products are summed in 16 bits, which hold those of a strip of nibbles: 8 * 2 * 15 * 127
template <int ROWS, int BITS, class Scale>
static inline void multiply_half(TileWeight<Scale> weight, const RoundedRows& x, int64_t first_row, float* output) {
  const __m256i nibble = _mm256_set1_epi8(15);
  const int8_t* bytes = x.high(first_row);
  const BlockScale* blocks = x.block(first_row);
  __m256 sums[ROWS];
  for (int row = 0; row < ROWS; ++row) sums[row] = _mm256_setzero_ps();
  for (int64_t group = 0; group < weight.num_groups; ++group, weight.scales += TILE, weight.zeros += TILE) {
    const __m256i zeros = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)weight.zeros));
    for (int64_t block = 0; block < weight.blocks_per_group; ++block, ++blocks) {
      // of each row those of its high bytes, then those of its low ones
      __m256i products[2 * ROWS];
      for (int row = 0; row < ROWS; ++row) {
        __m256i negative_sums = _mm256_set1_epi32(both_sums(blocks[row * x.num_blocks]));
        products[2 * row] = _mm256_madd_epi16(zeros, negative_sums);
        products[2 * row + 1] = _mm256_madd_epi16(_mm256_slli_epi32(zeros, 16), negative_sums);
      }
      for (int64_t strip = 0; strip < weight.block; strip += STRIP) {
        // 8 bits: the lower halves of codes, then the upper ones
        constexpr int HALVES = BITS / 4;
        __m256i pairs[HALVES][2 * ROWS];
        for (auto& half : pairs)
          for (__m256i& pair : half) pair = _mm256_setzero_si256();
#pragma GCC unroll 1
        for (int step = 0; step < STRIP * BITS / 32; ++step, weight.codes += 64, bytes += 32 / BITS) {
          __m256i codes = _mm256_loadu_si256((const __m256i*)weight.codes);
          __m256i first = _mm256_and_si256(codes, nibble);
          __m256i second = _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble);
          for (int row = 0; row < 2 * ROWS; ++row) {
            const int8_t* four = bytes + row * x.num_columns;
            __m256i inputs = _mm256_set1_epi32(four_bytes(four));
            __m256i others = BITS == 4 ? _mm256_set1_epi32(four_bytes(four + 4)) : inputs;
            pairs[0][row] = _mm256_add_epi16(pairs[0][row], _mm256_maddubs_epi16(first, inputs));
            pairs[HALVES - 1][row] = _mm256_add_epi16(pairs[HALVES - 1][row], _mm256_maddubs_epi16(second, others));
          }
        }
        for (int half = 0; half < HALVES; ++half)
          for (int row = 0; row < 2 * ROWS; ++row) {
            __m256i weights = _mm256_set1_epi16(half ? 16 : 1);
            products[row] = _mm256_add_epi32(products[row], _mm256_madd_epi16(pairs[half][row], weights));
          }
      }
      for (int row = 0; row < ROWS; ++row) {
        __m256i product = _mm256_add_epi32(_mm256_slli_epi32(products[2 * row], 3), products[2 * row + 1]);
        __m256 scale = _mm256_mul_ps(load(weight.scales), _mm256_set1_ps(blocks[row * x.num_blocks].scale));
        sums[row] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(product), scale, sums[row]);
      }
    }
  }
  for (int row = 0; row < ROWS; ++row) _mm256_storeu_ps(output + row * TILE, sums[row]);
}

template <int ROWS, int BITS, class Scale>
static inline void multiply_tile(TileWeight<Scale> weight, const RoundedRows& x, int64_t first_row, float* output) {
  multiply_half<ROWS, BITS>(weight, x, first_row, output);
  weight.codes += 32, weight.scales += TILE / 2, weight.zeros += TILE / 2;
  multiply_half<ROWS, BITS>(weight, x, first_row, output + TILE / 2);
}

#endif

template <int BITS, class Scale>
static inline void multiply_rows(int num_rows, TileWeight<Scale> weight, const RoundedRows& x, int64_t first_row,
                                 float* output) {
  switch (num_rows) {
    case 1: return multiply_tile<1, BITS>(weight, x, first_row, output);
    case 2: return multiply_tile<2, BITS>(weight, x, first_row, output);
    case 3: return multiply_tile<3, BITS>(weight, x, first_row, output);
    case 4: return multiply_tile<4, BITS>(weight, x, first_row, output);
#if defined(__AVX512VNNI__)
    case 5: return multiply_tile<5, BITS>(weight, x, first_row, output);
    case 6: return multiply_tile<6, BITS>(weight, x, first_row, output);
    case 7: return multiply_tile<7, BITS>(weight, x, first_row, output);
    case 8: return multiply_tile<8, BITS>(weight, x, first_row, output);
#endif
  }
}

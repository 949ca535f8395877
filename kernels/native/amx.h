// The same whole-number products as linear.h, 16 rows at once, by the CPU's matrix unit (AMX). For 4-bit codes: less their zero
// point they fit a signed byte, so that a tile of codes is unpacked once for all rows.
#pragma once
#include "linear.h"

#if defined(__AMX_INT8__)
#include <sys/syscall.h>
#include <unistd.h>

constexpr int MATRIX_ROWS = 16;

struct alignas(64) MatrixShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes_per_row[16];
  uint8_t rows[16];
};

// Linux hands out the matrix unit to processes that ask
static inline bool request_matrices() {
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

// matrices 0 and 1: products of 16 rows each; 2 to 5: their high and low bytes; 6 and 7: codes of `columns` inputs
static inline void configure_matrices(int columns) {
  MatrixShapes shapes = {};
  shapes.palette = 1;
  for (int matrix = 0; matrix < 8; ++matrix) {
    shapes.rows[matrix] = (uint8_t)(matrix < 6 ? MATRIX_ROWS : columns / 4);
    shapes.bytes_per_row[matrix] = (uint16_t)(matrix >= 2 && matrix < 6 ? columns : 64);
  }
  _tile_loadconfig(&shapes);
}

// Codes less zero points as signed bytes, 64 for 4 inputs of the 16 outputs: eightfold for the high bytes' products, then, for
// the same `columns` inputs, as they are for the low bytes'. So both are summed in one matrix.
template <class Scale>
static inline void unpack_tile(TileWeight<Scale> weight, int64_t group_size, int64_t columns, int8_t* unpacked) {
  const __m512i nibble = _mm512_set1_epi8(15), high_bits = _mm512_set1_epi8(0x78);
  const int64_t size = columns * TILE;
  for (int64_t group = 0; group < weight.num_groups; ++group, weight.zeros += TILE) {
    __m512i zeros = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)weight.zeros));
    zeros = _mm512_mullo_epi32(zeros, _mm512_set1_epi32(0x01010101));
    __m512i eightfold_zeros = _mm512_slli_epi16(zeros, 3);
    for (int64_t start = 0; start < group_size; start += columns, unpacked += 2 * size)
      for (int64_t offset = 0; offset < size; offset += 128, weight.codes += 64) {
        __m512i codes = _mm512_loadu_si512(weight.codes);
        __m512i first = _mm512_and_si512(_mm512_slli_epi16(codes, 3), high_bits);
        __m512i second = _mm512_and_si512(_mm512_srli_epi16(codes, 1), high_bits);
        _mm512_storeu_si512(unpacked + offset, _mm512_sub_epi8(first, eightfold_zeros));
        _mm512_storeu_si512(unpacked + offset + 64, _mm512_sub_epi8(second, eightfold_zeros));
        first = _mm512_and_si512(codes, nibble);
        second = _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble);
        _mm512_storeu_si512(unpacked + size + offset, _mm512_sub_epi8(first, zeros));
        _mm512_storeu_si512(unpacked + size + offset + 64, _mm512_sub_epi8(second, zeros));
      }
  }
}

// products of STEPS times COLUMNS inputs of 16 or 32 rows, from where the pointers point on
template <bool TWICE, int STEPS, int COLUMNS>
static inline void multiply_block(const int8_t* unpacked, const int8_t* bytes, int64_t num_columns, int32_t* products) {
  const int64_t stride = 2 * num_columns;
  const int8_t* others = bytes + MATRIX_ROWS * stride;
  _tile_zero(0);
  if (TWICE) _tile_zero(1);
#pragma GCC unroll 4
  for (int step = 0; step < STEPS; ++step, bytes += COLUMNS, others += COLUMNS, unpacked += 2 * COLUMNS * TILE) {
    _tile_loadd(6, unpacked, 64);
    _tile_loadd(2, bytes, stride);
    _tile_dpbssd(0, 2, 6);
    if (TWICE) _tile_loadd(4, others, stride);
    if (TWICE) _tile_dpbssd(1, 4, 6);
    _tile_loadd(7, unpacked + COLUMNS * TILE, 64);
    _tile_loadd(3, bytes + num_columns, stride);
    _tile_dpbssd(0, 3, 7);
    if (TWICE) _tile_loadd(5, others + num_columns, stride);
    if (TWICE) _tile_dpbssd(1, 5, 7);
  }
  _tile_stored(0, products, 64);
  if (TWICE) _tile_stored(1, products + MATRIX_ROWS * TILE, 64);
}

// sums[row] = the 16 results of 16 or, TWICE, 32 rows; COLUMNS as configured
template <bool TWICE, int STEPS, int COLUMNS, class Scale>
static inline void multiply_matrix(TileWeight<Scale> weight, const int8_t* unpacked, const RoundedRows& x,
                                   int64_t first_row, float* sums) {
  constexpr int ROWS = TWICE ? 2 * MATRIX_ROWS : MATRIX_ROWS, WIDE = STEPS * COLUMNS;
  const int64_t num_blocks = x.num_blocks;
  const int8_t* bytes = x.high(first_row);
  const BlockScale* blocks = x.block(first_row);
  alignas(64) int32_t products[ROWS * TILE];
  int64_t left_in_group = weight.blocks_per_group;
  __m512 scales = load(weight.scales);
  for (int64_t block = 0; block < num_blocks; ++block, --left_in_group, bytes += WIDE, unpacked += 2 * WIDE * TILE) {
    if (left_in_group == 0) {
      left_in_group = weight.blocks_per_group;
      scales = load(weight.scales += TILE);
    }
    // the next block's codes, from the second cache
    for (int64_t byte = 2 * WIDE * TILE; byte < 4 * WIDE * TILE; byte += 64)
      _mm_prefetch((const char*)unpacked + byte, _MM_HINT_T0);
    multiply_block<TWICE, STEPS, COLUMNS>(unpacked, bytes, x.num_columns, products);
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row) {
      __m512 before = block ? _mm512_load_ps(sums + row * TILE) : _mm512_setzero_ps();
      __m512 product = _mm512_cvtepi32_ps(_mm512_load_si512(products + row * TILE));
      __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(blocks[row * num_blocks + block].scale));
      _mm512_store_ps(sums + row * TILE, _mm512_fmadd_ps(product, scale, before));
    }
  }
}

template <bool TWICE, class Scale>
static inline void multiply_matrix(int64_t block, TileWeight<Scale> weight, const int8_t* unpacked, const RoundedRows& x,
                                   int64_t first_row, float* sums) {
  if (block == 32) return multiply_matrix<TWICE, 1, 32>(weight, unpacked, x, first_row, sums);
  if (block == 64) return multiply_matrix<TWICE, 1, 64>(weight, unpacked, x, first_row, sums);
  multiply_matrix<TWICE, 2, 64>(weight, unpacked, x, first_row, sums);
}

#endif

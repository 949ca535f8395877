// Operations on single rows: norms, the gate, and rounding to whole numbers.
//
// A rounded row: x = (high * 8 + low) * scale, high in [-127, 127] and low in [-4, 3] in bytes of their own, one scale for each
// block of columns. With these 11 bits a product is nearly as good as one of floats, and still is one of bytes. A block's bytes
// are also summed, for the weights' zero points: sum((code - zero) * byte) = sum(code * byte) - zero * sum(byte).
#pragma once
#include "operation.h"
#include "simd.h"

constexpr float LARGEST_WHOLE = 127 * 8;

struct BlockScale {
  float scale;
  int16_t negative_high_sum, negative_low_sum;
};

struct RoundedRows {
  int64_t num_columns, num_blocks;
  int8_t* bytes;       // [T, 2, K]: a row's high bytes, then its low ones
  BlockScale* blocks;  // [T, K / block]

  RoundedRows(uint8_t* buffer, int64_t num_rows, int64_t columns, int64_t block)
      : num_columns(columns),
        num_blocks(columns / block),
        bytes((int8_t*)buffer),
        blocks((BlockScale*)(buffer + (num_rows * 2 * columns + 63) / 64 * 64)) {}

  int8_t* high(int64_t row) const { return bytes + row * 2 * num_columns; }
  int8_t* low(int64_t row) const { return high(row) + num_columns; }
  BlockScale* block(int64_t row) const { return blocks + row * num_blocks; }
};

constexpr int64_t MAX_BLOCK = 128;

// rounds the block with this index of a row; values(column) gives the Floats from that column on
template <class Values>
static inline void round_block(const RoundedRows& rounded, int64_t row, int64_t index, int64_t width, Values values) {
  int64_t first = index * width;
  float block_values[MAX_BLOCK];
  Floats peak = fill(0), spoiled = fill(0);
  for (int64_t i = 0; i < width; i += WIDTH) {
    Floats x = values(first + i);
    store(block_values + i, x);
    peak = larger(peak, magnitude(x));
    // NaN where x is not finite: it must come out of the product as NaN, not as some byte
    spoiled = multiply_add(x, fill(0), spoiled);
  }
  float extent = largest(peak);
  Floats inverse = fill(extent > 0 ? LARGEST_WHOLE / extent : 0.0f), limit = fill(LARGEST_WHOLE);
  Integers high_sums = no_integers(), low_sums = no_integers();
  for (int64_t i = 0; i < width; i += WIDTH) {
    Floats whole = round_to_whole(multiply(load(block_values + i), inverse));
    Integers high, low;
    split(smaller(limit, larger(subtract(fill(0), limit), whole)), &high, &low);
    store_bytes(rounded.high(row) + first + i, high);
    store_bytes(rounded.low(row) + first + i, low);
    high_sums = add(high_sums, high);
    low_sums = add(low_sums, low);
  }
  BlockScale* block = rounded.block(row) + index;
  block->scale = extent / LARGEST_WHOLE + sum(spoiled);
  block->negative_high_sum = (int16_t)-sum(high_sums);
  block->negative_low_sum = (int16_t)-sum(low_sums);
}

// 1 / rms of a row
static inline float inverse_rms(const float* x, int64_t width, float epsilon) {
  Floats squares = fill(0);
  for (int64_t column = 0; column < width; column += WIDTH) {
    Floats part = load(x + column);
    squares = multiply_add(part, part, squares);
  }
  return 1.0f / __builtin_sqrtf(sum(squares) / (float)width + epsilon);
}

static inline void normalize_row(const Operation& op, const float* x, float* output) {
  Floats scale = fill(inverse_rms(x, op.num_inputs, op.epsilon));
  for (int64_t column = 0; column < op.num_inputs; column += WIDTH)
    store(output + column, multiply(multiply(load(x + column), scale), load(op.norm + column)));
}

static inline void quantize_row(const Operation& op, const float* x, const RoundedRows& rounded, int64_t row) {
  Floats scale = fill(op.norm ? inverse_rms(x, op.num_inputs, op.epsilon) : 1.0f);
  for (int64_t index = 0; index < rounded.num_blocks; ++index) {
    if (op.norm)
      round_block(rounded, row, index, op.block,
                  [&](int64_t column) { return multiply(multiply(load(x + column), scale), load(op.norm + column)); });
    else
      round_block(rounded, row, index, op.block, [&](int64_t column) { return load(x + column); });
  }
}

// silu(gate) * up, where x holds the gate's columns and then the up projection's
static inline void gate_block(const Operation& op, const float* x, const RoundedRows& rounded, int64_t row, int64_t index) {
  round_block(rounded, row, index, op.block, [&](int64_t column) {
    Floats gate = load(x + column), up = load(x + op.num_inputs + column);
    Floats denominator = add(fill(1.0f), exponential(subtract(fill(0), gate)));
    return multiply(multiply(gate, reciprocal(denominator)), up);
  });
}

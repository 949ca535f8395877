// The linear operation: tiles of outputs, for all rows of the step.
#pragma once
#include "amx.h"

template <int BITS, class Scale>
class TileProducts {
 public:
  TileProducts(const Operation& op, const Step& step)
      : op_(op),
        num_rows_(step.num_rows),
        x_(step.buffers[op.input], step.num_rows, op.num_inputs, op.block),
        output_((float*)step.buffers[op.output]) {}

  // scratch: room for the tiles' unpacked codes, 32 bytes an input each
  void run(int64_t first_tile, int64_t last_tile, int8_t* scratch) const {
    int64_t first_row = multiply_matrices(first_tile, last_tile, scratch);
    for (int64_t tile = first_tile; tile < last_tile; ++tile)
      for (int64_t row = first_row; row < num_rows_; row += MAX_ROWS) {
        int count = (int)(num_rows_ - row < MAX_ROWS ? num_rows_ - row : MAX_ROWS);
        float products[MAX_ROWS * TILE];
        multiply_rows<BITS>(count, weight_of(tile), x_, row, products);
        store(tile, row, count, products);
      }
  }

 private:
  TileWeight<Scale> weight_of(int64_t tile) const {
    int64_t num_groups = op_.num_inputs / op_.group_size, before = tile * num_groups * TILE;
    return {op_.codes + tile * op_.num_inputs * 2 * BITS, (const Scale*)op_.scales + before, op_.zeros + before,
            num_groups, op_.group_size / op_.block, op_.block};
  }

  // with bias and, where the operation adds, what is there already
  void store(int64_t tile, int64_t first_row, int count, const float* products) const {
    int64_t first = tile * TILE, width = op_.num_outputs - first;
    for (int index = 0; index < count; ++index, products += TILE) {
      float* output = output_ + (first_row + index) * op_.num_outputs + first;
      const float* bias = op_.bias ? op_.bias + first : nullptr;
      if (width >= TILE) {
        for (int lane = 0; lane < TILE; lane += WIDTH) {
          Floats value = load(products + lane);
          if (bias) value = add(value, load(bias + lane));
          if (op_.adds) value = add(load(output + lane), value);
          ::store(output + lane, value);
        }
      } else {
        for (int64_t lane = 0; lane < width; ++lane) {
          float value = bias ? products[lane] + bias[lane] : products[lane];
          output[lane] = op_.adds ? output[lane] + value : value;
        }
      }
    }
  }

#if defined(__AMX_INT8__)
  // the first rows, as many as fill matrices; gives their number. The results of the others are the same to the bit
  int64_t multiply_matrices(int64_t first_tile, int64_t last_tile, int8_t* scratch) const {
    static const bool granted = request_matrices();
    int64_t num_rows = BITS == 4 && granted ? num_rows_ / MATRIX_ROWS * MATRIX_ROWS : 0;
    if (num_rows == 0) return 0;
    int columns = op_.block % 64 ? 32 : 64;
    configure_matrices(columns);
    int64_t unpacked_size = 2 * TILE * op_.num_inputs;
    for (int64_t tile = first_tile; tile < last_tile; ++tile)
      unpack_tile(weight_of(tile), op_.group_size, columns, scratch + (tile - first_tile) * unpacked_size);
    for (int64_t row = 0, count; row < num_rows; row += count) {
      count = num_rows - row < 2 * MATRIX_ROWS ? MATRIX_ROWS : 2 * MATRIX_ROWS;
      for (int64_t tile = first_tile; tile < last_tile; ++tile) {
        const int8_t* unpacked = scratch + (tile - first_tile) * unpacked_size;
        alignas(64) float sums[2 * MATRIX_ROWS * TILE];
        if (count == MATRIX_ROWS) multiply_matrix<false>(op_.block, weight_of(tile), unpacked, x_, row, sums);
        else multiply_matrix<true>(op_.block, weight_of(tile), unpacked, x_, row, sums);
        store(tile, row, (int)count, sums);
      }
    }
    _tile_release();
    return num_rows;
  }
#else
  static int64_t multiply_matrices(int64_t, int64_t, int8_t*) { return 0; }
#endif

  const Operation& op_;
  int64_t num_rows_;
  RoundedRows x_;
  float* output_;
};

static inline void multiply_tiles(const Operation& op, const Step& step, int64_t first, int64_t last, int8_t* scratch) {
  if (op.bits == 4 && op.scale_type == FLOAT16) return TileProducts<4, Float16>(op, step).run(first, last, scratch);
  if (op.bits == 4) return TileProducts<4, float>(op, step).run(first, last, scratch);
  if (op.scale_type == FLOAT16) return TileProducts<8, Float16>(op, step).run(first, last, scratch);
  return TileProducts<8, float>(op, step).run(first, last, scratch);
}

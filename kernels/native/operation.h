// What crosses the C interface: operations, and the step that they are run for. kernels/native_cpu.py mirrors both.
//
// Legend: T = rows (tokens) of the step, N = outputs, K = inputs, H = heads, D = head width. A buffer is named by its
// number in Step::buffers and holds float [T, columns], or, after QUANTIZE and GATE, rows of bytes (see rows.h).
#pragma once
#include <stdint.h>

enum Kind : int64_t { QUANTIZE, GATE, LINEAR, ROTATE, ATTEND, NORM, NUM_KINDS };
enum FloatType : int64_t { FLOAT32, FLOAT16 };

struct Operation {
  int64_t kind;
  int64_t input;
  int64_t output;
  int64_t num_inputs;   // columns of the input; of one half of it for GATE
  int64_t num_outputs;  // LINEAR: N; its input is what QUANTIZE or GATE left
  int64_t block;        // columns that share an activation scale; divides the group size
  int64_t bits;         // LINEAR: 4 or 8
  int64_t group_size;
  int64_t scale_type;   // FLOAT16 or FLOAT32
  int64_t adds;         // LINEAR: 1 to add to what the output buffer holds
  int64_t num_heads;    // ROTATE and ATTEND: of queries; rows of the input hold queries, keys, values
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t layer;        // which of the step's caches
  int64_t window;       // ATTEND: tokens seen back, 0 for all
  float epsilon;        // of the norms
  float softmax_scale;
  const uint8_t* codes;  // LINEAR: see WeightLayout.TILES
  const void* scales;
  const uint8_t* zeros;
  const float* bias;        // [N] or null
  const float* norm;        // QUANTIZE and NORM: [K] or null
  const float* query_norm;  // ROTATE: [D] or null
  const float* key_norm;
};

struct Step {
  int64_t num_rows;
  int64_t num_sequences;
  int64_t max_blocks;
  int64_t block_size;       // tokens of a block of the cache, a multiple of 16
  int64_t scratch_bytes;    // of each thread: see Program.scratch_bytes in native_program.py
  uint8_t* const* buffers;
  int8_t* scratch;
  void* const* keys;        // of each layer float16 [num_blocks, H_kv, D, block_size]
  void* const* values;      // of each layer float16 [num_blocks, H_kv, block_size, D]
  const float* cosines;     // [T, D / 2]
  const float* sines;
  const int64_t* slots;     // [T]
  const int32_t* query_starts;  // [num_sequences + 1]
  const int32_t* context_lens;
  const int32_t* block_tables;  // [num_sequences, max_blocks]
};

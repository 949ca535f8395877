// Rotation, writing to the paged cache, and attention over it.
//
// Keys lie transposed within their block of the cache, so that the scores of WIDTH neighbouring keys are one vector. A query's
// result is summed in the order of its own keys: it does not depend on the step's other queries.
#pragma once
#include <math.h>

#include "rows.h"

// within what Float16 holds; NaN stays NaN
static inline Floats clamp_to_stored(Floats a) { return smaller(fill(65504.0f), larger(fill(-65504.0f), a)); }

// element i pairs with element i + D / 2
static inline void rotate_head(float* head, const float* cosines, const float* sines, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    float first = head[i], second = head[i + half];
    head[i] = first * cosines[i] - second * sines[i];
    head[i + half] = second * cosines[i] + first * sines[i];
  }
}

static inline void normalize_head(float* head, const float* norm, int64_t width, float epsilon) {
  float squares = 0;
  for (int64_t i = 0; i < width; ++i) squares += head[i] * head[i];
  float scale = 1.0f / sqrtf(squares / (float)width + epsilon);
  for (int64_t i = 0; i < width; ++i) head[i] = head[i] * scale * norm[i];
}

// rotates a row's queries in place, and writes its keys, rotated, and its values to their slot
static inline void rotate_row(const Operation& op, const Step& step, int64_t row) {
  int64_t width = op.head_dim, half = width / 2;
  float* head = (float*)step.buffers[op.input] + row * (op.num_heads + 2 * op.num_kv_heads) * width;
  const float *cosines = step.cosines + row * half, *sines = step.sines + row * half;
  for (int64_t i = 0; i < op.num_heads; ++i, head += width) {
    if (op.query_norm) normalize_head(head, op.query_norm, width, op.epsilon);
    rotate_head(head, cosines, sines, half);
  }
  int64_t block = step.slots[row] / step.block_size, offset = step.slots[row] % step.block_size;
  for (int64_t i = 0; i < op.num_kv_heads; ++i, head += width) {
    if (op.key_norm) normalize_head(head, op.key_norm, width, op.epsilon);
    rotate_head(head, cosines, sines, half);
    Float16* keys = (Float16*)step.keys[op.layer] + (block * op.num_kv_heads + i) * step.block_size * width + offset;
    for (int64_t d = 0; d < width; d += WIDTH) {
      Float16 part[WIDTH];
      store(part, clamp_to_stored(load(head + d)));
      for (int64_t lane = 0; lane < WIDTH; ++lane) keys[(d + lane) * step.block_size] = part[lane];
    }
  }
  for (int64_t i = 0; i < op.num_kv_heads; ++i, head += width) {
    Float16* values = (Float16*)step.values[op.layer] + ((block * op.num_kv_heads + i) * step.block_size + offset) * width;
    for (int64_t d = 0; d < width; d += WIDTH) store(values + d, clamp_to_stored(load(head + d)));
  }
}

// queries that are attended together, as they see the same keys but for the last few
constexpr int QUERY_ROWS = 4;
constexpr int MAX_QUERIES = 12;

// one query head of one row: its scores, then weights, for keys span.first ..
struct Query {
  const float* values;  // [D]
  float* weights;
  float* output;  // [D]
  int64_t context_len;
};

// keys first .. last of one key head of one sequence; first is a multiple of WIDTH
struct Span {
  const Float16 *keys, *values;
  const int32_t* block_table;
  int64_t head_dim, block_size, block_stride, first, last;

  const Float16* keys_at(int64_t key) const {
    return keys + block_table[key / block_size] * block_stride + key % block_size;
  }
  const Float16* values_at(int64_t key) const {
    return values + block_table[key / block_size] * block_stride + key % block_size * head_dim;
  }
};

template <int QUERIES>
static inline void score_keys(const Query* queries, const Span& span, float softmax_scale) {
  for (int64_t key = span.first; key < span.last; key += WIDTH) {
    const Float16* keys = span.keys_at(key);
    // two sums a score, as one would wait for itself
    Floats even[QUERIES], odd[QUERIES];
#pragma GCC unroll 12
    for (int q = 0; q < QUERIES; ++q) even[q] = odd[q] = fill(0);
    for (int64_t d = 0; d < span.head_dim; d += 2) {
      Floats first = load(keys + d * span.block_size), second = load(keys + (d + 1) * span.block_size);
#pragma GCC unroll 12
      for (int q = 0; q < QUERIES; ++q) {
        even[q] = multiply_add(fill(queries[q].values[d]), first, even[q]);
        odd[q] = multiply_add(fill(queries[q].values[d + 1]), second, odd[q]);
      }
    }
#pragma GCC unroll 12
    for (int q = 0; q < QUERIES; ++q)
      store(queries[q].weights + key - span.first, multiply(add(even[q], odd[q]), fill(softmax_scale)));
  }
}

// scores [hidden, count) become weights that sum to 1, those before and those up to `size` zeros
static inline void softmax_scores(float* scores, int64_t hidden, int64_t count, int64_t size) {
  for (int64_t i = 0; i < hidden; ++i) scores[i] = -INFINITY;
  for (int64_t i = count; i < size; ++i) scores[i] = -INFINITY;
  Floats peaks = fill(-INFINITY);
  for (int64_t i = 0; i < count; i += WIDTH) peaks = larger(peaks, load(scores + i));
  Floats peak = fill(largest(peaks)), sums = fill(0);
  for (int64_t i = 0; i < count; i += WIDTH) {
    Floats weights = exponential(subtract(load(scores + i), peak));
    if (hidden > i) weights = subtract(weights, keep_first(weights, (int)(hidden - i < WIDTH ? hidden - i : WIDTH)));
    if (count - i < WIDTH) weights = keep_first(weights, (int)(count - i));
    sums = add(sums, weights);
    store(scores + i, weights);
  }
  Floats inverse = fill(1.0f / sum(sums));
  for (int64_t i = 0; i < count; i += WIDTH) store(scores + i, multiply(load(scores + i), inverse));
  for (int64_t i = (count + WIDTH - 1) / WIDTH * WIDTH; i < size; i += WIDTH) store(scores + i, fill(0));
}

// output[column ..] = sum over keys of weight * value, for VECTORS vectors of columns
template <int QUERIES, int VECTORS>
static inline void sum_values(const Query* queries, const Span& span, int64_t column) {
  Floats sums[QUERIES][VECTORS];
#pragma GCC unroll 12
  for (int q = 0; q < QUERIES; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sums[q][v] = fill(0);
  for (int64_t key = span.first; key < span.last;) {
    int64_t end = (key / span.block_size + 1) * span.block_size;
    const Float16* values = span.values_at(key) + column;
    for (int64_t last = end < span.last ? end : span.last; key < last; ++key, values += span.head_dim) {
      Floats parts[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) parts[v] = load(values + v * WIDTH);
#pragma GCC unroll 12
      for (int q = 0; q < QUERIES; ++q) {
        Floats weight = fill(queries[q].weights[key - span.first]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sums[q][v] = multiply_add(weight, parts[v], sums[q][v]);
      }
    }
  }
#pragma GCC unroll 12
  for (int q = 0; q < QUERIES; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) store(queries[q].output + column + v * WIDTH, sums[q][v]);
}

template <int QUERIES>
static inline void attend_queries(const Operation& op, const Query* queries, const Span& span) {
  constexpr int VECTORS = QUERIES > 4 ? 2 : 4;
  score_keys<QUERIES>(queries, span, op.softmax_scale);
  int64_t size = (span.last - span.first + WIDTH - 1) / WIDTH * WIDTH;
  for (int q = 0; q < QUERIES; ++q) {
    int64_t context_len = queries[q].context_len;
    int64_t first = op.window && context_len > op.window ? context_len - op.window : 0;
    softmax_scores(queries[q].weights, first - span.first, context_len - span.first, size);
  }
  int64_t column = 0;
  for (; column + VECTORS * WIDTH <= op.head_dim; column += VECTORS * WIDTH)
    sum_values<QUERIES, VECTORS>(queries, span, column);
  for (; column < op.head_dim; column += WIDTH) sum_values<QUERIES, 1>(queries, span, column);
}

// neighbouring rows of one sequence
struct QueryRows {
  int64_t sequence, first, count;
};

// heads first_head .. last_head, all of one key head, of some rows; scratch holds a float for every query and key
static inline void attend(const Operation& op, const Step& step, QueryRows rows, int64_t first_head, int64_t last_head,
                          float* scratch) {
  int64_t width = op.head_dim, row_width = (op.num_heads + 2 * op.num_kv_heads) * width;
  int64_t kv_head = first_head / (op.num_heads / op.num_kv_heads);
  // of the last row
  int64_t context_len = step.context_lens[rows.sequence] -
                        (step.query_starts[rows.sequence + 1] - rows.first - rows.count);
  int64_t first_len = context_len - rows.count + 1;
  // slots before the first row's window are of the same sequence, so they may be read, and weigh nothing
  int64_t first_key = op.window && first_len > op.window ? (first_len - op.window) / WIDTH * WIDTH : 0;
  int64_t head_stride = step.block_size * width;
  Span span{(const Float16*)step.keys[op.layer] + kv_head * head_stride,
            (const Float16*)step.values[op.layer] + kv_head * head_stride,
            step.block_tables + rows.sequence * step.max_blocks,
            width, step.block_size, op.num_kv_heads * head_stride, first_key, context_len};
  int64_t stride = (context_len - first_key + WIDTH - 1) / WIDTH * WIDTH;
  Query queries[MAX_QUERIES];
  int count = 0;
  auto attend_all = [&] {
    const Query* next = queries;
    for (; count >= 12; count -= 12, next += 12) attend_queries<12>(op, next, span);
    for (; count >= 4; count -= 4, next += 4) attend_queries<4>(op, next, span);
    for (; count >= 3; count -= 3, next += 3) attend_queries<3>(op, next, span);
    for (; count >= 1; count -= 1, next += 1) attend_queries<1>(op, next, span);
  };
  for (int64_t row = rows.first; row < rows.first + rows.count; ++row)
    for (int64_t head = first_head; head < last_head; ++head) {
      queries[count] = {(const float*)step.buffers[op.input] + row * row_width + head * width,
                        scratch + count * stride,
                        (float*)step.buffers[op.output] + (row * op.num_heads + head) * width,
                        first_len + row - rows.first};
      if (++count == MAX_QUERIES) attend_all();
    }
  attend_all();
}

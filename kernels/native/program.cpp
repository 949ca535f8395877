// The C interface: a pool of threads, and a list of operations that it runs for the rows of one step.
#include "attention.h"
#include "pool.h"
#include "tiles.h"

namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// few enough bytes that every thread gets several chunks, and enough that taking one costs nothing beside it
constexpr int64_t CHUNK_BYTES = 32768;
constexpr int64_t MAX_TILES = 8;
// blocks of columns that a chunk of a gate rounds, of few rows
constexpr int64_t GATE_BLOCKS = 8;

class Program final : public Work {
 public:
  Program(const Operation* operations, int num_operations, const Step& step, int num_threads)
      : operations_(operations), num_operations_(num_operations), step_(step), num_threads_(num_threads) {
    cut_query_rows();
  }

  int num_operations() const override { return num_operations_; }

  int num_chunks(int operation) const override {
    const Operation& op = operations_[operation];
    switch (op.kind) {
      case LINEAR: return (int)divide_up(num_tiles(op), tiles_per_chunk(op));
      case GATE: return (int)(step_.num_rows * divide_up(op.num_inputs / op.block, gate_blocks(op)));
      case ATTEND: return (int)((int64_t)query_rows_.size() * op.num_kv_heads * splits_of_group(op));
      default: return (int)divide_up(step_.num_rows, rows_per_chunk());
    }
  }

  void run(int operation, int chunk, int thread) override {
    const Operation& op = operations_[operation];
    switch (op.kind) {
      case LINEAR: {
        int64_t first = chunk * tiles_per_chunk(op), last = first + tiles_per_chunk(op);
        return multiply_tiles(op, step_, first, last < num_tiles(op) ? last : num_tiles(op), scratch_of(thread));
      }
      case GATE: return gate(op, chunk);
      case ATTEND: return attend_chunk(op, chunk, thread);
      default: break;
    }
    int64_t first = chunk * rows_per_chunk(), last = first + rows_per_chunk();
    for (int64_t row = first; row < last && row < step_.num_rows; ++row) run_row(op, row);
  }

 private:
  int8_t* scratch_of(int thread) const { return step_.scratch + thread * step_.scratch_bytes; }

  int64_t num_tiles(const Operation& op) const { return divide_up(op.num_outputs, TILE); }

  int64_t tiles_per_chunk(const Operation& op) const {
    int64_t by_bytes = CHUNK_BYTES / (op.num_inputs * 2 * op.bits), by_threads = num_tiles(op) / (4 * num_threads_);
    int64_t tiles = by_bytes < by_threads ? by_bytes : by_threads;
    if (tiles > MAX_TILES) return MAX_TILES;
    return tiles > 1 ? tiles : 1;
  }

  // of one chunk of a gate: a row, read as one stream, where there are enough of them
  int64_t gate_blocks(const Operation& op) const {
    return step_.num_rows < 8 * num_threads_ ? GATE_BLOCKS : op.num_inputs / op.block;
  }

  int64_t rows_per_chunk() const { return divide_up(step_.num_rows, 8 * num_threads_); }

  // the query heads of a key head are one chunk, or one each where there would be too few chunks
  int64_t splits_of_group(const Operation& op) const {
    return (int64_t)query_rows_.size() * op.num_kv_heads < 4 * num_threads_ ? op.num_heads / op.num_kv_heads : 1;
  }

  void run_row(const Operation& op, int64_t row) const {
    const float* x = (const float*)step_.buffers[op.input] + row * op.num_inputs;
    switch (op.kind) {
      case QUANTIZE: {
        RoundedRows rounded(step_.buffers[op.output], step_.num_rows, op.num_inputs, op.block);
        return quantize_row(op, x, rounded, row);
      }
      case NORM: return normalize_row(op, x, (float*)step_.buffers[op.output] + row * op.num_inputs);
      case ROTATE: return rotate_row(op, step_, row);
      default: return;
    }
  }

  void gate(const Operation& op, int64_t chunk) const {
    int64_t num_blocks = op.num_inputs / op.block, width = gate_blocks(op), chunks_per_row = divide_up(num_blocks, width);
    int64_t row = chunk / chunks_per_row, first = chunk % chunks_per_row * width;
    const float* x = (const float*)step_.buffers[op.input] + row * 2 * op.num_inputs;
    RoundedRows rounded(step_.buffers[op.output], step_.num_rows, op.num_inputs, op.block);
    for (int64_t index = first; index < num_blocks && index < first + width; ++index)
      gate_block(op, x, rounded, row, index);
  }

  void attend_chunk(const Operation& op, int64_t chunk, int thread) const {
    int64_t splits = splits_of_group(op), heads = op.num_heads / op.num_kv_heads / splits;
    int64_t chunks_per_rows = op.num_kv_heads * splits, first_head = chunk % chunks_per_rows * heads;
    attend(op, step_, query_rows_[chunk / chunks_per_rows], first_head, first_head + heads, (float*)scratch_of(thread));
  }

  // a sequence's rows, cut so that a row's neighbours do not depend on the other sequences
  void cut_query_rows() {
    for (int64_t sequence = 0; sequence < step_.num_sequences; ++sequence) {
      int64_t row = step_.query_starts[sequence], end = step_.query_starts[sequence + 1];
      for (int64_t count; row < end; row += count) {
        count = end - row < QUERY_ROWS ? end - row : QUERY_ROWS;
        query_rows_.push_back({sequence, row, count});
      }
    }
  }

  const Operation* operations_;
  int num_operations_;
  const Step& step_;
  int num_threads_;
  std::vector<QueryRows> query_rows_;
};

}  // namespace

extern "C" {

Pool* awq_pool_create(int64_t num_threads) { return new Pool((int)num_threads); }

void awq_pool_destroy(Pool* pool) { delete pool; }

void awq_run(Pool* pool, const Operation* operations, int64_t num_operations, const Step* step) {
  Program program(operations, (int)num_operations, *step, pool->num_threads());
  pool->run(&program);
}
}

// Whole layers in one call: what a Transformer computes for the new tokens of several sequences over a paged cache.
#pragma once

#include <array>
#include <initializer_list>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "attention.h"
#include "matrix.h"
#include "pool.h"

namespace tael {

using MatrixPtr = std::shared_ptr<Matrix>;

struct Shape {
  int64_t hidden = 0, heads = 0, kv_heads = 0, head_dim = 0;           // GQA
  int64_t rank = 0, nope = 0, rope = 0, value = 0;                     // MLA
  int64_t experts = 0, chosen = 0, groups = 1, kept_groups = 1, group_top = 1;
  bool mla = false, interleaved = false, sigmoid = false, normalises = false, limits_groups = false;
  float eps = 1e-6f, latent_eps = 1e-6f, scale = 1.0f, routed_scale = 1.0f;
  int64_t width() const { return mla ? rank + rope : 2 * kv_heads * head_dim; }  // of a cache entry
  int64_t pairs() const { return (mla ? rope : head_dim) / 2; }
};

struct Layer {
  const float *input_norm = nullptr, *post_norm = nullptr, *q_norm = nullptr, *kv_norm = nullptr;
  MatrixPtr q, q_a, k, v, kv_a, kv_b, key_up, o;  // q: q_proj or q_b_proj; key_up: W_UK [H N, R], rows as in kv_b
  MatrixPtr gate, up, down;                       // dense, or the shared experts
  MatrixPtr router;
  const float* router_bias = nullptr;
  std::vector<std::array<MatrixPtr, 3>> experts;  // gate, up, down
};

struct DraftModule {
  const float *embedding_norm = nullptr, *hidden_norm = nullptr, *norm = nullptr;
  MatrixPtr join;
  int64_t layer = 0;
};

// One forward pass; see StepBatch in tael/engine/batch.py.
struct Batch {
  const int64_t *tokens, *positions, *starts, *tables;
  const bool* expanded;
  int64_t count, sequences, table_width;
};

// Queries of one sequence that look at the same keys: tokens first..last, `heads` heads from `head` on, in `groups` of
// heads that share keys and values.
struct Unit {
  int64_t sequence, head, heads, groups, first, last;
};

// A unit's part in a piece; `at`: its first row among the partial results.
struct Member {
  int64_t unit, at;
};

// A chunk of keys and the units (members first..first + count) that hold it in the same blocks.
struct Piece {
  int64_t chunk, first, count;
};

struct Found {
  int64_t unit, chunk, at, piece;
};

class Operator {
 public:
  Operator(Shape shape, int threads) : shape_(shape), pool_(threads), scratch_(pool_.threads()) {}

  Shape shape_;
  std::vector<Layer> layers_;
  std::vector<DraftModule> drafts_;
  MatrixPtr embedding_, head_;
  const float* norm_ = nullptr;
  // The cache: [layers, blocks, block size, width]; for GQA a block's bytes are [key heads, 2, block size, head_dim].
  void* cache_ = nullptr;
  Type cache_type_ = Type::f32;
  int64_t blocks_ = 0, block_bits_ = 0;  // 2^block_bits_ slots a block
  // cos, sin [positions, pairs].
  const float *cos_ = nullptr, *sin_ = nullptr;

  void forward(const Batch& batch, float* hidden);
  void logits(const float* hidden, int64_t rows, float* out);
  void draft(int64_t module, const Batch& batch, const float* states, float* hidden);

 private:
  struct Job {
    const Matrix* matrix;
    const Rows* rows;
    float* y;
    int64_t stride;
    const int32_t* index = nullptr;
    int64_t count = -1, from = 0, to = -1;
  };
  struct Task {
    const Job* job;
    int64_t first, last, from, to;
  };
  void multiply_all(const Job* jobs, size_t count);
  void multiply_all(std::initializer_list<Job> jobs) { multiply_all(jobs.begin(), jobs.size()); }
  void multiply_all(const std::vector<Job>& jobs) { multiply_all(jobs.data(), jobs.size()); }
  void find_sequences(const Batch& batch);
  template <class F>
  void each_row(int64_t rows, const F& f);
  void prepare(Rows& rows, const float* x, int64_t count, int64_t width, bool round);
  void run_layer(const Layer& layer, int64_t index, const Batch& batch, float* x, int64_t first_key);
  void attention(const Layer& layer, int64_t index, const Batch& batch, int64_t first_key);
  void attention_mla(const Layer& layer, int64_t index, const Batch& batch, int64_t first_key);
  void feed_forward(const Layer& layer, int64_t count);
  void mixture(const Layer& layer, int64_t count);
  void route(const Layer& layer, int64_t row);
  uint8_t* entry(int64_t layer, const Batch& batch, int64_t sequence, int64_t slot) const;
  template <class F>
  void each_query(const Unit& unit, int64_t group, const F& f) const;
  template <class Form, class Emit>
  void attend_together(const Batch& batch, const Form& form, const Member* members, int64_t count, int64_t chunk,
                       int64_t group, AttentionScratch& scratch, const Emit& emit);
  template <class Form>
  void attend(const Batch& batch, const Form& form);
  void share_chunks(const Batch& batch, const std::vector<Unit>& units);

  Pool pool_;
  std::vector<AttentionScratch> scratch_;
  std::vector<Task> tasks_;
  std::vector<Unit> units_;
  std::vector<Piece> pieces_;
  std::vector<Member> members_;
  std::vector<Found> found_chunks_;
  std::map<std::pair<int64_t, int64_t>, int64_t> by_blocks_;  // (first block, chunk and head) -> one that lies there
  std::vector<int64_t> begin_, sequence_, piece_rows_;
  Rows in_, mid_, latent_rows_, out_rows_, hidden_rows_;
  std::vector<float> x_, normed_, q_, q_low_, k_, v_, entry_, q_latent_, attended_, out_, gate_, up_, joined_;
  std::vector<float> expanded_, latents_, partial_values_;
  std::vector<Partial> partials_;
  std::vector<float> scores_, gates_;
  std::vector<int32_t> choice_, order_;
};

}  // namespace tael

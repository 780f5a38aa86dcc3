// Made layers for the tests of sparse attention, and the same attention by a mask, in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <span>
#include <vector>

#include "gpu/sparse/build_index.h"
#include "gpu/sparse/sparse_index.h"
#include "proto/half.h"

namespace quarry::testing {

struct CaseShape {
  DType dtype = DType::kFp32;
  uint32_t heads = 1, kv_heads = 1, head_dim = 64;
  uint32_t first_token = 0, rows = 1;
};

// K and V of [0, first_token + rows) and q of the rows. Behind the tokens and between the heads
// lies what must not be read: numbers that nothing else has.
class SparseCase {
 public:
  SparseCase(const CaseShape& shape, std::mt19937_64* random) : shape_(shape) {
    std::normal_distribution<float> normal;
    const size_t stride = size_t{tokens() + kBehind} * shape.head_dim;
    for (auto* side : {&k_, &v_}) {
      side->resize(stride * shape.kv_heads * DTypeBytes(shape.dtype));
      for (size_t i = 0; i < stride * shape.kv_heads; ++i) {
        const bool behind = i % stride / shape.head_dim >= tokens();
        StoreFromFloat(side->data(), i, shape.dtype, behind ? 60000.0f : normal(*random));
      }
    }
    q_.resize(size_t{shape.rows} * shape.heads * shape.head_dim);
    // Wide enough that some keys matter much more than others.
    for (float& x : q_) x = 2 * normal(*random);
  }

  const CaseShape& shape() const { return shape_; }
  uint32_t tokens() const { return shape_.first_token + shape_.rows; }
  TokenRange prefill() const { return {shape_.first_token, tokens()}; }
  const std::vector<float>& q() const { return q_; }
  float* Query(uint32_t row, uint32_t head) {
    return &q_[(size_t{row} * shape_.heads + head) * shape_.head_dim];
  }
  const float* Query(uint32_t row, uint32_t head) const {
    return &q_[(size_t{row} * shape_.heads + head) * shape_.head_dim];
  }
  const float* last_q() const { return Query(shape_.rows - std::min(shape_.rows, 64u), 0); }
  LayerKv layer() const {
    const size_t stride = size_t{tokens() + kBehind} * shape_.head_dim * DTypeBytes(shape_.dtype);
    return {{k_.data(), v_.data(), stride, {0, tokens()}},
            shape_.dtype,
            shape_.heads,
            shape_.kv_heads,
            shape_.head_dim};
  }
  float Key(uint32_t head, uint32_t j, uint32_t i) const { return Load(k_, head, j, i); }
  float Value(uint32_t head, uint32_t j, uint32_t i) const { return Load(v_, head, j, i); }
  void SetKey(uint32_t head, uint32_t j, uint32_t i, float x) {
    StoreFromFloat(k_.data(), Place(head, j, i), shape_.dtype, x);
  }

  // To the keys' dtype, as devices do that multiply in it.
  void RoundQueries() {
    for (float& x : q_) {
      std::byte stored[4];
      StoreFromFloat(stored, 0, shape_.dtype, x);
      x = LoadAsFloat(stored, 0, shape_.dtype);
    }
  }

  // q.k / sqrt(head_dim) of a row and key j.
  double Score(uint32_t row, uint32_t head, uint32_t j) const {
    const float* q = Query(row, head);
    double z = 0;
    for (uint32_t i = 0; i < shape_.head_dim; ++i) z += double{q[i]} * Key(head, j, i);
    return z / std::sqrt(double{1} * shape_.head_dim);
  }

  struct Answer {
    std::vector<double> o;
    double lse = 0;
    double mass = 0;  // of what is attended by that of all keys up to the row's own
    uint32_t keys = 0;
  };
  // attends(j): whether the row attends key j, asked for j up to the row's own.
  template <typename F>
  Answer Attend(uint32_t row, uint32_t head, const F& attends) const {
    const uint32_t token = shape_.first_token + row;
    std::vector<double> z(token + 1);
    double most = -std::numeric_limits<double>::infinity();
    for (uint32_t j = 0; j <= token; ++j) most = std::max(most, z[j] = Score(row, head, j));
    Answer out{std::vector<double>(shape_.head_dim, 0.0)};
    double sum = 0, all = 0;
    for (uint32_t j = 0; j <= token; ++j) {
      const double w = std::exp(z[j] - most);
      all += w;
      if (!attends(j)) continue;
      sum += w;
      ++out.keys;
      for (uint32_t i = 0; i < shape_.head_dim; ++i) out.o[i] += w * Value(head, j, i);
    }
    for (double& x : out.o) x /= sum;
    out.lse = most + std::log(sum);
    out.mass = sum / all;
    return out;
  }

 private:
  static constexpr uint32_t kBehind = 3;
  size_t Place(uint32_t head, uint32_t j, uint32_t i) const {
    const size_t kv_head = head / (shape_.heads / shape_.kv_heads);
    return (kv_head * (tokens() + kBehind) + j) * shape_.head_dim + i;
  }
  float Load(const std::vector<std::byte>& side, uint32_t head, uint32_t j, uint32_t i) const {
    return LoadAsFloat(side.data(), Place(head, j, i), shape_.dtype);
  }

  const CaseShape shape_;
  std::vector<std::byte> k_, v_;
  std::vector<float> q_;
};

// Whether row i attends key j <= i, from the arrays and their definition alone.
inline bool Attends(const SparseIndex& index, uint32_t head, uint32_t i, uint32_t j) {
  const uint32_t t = (i - index.first_token) / 128;
  const int64_t i0 = int64_t{index.first_token} + 128 * int64_t{t};
  const size_t tiles_of_rows = (index.rows + 127) / 128;
  const int64_t end = std::min<int64_t>(i0 + 128, int64_t{index.first_token} + index.rows);
  if (index.tiles[head * tiles_of_rows + t] == (end + 63) / 64) return true;
  for (uint32_t r = index.range_first[head]; r < index.range_first[head + 1]; ++r) {
    if (j >= i0 + index.ranges[r].lo && j < i0 + index.ranges[r].hi) return true;
  }
  for (uint32_t c = index.column_first[head]; c < index.column_first[head + 1]; ++c) {
    if (index.columns[c] == j) return true;
  }
  const size_t at = head * tiles_of_rows + t;
  for (uint32_t b = index.block_first[at]; b < index.block_first[at + 1]; ++b) {
    if (j / 64 == index.blocks[b]) return true;
  }
  return false;
}

}  // namespace quarry::testing

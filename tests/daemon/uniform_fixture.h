// Sequences whose keys are all zero, so that every token weighs the same: the answer over a set
// of tokens is the mean of their values, its lse the logarithm of their number. So each answer
// says how many tokens were counted, and whether any was counted twice.
#pragma once

#include <cmath>
#include <vector>

#include "tests/daemon/engine_fixture.h"

namespace quarry {

class UniformSequence {
 public:
  UniformSequence(uint32_t tokens, uint64_t seed) : data_(Shape(), tokens, seed) {
    for (uint32_t t = 0; t < tokens; ++t) std::memset(data_.k(0, t), 0, data_.token_bytes());
    const size_t dims = data_.shape().kv_heads * data_.shape().head_dim;
    sums_.resize((tokens + 1) * dims);
    for (uint32_t t = 0; t < tokens; ++t) {
      for (size_t d = 0; d < dims; ++d) {
        sums_[(t + 1) * dims + d] =
            sums_[t * dims + d] + LoadAsFloat(data_.v(0, t), d, data_.shape().dtype);
      }
    }
  }

  static KvShape Shape() {
    return {.layers = 1, .heads = 2, .kv_heads = 2, .head_dim = 16, .dtype = DType::kFp32};
  }
  const KvData& data() const { return data_; }

  // Whether the answer is the mean of exactly the first `count` tokens of the row's range: with
  // equal scores a budget takes the lowest tokens. Tokens from `fork` on are those of `after`.
  ::testing::AssertionResult IsMeanOfFirst(const OwnedRow& row, uint32_t count, uint32_t fork = ~0u,
                                           const UniformSequence* after = nullptr) const {
    const KvShape& s = data_.shape();
    const uint32_t lo = row.row.range.lo, hi = lo + count;
    if (row.answer.tokens_attended != uint64_t{count} * s.heads) {
      return ::testing::AssertionFailure() << row.answer.tokens_attended << " tokens attended by "
                                           << s.heads << " heads instead of " << count << " each";
    }
    const double lse = count == 0 ? -INFINITY : std::log(static_cast<double>(count));
    for (uint32_t h = 0; h < s.heads; ++h) {
      if (row.lse[h] != lse && !(std::abs(row.lse[h] - lse) < 1e-5)) {
        return ::testing::AssertionFailure()
               << "lse " << row.lse[h] << " of " << count << " tokens, not " << lse;
      }
    }
    for (size_t at = 0; at < row.o.size(); ++at) {
      double sum = Sum(at, Intersect({lo, hi}, {0, fork}));
      if (after != nullptr) sum += after->Sum(at, Intersect({lo, hi}, {fork, ~0u}));
      const double mean = count == 0 ? 0 : sum / count;
      if (!(std::abs(row.o[at] - mean) < 1e-5)) {
        return ::testing::AssertionFailure() << "o[" << at << "] is " << row.o[at] << " instead of "
                                             << mean << " over " << count << " tokens from " << lo;
      }
    }
    return ::testing::AssertionSuccess();
  }

 private:
  // Of one dimension of V (each query head has its own KV head) over some tokens.
  double Sum(size_t at, TokenRange tokens) const {
    const size_t dims = data_.shape().kv_heads * data_.shape().head_dim;
    return tokens.empty() ? 0 : sums_[tokens.hi * dims + at] - sums_[tokens.lo * dims + at];
  }

  KvData data_;
  std::vector<double> sums_;  // [token][kv_head][head_dim], of all tokens before
};

}  // namespace quarry

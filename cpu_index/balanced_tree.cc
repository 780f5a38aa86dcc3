#include "cpu_index/balanced_tree.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <span>

#include "cpu_index/float_sum.h"
#include "cpu_index/simd.h"
#include "proto/check.h"

namespace quarry {
namespace {

constexpr uint32_t kSample = 512;  // rows that decide the direction of a cut
constexpr int kRounds = 2;         // of moving the two means

// Rows of the left part: about half, in whole groups.
uint32_t LeftRows(uint32_t rows) {
  const uint32_t unit = rows > kSuperRows ? kSuperRows : kLeafRows;
  return (rows + unit - 1) / unit / 2 * unit;
}

class Bisection {
 public:
  Bisection(std::span<float> rows, uint32_t width)
      : rows_(rows.data()), width_(width), order_(rows.size() / width) {
    std::iota(order_.begin(), order_.end(), 0u);
    for (std::vector<float>* of_columns : {&direction_, &sum_, &square_}) of_columns->resize(width);
    sample_.resize(size_t{kSample} * width);
    sample_along_.resize(kSample);
    along_.resize(order_.size());
    sorted_.resize(order_.size());
    moved_.resize(rows.size());
    moved_order_.resize(order_.size());
  }

  std::vector<uint32_t> Run() {
    Split(0, static_cast<uint32_t>(order_.size()));
    return std::move(order_);
  }

 private:
  float* Row(uint32_t i) const { return rows_ + size_t{i} * width_; }

  void Split(uint32_t lo, uint32_t hi) {
    if (hi - lo <= kLeafRows) return;
    const uint32_t middle = lo + LeftRows(hi - lo);
    FindDirection(lo, hi);
    Along(Row(lo), hi - lo, along_.data() + lo);
    Cut(lo, middle, hi);
    Split(lo, middle);
    Split(middle, hi);
  }

  // How far rows lie along the direction.
  void Along(const float* rows, uint32_t n, float* out) const {
    kernels::ScoreTile tile{};
    tile.q = direction_.data();
    tile.queries = 1;
    tile.head_dim = width_;
    tile.k = rows;
    tile.tokens = n;
    tile.dtype = kernels::kFp32;
    tile.scale = 1;
    tile.out = out;
    tile.ld_out = n;
    Kernels().score(tile);
  }

  // The line from the mean of the lower part to that of the upper one, from a first guess: the
  // coordinate that varies most.
  void FindDirection(uint32_t lo, uint32_t hi) {
    const uint32_t step = (hi - lo + kSample - 1) / kSample;
    const uint32_t n = (hi - lo + step - 1) / step;
    const float* sample = Row(lo);
    if (step > 1) {
      for (uint32_t i = 0; i < n; ++i) {
        std::copy_n(Row(lo + i * step), width_, sample_.data() + size_t{i} * width_);
      }
      sample = sample_.data();
    }
    std::fill(sum_.begin(), sum_.end(), 0.0f);
    std::fill(square_.begin(), square_.end(), 0.0f);
    for (uint32_t i = 0; i < n; ++i) {
      const float* const row = sample + size_t{i} * width_;
      for (uint32_t c = 0; c < width_; ++c) {
        sum_[c] += row[c];
        square_[c] += row[c] * row[c];
      }
    }
    for (uint32_t c = 0; c < width_; ++c) square_[c] -= sum_[c] * sum_[c] / static_cast<float>(n);
    const size_t widest = std::max_element(square_.begin(), square_.end()) - square_.begin();
    for (uint32_t i = 0; i < n; ++i) sample_along_[i] = sample[size_t{i} * width_ + widest];
    for (int round = 0; round < kRounds; ++round) {
      FromMeanToMean(sample, n);
      Along(sample, n, sample_along_.data());
    }
    FromMeanToMean(sample, n);
  }

  // Of the sample's rows that lie below the mean of sample_along_ to those that lie above.
  void FromMeanToMean(const float* sample, uint32_t n) {
    const float mean = FloatSum({sample_along_.data(), n}) / static_cast<float>(n);
    for (uint32_t i = 0; i < n; ++i) sample_along_[i] = sample_along_[i] > mean ? 1.0f : 0.0f;
    const float above = FloatSum({sample_along_.data(), n});
    std::fill(direction_.begin(), direction_.end(), 0.0f);
    if (above == 0) return;  // all alike: any cut will do
    kernels::AccumulateTile tile{};
    tile.p = sample_along_.data();
    tile.ld_p = n;
    tile.queries = 1;
    tile.head_dim = width_;
    tile.v = sample;
    tile.tokens = n;
    tile.dtype = kernels::kFp32;
    tile.acc = direction_.data();
    Kernels().accumulate(tile);
    const float up = 1.0f / above, down = 1.0f / (static_cast<float>(n) - above);
    for (uint32_t c = 0; c < width_; ++c) {
      direction_[c] = direction_[c] * up - (sum_[c] - direction_[c]) * down;
    }
  }

  // The rows that lie lowest go to [lo, middle), ties by their order, which is otherwise kept.
  void Cut(uint32_t lo, uint32_t middle, uint32_t hi) {
    std::copy(along_.begin() + lo, along_.begin() + hi, sorted_.begin());
    const auto pivot_at = sorted_.begin() + (middle - lo);
    std::nth_element(sorted_.begin(), pivot_at, sorted_.begin() + (hi - lo));
    const float pivot = *pivot_at;
    uint32_t ties = middle - lo;  // that still go left
    for (uint32_t i = lo; i < hi; ++i) ties -= along_[i] < pivot ? 1 : 0;
    uint32_t to[2] = {lo, middle};  // the left and the right part's next place
    for (uint32_t i = lo; i < hi; ++i) {
      const uint32_t tie = along_[i] == pivot && ties > 0 ? 1 : 0;
      ties -= tie;
      const uint32_t at = to[along_[i] >= pivot && tie == 0 ? 1 : 0]++;
      std::copy_n(Row(i), width_, moved_.data() + size_t{at} * width_);
      moved_order_[at] = order_[i];
    }
    QUARRY_CHECK(to[0] == middle);
    std::memcpy(Row(lo), moved_.data() + size_t{lo} * width_,
                size_t{hi - lo} * width_ * sizeof(float));
    std::copy(moved_order_.begin() + lo, moved_order_.begin() + hi, order_.begin() + lo);
  }

  float* const rows_;
  const uint32_t width_;
  std::vector<uint32_t> order_;
  std::vector<float> direction_, sum_, square_;  // [width]
  std::vector<float> sample_, sample_along_, sorted_;
  std::vector<float> along_;  // [n] of each row
  std::vector<float> moved_;  // [n][width]
  std::vector<uint32_t> moved_order_;
};

}  // namespace

std::vector<uint32_t> BisectRows(std::span<float> rows, uint32_t width) {
  QUARRY_CHECK(width > 0 && width % 16 == 0 && rows.size() % width == 0);
  return Bisection(rows, width).Run();
}

}  // namespace quarry

#include "cpu_index/balanced_tree.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <span>

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
    direction_.resize(width);
    along_.resize(order_.size());
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

  // The line from the mean of the lower half to that of the upper one, from a first guess: the
  // coordinate that varies most.
  void FindDirection(uint32_t lo, uint32_t hi) {
    const uint32_t step = (hi - lo + kSample - 1) / kSample;
    sample_.clear();
    for (uint32_t i = lo; i < hi; i += step) sample_.insert(sample_.end(), Row(i), Row(i) + width_);
    const auto n = static_cast<uint32_t>(sample_.size() / width_);
    std::vector<float> sum(width_), square(width_);
    for (uint32_t i = 0; i < n; ++i) {
      const float* const row = sample_.data() + size_t{i} * width_;
      for (uint32_t c = 0; c < width_; ++c) {
        sum[c] += row[c];
        square[c] += row[c] * row[c];
      }
    }
    for (uint32_t c = 0; c < width_; ++c) square[c] -= sum[c] * sum[c] / static_cast<float>(n);
    const size_t widest = std::max_element(square.begin(), square.end()) - square.begin();
    sample_along_.resize(n);
    for (uint32_t i = 0; i < n; ++i) sample_along_[i] = sample_[size_t{i} * width_ + widest];
    for (int round = 0; round < kRounds; ++round) {
      MeansOfHalves(sum);
      Along(sample_.data(), n, sample_along_.data());
    }
    MeansOfHalves(sum);
  }

  void MeansOfHalves(std::span<const float> sum) {
    const auto n = static_cast<uint32_t>(sample_along_.size());
    sorted_ = sample_along_;
    std::nth_element(sorted_.begin(), sorted_.begin() + n / 2, sorted_.end());
    const float median = sorted_[n / 2];
    std::fill(direction_.begin(), direction_.end(), 0.0f);
    uint32_t above = 0;
    for (uint32_t i = 0; i < n; ++i) {
      if (sample_along_[i] < median) continue;
      ++above;
      const float* const row = sample_.data() + size_t{i} * width_;
      for (uint32_t c = 0; c < width_; ++c) direction_[c] += row[c];
    }
    if (above == n) return;  // all alike: any cut will do
    const float up = 1.0f / static_cast<float>(above), down = 1.0f / static_cast<float>(n - above);
    for (uint32_t c = 0; c < width_; ++c) {
      direction_[c] = direction_[c] * up - (sum[c] - direction_[c]) * down;
    }
  }

  // The rows that lie lowest go to [lo, middle), ties by their order, which is otherwise kept.
  void Cut(uint32_t lo, uint32_t middle, uint32_t hi) {
    sorted_.assign(along_.begin() + lo, along_.begin() + hi);
    std::nth_element(sorted_.begin(), sorted_.begin() + (middle - lo), sorted_.end());
    const float pivot = sorted_[middle - lo];
    uint32_t ties = middle - lo;  // that still go left
    for (uint32_t i = lo; i < hi; ++i) ties -= along_[i] < pivot ? 1 : 0;
    uint32_t left = lo, right = middle;
    for (uint32_t i = lo; i < hi; ++i) {
      const bool tie = along_[i] == pivot && ties > 0;
      ties -= tie ? 1 : 0;
      uint32_t& to = tie || along_[i] < pivot ? left : right;
      std::memcpy(moved_.data() + size_t{to} * width_, Row(i), width_ * sizeof(float));
      moved_order_[to++] = order_[i];
    }
    QUARRY_CHECK(left == middle);
    std::memcpy(Row(lo), moved_.data() + size_t{lo} * width_,
                size_t{hi - lo} * width_ * sizeof(float));
    std::copy(moved_order_.begin() + lo, moved_order_.begin() + hi, order_.begin() + lo);
  }

  float* const rows_;
  const uint32_t width_;
  std::vector<uint32_t> order_;
  std::vector<float> direction_;
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

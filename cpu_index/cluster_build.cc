// How a clustered index is made of a run, with a model.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "cpu_index/cluster_index.h"
#include "cpu_index/cluster_rows.h"
#include "cpu_index/simd.h"
#include "proto/half.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// A run whose longest key, as queries see it, or value is so many times as long as the median one
// is not indexed: its means and quantisers would serve that one alone, and all others would be
// lost.
constexpr double kMostLonger = 30;

// The longest row by the median one.
double LongestByMedian(std::vector<float> squares) {
  const auto middle = squares.begin() + static_cast<ptrdiff_t>(squares.size() / 2);
  std::nth_element(squares.begin(), middle, squares.end());
  const float most = *std::max_element(middle, squares.end());
  return most > 0 ? std::sqrt(double{most} / *middle) : 1;
}

// Encodes a run super by super, so that what is computed of one stays in the nearest caches until
// it is coded.
class Encoder {
 public:
  Encoder(const KvView& run, const ClusterModel& model, std::vector<uint32_t> order)
      : m_(model),
        n_(static_cast<uint32_t>(order.size())),
        d_(model.head_dim()),
        p_{std::move(order),
           KeyCodes(model.CodeBasis(), n_),
           {},
           KeyRows(n_, model.row_variance),
           ValueRows(n_, model.token_deviation),
           ValueRows((n_ + kLeafRows - 1) / kLeafRows, model.leaf_deviation),
           {},
           NodeLevel(n_, kLeafRows),
           NodeLevel(n_, kSuperRows),
           UncodedKeys(d_)},
        run_(run),
        rounded_(std::accumulate(model.code_error.begin(), model.code_error.end(), 0.0f)),
        keys_(run, p_.order, model.basis),
        values_(run, p_.order),
        equaliser_(model.difference_variance),
        rows_(size_t{kSuperRows} * d_),
        ones_(d_, 1.0f) {
    p_.scale.resize(p_.codes.keys_padded());
    p_.super_values.resize(size_t{p_.supers.nodes()} * d_);
  }

  ClusterIndex::Parts Run() {
    for (uint32_t super = 0; super < p_.supers.nodes(); ++super) {
      EncodeKeys(super);
      EncodeValues(super);
    }
    if (d_ > KeyCodes::kCoordinates) p_.uncoded = UncodedKeys(run_, p_.order, lost_);
    return std::move(p_);
  }

  // After Run. FailedPrecondition: no run for an index.
  absl::Status Check() const {
    const auto check = [](const std::vector<float>& squares, const char* what) {
      const double longer = LongestByMedian(squares);
      // What is no number is too long.
      if (longer <= kMostLonger) return absl::OkStatus();
      return absl::FailedPreconditionError(
          absl::StrCat("clusters of a run whose longest ", what, " is ", longer,
                       " times as long as the median one; the most is ", kMostLonger));
    };
    QUARRY_RETURN_IF_ERROR(check(key_squares_, "key"));
    return check(value_squares_, "value");
  }

 private:
  // rows: [count][head_dim]
  void Measure(const float* rows, uint32_t count, std::vector<float>* squares) {
    const size_t at = squares->size();
    squares->resize(at + count);
    std::vector<float> most(count);
    Kernels().measure_rows({rows, count, d_, ones_.data(), squares->data() + at, most.data()});
  }

  // Codes and rows are of what a token differs in from its leaf.
  void EncodeKeys(uint32_t super) {
    const uint32_t lo = super * kSuperRows, hi = std::min(n_, lo + kSuperRows);
    keys_.Read(lo, hi, rows_.data());
    Measure(rows_.data(), hi - lo, &key_squares_);
    p_.supers.Store(super, rows_.data(), d_, m_.centre_step, m_.lost_variance);
    for (uint32_t at = lo; at < hi; at += kLeafRows) {
      StoreLeaf(at / kLeafRows, d_, m_.centre_step, m_.lost_variance,
                rows_.data() + size_t{at - lo} * d_, &p_.leaves);
    }
    const std::span<float> rows = std::span(rows_).first(size_t{hi - lo} * d_);
    for (size_t at = 0; at < rows.size(); at += d_) lost_.push_back(Lost(rows.subspan(at, d_)));
    equaliser_.Equalise(rows, std::span(p_.scale).subspan(lo, hi - lo));
    for (uint32_t t = lo; t < hi; ++t) {
      const float scale = Bf16ToFloat(p_.scale[t]);
      lost_[t] += scale * scale * rounded_;
    }
    p_.key_rows.Store(lo, rows);
    p_.codes.Store(lo, rows, d_);
  }

  // What codes have no coordinate for of a token's difference.
  static float Lost(std::span<const float> row) {
    float sum = 0;
    for (size_t c = KeyCodes::kCoordinates; c < row.size(); ++c) sum += row[c] * row[c];
    return sum;
  }

  // Leaves' means around their super's, and tokens' values around their leaf's mean, both as those
  // are kept.
  void EncodeValues(uint32_t super) {
    values_.Read(super);
    Measure(values_.Leaf(0), values_.tokens(), &value_squares_);
    uint16_t* const kept = p_.super_values.data() + size_t{super} * d_;
    std::transform(values_.mean().begin(), values_.mean().end(), kept, FloatToBf16);
    std::vector<float> mean(d_);
    for (uint32_t i = 0; i < values_.leaves(); ++i) {
      const uint32_t leaf = super * kLeavesPerSuper + i;
      const float* const exact = values_.LeafMean(i);
      for (uint32_t d = 0; d < d_; ++d) mean[d] = exact[d] - Bf16ToFloat(kept[d]);
      p_.leaf_values.Store(leaf, mean);
      p_.leaf_values.Decode(leaf, mean);
      for (uint32_t d = 0; d < d_; ++d) mean[d] += Bf16ToFloat(kept[d]);
      const float* const value = values_.Leaf(i);
      float* const row = rows_.data() + size_t{i} * kLeafRows * d_;
      for (size_t at = 0; at < size_t{values_.leaf_tokens(i)} * d_; at += d_) {
        for (uint32_t d = 0; d < d_; ++d) row[at + d] = value[at + d] - mean[d];
      }
    }
    p_.token_values.Store(super * kSuperRows,
                          std::span(rows_).first(size_t{values_.tokens()} * d_));
  }

  const ClusterModel& m_;
  const uint32_t n_, d_;
  ClusterIndex::Parts p_;
  const KvView& run_;
  const float rounded_;      // what codes leave out of a token of scale 1 by their steps
  std::vector<float> lost_;  // what they leave out of each token up to now
  OrderedKeys keys_;
  OrderedValues values_;
  const Equaliser equaliser_;
  std::vector<float> rows_;  // of a super
  const std::vector<float> ones_;
  std::vector<float> key_squares_, value_squares_;  // of the tokens up to now
};

}  // namespace

absl::StatusOr<std::unique_ptr<ClusterIndex>> ClusterIndex::Build(
    const KvView& run, std::shared_ptr<const ClusterModel> model) {
  if (run.tokens().empty() || run.head_dim != model->head_dim()) {
    return absl::InvalidArgumentError(
        absl::StrCat("clusters of ", run.tokens().size(), " tokens of head_dim ", run.head_dim,
                     " by a model of head_dim ", model->head_dim()));
  }
  std::vector<uint32_t> order = TreeOrder(run, model->basis);
  return Build(run, std::move(model), std::move(order));
}

absl::StatusOr<std::unique_ptr<ClusterIndex>> ClusterIndex::Build(
    const KvView& run, std::shared_ptr<const ClusterModel> model, std::vector<uint32_t> order) {
  Encoder encoder(run, *model, std::move(order));
  Parts parts = encoder.Run();
  QUARRY_RETURN_IF_ERROR(encoder.Check());
  return std::unique_ptr<ClusterIndex>(new ClusterIndex(std::move(parts), std::move(model)));
}

uint64_t ClusterIndex::memory_bytes() const {
  return p_.codes.memory_bytes() + p_.key_rows.memory_bytes() + p_.token_values.memory_bytes() +
         p_.leaf_values.memory_bytes() + p_.leaves.memory_bytes() + p_.supers.memory_bytes() + p_.uncoded.bytes() +
         4 * p_.order.size() + 2 * (p_.scale.size() + p_.super_values.size());
}

}  // namespace quarry

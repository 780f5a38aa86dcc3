// How a clustered index is made from keys, values and sampled queries.
#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "cpu_index/balanced_tree.h"
#include "cpu_index/cluster_index.h"
#include "cpu_index/run_rows.h"
#include "proto/half.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

constexpr uint32_t kWidth = KeyCodes::kCoordinates;

// [nodes][head_dim]
Matrix MeanValues(const KvView& run, std::span<const uint32_t> order) {
  const RunRows values(run, KvPart::kValue);
  const auto n = static_cast<uint32_t>(order.size());
  Matrix means = Matrix::Zero((n + kLeafRows - 1) / kLeafRows, run.head_dim);
  std::vector<float> value(run.head_dim);
  for (uint32_t at = 0; at < n; ++at) {
    values.Widen(order[at], value.data());
    float* const mean = means.row(at / kLeafRows).data();
    for (uint32_t d = 0; d < run.head_dim; ++d) mean[d] += value[d];
  }
  for (uint32_t leaf = 0; leaf < means.rows(); ++leaf) {
    means.row(leaf) /= static_cast<float>(std::min(kLeafRows, n - leaf * kLeafRows));
  }
  return means;
}

Matrix MeansAbove(const Matrix& leaves, uint32_t rows) {
  constexpr Eigen::Index kLeaves = kSuperRows / kLeafRows;
  const Eigen::Index supers = (leaves.rows() + kLeaves - 1) / kLeaves;
  Matrix out(supers, leaves.cols());
  for (Eigen::Index s = 0; s < supers; ++s) {
    Eigen::RowVectorXf sum = Eigen::RowVectorXf::Zero(leaves.cols());
    float tokens = 0;
    for (Eigen::Index l = s * kLeaves; l < std::min(leaves.rows(), (s + 1) * kLeaves); ++l) {
      const auto count =
          static_cast<float>(std::min<Eigen::Index>(kLeafRows, Eigen::Index{rows} - l * kLeafRows));
      sum += count * leaves.row(l);
      tokens += count;
    }
    out.row(s) = sum / tokens;
  }
  return out;
}

std::vector<uint16_t> Rounded(const Matrix& m) {
  std::vector<uint16_t> out(m.size());
  for (Eigen::Index i = 0; i < m.size(); ++i) out[i] = FloatToBf16(m.data()[i]);
  return out;
}

// The first kWidth columns of rows of `width`, 0 where there are fewer.
std::vector<float> Narrowed(std::span<const float> rows, uint32_t width) {
  std::vector<float> out(rows.size() / width * kWidth);
  const uint32_t taken = std::min(width, kWidth);
  for (size_t t = 0; t < rows.size() / width; ++t) {
    std::copy_n(rows.data() + t * width, taken, out.data() + t * kWidth);
  }
  return out;
}

// [n][width] of reordered rows from their leaf's centre, as that is scored.
std::vector<float> Differences(std::span<const float> rows, std::span<const uint32_t> order,
                               const NodeLevel& leaves) {
  const size_t width = rows.size() / order.size();
  std::vector<float> out(rows.size());
  float centre[kWidth];
  for (size_t at = 0; at < order.size(); ++at) {
    if (at % kLeafRows == 0) leaves.Centre(static_cast<uint32_t>(at / kLeafRows), centre);
    const float* const row = rows.data() + order[at] * width;
    float* const difference = out.data() + at * width;
    std::copy_n(row, width, difference);
    for (size_t c = 0; c < std::min<size_t>(width, kWidth); ++c) difference[c] -= centre[c];
  }
  return out;
}

// [width] mean squares.
std::vector<float> SecondMoments(std::span<const float> rows, uint32_t width) {
  std::vector<double> sum(width);
  for (size_t at = 0; at < rows.size(); at += width) {
    for (uint32_t c = 0; c < width; ++c) sum[c] += rows[at + c] * rows[at + c];
  }
  std::vector<float> out;
  for (double s : sum) {
    out.push_back(static_cast<float>(s * width / static_cast<double>(rows.size())));
  }
  return out;
}

// Makes all rows equally long, relative to the deviation of each coordinate, but for those that one
// coordinate would carry past what quantisers hold; returns by what factor each was longer, bf16.
std::vector<uint16_t> Equalise(std::span<float> rows, uint32_t width) {
  constexpr float kHeld = 3;  // deviations
  std::vector<float> inverse = SecondMoments(rows, width);
  uint32_t varying = 0;
  for (float& x : inverse) {
    x = x > 0 ? 1 / x : 0;
    varying += x > 0 ? 1 : 0;
  }
  std::vector<uint16_t> scale;
  for (size_t at = 0; at < rows.size(); at += width) {
    float squares = 0, most = 0;
    for (uint32_t c = 0; c < width; ++c) {
      const float square = rows[at + c] * rows[at + c] * inverse[c];
      squares += square;
      most = std::max(most, square);
    }
    const float mean = squares / static_cast<float>(std::max(1u, varying));
    scale.push_back(FloatToBf16(std::sqrt(std::max(mean, most / (kHeld * kHeld)))));
    const float s = Bf16ToFloat(scale.back());
    for (uint32_t c = 0; c < width; ++c) rows[at + c] *= s > 0 ? 1 / s : 0;
  }
  return scale;
}

KeyRows EncodeKeys(std::span<const float> differences, uint32_t width) {
  KeyRows rows(static_cast<uint32_t>(differences.size() / width),
               SecondMoments(differences, width));
  for (uint32_t at = 0; size_t{at} * width < differences.size(); ++at) {
    rows.Store(at, differences.subspan(size_t{at} * width, width));
  }
  return rows;
}

// difference(at): what row `at` stores, valid until the next call.
template <typename F>
ValueRows EncodeValues(uint32_t n, uint32_t head_dim, F&& difference) {
  constexpr uint32_t kSampled = 4096;
  std::vector<float> deviation(head_dim);
  const uint32_t step = n / kSampled + 1;
  for (uint32_t at = 0; at < n; at += step) {
    const float* const value = difference(at);
    for (uint32_t d = 0; d < head_dim; ++d) deviation[d] += value[d] * value[d];
  }
  for (float& d : deviation) d = std::sqrt(d / static_cast<float>((n + step - 1) / step));
  ValueRows rows(n, deviation);
  for (uint32_t at = 0; at < n; ++at) rows.Store(at, {difference(at), head_dim});
  return rows;
}

// Around their super's means as those are kept.
ValueRows EncodeLeafValues(const Matrix& leaf_means, std::span<const uint16_t> super_means) {
  const auto head_dim = static_cast<uint32_t>(leaf_means.cols());
  std::vector<float> value(head_dim);
  return EncodeValues(static_cast<uint32_t>(leaf_means.rows()), head_dim, [&](uint32_t leaf) {
    const uint16_t* const super =
        super_means.data() + size_t{leaf / (kSuperRows / kLeafRows)} * head_dim;
    for (uint32_t d = 0; d < head_dim; ++d) value[d] = leaf_means(leaf, d) - Bf16ToFloat(super[d]);
    return value.data();
  });
}

// Around their leaf's means as those are kept.
ValueRows EncodeTokenValues(const KvView& run, std::span<const uint32_t> order,
                            const ValueRows& leaf_values, std::span<const uint16_t> super_means) {
  const RunRows values(run, KvPart::kValue);
  const uint32_t head_dim = run.head_dim;
  std::vector<float> value(head_dim), mean(head_dim);
  uint32_t mean_of = ~0u;
  const auto difference = [&](uint32_t at) {
    if (at / kLeafRows != mean_of) {
      mean_of = at / kLeafRows;
      leaf_values.Decode(mean_of, mean);
      const uint16_t* const super = super_means.data() + size_t{at / kSuperRows} * head_dim;
      for (uint32_t d = 0; d < head_dim; ++d) mean[d] += Bf16ToFloat(super[d]);
    }
    values.Widen(order[at], value.data());
    for (uint32_t d = 0; d < head_dim; ++d) value[d] -= mean[d];
    return value.data();
  };
  return EncodeValues(static_cast<uint32_t>(order.size()), head_dim, difference);
}

}  // namespace

absl::StatusOr<std::unique_ptr<ClusterIndex>> ClusterIndex::Build(const KvView& run,
                                                                  std::span<const float> queries) {
  const uint32_t width = run.head_dim, rank = std::min(width, kWidth);
  QUARRY_ASSIGN_OR_RETURN(QueryBasis basis, FitQueryBasis(run, queries, width));
  const float lost = std::accumulate(basis.variance.begin() + rank, basis.variance.end(), 0.0f);
  const std::vector<float> coordinates = ProjectKeys(run, basis, width);
  std::vector<float> rows = Narrowed(coordinates, width);
  std::vector<uint32_t> order = BisectRows(rows, kWidth);
  NodeLevel leaves(rows, kLeafRows, lost), supers(rows, kSuperRows, lost);
  // Codes and rows are of what a token differs in from its leaf.
  std::vector<float> differences = Differences(coordinates, order, leaves);
  std::vector<uint16_t> scale = Equalise(differences, width);
  KeyRows key_rows = EncodeKeys(differences, width);
  const std::vector<float> narrow = Narrowed(differences, width);
  QueryBasis inside;  // codes need no more of it
  inside.head_dim = width;
  inside.rank = rank;
  inside.variance = SecondMoments(narrow, kWidth);
  inside.variance.resize(rank);
  KeyCodes codes = KeyCodes::Encode(narrow, std::move(inside));
  std::vector<float> code_error = codes.ErrorVariance(narrow);
  scale.resize(codes.keys_padded());
  const Matrix leaf_means = MeanValues(run, order);
  std::vector<uint16_t> super_values =
      Rounded(MeansAbove(leaf_means, static_cast<uint32_t>(order.size())));
  ValueRows leaf_values = EncodeLeafValues(leaf_means, super_values);
  ValueRows token_values = EncodeTokenValues(run, order, leaf_values, super_values);
  std::unique_ptr<ClusterIndex> index(new ClusterIndex(
      {std::move(basis), lost, std::move(order), std::move(codes), std::move(scale),
       std::move(key_rows), std::move(token_values), std::move(leaf_values),
       std::move(super_values), std::move(leaves), std::move(supers)}));
  index->code_error_ = std::move(code_error);
  index->inside_leaf_ = LookInside(rows, kLeafRows, lost);
  index->inside_super_ = LookInside(rows, kSuperRows, lost);
  index->LearnSlopes(run, queries);
  index->LearnDoubts(run, queries);
  return index;
}

}  // namespace quarry

// How a clustered index is made from keys, values and sampled queries.
#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <cstring>
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

// [n][kWidth] of rows from their leaf's centre, as that is scored.
std::vector<float> Differences(std::span<const float> rows, const NodeLevel& leaves) {
  std::vector<float> out(rows.begin(), rows.end());
  float centre[kWidth];
  for (size_t at = 0; at < rows.size(); at += kWidth) {
    if (at % (kLeafRows * kWidth) == 0) {
      leaves.Centre(static_cast<uint32_t>(at / (kLeafRows * kWidth)), centre);
    }
    for (uint32_t c = 0; c < kWidth; ++c) out[at + c] -= centre[c];
  }
  return out;
}

// Makes all rows equally long, relative to the deviation of each coordinate; returns by what factor
// each was longer than 1, bf16.
std::vector<uint16_t> Equalise(std::span<float> rows) {
  std::vector<float> inverse(kWidth);
  for (size_t at = 0; at < rows.size(); ++at) inverse[at % kWidth] += rows[at] * rows[at];
  uint32_t varying = 0;
  for (float& x : inverse) {
    x = x > 0 ? static_cast<float>(rows.size() / kWidth) / x : 0;
    varying += x > 0 ? 1 : 0;
  }
  std::vector<uint16_t> scale;
  for (size_t at = 0; at < rows.size(); at += kWidth) {
    float squares = 0;
    for (uint32_t c = 0; c < kWidth; ++c) squares += rows[at + c] * rows[at + c] * inverse[c];
    scale.push_back(FloatToBf16(std::sqrt(squares / static_cast<float>(std::max(1u, varying)))));
    const float s = Bf16ToFloat(scale.back());
    for (uint32_t c = 0; c < kWidth; ++c) rows[at + c] *= s > 0 ? 1 / s : 0;
  }
  return scale;
}

std::vector<float> SecondMoments(std::span<const float> rows, uint32_t rank) {
  std::vector<double> sum(rank);
  for (size_t at = 0; at < rows.size(); at += kWidth) {
    for (uint32_t c = 0; c < rank; ++c) sum[c] += rows[at + c] * rows[at + c];
  }
  std::vector<float> out;
  for (double s : sum)
    out.push_back(static_cast<float>(s * kWidth / static_cast<double>(rows.size())));
  return out;
}

ValueCodes EncodeValues(const KvView& run, std::span<const uint32_t> order,
                        const NodeLevel& leaves) {
  constexpr uint32_t kSampled = 4096;
  const RunRows values(run, KvPart::kValue);
  const auto n = static_cast<uint32_t>(order.size());
  std::vector<float> value(run.head_dim), deviation(run.head_dim);
  const auto difference = [&](uint32_t at) {
    values.Widen(order[at], value.data());
    const uint16_t* const mean = leaves.values().data() + size_t{at / kLeafRows} * run.head_dim;
    for (uint32_t d = 0; d < run.head_dim; ++d) value[d] -= Bf16ToFloat(mean[d]);
  };
  const uint32_t step = n / kSampled + 1;
  for (uint32_t at = 0; at < n; at += step) {
    difference(at);
    for (uint32_t d = 0; d < run.head_dim; ++d) deviation[d] += value[d] * value[d];
  }
  for (float& d : deviation) d = std::sqrt(d / static_cast<float>((n + step - 1) / step));
  ValueCodes codes(n, deviation);
  for (uint32_t at = 0; at < n; ++at) {
    difference(at);
    codes.Store(at, value);
  }
  return codes;
}

}  // namespace

absl::StatusOr<std::unique_ptr<ClusterIndex>> ClusterIndex::Build(const KvView& run,
                                                                  std::span<const float> queries) {
  const uint32_t rank = std::min(run.head_dim, kWidth);
  QUARRY_ASSIGN_OR_RETURN(QueryBasis basis, FitQueryBasis(run, queries, rank));
  std::vector<float> rows = ProjectKeys(run, basis, kWidth);
  std::vector<uint32_t> order = BisectRows(rows, kWidth);
  const auto n = static_cast<uint32_t>(order.size());
  const Matrix leaf_means = MeanValues(run, order);
  const Matrix super_means = MeansAbove(leaf_means, n);
  const float lost = basis.lost_variance;
  NodeLevel leaves(rows, kLeafRows, Rounded(leaf_means), lost);
  NodeLevel supers(rows, kSuperRows, Rounded(super_means), lost);
  // Codes are of what a token differs in from its leaf.
  std::vector<float> differences = Differences(rows, leaves);
  std::vector<uint16_t> scale = Equalise(differences);
  QueryBasis inside = basis;
  inside.variance = SecondMoments(differences, rank);
  KeyCodes codes = KeyCodes::Encode(differences, std::move(inside));
  ValueCodes values = EncodeValues(run, order, leaves);
  std::vector<float> code_error = codes.ErrorVariance(differences);
  std::unique_ptr<ClusterIndex> index(new ClusterIndex(std::move(basis), std::move(order),
                                                       std::move(codes), std::move(values),
                                                       std::move(leaves), std::move(supers)));
  index->code_error_ = std::move(code_error);
  index->SetScales(std::move(scale));
  index->inside_leaf_ = LookInside(rows, kLeafRows, lost);
  index->inside_super_ = LookInside(rows, kSuperRows, lost);
  index->LearnSlopes(run, queries);
  index->LearnDoubts(run, queries);
  return index;
}

}  // namespace quarry

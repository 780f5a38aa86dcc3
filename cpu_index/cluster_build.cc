// How a clustered index is made of a run, with a model.
#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "cpu_index/cluster_index.h"
#include "cpu_index/cluster_rows.h"
#include "cpu_index/run_rows.h"
#include "proto/half.h"

namespace quarry {
namespace {

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

constexpr uint32_t kWidth = KeyCodes::kCoordinates;

Matrix MeansAbove(const LeafMeans& leaves) {
  const auto nodes = static_cast<uint32_t>(leaves.means.size() / leaves.head_dim);
  const uint32_t supers = (nodes + kLeavesPerSuper - 1) / kLeavesPerSuper;
  Matrix out = Matrix::Zero(supers, leaves.head_dim);
  for (uint32_t l = 0; l < nodes; ++l) {
    const uint32_t super = l / kLeavesPerSuper;
    const uint32_t in_super = std::min(kSuperRows, leaves.rows - super * kSuperRows);
    const auto count = static_cast<float>(std::min(kLeafRows, leaves.rows - l * kLeafRows));
    out.row(super) += count / static_cast<float>(in_super) *
                      Eigen::Map<const Eigen::RowVectorXf>(leaves.Of(l), leaves.head_dim);
  }
  return out;
}

KeyRows EncodeKeys(std::span<const float> differences, std::span<const float> variance) {
  const size_t width = variance.size();
  KeyRows rows(static_cast<uint32_t>(differences.size() / width), variance);
  for (uint32_t at = 0; size_t{at} * width < differences.size(); ++at) {
    rows.Store(at, differences.subspan(size_t{at} * width, width));
  }
  return rows;
}

// The leaves' means around their super's, as those are kept.
ValueRows EncodeLeafValues(const LeafMeans& means, std::span<const uint16_t> super_means,
                           std::span<const float> deviation) {
  const uint32_t d = means.head_dim;
  const auto leaves = static_cast<uint32_t>(means.means.size() / d);
  ValueRows rows(leaves, deviation);
  std::vector<float> value(d);
  for (uint32_t leaf = 0; leaf < leaves; ++leaf) {
    const uint16_t* const super = super_means.data() + size_t{leaf / kLeavesPerSuper} * d;
    for (uint32_t i = 0; i < d; ++i) value[i] = means.Of(leaf)[i] - Bf16ToFloat(super[i]);
    rows.Store(leaf, value);
  }
  return rows;
}

// Tokens' values around their leaf's means as those are kept.
ValueRows EncodeTokenValues(const KvView& run, std::span<const uint32_t> order,
                            const ValueRows& leaf_values, std::span<const uint16_t> super_means,
                            std::span<const float> deviation) {
  const RunRows values(run, KvPart::kValue);
  const uint32_t head_dim = run.head_dim;
  ValueRows rows(static_cast<uint32_t>(order.size()), deviation);
  std::vector<float> value(head_dim), mean(head_dim);
  for (uint32_t at = 0; at < order.size(); ++at) {
    if (at % kLeafRows == 0) {
      leaf_values.Decode(at / kLeafRows, mean);
      const uint16_t* const super = super_means.data() + size_t{at / kSuperRows} * head_dim;
      for (uint32_t d = 0; d < head_dim; ++d) mean[d] += Bf16ToFloat(super[d]);
    }
    values.Widen(order[at], value.data());
    for (uint32_t d = 0; d < head_dim; ++d) value[d] -= mean[d];
    rows.Store(at, value);
  }
  return rows;
}

}  // namespace

ClusterIndex::Draft ClusterIndex::MakeDraft(const KvView& run, const QueryBasis& basis) {
  Draft draft;
  draft.coordinates = ProjectKeys(run, basis, basis.head_dim);
  draft.rows = Narrowed(draft.coordinates, basis.head_dim);
  draft.order = BisectRows(draft.rows, kWidth);
  return draft;
}

absl::StatusOr<std::unique_ptr<ClusterIndex>> ClusterIndex::Build(
    const KvView& run, std::shared_ptr<const ClusterModel> model) {
  if (run.tokens().empty() || run.head_dim != model->head_dim()) {
    return absl::InvalidArgumentError(
        absl::StrCat("clusters of ", run.tokens().size(), " tokens of head_dim ", run.head_dim,
                     " by a model of head_dim ", model->head_dim()));
  }
  Draft draft = MakeDraft(run, model->basis);
  return Build(run, std::move(model), std::move(draft));
}

std::unique_ptr<ClusterIndex> ClusterIndex::Build(const KvView& run,
                                                  std::shared_ptr<const ClusterModel> model,
                                                  Draft draft) {
  const ClusterModel& m = *model;
  NodeLevel leaves(draft.rows, kLeafRows, m.centre_step, m.lost_variance);
  NodeLevel supers(draft.rows, kSuperRows, m.centre_step, m.lost_variance);
  // Codes and rows are of what a token differs in from its leaf.
  std::vector<float> differences =
      Differences(draft.coordinates, draft.order, leaves, m.centre_step);
  std::vector<uint16_t> scale = Equalise(m.difference_variance, differences);
  KeyRows key_rows = EncodeKeys(differences, m.row_variance);
  KeyCodes codes = KeyCodes::Encode(Narrowed(differences, m.head_dim()), m.CodeBasis());
  scale.resize(codes.keys_padded());
  const LeafMeans leaf_means = MeanValues(run, draft.order);
  const Matrix super_means = MeansAbove(leaf_means);
  std::vector<uint16_t> super_values =
      RoundedToBf16({super_means.data(), static_cast<size_t>(super_means.size())});
  ValueRows leaf_values = EncodeLeafValues(leaf_means, super_values, m.leaf_deviation);
  ValueRows token_values =
      EncodeTokenValues(run, draft.order, leaf_values, super_values, m.token_deviation);
  return std::unique_ptr<ClusterIndex>(new ClusterIndex(
      {std::move(draft.order), std::move(codes), std::move(scale), std::move(key_rows),
       std::move(token_values), std::move(leaf_values), std::move(super_values),
       std::move(leaves), std::move(supers)},
      std::move(model)));
}

uint64_t ClusterIndex::memory_bytes() const {
  return p_.codes.memory_bytes() + p_.key_rows.memory_bytes() + p_.token_values.memory_bytes() +
         p_.leaf_values.memory_bytes() + p_.leaves.memory_bytes() + p_.supers.memory_bytes() +
         4 * p_.order.size() + 2 * (p_.scale.size() + p_.super_values.size());
}

}  // namespace quarry

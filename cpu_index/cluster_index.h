// The clustered index: groups of keys that lie together, opened where queries look, estimated
// where they do not.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "cpu_index/balanced_tree.h"
#include "cpu_index/cluster_model.h"
#include "cpu_index/key_codes.h"
#include "cpu_index/key_index.h"
#include "cpu_index/key_rows.h"
#include "cpu_index/node_level.h"
#include "cpu_index/uncoded_keys.h"
#include "cpu_index/value_rows.h"

namespace quarry {

inline constexpr uint32_t kLeavesPerSuper = kSuperRows / kLeafRows;
static_assert(kLeafRows == KeyCodes::kBlockKeys && kLeavesPerSuper == NodeLevel::kBlockNodes);

// An index of one run, in levels: supers of 256 tokens, leaves of 16, tokens with 16-byte codes of
// their keys, and rows of 4 bits for each number of key and value. Searched by cluster_search.h,
// together with the other runs that have the same model. Immutable; thread-safe.
class ClusterIndex final : public KeyIndex {
 public:
  // InvalidArgument: a run of no tokens, or of another head_dim than the model's.
  // FailedPrecondition: a key or a value far longer than the run's others.
  static absl::StatusOr<std::unique_ptr<ClusterIndex>> Build(
      const KvView& run, std::shared_ptr<const ClusterModel> model);
  // order: TreeOrder of the run.
  static absl::StatusOr<std::unique_ptr<ClusterIndex>> Build(
      const KvView& run, std::shared_ptr<const ClusterModel> model, std::vector<uint32_t> order);

  // What Serialize made; it shares the first of `known` that is the same as its model. DataLoss or
  // InvalidArgument: anything else, and what was made of keys or values so large that not all of its
  // numbers are finite.
  static absl::StatusOr<std::unique_ptr<ClusterIndex>> Deserialize(
      std::span<const std::byte> bytes,
      std::span<const std::shared_ptr<const ClusterModel>> known = {});
  // With its model. Equal runs and models give equal bytes on machines with the same kernels.
  std::vector<std::byte> Serialize() const;

  std::string_view kind() const override { return "clusters"; }
  bool Fits(const KvView& run) const override {
    return run.tokens().size() == tokens() && run.head_dim == model_->head_dim();
  }

  uint32_t tokens() const { return static_cast<uint32_t>(p_.order.size()); }
  const std::shared_ptr<const ClusterModel>& model() const { return model_; }
  // Without the model, which other runs share.
  uint64_t memory_bytes() const;

  // What Build makes of a run. Places are positions in `order`.
  struct Parts {
    std::vector<uint32_t> order;    // [tokens] within the run
    KeyCodes codes;                 // in that order, around their leaf's centre: a leaf is a block
    std::vector<uint16_t> scale;    // bf16 [keys_padded] of what each token's codes stand for
    KeyRows key_rows;               // the same of all coordinates
    ValueRows token_values;         // around their leaf's mean
    ValueRows leaf_values;          // the leaves' means, around their super's
    std::vector<uint16_t> super_values;  // bf16 [supers][head_dim]
    NodeLevel leaves, supers;
    UncodedKeys uncoded;
  };
  const Parts& parts() const { return p_; }

 private:
  ClusterIndex(Parts parts, std::shared_ptr<const ClusterModel> model)
      : p_(std::move(parts)), model_(std::move(model)) {}

  const Parts p_;
  const std::shared_ptr<const ClusterModel> model_;
};

}  // namespace quarry

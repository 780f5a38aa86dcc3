// Indexes of any kind as bytes.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "cpu_index/key_index.h"

namespace quarry {

struct ClusterModel;

// As index_form.h says; equal indexes have equal bytes. What was set for searches alone
// (candidates, queue) is not kept. Unimplemented: of a kind that is not kept as bytes, as the
// baselines are.
absl::StatusOr<std::vector<std::byte>> SerializeIndex(const KeyIndex& index);

// An index that answers as the one that the bytes were made from. Whatever the bytes, it can be
// searched with every run that it Fits. DataLoss or InvalidArgument: anything else than what
// SerializeIndex made, of a version that this program knows.
// known: models that clusters share if theirs is the same, as runs that are searched together must.
absl::StatusOr<std::unique_ptr<KeyIndex>> DeserializeIndex(
    std::span<const std::byte> bytes,
    std::span<const std::shared_ptr<const ClusterModel>> known = {});

// What an index shares with others of its head; null: its kind shares nothing.
std::shared_ptr<const ClusterModel> ModelOf(const KeyIndex& index);

}  // namespace quarry

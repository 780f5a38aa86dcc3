// OpaqueBlocks: bytes under an engine's own keys.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "daemon/engine.h"
#include "daemon/held_block.h"
#include "storage/block_store.h"

namespace quarry {

// Thread-safe.
class OpaqueBlocks {
 public:
  explicit OpaqueBlocks(BlockStore& store) : store_(store) {}

  // InvalidArgument: a key of 0 or more than 256 bytes, a namespace of more, no bytes.
  // DataLoss: `digest` is not that of the bytes as copied; nothing is stored.
  absl::StatusOr<PutResult> Put(std::string_view tenant, std::string_view name_space,
                                std::string_view key, std::span<const std::byte> bytes,
                                std::optional<ByteDigest> digest);
  // NotFound = miss, also when the stored bytes fail their digest (counted in *digest_failures).
  absl::StatusOr<std::string> Get(std::string_view tenant, std::string_view name_space,
                                  std::string_view key, ByteDigest* digest,
                                  std::atomic<uint64_t>* digest_failures);
  absl::StatusOr<std::shared_ptr<HeldBlock>> Acquire(std::string_view tenant,
                                                     std::string_view name_space,
                                                     std::string_view key);
  absl::StatusOr<bool> Contains(std::string_view tenant, std::string_view name_space,
                                std::string_view key) const;

 private:
  BlockStore& store_;
};

}  // namespace quarry

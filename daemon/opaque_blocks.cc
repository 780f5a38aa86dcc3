#include "daemon/opaque_blocks.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/byte_digest.h"
#include "proto/identity.h"
#include "proto/shm_layout.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// All tenants' engine blocks have no namespace digest and no parent.
absl::StatusOr<BlockKey> KeyOf(std::string_view tenant, std::string_view name_space,
                               std::string_view key) {
  if (key.empty() || key.size() > shm::kMaxNameBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("engine key of ", key.size(), " bytes; 1 to ", shm::kMaxNameBytes, " are allowed"));
  }
  if (name_space.size() > shm::kMaxNameBytes) {
    return absl::InvalidArgumentError(absl::StrCat("engine namespace of ", name_space.size(),
                                                   " bytes; at most ", shm::kMaxNameBytes,
                                                   " are allowed"));
  }
  BlockKey out;
  out.id = EngineBlockIdOf(tenant, name_space, key);
  // Lengths first: no two (namespace, key) pairs have one full key.
  out.full_key = absl::StrCat("engine:", name_space.size(), ":", key.size(), ":");
  out.full_key.append(name_space).append(key);
  return out;
}

}  // namespace

absl::StatusOr<PutResult> OpaqueBlocks::Put(std::string_view tenant, std::string_view name_space,
                                            std::string_view key, std::span<const std::byte> bytes,
                                            std::optional<ByteDigest> digest) {
  QUARRY_ASSIGN_OR_RETURN(BlockKey block_key, KeyOf(tenant, name_space, key));
  if (bytes.empty()) return absl::InvalidArgumentError("put of 0 bytes");
  if (absl::StatusOr<BlockView> stored = store_.Acquire(tenant, block_key); stored.ok()) {
    store_.Release(stored->handle);
    return PutResult{stored->id, stored->digest, true};
  }
  QUARRY_RETURN_IF_ERROR(store_.Reserve(tenant, bytes.size(), 1));
  absl::StatusOr<BlockView> begun = store_.Begin(tenant, bytes.size());
  if (!begun.ok()) {
    store_.Unreserve(tenant, bytes.size(), 1);
    return begun.status();
  }
  HeldBlock block(store_, *begun, BlockOrigin{});
  // Of the copy: the caller may change its bytes while we read them.
  const ByteDigest copied = CopyAndDigest(block.writable(), bytes.data(), bytes.size());
  if (digest.has_value() && !(*digest == copied)) {
    return absl::DataLossError(absl::StrCat("put of ", bytes.size(), " bytes: digest ",
                                            HexOf(copied), ", not the given ", HexOf(*digest)));
  }
  QUARRY_ASSIGN_OR_RETURN(std::shared_ptr<HeldBlock> winner, block.Publish(block_key, copied));
  const HeldBlock& stored = winner == nullptr ? block : *winner;
  return PutResult{stored.id(), stored.digest(), winner != nullptr};
}

absl::StatusOr<std::shared_ptr<HeldBlock>> OpaqueBlocks::Acquire(std::string_view tenant,
                                                                 std::string_view name_space,
                                                                 std::string_view key) {
  QUARRY_ASSIGN_OR_RETURN(const BlockKey block_key, KeyOf(tenant, name_space, key));
  QUARRY_ASSIGN_OR_RETURN(const BlockView view, store_.Acquire(tenant, block_key));
  return std::make_shared<HeldBlock>(store_, view, BlockOrigin{});
}

absl::StatusOr<std::string> OpaqueBlocks::Get(std::string_view tenant, std::string_view name_space,
                                              std::string_view key, ByteDigest* digest,
                                              std::atomic<uint64_t>* digest_failures) {
  QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<HeldBlock> block, Acquire(tenant, name_space, key));
  std::string bytes(block->bytes(), '\0');
  const absl::Status copied =
      store_.CopyOut(block->handle(), 0, std::as_writable_bytes(std::span(bytes)));
  if (!copied.ok()) {
    digest_failures->fetch_add(1, std::memory_order_relaxed);
    return absl::NotFoundError(
        absl::StrCat("stored bytes are no longer good: ", std::string(copied.message())));
  }
  if (digest != nullptr) *digest = block->digest();
  return bytes;
}

absl::StatusOr<bool> OpaqueBlocks::Contains(std::string_view tenant, std::string_view name_space,
                                            std::string_view key) const {
  QUARRY_ASSIGN_OR_RETURN(const BlockKey block_key, KeyOf(tenant, name_space, key));
  return store_.Contains(tenant, block_key);
}

}  // namespace quarry

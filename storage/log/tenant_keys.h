// The tenants' keys of an encrypted log, and where they lie: storage/FORMAT.md, "Encryption".
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "storage/disk/disk.h"
#include "storage/log/frames.h"
#include "storage/log/secret.h"

namespace quarry {

// What tells whether a key is the one that a log's keys are wrapped with, and nothing of it.
std::array<uint8_t, 16> KeyCheckOf(const Secret& log_key, const DeviceId& device);
// Zeros in all slots of both areas. Not synced.
absl::Status WriteNoKeys(Disk* disk, const Superblock& superblock);

// Thread-safe, but that calls which write, Draw, Destroy and Settle, are one at a time.
class TenantKeys {
 public:
  // Reads those that the disk has, and mends a copy by the other. What cannot be read is left as it
  // is: what it is for are misses. The disk outlives it. Unavailable: there are no random numbers.
  static absl::StatusOr<std::unique_ptr<TenantKeys>> Recover(Disk* disk,
                                                             const Superblock& superblock,
                                                             const Secret& log_key);

  // What new parts of the tenant are encrypted with until this log ends.
  struct Writing {
    PartSeal seal;  // but for the tag
    std::shared_ptr<const Secret> part_key;
  };
  // Nothing: the tenant has no key.
  std::optional<Writing> ForWriting(std::string_view tenant) const;
  // Draws one, and writes it; it is durable and stays if the next Settle says so. `sequence` is
  // that of the frame it is for. FailedPrecondition: all slots are taken. InvalidArgument: the
  // tenant's name is too long. Unavailable: the disk.
  absl::StatusOr<Writing> Draw(std::string_view tenant, uint64_t sequence);
  // Null: there is none, or it cannot be read.
  std::shared_ptr<const Secret> Find(const KeyId& id) const;

  // The tenant's next part is encrypted with a new key. Before a purge that is to destroy those of
  // before: it may come to count although it failed.
  void Retire(std::string_view tenant);
  // Overwrites the keys that the tenant has from before this sequence; nothing is encrypted with
  // them from now on. Done when the next Settle says so; if it does not, a later call tries again.
  // Returns how many there were.
  absl::StatusOr<size_t> Destroy(std::string_view tenant, uint64_t before);
  // All writes since the last call are durable; or not known to be.
  enum class Outcome { kDurable, kUnknown };
  void Settle(Outcome outcome);

  // Keys that the start could not read.
  uint64_t unreadable() const { return unreadable_; }

 private:
  enum class SlotState : uint8_t {
    kFree,
    kUsed,
    kFresh,    // written, and not settled
    kDoomed,   // overwritten, and not settled
    kUnknown,  // what is there is not known: no new key is written there before the next start
  };
  struct Slot {
    SlotState state = SlotState::kFree;
    std::string tenant;
    KeyId id{};
    uint64_t sequence = 0;
    std::shared_ptr<const Secret> key;  // kUsed and kFresh
  };
  // What lies in a slot, in both areas.
  struct Wrapped;

  TenantKeys(Disk* disk, const Superblock& superblock, Secret wrapping_key);

  // What the areas have of it; empty: it cannot be read.
  using Found = std::array<std::span<const std::byte>, LogLayout::kAreas>;
  void RecoverSlot(uint32_t slot, const Found& found);
  Slot Unwrapped(uint32_t slot, const Wrapped& wrapped) const;
  absl::Status WriteSlot(uint32_t slot, const Wrapped& wrapped);
  absl::Status EraseSlot(uint32_t slot);
  void Use(uint32_t slot, Slot value) ABSL_LOCKS_EXCLUDED(mutex_);
  void Forget(Slot* slot, SlotState state) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  Disk* const disk_;
  const Superblock superblock_;
  const Secret wrapping_key_;
  std::array<uint8_t, 16> salt_{};  // of this start
  uint64_t unreadable_ = 0;

  mutable absl::Mutex mutex_;
  std::vector<Slot> slots_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_map<KeyId, uint32_t> by_id_ ABSL_GUARDED_BY(mutex_);
  std::map<std::string, Writing, std::less<>> writing_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace quarry

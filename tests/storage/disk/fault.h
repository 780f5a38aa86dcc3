// What can go wrong at one operation of a simulated disk.
#pragma once

#include <cstdint>
#include <string_view>

namespace quarry::testing {

enum class DiskCall { kRead, kWrite, kSync, kDiscard };
std::string_view NameOf(DiskCall call);

struct DiskOperation {
  DiskCall call = DiskCall::kSync;
  uint64_t offset = 0;
  uint64_t bytes = 0;
};

struct Fault {
  enum Kind {
    // Any: Unavailable, and nothing is done; a sync fails as by kFailedSync.
    kError,
    // Write: ResourceExhausted, a random part is written. Sync: as kFailedSync, ResourceExhausted.
    kNoSpace,
    // Read: a random first part is read. Write: a random part is written. Then Unavailable.
    kShort,
    // Read: a bit of what is returned is flipped, not on the disk. Write: a bit of what is stored.
    kBitFlip,
    // Read, write: of another place than the one that was named, as long; by coin one near it.
    kMisdirected,
    // Write: nothing is stored.
    kLost,
    // Sync: OK, and nothing was made durable.
    kLyingSync,
    // Sync: Unavailable. Each write that it should have covered is durable by coin, and no later
    // sync covers the others: by coin reads see them until the power goes, or no more at all.
    kFailedSync,
    // Any: it calls SimulatedDiskOptions::stall first, with no lock held.
    kStall,
    // Any: the power goes. A random part of a write or discard is done, unsynced; this call and
    // all later ones are Unavailable.
    kCrash,
  };
  static constexpr int kKinds = kCrash + 1;

  Kind kind = kError;
  // The operation it strikes, counted from 0 over all of the disk's reads, writes, syncs and
  // discards: it, or else the first later one of a kind that it can befall and that no fault
  // scheduled earlier strikes. Stalls go together with one other.
  uint64_t at = 0;
};
std::string_view NameOf(Fault::Kind kind);

bool CanBefall(Fault::Kind kind, const DiskOperation& operation, uint64_t disk_bytes);

}  // namespace quarry::testing

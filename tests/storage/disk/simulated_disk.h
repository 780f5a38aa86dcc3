// A disk in memory that fails, lies and loses power as it is told, by seed.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"

#include "storage/disk/disk.h"
#include "tests/storage/disk/fault.h"
#include "tests/storage/disk/power_cut.h"
#include "tests/storage/disk/sector_image.h"

namespace quarry::testing {

struct SimulatedDiskOptions {
  uint64_t bytes = 64 << 20;  // whole sectors
  uint64_t seed = 1;
  std::string name = "simulated";
  // What a power cut or a failed write keeps or loses whole: 512, 1024, 2048 or 4096.
  uint32_t torn_bytes = kGranuleBytes;
  // If not, Discard is Unimplemented and does nothing.
  bool discards_supported = true;
  // What kStall calls. May block and may use the disk.
  std::function<void()> stall;
};

// Calls so far, those too that failed, and the bytes they asked for. What was refused as
// InvalidArgument or Unimplemented is no operation.
struct DiskCounts {
  uint64_t reads = 0, writes = 0, syncs = 0, discards = 0;
  uint64_t read_bytes = 0, written_bytes = 0, discarded_bytes = 0;
  uint64_t operations() const { return reads + writes + syncs + discards; }
  void Add(const DiskOperation& operation);
};

// All zeros at first, and takes memory by what is written. Discarded sectors become garbage, in a
// range of more than kWholeDiscardBytes only those that were written. A sync covers the writes and
// discards that had returned when it began, and no others. Used by one thread, it does the same at
// the same seed. Thread-safe.
class SimulatedDisk : public Disk {
 public:
  static constexpr uint64_t kWholeDiscardBytes = 256 << 20;

  explicit SimulatedDisk(SimulatedDiskOptions options);

  uint64_t bytes() const override { return options_.bytes; }
  const std::string& name() const override { return options_.name; }
  absl::Status Read(uint64_t offset, ReadPieces out) override;
  absl::Status Write(uint64_t offset, WritePieces pieces) override;
  absl::Status Sync() override;
  absl::Status Discard(uint64_t offset, uint64_t bytes) override;

  void Schedule(Fault fault);
  // How many faults of the kind have struck.
  uint64_t struck(Fault::Kind kind) const;
  DiskCounts counts() const;
  uint64_t operations() const { return counts().operations(); }
  // Writes and discards that a power cut may still take back.
  uint64_t unsynced() const;

  // The disk as a power cut at this moment might leave it, with power again, nothing counted and
  // no faults scheduled. What is kept follows from `seed`, which becomes the new disk's own.
  std::unique_ptr<SimulatedDisk> Crashed(uint64_t seed) const;
  std::unique_ptr<SimulatedDisk> Crashed(PowerCut cut, uint64_t seed) const;
  // One that would go on as this one, unsynced writes, faults and all.
  std::unique_ptr<SimulatedDisk> Clone() const;

  // The medium by itself, in bytes (or bits, the lowest of a byte first) from its start: no
  // operations, without faults, in range. Changes outlast power cuts.
  void FlipBit(uint64_t offset_in_bits);
  void Corrupt(uint64_t offset, std::span<const std::byte> bytes);
  // As a read would see it.
  std::vector<std::byte> Peek(uint64_t offset, size_t bytes) const;

 private:
  // What an operation knows when it begins.
  struct Begun {
    std::optional<Fault::Kind> fault;  // never kStall
    int stalls = 0;
    uint64_t landed = 0;
  };
  // What a clone gets a copy of.
  struct State {
    bool powered = true;
    SectorImage newest;             // what reads see
    SectorImage durable;            // what a power cut leaves of it at least
    std::vector<Patches> unsynced;  // oldest first
    uint64_t landed = 0;            // of all writes and discards, those that were done
    std::vector<Fault> faults;      // those that have not struck
    std::array<uint64_t, Fault::kKinds> struck = {};
    DiskCounts counts;
    std::mt19937_64 random;
  };
  SimulatedDisk(SimulatedDiskOptions options, State state);

  absl::Status CheckRange(const DiskOperation& operation) const;
  // `Pieces` is ReadPieces or WritePieces; sets operation.bytes.
  template <typename Pieces>
  absl::Status CheckPieces(DiskOperation& operation, Pieces pieces) const;
  std::string Describe(const DiskOperation& operation) const;
  absl::Status Unavailable(const DiskOperation& operation, std::string_view why) const;

  // Counts the operation, takes the fault that strikes it, and stalls.
  Begun Begin(const DiskOperation& operation) ABSL_LOCKS_EXCLUDED(mutex_);
  // Begin without the stalls.
  Begun Strike(const DiskOperation& operation) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Land(Patches patches) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void LandPart(Patches patches) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // The writes and discards that a sync covers if `landed` of all had been done when it began.
  std::vector<Patches> TakeUnsynced(uint64_t landed) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void LoseUnsynced(std::vector<Patches> lost) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void CutPower() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { state_.powered = false; }
  uint64_t OtherPlace(const DiskOperation& operation) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Applies `change` to the sector wherever it lies.
  void ChangeSector(uint64_t sector, const std::function<void(SectorBytes&)>& change)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const SimulatedDiskOptions options_;
  mutable absl::Mutex mutex_;
  State state_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace quarry::testing

// What lies on a simulated disk, sparsely.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/container/btree_map.h"

#include "storage/disk/disk.h"

namespace quarry::testing {

using SectorBytes = std::array<std::byte, kSectorBytes>;

// The bytes of one sector, which never change; zeros at first. Copies are cheap.
class SectorContent {
 public:
  SectorContent() = default;
  // A copy of kSectorBytes.
  explicit SectorContent(const std::byte* bytes);
  // Pseudo-random bytes, made where they are looked at.
  static SectorContent Garbage(uint64_t seed);

  SectorBytes bytes() const;
  void CopyTo(std::byte* out) const;

 private:
  // Shared by the images, the writes and the copies of disks that hold the same sector.
  std::shared_ptr<const SectorBytes> bytes_;
  uint64_t garbage_ = 0;  // the seed of it, where there are no bytes; 0 for zeros
};

// The smallest thing that a disk ever keeps or loses whole.
inline constexpr uint32_t kGranuleBytes = 512;
inline constexpr uint8_t kWholeSector = 0xff;

// A sector of a write; bit i of `granules` says whether its i-th granule is written.
struct Patch {
  uint64_t sector = 0;
  SectorContent content;
  uint8_t granules = kWholeSector;
};
// One write or discard.
using Patches = std::vector<Patch>;

// A disk's sectors by number; those that no patch wrote are zeros. Copies share their sectors.
class SectorImage {
 public:
  void Apply(const Patch& patch);
  void Apply(const Patches& patches);
  SectorContent Get(uint64_t sector) const;
  // `out.size()` bytes from `offset` on, neither in whole sectors.
  void CopyTo(uint64_t offset, std::span<std::byte> out) const;
  // The numbers of those in [begin, end) that were written, ascending.
  std::vector<uint64_t> Written(uint64_t begin, uint64_t end) const;

 private:
  absl::btree_map<uint64_t, SectorContent> sectors_;
};

}  // namespace quarry::testing

// What is left of writes that no sync has covered.
#pragma once

#include <cstdint>
#include <random>
#include <span>

#include "tests/storage/disk/sector_image.h"

namespace quarry::testing {

// Which of the writes a power cut leaves on the medium.
enum class PowerCut {
  kNoneKept,
  kAllKept,
  // All up to some granule, none after it.
  kPrefix,
  // Each write whole or not at all.
  kWholeWrites,
  // Each granule or not, in the order of the writes.
  kGranules,
  // Each granule or not, the writes in any order: an older one may lie over a newer one.
  kAnyOrder,
};
inline constexpr int kPowerCuts = 6;

// `torn_bytes` is how much is always kept or lost whole: 512, 1024, 2048 or 4096.
SectorImage AfterPowerCut(PowerCut cut, const SectorImage& durable,
                          std::span<const Patches> unsynced, uint32_t torn_bytes,
                          std::mt19937_64& random);

// None, some or all of the granules: by coin those up to one, or any.
Patches RandomPart(Patches patches, uint32_t torn_bytes, std::mt19937_64& random);

}  // namespace quarry::testing

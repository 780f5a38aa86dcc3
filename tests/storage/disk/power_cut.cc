#include "tests/storage/disk/power_cut.h"

#include <algorithm>
#include <vector>

namespace quarry::testing {
namespace {

uint32_t TornPerSector(uint32_t torn_bytes) { return kSectorBytes / torn_bytes; }

// A sector's first `n` torn units.
uint8_t FirstUnits(uint64_t n, uint32_t torn_bytes) {
  return static_cast<uint8_t>((1u << (n * torn_bytes / kGranuleBytes)) - 1);
}

// Counts down `left`, in torn units of whole sectors, over the patches.
void KeepFirst(Patches& patches, uint64_t& left, uint32_t torn_bytes) {
  for (Patch& patch : patches) {
    const uint64_t n = std::min<uint64_t>(left, TornPerSector(torn_bytes));
    patch.granules &= FirstUnits(n, torn_bytes);
    left -= n;
  }
}

// Keeps each unit with a chance of `eighths`.
void KeepSome(Patches& patches, uint32_t eighths, uint32_t torn_bytes, std::mt19937_64& random) {
  const uint32_t unit = FirstUnits(1, torn_bytes);
  for (Patch& patch : patches) {
    uint32_t kept = 0;
    for (uint32_t i = 0; i < TornPerSector(torn_bytes); ++i) {
      if (random() % 8 < eighths) kept |= unit << (i * torn_bytes / kGranuleBytes);
    }
    patch.granules &= static_cast<uint8_t>(kept);
  }
}

// Few, half or most: what breaks at one lost granule hides where many are.
uint32_t RandomEighths(std::mt19937_64& random) {
  constexpr uint32_t kEighths[] = {1, 4, 7};
  return kEighths[random() % 3];
}

}  // namespace

SectorImage AfterPowerCut(PowerCut cut, const SectorImage& durable,
                          std::span<const Patches> unsynced, uint32_t torn_bytes,
                          std::mt19937_64& random) {
  SectorImage image = durable;
  if (cut == PowerCut::kNoneKept) return image;
  std::vector<Patches> writes(unsynced.begin(), unsynced.end());
  const uint32_t eighths = RandomEighths(random);
  switch (cut) {
    case PowerCut::kNoneKept:
    case PowerCut::kAllKept:
      break;
    case PowerCut::kPrefix: {
      uint64_t units = 0;
      for (const Patches& write : writes) units += write.size() * TornPerSector(torn_bytes);
      uint64_t left = random() % (units + 1);
      for (Patches& write : writes) KeepFirst(write, left, torn_bytes);
      break;
    }
    case PowerCut::kWholeWrites:
      std::erase_if(writes, [&](const Patches&) { return random() % 8 >= eighths; });
      break;
    case PowerCut::kAnyOrder:
      std::shuffle(writes.begin(), writes.end(), random);
      [[fallthrough]];
    case PowerCut::kGranules:
      for (Patches& write : writes) KeepSome(write, eighths, torn_bytes, random);
      break;
  }
  for (const Patches& write : writes) image.Apply(write);
  return image;
}

Patches RandomPart(Patches patches, uint32_t torn_bytes, std::mt19937_64& random) {
  if (random() % 2 == 0) {
    uint64_t left = random() % (patches.size() * TornPerSector(torn_bytes) + 1);
    KeepFirst(patches, left, torn_bytes);
  } else {
    KeepSome(patches, RandomEighths(random), torn_bytes, random);
  }
  return patches;
}

}  // namespace quarry::testing

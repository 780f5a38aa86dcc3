#include "tests/storage/disk/sector_image.h"

#include <algorithm>
#include <cstring>
#include <random>

namespace quarry::testing {

SectorContent::SectorContent(const std::byte* bytes) {
  auto copy = std::make_shared<SectorBytes>();
  std::memcpy(copy->data(), bytes, kSectorBytes);
  bytes_ = std::move(copy);
}

SectorContent SectorContent::Garbage(uint64_t seed) {
  SectorContent content;
  content.garbage_ = seed | 1;
  return content;
}

SectorBytes SectorContent::bytes() const {
  SectorBytes bytes;
  CopyTo(bytes.data());
  return bytes;
}

void SectorContent::CopyTo(std::byte* out) const {
  if (bytes_ != nullptr) {
    std::memcpy(out, bytes_->data(), kSectorBytes);
  } else if (garbage_ == 0) {
    std::memset(out, 0, kSectorBytes);
  } else {
    std::mt19937_64 random(garbage_);
    for (size_t at = 0; at < kSectorBytes; at += sizeof(uint64_t)) {
      const uint64_t drawn = random();
      std::memcpy(out + at, &drawn, sizeof(drawn));
    }
  }
}

void SectorImage::Apply(const Patch& patch) {
  if (patch.granules == 0) return;
  if (patch.granules == kWholeSector) {
    sectors_[patch.sector] = patch.content;
    return;
  }
  const SectorBytes newer = patch.content.bytes();
  SectorContent& held = sectors_[patch.sector];
  SectorBytes merged = held.bytes();
  for (size_t i = 0; i < kSectorBytes / kGranuleBytes; ++i) {
    if ((patch.granules >> i & 1) == 0) continue;
    std::memcpy(merged.data() + i * kGranuleBytes, newer.data() + i * kGranuleBytes, kGranuleBytes);
  }
  held = SectorContent(merged.data());
}

void SectorImage::Apply(const Patches& patches) {
  for (const Patch& patch : patches) Apply(patch);
}

SectorContent SectorImage::Get(uint64_t sector) const {
  const auto it = sectors_.find(sector);
  return it != sectors_.end() ? it->second : SectorContent();
}

void SectorImage::CopyTo(uint64_t offset, std::span<std::byte> out) const {
  while (!out.empty()) {
    const uint64_t within = offset % kSectorBytes;
    const size_t n = std::min<size_t>(kSectorBytes - within, out.size());
    if (n == kSectorBytes) {
      Get(offset / kSectorBytes).CopyTo(out.data());
    } else {
      const SectorBytes bytes = Get(offset / kSectorBytes).bytes();
      std::memcpy(out.data(), bytes.data() + within, n);
    }
    offset += n;
    out = out.subspan(n);
  }
}

std::vector<uint64_t> SectorImage::Written(uint64_t begin, uint64_t end) const {
  std::vector<uint64_t> written;
  for (auto it = sectors_.lower_bound(begin); it != sectors_.end() && it->first < end; ++it) {
    written.push_back(it->first);
  }
  return written;
}

}  // namespace quarry::testing

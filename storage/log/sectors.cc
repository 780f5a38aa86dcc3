#include "storage/log/sectors.h"

#include <algorithm>
#include <cstring>

namespace quarry {
namespace {

constexpr int kTries = 3;

}  // namespace

absl::Status ReadSectors(Disk* disk, uint64_t offset, AlignedBuffer* out) {
  const std::span<std::byte> piece[] = {out->bytes()};
  absl::Status status;
  for (int tries = 0; tries < kTries; ++tries) {
    status = disk->Read(offset, piece);
    if (status.ok()) break;
  }
  return status;
}

std::vector<bool> ReadEachSector(Disk* disk, uint64_t offset, AlignedBuffer* out) {
  std::vector<bool> read(out->size() / kSectorBytes, true);
  if (ReadSectors(disk, offset, out).ok()) return read;
  AlignedBuffer sector(kSectorBytes);
  for (size_t i = 0; i < read.size(); ++i) {
    read[i] = ReadSectors(disk, offset + i * kSectorBytes, &sector).ok();
    if (!read[i]) std::memset(sector.bytes().data(), 0, kSectorBytes);
    std::memcpy(out->bytes().data() + i * kSectorBytes, sector.bytes().data(), kSectorBytes);
  }
  return read;
}

bool IsBlank(std::span<const std::byte> bytes) {
  return std::all_of(bytes.begin(), bytes.end(), [](std::byte b) { return b == std::byte{0}; });
}

}  // namespace quarry

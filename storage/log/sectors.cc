#include "storage/log/sectors.h"

#include <span>

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

}  // namespace quarry

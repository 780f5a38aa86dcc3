// The footers of sealed segments.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "storage/disk/disk.h"
#include "storage/log/frames.h"

namespace quarry {

struct Footer {
  uint64_t generation = 0, sequence = 0;
  std::vector<FooterEntry> entries;
};

// Of the segment's use with this generation; none given: of any. DataLoss: there is none.
// Unavailable: whether there is one cannot be read.
absl::StatusOr<Footer> ReadFooter(Disk* disk, const Superblock& superblock, uint32_t segment,
                                  std::optional<uint64_t> generation);
// Returns the bytes written, which are not synced.
absl::StatusOr<uint64_t> WriteFooter(Disk* disk, const Superblock& superblock, uint32_t segment,
                                     const Footer& footer);

}  // namespace quarry

// Checksums that are right again after bytes were changed, so that what lies behind them is read.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "storage/log/checksum.h"
#include "storage/log/frames.h"

namespace quarry::testing {

inline void StoreNumber(std::span<std::byte> bytes, size_t at, uint32_t value) {
  std::memcpy(bytes.data() + at, &value, sizeof(value));
}
inline uint32_t LoadNumber(std::span<const std::byte> bytes, size_t at) {
  uint32_t value;
  std::memcpy(&value, bytes.data() + at, sizeof(value));
  return value;
}

// Sets the checksum of the frame that begins with these bytes, if one does that ends within them.
inline void MendFrame(std::span<std::byte> bytes) {
  const auto head = PeekFrame(bytes.first(kSectorBytes));
  if (!head.ok() || head->bytes > bytes.size()) return;
  StoreNumber(bytes, 12, 0);
  StoreNumber(bytes, 12, Crc32c(bytes.first(head->bytes)));
}

// The same of a footer, whose entries end where its last sector begins; of those, as far as they
// are in `segment`, which ends with it.
inline void MendFooter(std::span<std::byte> segment) {
  const std::span<std::byte> last = segment.last(kSectorBytes);
  uint64_t entry_bytes;
  std::memcpy(&entry_bytes, last.data() + 64, sizeof(entry_bytes));
  if (entry_bytes <= segment.size() - kSectorBytes) {
    StoreNumber(last, 76,
                Crc32c(segment.subspan(segment.size() - kSectorBytes - entry_bytes, entry_bytes)));
  }
  MendFrame(last);
}

// All frames of a segment.
inline void MendSegment(std::span<std::byte> segment) {
  for (size_t at = 0; at + kSectorBytes < segment.size(); at += kSectorBytes) {
    MendFrame(segment.subspan(at));
  }
  MendFooter(segment);
}

}  // namespace quarry::testing

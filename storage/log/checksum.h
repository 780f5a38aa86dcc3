// CRC32C, of what the log writes about itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace quarry {

// Of `bytes` behind those that `before` is of (0: none). At most 2^31 - 1 bytes.
uint32_t Crc32c(std::span<const std::byte> bytes, uint32_t before = 0);

}  // namespace quarry

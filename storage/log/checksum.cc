#include "storage/log/checksum.h"

#include <isa-l/crc.h>

namespace quarry {

uint32_t Crc32c(std::span<const std::byte> bytes, uint32_t before) {
  // The library neither inverts nor writes, though its argument is not const.
  auto* const data = reinterpret_cast<unsigned char*>(const_cast<std::byte*>(bytes.data()));
  return ~crc32_iscsi(data, static_cast<int>(bytes.size()), ~before);
}

}  // namespace quarry

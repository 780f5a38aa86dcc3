#include "daemon/finite.h"

#include <bit>
#include <cstring>

namespace quarry {
namespace {

constexpr size_t kChunk = 16;  // head_dim is a multiple; fixed, so that the loops vectorise at -O2

template <typename Bits, Bits kExponent>
bool AllFiniteBits(const void* data, size_t count) {
  const auto* bytes = static_cast<const std::byte*>(data);
  Bits bad = 0;
  for (size_t i = 0; i < count; i += kChunk) {
    Bits chunk[kChunk];
    std::memcpy(chunk, bytes + i * sizeof(Bits), sizeof(chunk));
    for (size_t j = 0; j < kChunk; ++j) bad |= (chunk[j] & kExponent) == kExponent;
  }
  return bad == 0;
}

inline float WidenBf16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

// Exact for every finite half: the product with 2^112 moves the exponent's bias and normalises
// subnormals.
inline float WidenFp16(uint16_t bits) {
  const float magnitude = std::bit_cast<float>(uint32_t{bits & 0x7FFFu} << 13) * 0x1p112f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) |
                              (uint32_t{bits & 0x8000u} << 16));
}

}  // namespace

bool AllFinite(DType dtype, const void* data, size_t count) {
  switch (dtype) {
    case DType::kBf16:
      return AllFiniteBits<uint16_t, 0x7F80>(data, count);
    case DType::kFp16:
      return AllFiniteBits<uint16_t, 0x7C00>(data, count);
    case DType::kFp32:
      return AllFiniteBits<uint32_t, 0x7F800000>(data, count);
  }
  return false;
}

bool WidenFinite(DType dtype, const void* data, size_t count, float* out) {
  if (dtype == DType::kFp32) {
    std::memcpy(out, data, count * sizeof(float));
    return AllFinite(dtype, out, count);
  }
  const auto* bytes = static_cast<const std::byte*>(data);
  bool finite = true;
  for (size_t i = 0; i < count; i += kChunk) {
    uint16_t chunk[kChunk];
    std::memcpy(chunk, bytes + i * sizeof(uint16_t), sizeof(chunk));
    finite &= AllFinite(dtype, chunk, kChunk);
    if (dtype == DType::kBf16) {
      for (size_t j = 0; j < kChunk; ++j) out[i + j] = WidenBf16(chunk[j]);
    } else {
      for (size_t j = 0; j < kChunk; ++j) out[i + j] = WidenFp16(chunk[j]);
    }
  }
  return finite;
}

}  // namespace quarry

#include "storage/codecs/kv_codecs.h"

#include <algorithm>

#include "proto/check.h"
#include "proto/head_dim.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

static_assert(codecs::kBf16 == static_cast<uint8_t>(DType::kBf16) &&
              codecs::kFp16 == static_cast<uint8_t>(DType::kFp16) &&
              codecs::kFp32 == static_cast<uint8_t>(DType::kFp32));
static_assert(coded::kKey == static_cast<uint8_t>(KvPart::kKey) &&
              coded::kValue == static_cast<uint8_t>(KvPart::kValue));

const codecs::Table& Coders() {
  static const codecs::Table& table = codecs::TableOf(SimdLevelInUse());
  return table;
}

// Calls f(tile, where its rows begin in bytes, where it begins itself) for the strip's tiles.
template <typename F>
void ForEachTile(const CodedStrip& strip, DType dtype, F&& f) {
  codecs::Tile tile{static_cast<uint8_t>(strip.codec), static_cast<uint8_t>(strip.part),
                    static_cast<uint8_t>(dtype), strip.head_dim, coded::kTileTokens};
  const size_t row_bytes = size_t{strip.head_dim} * DTypeBytes(dtype);
  size_t at = 0;
  for (uint32_t t = 0; t < strip.tokens; t += coded::kTileTokens) {
    tile.tokens = std::min(coded::kTileTokens, strip.tokens - t);
    f(tile, t * row_bytes, at);
    at += strip.whole_tile_bytes();
  }
}

}  // namespace

namespace codecs {

const Table& TableOf(SimdLevel level) {
  switch (level) {
    case SimdLevel::kScalar:
      return ScalarTable();
    case SimdLevel::kAvx2:
      return Avx2Table();
    case SimdLevel::kAvx512:
    case SimdLevel::kAmx:
      return Avx512Table();
  }
  return ScalarTable();
}

}  // namespace codecs

void EncodeStrip(const CodedStrip& strip, DType dtype, const void* rows, std::span<std::byte> out) {
  QUARRY_CHECK(strip.codec != KvCodec::kNone && IsHeadDim(strip.head_dim) && IsValid(dtype) &&
               out.size() == strip.bytes());
  ForEachTile(strip, dtype, [&](const codecs::Tile& tile, size_t row, size_t at) {
    Coders().encode(tile, static_cast<const char*>(rows) + row,
                    reinterpret_cast<uint8_t*>(out.data() + at));
  });
}

absl::Status DecodeStrip(const CodedStrip& strip, std::span<const std::byte> coded, DType dtype,
                         void* rows) {
  QUARRY_CHECK(IsValid(dtype));
  QUARRY_RETURN_IF_ERROR(CheckCodedStrip(strip, coded));
  ForEachTile(strip, dtype, [&](const codecs::Tile& tile, size_t row, size_t at) {
    Coders().decode(tile, reinterpret_cast<const uint8_t*>(coded.data() + at),
                    static_cast<char*>(rows) + row);
  });
  return absl::OkStatus();
}

}  // namespace quarry

#include "proto/kv_codec.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "proto/half.h"
#include "proto/head_dim.h"

namespace quarry {
namespace {

constexpr KvCodec kCodecs[] = {KvCodec::kNone, KvCodec::kFp8, KvCodec::kInt8, KvCodec::kInt4};

// Encoders bound numbers by 2^120 and steps from below; rounding adds less than a bit.
constexpr float kMostScale = 0x1p121f, kLeastScale = 0x1p-101f;

uint16_t ScaleAt(const std::byte* scales, size_t i) {
  uint16_t bits;
  std::memcpy(&bits, scales + i * 2, sizeof(bits));
  return bits;
}

// 0, of what is filled up, or a positive number.
bool IsStep(uint16_t bits) {
  const float x = Bf16ToFloat(bits);
  return bits == 0 || (x >= kLeastScale && x <= kMostScale);
}

bool IsZeroPoint(uint16_t bits) {
  const float x = Bf16ToFloat(bits);
  return x >= -kMostScale && x <= kMostScale;
}

// Scales of a tile are steps, but that with int4 every other group of `each` are zero points.
bool AreScales(const CodedStrip& strip, const std::byte* scales, uint32_t tokens) {
  const uint8_t codec = static_cast<uint8_t>(strip.codec), part = static_cast<uint8_t>(strip.part);
  if (strip.codec != KvCodec::kInt4) {
    for (uint32_t t = 0; t < coded::FilledTokens(tokens); ++t) {
      if (!IsStep(ScaleAt(scales, t))) return false;
    }
    return true;
  }
  const uint32_t each = strip.part == KvPart::kKey ? strip.head_dim : coded::FilledTokens(tokens);
  const uint32_t all = coded::ScaleBytes(codec, part, strip.head_dim, tokens) / 2;
  for (uint32_t i = 0; i < all; ++i) {
    const uint16_t bits = ScaleAt(scales, i);
    if (!(i / each % 2 == 0 ? IsStep(bits) : IsZeroPoint(bits))) return false;
  }
  return true;
}

}  // namespace

std::optional<KvCodec> KvCodecNamed(std::string_view name) {
  for (KvCodec codec : kCodecs) {
    if (KvCodecName(codec) == name) return codec;
  }
  return std::nullopt;
}

absl::Status CheckCodedStrip(const CodedStrip& strip, std::span<const std::byte> bytes) {
  if (strip.codec < KvCodec::kFp8 || strip.codec > KvCodec::kInt4) {
    return absl::InvalidArgumentError(
        absl::StrCat("codec ", static_cast<uint32_t>(strip.codec), " codes no strip"));
  }
  if (!IsHeadDim(strip.head_dim)) {
    return absl::InvalidArgumentError(absl::StrCat("head_dim ", strip.head_dim));
  }
  if (bytes.size() != strip.bytes()) {
    return absl::DataLossError(absl::StrCat(bytes.size(), " bytes where ", strip.tokens,
                                            " tokens of head_dim ", strip.head_dim, " have ",
                                            strip.bytes()));
  }
  const std::byte* tile = bytes.data();
  for (uint32_t t = 0; t < strip.tokens; t += coded::kTileTokens) {
    if (!AreScales(strip, tile, std::min(coded::kTileTokens, strip.tokens - t))) {
      return absl::DataLossError(
          absl::StrCat("a scale that is none in the tile of token ", t, " of ", strip.tokens));
    }
    tile += strip.whole_tile_bytes();
  }
  return absl::OkStatus();
}

TokenRange KvCoding::CodedTokens(uint32_t tokens) const {
  if (codec == KvCodec::kNone || tokens <= last_uncoded) return {};
  const uint64_t lo = (uint64_t{first_uncoded} + kBlockTokens - 1) / kBlockTokens * kBlockTokens;
  const uint32_t hi = (tokens - last_uncoded) / kBlockTokens * kBlockTokens;
  return lo < hi ? TokenRange{static_cast<uint32_t>(lo), hi} : TokenRange{};
}

}  // namespace quarry

// What a coded strip means, number by number, as storage/CODECS.md says.
#pragma once

#include <cmath>
#include <cstring>
#include <span>
#include <utility>
#include <vector>

#include "proto/half.h"
#include "proto/kv_codec.h"

namespace quarry {

class CodedReference {
 public:
  CodedReference(const CodedStrip& strip, std::span<const std::byte> bytes)
      : strip_(strip), bytes_(bytes) {}

  double Scale(uint32_t token, uint32_t channel) const {
    return Bf16(ScaleIndex(token, channel), token);
  }
  double Zero(uint32_t token, uint32_t channel) const {
    if (strip_.codec != KvCodec::kInt4) return 0;
    const uint32_t behind = strip_.part == KvPart::kKey ? strip_.head_dim : Filled(token);
    return Bf16(ScaleIndex(token, channel) + behind, token);
  }
  // Exact.
  double Number(uint32_t token, uint32_t channel) const {
    const uint32_t code = Code(token, channel);
    const double scale = Scale(token, channel);
    if (strip_.codec == KvCodec::kInt4) return Zero(token, channel) + scale * code;
    if (strip_.codec == KvCodec::kInt8) return scale * (static_cast<int>(code) - 128);
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const double magnitude =
        exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
    return code & 128 ? -scale * magnitude : scale * magnitude;
  }
  // The tokens and channels of the same scale, these included.
  std::vector<std::pair<uint32_t, uint32_t>> SharesScaleWith(uint32_t token,
                                                             uint32_t channel) const {
    std::vector<std::pair<uint32_t, uint32_t>> out;
    for (uint32_t t = token / 64 * 64; t < std::min(strip_.tokens, token / 64 * 64 + 64); ++t) {
      for (uint32_t c = 0; c < strip_.head_dim; ++c) {
        if (ScaleIndex(t, c) == ScaleIndex(token, channel)) out.emplace_back(t, c);
      }
    }
    return out;
  }

 private:
  uint32_t Filled(uint32_t token) const {
    const uint32_t tokens = std::min(64u, strip_.tokens - token / 64 * 64);
    return (tokens + 15) / 16 * 16;
  }
  // Of the scale in its tile.
  uint32_t ScaleIndex(uint32_t token, uint32_t channel) const {
    if (strip_.codec != KvCodec::kInt4) return token % 64;
    if (strip_.part == KvPart::kKey) return channel;
    return channel / 32 * 2 * Filled(token) + token % 64;
  }
  size_t TileAt(uint32_t token) const { return token / 64 * strip_.whole_tile_bytes(); }
  double Bf16(uint32_t index, uint32_t token) const {
    uint16_t bits;
    std::memcpy(&bits, bytes_.data() + TileAt(token) + size_t{index} * 2, sizeof(bits));
    return Bf16ToFloat(bits);
  }
  uint32_t Code(uint32_t token, uint32_t channel) const {
    const uint32_t d = strip_.head_dim, in_tile = token % 64;
    const bool four = strip_.codec == KvCodec::kInt4, key = strip_.part == KvPart::kKey;
    size_t scales = (Filled(token) * 2 + 63) / 64 * 64;
    if (four) scales = key ? d * 4 : (d + 31) / 32 * Filled(token) * 4;
    // Codes of a word, along channels for keys and along tokens for values.
    const uint32_t each = four ? 8 : strip_.codec == KvCodec::kInt8 ? 4 : 2;
    const uint32_t in_word = (key ? channel : in_tile) % each;
    const size_t word =
        key ? (size_t{in_tile / 16} * (d / each) + channel / each) * 16 + in_tile % 16
            : size_t{in_tile / each} * d + channel;
    const size_t at = TileAt(token) + scales + word * (each == 2 ? 2 : 4) + in_word % 4;
    const uint32_t code = static_cast<uint32_t>(bytes_[at]);
    return !four ? code : in_word >= 4 ? code >> 4 : code & 15;
  }

  const CodedStrip strip_;
  const std::span<const std::byte> bytes_;
};

}  // namespace quarry

// Rows of coded keys and values without vector instructions.
#pragma once

#include "cpu_index/kernels.h"

namespace quarry::kernels {
namespace {

float CodedScaleAt(const uint8_t* scales, uint32_t i) {
  uint16_t half;
  __builtin_memcpy(&half, scales + size_t{i} * 2, sizeof(half));
  const uint32_t bits = uint32_t{half} << 16;
  float out;
  __builtin_memcpy(&out, &bits, sizeof(out));
  return out;
}

float E4m3ToFloat(uint32_t code) {
  const uint32_t bits = (code & 0x7f) << 20;
  float magnitude;
  __builtin_memcpy(&magnitude, &bits, sizeof(magnitude));
  magnitude *= 0x1p120f;
  return (code & 0x80) != 0 ? -magnitude : magnitude;
}

// Keys or values of one strip of coded tokens, row by row.
class CodedRows {
 public:
  CodedRows(uint8_t codec, uint8_t part, uint32_t head_dim, uint32_t tokens, const void* strip)
      : codec_(codec),
        part_(part),
        head_dim_(head_dim),
        tokens_(tokens),
        strip_(static_cast<const uint8_t*>(strip)) {}

  // Writes the token's numbers [head_dim].
  void Read(uint32_t token, float* out) const {
    const uint32_t tile = token / coded::kTileTokens;
    const uint32_t behind = tokens_ - tile * coded::kTileTokens;
    const uint32_t tokens = behind < coded::kTileTokens ? behind : coded::kTileTokens;
    const uint8_t* scales =
        strip_ + size_t{tile} * coded::TileBytes(codec_, part_, head_dim_, coded::kTileTokens);
    const uint8_t* codes = scales + coded::ScaleBytes(codec_, part_, head_dim_, tokens);
    const uint32_t t = token % coded::kTileTokens;
    for (uint32_t c = 0; c < head_dim_; ++c) {
      const uint32_t code = CodeAt(codes, t, c);
      if (codec_ == coded::kInt4) {
        const uint32_t filled = coded::FilledTokens(tokens);
        const uint32_t step = part_ == coded::kKey ? c : c / coded::kValueChannels * 2 * filled + t;
        const uint32_t zero = step + (part_ == coded::kKey ? head_dim_ : filled);
        out[c] = CodedScaleAt(scales, zero) + CodedScaleAt(scales, step) * static_cast<float>(code);
      } else if (codec_ == coded::kInt8) {
        out[c] = CodedScaleAt(scales, t) *
                 static_cast<float>(static_cast<int32_t>(code) - coded::kInt8Excess);
      } else {
        out[c] = CodedScaleAt(scales, t) * E4m3ToFloat(code);
      }
    }
  }

 private:
  uint32_t CodeAt(const uint8_t* codes, uint32_t t, uint32_t c) const {
    const uint32_t each = coded::WordCodes(codec_);
    const uint32_t in_word = (part_ == coded::kKey ? c : t) % each;
    const size_t word = part_ == coded::kKey
                            ? (size_t{t / coded::kLaneTokens} * (head_dim_ / each) + c / each) *
                                      coded::kLaneTokens +
                                  t % coded::kLaneTokens
                            : size_t{t / each} * head_dim_ + c;
    const uint8_t byte = codes[word * coded::WordBytes(codec_) + in_word % 4];
    if (codec_ != coded::kInt4) return byte;
    return in_word >= 4 ? byte >> 4 : byte & 15;
  }

  const uint8_t codec_, part_;
  const uint32_t head_dim_, tokens_;
  const uint8_t* const strip_;
};

}  // namespace
}  // namespace quarry::kernels

// Compressed K and V: the codecs, and the size of what they make of a strip. The bytes themselves
// are specified in storage/CODECS.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include "absl/status/status.h"
#include "proto/coded_tile.h"
#include "proto/types.h"

namespace quarry {

// How K and V of a token are kept. kNone: as they came.
enum class KvCodec : uint8_t {
  kNone = 0,
  kFp8 = coded::kFp8,    // e4m3 with a scale per token
  kInt8 = coded::kInt8,  // with a scale per token
  kInt4 = coded::kInt4,  // keys per channel over tiles of tokens, values per token over groups of
                         // channels (KIVI)
};

constexpr std::string_view KvCodecName(KvCodec codec) {
  switch (codec) {
    case KvCodec::kNone:
      return "none";
    case KvCodec::kFp8:
      return "fp8";
    case KvCodec::kInt8:
      return "int8";
    case KvCodec::kInt4:
      return "int4";
  }
  return "invalid";
}
// The codec of that name.
std::optional<KvCodec> KvCodecNamed(std::string_view name);

// Coded K or V of consecutive tokens of one layer and KV head. Begins at a multiple of 64 bytes
// wherever kernels are to be fast; they accept any alignment.
struct CodedStrip {
  KvCodec codec = KvCodec::kInt8;  // not kNone
  KvPart part = KvPart::kKey;
  uint32_t head_dim = 0;  // IsHeadDim
  uint32_t tokens = 0;

  friend bool operator==(const CodedStrip&, const CodedStrip&) = default;
  // Every tile but the last is whole.
  uint64_t whole_tile_bytes() const { return TileBytes(coded::kTileTokens); }
  uint64_t bytes() const {
    const uint32_t rest = tokens % coded::kTileTokens;
    return tokens / coded::kTileTokens * whole_tile_bytes() + (rest > 0 ? TileBytes(rest) : 0);
  }

 private:
  uint64_t TileBytes(uint32_t of_tokens) const {
    return coded::TileBytes(static_cast<uint8_t>(codec), static_cast<uint8_t>(part), head_dim,
                            of_tokens);
  }
};

// Whether bytes that come from a disk or another process may be decoded and attended as this strip:
// what passes gives finite numbers, whatever its codes. InvalidArgument for a strip that cannot be,
// DataLoss for another length and for a scale that no encoder writes; both name the numbers.
absl::Status CheckCodedStrip(const CodedStrip& strip, std::span<const std::byte> bytes);

// What a codec is applied to: whole blocks, without a sequence's first and last tokens, which most
// attention falls on. A block that is coded stays so while the sequence grows.
struct KvCoding {
  KvCodec codec = KvCodec::kNone;
  uint32_t first_uncoded = 128;  // tokens
  uint32_t last_uncoded = 512;

  friend bool operator==(const KvCoding&, const KvCoding&) = default;
  // Of a sequence of so many tokens.
  TokenRange CodedTokens(uint32_t tokens) const;
};

}  // namespace quarry

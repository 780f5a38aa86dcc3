// How coded K and V lie in memory: sizes and places within a tile (storage/CODECS.md). Plain
// numbers only, for the kernels of every instruction set; strips and names are in kv_codec.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace quarry::coded {

// The values of KvCodec, and of KvPart.
inline constexpr uint8_t kFp8 = 1, kInt8 = 2, kInt4 = 3;
inline constexpr uint8_t kKey = 0, kValue = 1;

// Tokens of a tile: those that share the steps of an int4 key's channels. 32 instead of 64 make
// errors of the output a seventh smaller, and keys a tenth larger; 256 make them a third larger.
inline constexpr uint32_t kTileTokens = 64;
// Tokens whose codes lie side by side in a vector; a tile's are filled up to a multiple of it.
inline constexpr uint32_t kLaneTokens = 16;
// Channels that share the step of an int4 value. 64 instead of 32 make errors of the output a
// seventh larger, and values a tenth smaller.
inline constexpr uint32_t kValueChannels = 32;
// What a code of 8 bits stands above the number that it means.
inline constexpr int32_t kInt8Excess = 128;
inline constexpr int32_t kInt8Most = 127, kInt4Most = 15;
inline constexpr float kFp8Most = 448.0f;

// Codes of a word, and its bytes.
constexpr uint32_t WordCodes(uint8_t codec) { return codec == kFp8 ? 2 : codec == kInt8 ? 4 : 8; }
constexpr uint32_t WordBytes(uint8_t codec) { return codec == kFp8 ? 2 : 4; }

constexpr uint32_t FilledTokens(uint32_t tokens) {
  return (tokens + kLaneTokens - 1) / kLaneTokens * kLaneTokens;
}

constexpr uint32_t ValueGroups(uint32_t head_dim) {
  return (head_dim + kValueChannels - 1) / kValueChannels;
}

// Bytes of the scales at the start of a tile of up to kTileTokens tokens, a multiple of 64.
constexpr uint32_t ScaleBytes(uint8_t codec, uint8_t part, uint32_t head_dim, uint32_t tokens) {
  if (codec != kInt4) return (FilledTokens(tokens) * 2 + 63) / 64 * 64;
  return part == kKey ? head_dim * 4 : ValueGroups(head_dim) * FilledTokens(tokens) * 4;
}

// Bytes of the codes behind them, a multiple of 64.
constexpr uint32_t CodeBytes(uint8_t codec, uint32_t head_dim, uint32_t tokens) {
  return FilledTokens(tokens) * head_dim / WordCodes(codec) * WordBytes(codec);
}

constexpr uint32_t TileBytes(uint8_t codec, uint8_t part, uint32_t head_dim, uint32_t tokens) {
  return ScaleBytes(codec, part, head_dim, tokens) + CodeBytes(codec, head_dim, tokens);
}

}  // namespace quarry::coded

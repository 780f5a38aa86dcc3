// Coding of tiles, one table per instruction set. Plain data only: the level files include this,
// nothing else of the tree but proto/coded_tile.h and proto/head_dim.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "proto/coded_tile.h"
#include "proto/head_dim.h"

namespace quarry::codecs {

// Element types of rows; the values of DType.
inline constexpr uint8_t kBf16 = 1, kFp16 = 2, kFp32 = 3;

struct Tile {
  uint8_t codec;      // of coded::
  uint8_t part;       // of coded::
  uint8_t dtype;      // of the rows
  uint32_t head_dim;  // IsHeadDim
  uint32_t tokens;    // 1 to coded::kTileTokens
};

struct Table {
  const char* name;
  // rows: [tokens][head_dim] of dtype. out: coded::TileBytes, all of which are written.
  void (*encode)(const Tile&, const void* rows, uint8_t* out);
  // Scales must be ones that CheckCodedStrip accepts.
  void (*decode)(const Tile&, const uint8_t* coded, void* rows);
};

// Each defined in its own file, compiled for that instruction set alone. They give the same bytes.
const Table& ScalarTable();
const Table& Avx2Table();
const Table& Avx512Table();

}  // namespace quarry::codecs

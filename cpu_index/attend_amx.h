// Attention over whole segments with AMX, in one pass over bf16 or fp16 keys and values.
//
// Tokens are taken in tiles of 32. Per block of queries, then per chunk of 32 dimensions:
//   scores  S[token][query] = K[token][dim] . Q[dim][query]: a register of S is one token's score
//           for every query, so maxima, exponentials and sums need no step across lanes;
//   weights P[query][token] are transposed once, as left operand of
//   output  O[query][dim] += P[query][token] . V[token][dim], kept in memory between tiles, with
//           pairs of tokens of V interleaved in a small buffer.
// A weight is two bf16 parts.
//
// The next tile is fetched meanwhile. From DRAM, with fetches at even steps in time 32 queries
// reach 0.70 of the read bandwidth, 16 reach 0.93; with all of them before the values 0.50 and
// 0.85.
#pragma once

#include "cpu_index/attend_block_amx.h"

namespace quarry::kernels {
namespace {

constexpr uint32_t kGroups = kAttendTileTokens / kRows;
static_assert(kGroups == 2, "scores and weights of a tile are laid out for two groups");

// What the blocks share, behind them.
struct Staging {
  char* k;        // for KeysOf
  char* v;        // a chunk's, [part][even, odd], a tile each
  float* scores;  // [32 * queries / 16][16 lanes]

  Staging(const AttendRun& a, char* at)
      : k(at),
        v(k + StagedKeyBytes(a.head_dim, a.dtype, kGroups)),
        scores(reinterpret_cast<float*>(v + ChunkBytes(a.dtype))) {}
  static size_t ChunkBytes(uint8_t dtype) { return KvParts(dtype) * 2 * kTileBytes; }
  static size_t Bytes(const AttendRun& a) {
    return StagedKeyBytes(a.head_dim, a.dtype, kGroups) + ChunkBytes(a.dtype) + 2 * kTileBytes;
  }
};

// Products of a tile's keys with a block's queries, folded.
template <uint32_t kColumns>
void ScoreTileKeys(const Shape& s, const TileKeys& keys, const char* queries, float* out,
                   Fetcher* fetcher) {
  _tile_zero(0);
  _tile_zero(1);
  for (uint32_t p = 0; p < s.kv_parts; ++p) {
    for (uint32_t c = 0; c < s.chunks; ++c) {
      const char* k = keys.at + p * keys.part_step + c * keys.chunk_step;
      const char* q = queries + size_t{c} * s.q_parts * kTileBytes;
      fetcher->Step<kKeyTileWork>();
      _tile_loadd(4, k, keys.stride);
      fetcher->Step<kKeyTileWork>();
      _tile_loadd(5, k + keys.group_step, keys.stride);
      for (uint32_t i = 0; i < s.q_parts; ++i) {
        _tile_loadd(6, q + i * kTileBytes, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
      }
    }
  }
  _tile_stored(0, out, 64);
  _tile_stored(1, out + (kColumns == 16 ? 256 : kColumns), 64);
}

// One pair of tokens into a row of the tiles. Interleaving within 128-bit lanes puts dims 0-3,
// 8-11, .. of a chunk into the first tile and dims 4-7, 12-15, .. into the second one; StoreBlock
// puts them back into order.
template <uint8_t kDtype>
[[gnu::always_inline]] inline void StagePair(__m512i even, __m512i odd, char* at) {
  __m512i x[2], y[2];
  SplitParts<kDtype>(even, x);
  SplitParts<kDtype>(odd, y);
  for (uint32_t p = 0; p < (kDtype == kFp16 ? 2 : 1); ++p) {
    char* tile = at + size_t{p} * 2 * kTileBytes;
    _mm512_store_si512(tile, _mm512_unpacklo_epi16(x[p], y[p]));
    _mm512_store_si512(tile + kTileBytes, _mm512_unpackhi_epi16(x[p], y[p]));
  }
}

// Chunk c of the values: row r of a tile has tokens 2r and 2r + 1, zeros past the end.
template <uint8_t kDtype>
void StageChunk(const uint16_t* v, uint32_t head_dim, uint32_t tokens, uint32_t c, char* out,
                Fetcher* fetcher) {
  const __mmask32 mask = ChunkMask(head_dim, c);
  v += c * kChunkDims;
  if (tokens == kAttendTileTokens && mask == 0xffffffffu) {
#pragma GCC unroll 4
    for (uint32_t t = 0; t < kAttendTileTokens; t += 2) {
      fetcher->Step<kStagePairWork>();
      const uint16_t* even = v + size_t{t} * head_dim;
      StagePair<kDtype>(_mm512_loadu_si512(even), _mm512_loadu_si512(even + head_dim),
                        out + t * 32);
    }
    return;
  }
  for (uint32_t t = 0; t < kAttendTileTokens; t += 2) {
    fetcher->Step<kStagePairWork>();
    const bool even_there = t < tokens, odd_there = t + 1 < tokens;
    const uint16_t* even = v + size_t{even_there ? t : 0} * head_dim;
    const uint16_t* odd = v + size_t{odd_there ? t + 1 : 0} * head_dim;
    StagePair<kDtype>(_mm512_maskz_loadu_epi16(even_there ? mask : 0, even),
                      _mm512_maskz_loadu_epi16(odd_there ? mask : 0, odd), out + t * 32);
  }
}

// O += P . V for one chunk.
template <uint32_t kParts>
void AddChunk(const char* weights, const char* v, float* even, float* odd, Fetcher* fetcher) {
  _tile_loadd(2, even, 64);
  _tile_loadd(3, odd, 64);
  for (uint32_t p = 0; p < kParts; ++p) {
    fetcher->Step<kThirdOfAddWork>();
    _tile_loadd(4, v + p * 2 * kTileBytes, 64);
    _tile_loadd(5, v + (p * 2 + 1) * kTileBytes, 64);
    fetcher->Step<kThirdOfAddWork>();
    _tile_loadd(7, weights, 64);
    _tile_dpbf16ps(2, 7, 4);
    _tile_dpbf16ps(3, 7, 5);
    fetcher->Step<kThirdOfAddWork>();
    _tile_loadd(7, weights + kTileBytes, 64);
    _tile_dpbf16ps(2, 7, 4);
    _tile_dpbf16ps(3, 7, 5);
  }
  _tile_stored(2, even, 64);
  _tile_stored(3, odd, 64);
}

struct Tile {
  const uint16_t* k = nullptr;
  const uint16_t* v = nullptr;
  uint32_t first = 0, tokens = 0;
};

// Walks over the tiles of the tokens that some query wants.
class Tiles {
 public:
  Tiles(const AttendRun& a, uint32_t lo, uint32_t hi) : a_(a), lo_(lo), hi_(hi) {}

  bool Next(Tile* tile) {
    for (; segment_ < a_.segment_count; ++segment_, at_ = 0) {
      const AttendSegment& s = a_.segments[segment_];
      const uint32_t end = s.first + s.tokens < hi_ ? s.first + s.tokens : hi_;
      if (at_ == 0) at_ = s.first > lo_ ? s.first : lo_;
      if (at_ >= end || at_ < s.first) continue;
      const size_t offset = size_t{at_ - s.first} * a_.head_dim;
      tile->k = static_cast<const uint16_t*>(s.k) + offset;
      tile->v = static_cast<const uint16_t*>(s.v) + offset;
      tile->first = at_;
      tile->tokens = end - at_ < kAttendTileTokens ? end - at_ : kAttendTileTokens;
      at_ += tile->tokens;
      return true;
    }
    return false;
  }

 private:
  const AttendRun& a_;
  const uint32_t lo_, hi_;
  size_t segment_ = 0;
  uint32_t at_ = 0;  // 0: at the segment's start
};

// All blocks of queries, and the memory behind them.
struct Blocks {
  const Shape shape;
  char* const at;

  Block* operator[](uint32_t i) const {
    return reinterpret_cast<Block*>(at + i * BlockBytes(shape));
  }
  char* end() const { return at + shape.blocks * BlockBytes(shape); }
};

template <uint8_t kDtype, uint32_t kColumns>
void AttendTile(const AttendRun& a, const Tile& tile, const Blocks& blocks, const Staging& staging,
                Fetcher* fetcher) {
  const Shape& s = blocks.shape;
  const TileKeys keys = KeysOf<kDtype, kGroups>(tile.k, a.head_dim, tile.tokens, staging.k);
  for (uint32_t b = 0; b < s.blocks; ++b) {
    Block* block = blocks[b];
    block->wanted = block->Wants(tile.first, tile.tokens);
    if (!block->wanted) continue;
    ScoreTileKeys<kColumns>(s, keys, block->q(), staging.scores, fetcher);
    const __m512 shift = RaiseMax<kColumns>(a, s, tile.first, tile.tokens, block, staging.scores);
    WeighTile<kColumns>(staging.scores, shift, block, fetcher);
  }
  for (uint32_t c = 0; c < s.chunks; ++c) {
    StageChunk<kDtype>(tile.v, a.head_dim, tile.tokens, c, staging.v, fetcher);
    for (uint32_t b = 0; b < s.blocks; ++b) {
      Block* block = blocks[b];
      if (!block->wanted) continue;
      AddChunk<kDtype == kFp16 ? 2 : 1>(block->weights(), staging.v, block->o(s, 2 * c),
                                        block->o(s, 2 * c + 1), fetcher);
    }
  }
}

template <uint8_t kDtype>
void AttendWithTiles(const AttendRun& a) {
  const Blocks blocks{ShapeOf(a), static_cast<char*>(a.scratch)};
  const Shape& s = blocks.shape;
  uint32_t lo = ~0u, hi = 0;
  for (uint32_t b = 0; b < s.blocks; ++b) {
    Block* block = blocks[b];
    InitBlock(a, s, b * s.columns, block);
    lo = block->min_lo < lo ? block->min_lo : lo;
    hi = block->max_hi > hi ? block->max_hi : hi;
  }
  const Staging staging(a, blocks.end());
  const TileConfig config = AttendConfig(s);
  _tile_loadconfig(&config);
  const size_t work = WorkOf(s);
  Tiles tiles(a, lo, hi);
  Tile tile, next;
  for (bool more = tiles.Next(&tile); more; tile = next) {
    more = tiles.Next(&next);
    const size_t lines = more ? size_t{next.tokens} * a.head_dim * 2 / 64 : 0;
    Fetcher fetcher(next.k, next.v, lines, work);
    if (s.columns == 8) {
      AttendTile<kDtype, 8>(a, tile, blocks, staging, &fetcher);
    } else {
      AttendTile<kDtype, 16>(a, tile, blocks, staging, &fetcher);
    }
  }
  _tile_release();
  for (uint32_t b = 0; b < s.blocks; ++b) StoreBlock(a, s, b * s.columns, blocks[b]);
}

inline size_t TileScratchBytes(const AttendRun& a) {
  const Shape s = ShapeOf(a);
  return s.blocks * BlockBytes(s) + Staging::Bytes(a);
}

}  // namespace
}  // namespace quarry::kernels

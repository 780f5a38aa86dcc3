// From patterns, keys and queries to what the heads of one layer attend: first a plan per head,
// once per prefill, then the index of as many of its rows as are attended at a time. How a prefill
// is cut into such chunks shows in nothing, if each begins at a multiple of 128 rows.
// Deterministic: ties go to the lower token, distance or block.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "gpu/device.h"
#include "gpu/sparse/head_cost.h"
#include "gpu/sparse/line_rules.h"
#include "gpu/sparse/pattern.h"
#include "gpu/sparse/sparse_index.h"
#include "gpu/thread_team.h"
#include "proto/types.h"

namespace quarry {

// K and V of tokens [0, kv.tokens.hi) of one layer, on the host; v is not read by what chooses.
struct LayerKv {
  DeviceKv kv;
  DType dtype = DType::kBf16;
  uint32_t heads = 0, kv_heads = 0, head_dim = 0;

  const std::byte* Keys(uint32_t head) const { return At(kv.k, head); }
  const std::byte* Values(uint32_t head) const { return At(kv.v, head); }
  size_t row_bytes() const { return size_t{head_dim} * DTypeBytes(dtype); }

 private:
  const std::byte* At(const void* side, uint32_t head) const {
    return static_cast<const std::byte*>(side) + head / (heads / kv_heads) * kv.head_stride;
  }
};

struct HeadPlan {
  HeadKind kind = HeadKind::kDense;
  Pattern pattern;                    // kBlocks: how blocks are chosen
  std::vector<RelativeRange> ranges;  // kRanges, as in SparseIndex
  std::vector<uint32_t> columns;
  // Share of the last queries' mass that the head attends, of vertical-slash patterns; else 1.
  double captured = 1;
};

// The prefill of rows `prefill`; K of all tokens before prefill.hi is there.
struct PlanInputs {
  LayerKv layer;
  TokenRange prefill;
  std::span<const HeadPattern> patterns;  // [heads]
  // The last min(64, rows) queries, [][heads][head_dim]. Null if no head is vertical-slash.
  const float* last_q = nullptr;
  DenseFallback fallback = DenseFallback::kWhereCheaper;
};

// Vertical-slash: 64 n head_dim products of a head (n: tokens before prefill.hi), n log n to rank;
// memory 16 n floats and a few n doubles per thread. By mass: O(n) more for each of some 20 numbers
// of slashes. A-shape: O(row tiles). Block patterns: nothing yet.
//
// By mass: the columns and slashes of the least tiles whose mask, ranges included, has the asked
// share of the last queries' mass; among numbers of slashes that grow by a half, and columns by
// what they add to the ranges, in whole tiles. None within the budget: dense.
// With kWhereCheaper a head is dense unless its tiles, sparse ones at 9/8, and the choosing itself
// (64 queries against all keys without values: a quarter tile per key tile) cost less than dense.
std::vector<HeadPlan> PlanHeads(const PlanInputs& inputs, ThreadTeam* team);

// Whether a plan needs the last queries' attention; and one head's plan that does not, by the
// prefill, the patterns and the fallback.
bool NeedsLineScores(const Pattern& pattern);
HeadPlan PlanWithoutScores(const PlanInputs& inputs, uint32_t head);
// What choosing columns and slashes is taken to cost a head.
constexpr uint64_t ChoosingEighths(uint32_t tokens) { return 8 * uint64_t{KeyTilesOf(tokens)} / 4; }

// Rows [first_token, first_token + rows) of the prefill; first_token is a multiple of 128 rows
// behind its first one.
struct IndexInputs {
  LayerKv layer;
  uint32_t first_token = 0, rows = 0;
  const float* q = nullptr;  // [rows][heads][head_dim]; null if no head is of a block pattern
  DenseFallback fallback = DenseFallback::kWhereCheaper;
};

// Block-sparse: rows n / 64^2 products of a head, quadratic but a 4,096th of dense attention's.
// Block-scored: rows n / 64, a 128th of it. Both read K once. The first block and those that the
// row tile's own keys lie in are always in. Other heads: O(ranges + columns + row tiles). With
// kWhereCheaper a row tile is dense unless its tiles at 9/8, and for block-scored the choosing,
// cost less.
SparseIndex BuildIndex(std::span<const HeadPlan> plans, const IndexInputs& inputs,
                       ThreadTeam* team);

}  // namespace quarry

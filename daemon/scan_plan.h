// ScanPlan: which blocks and runs are scanned for which rows, each token exactly once.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "daemon/block_table.h"
#include "proto/types.h"

namespace quarry {

// One row of a batch, as far as planning sees it. All members of a plan have one shape.
struct ScanMember {
  const BlockTable* table = nullptr;
  TokenRange range;
};

// A stretch of tokens scanned in one pass for the members that share its blocks.
struct ScanUnit {
  TokenRange tokens;  // all its members' ranges lie within; may be less than the run
  // The blocks from number first_block on: of a member's table, or all of the run's.
  const std::shared_ptr<HeldBlock>* blocks = nullptr;
  uint32_t first_block = 0;
  const Run* run = nullptr;  // whose index may answer; null: no index covers the tokens
  TokenRange run_tokens;     // all of the run's, as the members count them
  // From where the keys were stored to where the members use them: queries are turned back by it.
  // One for the whole unit; null: none.
  const Rotation* turn = nullptr;
  // Rising; a member with two stretches of tail in one unit is there twice.
  std::vector<uint32_t> members;
  std::vector<TokenRange> ranges;  // of each member, within tokens
};

enum class ScanKind {
  kExact,    // every token is read: no index helps, units are blocks that members share
  kIndexed,  // units are runs, and the tail that no run covers
};

// Tokens of a unit that is not a run, a multiple of kBlockTokens: task_tokens, which is one, or
// fewer where the first and the last token scanned are no more than `tokens`, at least 1, apart.
uint32_t UnitTokens(uint32_t tokens, uint32_t task_tokens);

// Units in token order. For each member the ranges of its units are disjoint and together are
// its range. The members' tables must outlive the plan.
std::vector<ScanUnit> PlanScan(std::span<const ScanMember> members, ScanKind kind,
                               uint32_t task_tokens);

// Of a row under a tolerated error whose answer will be merged with attention over the rest of
// [0, rest_hi): the parts of the rest, before the row's range and behind it, that are read beside
// it to know how closely to look; both are empty where they would be too long.
std::array<TokenRange, 2> RestBeside(TokenRange range, uint32_t rest_hi);

}  // namespace quarry

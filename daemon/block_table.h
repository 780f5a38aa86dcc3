// BlockTable: where a context's tokens lie, as one immutable snapshot.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "daemon/held_block.h"
#include "proto/types.h"

namespace quarry {

class Run;

// The part of a run that a context searches: all of it, or up to where a fork left it.
struct RunUse {
  std::shared_ptr<const Run> run;
  TokenRange tokens;
};

// Held by shared_ptr: an attend reads the snapshot it started with while the context swaps in
// the next one (a block won by an earlier writer, a run built in the background).
struct BlockTable {
  std::vector<std::shared_ptr<HeldBlock>> blocks;  // of max_tokens, from token 0
  std::vector<RunUse> runs;                        // disjoint, in token order
};

}  // namespace quarry

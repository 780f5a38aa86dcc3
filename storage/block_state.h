// A block's life, as one table. Illegal moves are our own bugs and CHECKed.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

namespace quarry {

enum class BlockState : uint8_t { kEmpty, kWriting, kSealed, kPublished, kRetiring, kFree };
inline constexpr int kBlockStates = 6;

constexpr std::string_view BlockStateName(BlockState s) {
  constexpr std::array<std::string_view, kBlockStates> kNames = {
      "EMPTY", "WRITING", "SEALED", "PUBLISHED", "RETIRING", "FREE"};
  return kNames[static_cast<int>(s)];
}

// kMoves[from][to]
inline constexpr bool kBlockMoves[kBlockStates][kBlockStates] = {
    /* EMPTY     */ {false, true, false, false, false, true},
    /* WRITING   */ {false, false, true, false, true, false},   // RETIRING: abandoned
    /* SEALED    */ {false, false, false, true, true, false},   // RETIRING: lost to an earlier writer
    /* PUBLISHED */ {false, false, false, false, true, false},
    /* RETIRING  */ {false, false, false, false, false, true},  // when the last lease ends
    /* FREE      */ {true, false, false, false, false, false},  // reuse bumps the generation
};

constexpr bool MayMove(BlockState from, BlockState to) {
  return kBlockMoves[static_cast<int>(from)][static_cast<int>(to)];
}

}  // namespace quarry

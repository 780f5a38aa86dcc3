// The numbers by which columns and slashes are chosen. Plain C++: the host and kernels see the
// same.
#pragma once

#include <cstdint>

namespace quarry {

// Queries whose attention chooses columns and slashes; always-in columns and slashes (MInference).
inline constexpr uint32_t kLastQueries = 64, kForcedColumns = 30, kForcedSlashes = 100;

// By mass, numbers of slashes are tried from kForcedSlashes on, each half as many again.
constexpr uint32_t NextSlashes(uint32_t count) { return count + count / 2; }
// How many there are, up to the first that is not below `tokens`.
constexpr uint32_t SlashTries(uint32_t tokens) {
  uint32_t tries = 1;
  for (uint32_t count = kForcedSlashes; count < tokens; count = NextSlashes(count)) ++tries;
  return tries;
}

}  // namespace quarry

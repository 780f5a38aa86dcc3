// Some of a run's tokens.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

namespace quarry {

// One bit for each of so many tokens, counted from the run's first one.
class TokenSet {
 public:
  explicit TokenSet(uint32_t tokens) : words_((uint64_t{tokens} + 63) / 64) {}

  bool Contains(uint32_t token) const { return (words_[token / 64] >> token % 64 & 1) != 0; }
  // False if it was in.
  bool Add(uint32_t token) {
    uint64_t& word = words_[token / 64];
    const uint64_t bit = uint64_t{1} << token % 64;
    if ((word & bit) != 0) return false;
    word |= bit;
    return true;
  }
  uint64_t size() const {
    uint64_t n = 0;
    for (uint64_t word : words_) n += static_cast<uint64_t>(std::popcount(word));
    return n;
  }
  const std::vector<uint64_t>& words() const { return words_; }

 private:
  std::vector<uint64_t> words_;
};

}  // namespace quarry

// SpreadBits: numbers that look random, without state.
#pragma once

#include <cstdint>

namespace quarry {

// Spreads numbers evenly over 64 bits (the finalizer of MurmurHash3).
inline uint64_t SpreadBits(uint64_t x) {
  x = (x ^ (x >> 33)) * 0xff51afd7ed558ccdull;
  x = (x ^ (x >> 33)) * 0xc4ceb9fe1a85ec53ull;
  return x ^ (x >> 33);
}

}  // namespace quarry

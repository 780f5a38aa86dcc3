// SoftmaxLift's random numbers: what is added to a token's score to give its priority.
#pragma once

#include <bit>
#include <cstdint>

namespace quarry {

// Which draw: of one query head at one position of one layer. Never 0, which means no sampling.
inline uint64_t LiftKey(uint64_t seed, uint32_t layer, uint32_t head, uint32_t position) {
  uint64_t x = seed;
  for (uint64_t part : {uint64_t{layer}, uint64_t{head}, uint64_t{position}}) {
    x += part + 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    x ^= x >> 31;
  }
  return x | 1;
}

// More than any TokenLift, by more than what adding it to a score may round.
inline constexpr float kMostTokenLift = 16.7f;

// -ln u of a token's own u, evenly distributed in (0, 1): from 6e-8 to 16.6, the same on every
// machine, whatever run the token lies in. Of floats and 32-bit integers only, for the compiler to
// do several at once.
inline float TokenLift(uint64_t key, uint32_t token) {
  const auto mix = [](uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
  };
  const uint32_t h =
      mix(mix(token + static_cast<uint32_t>(key)) ^ static_cast<uint32_t>(key >> 32));
  // An odd number of 24 bits, exact as a float: u = odd / 2^24.
  const float odd = static_cast<float>(static_cast<int32_t>(h >> 9 << 1 | 1));
  // ln of a mantissa in [sqrt(1/2), sqrt(2)) by Cephes' polynomial.
  const int32_t bits = std::bit_cast<int32_t>(odd);
  const int32_t above = (bits - 0x3f3504f3) >> 23;  // the exponent
  const float x = std::bit_cast<float>(bits - above * (1 << 23)) - 1.0f;
  const float square = x * x;
  float p = 7.0376836292e-2f;
  for (float c : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                  -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f}) {
    p = p * x + c;
  }
  const float ln = x * square * p - 0.5f * square + x;
  return static_cast<float>(24 - above) * 0.69314718056f - ln;
}

}  // namespace quarry

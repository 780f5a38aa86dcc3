// The seed of what a test program draws at random.
#pragma once

#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>

namespace quarry {

// QUARRY_TEST_SEED of the environment, else `otherwise`.
inline uint64_t GivenSeed(uint64_t otherwise) {
  const char* const given = std::getenv("QUARRY_TEST_SEED");
  return given != nullptr ? std::strtoull(given, nullptr, 10) : otherwise;
}

// One number per process: the given one, else a random one of 32 bits. The first call prints it in
// the form in which it is given, flushed so that a crash cannot swallow it. From any thread.
inline uint64_t Seed() {
  static const uint64_t seed = [] {
    const uint64_t value = GivenSeed(std::random_device{}());
    std::printf("QUARRY_TEST_SEED=%" PRIu64 "\n", value);
    std::fflush(stdout);
    return value;
  }();
  return seed;
}

// Of data of which a bounded figure is a statistic, such as the mean error of an index: always the
// same, unless one is given. What holds for most draws of such data would fail at some.
inline uint64_t SteadySeed() { return GivenSeed(1); }

}  // namespace quarry

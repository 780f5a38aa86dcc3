// The seed of what a test program draws at random.
#pragma once

#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>

namespace quarry {

// One number per process: QUARRY_TEST_SEED of the environment, else a random one of 32 bits. The
// first call prints it in that form, flushed so that a crash cannot swallow it. From any thread.
inline uint64_t Seed() {
  static const uint64_t seed = [] {
    const char* const given = std::getenv("QUARRY_TEST_SEED");
    const uint64_t value =
        given != nullptr ? std::strtoull(given, nullptr, 10) : std::random_device{}();
    std::printf("QUARRY_TEST_SEED=%" PRIu64 "\n", value);
    std::fflush(stdout);
    return value;
  }();
  return seed;
}

}  // namespace quarry

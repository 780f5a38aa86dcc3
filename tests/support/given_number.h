// Numbers by which a run of a test program is made longer.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace quarry {

// That of the environment, else `otherwise`.
inline uint64_t GivenNumber(const char* name, uint64_t otherwise) {
  const char* const given = std::getenv(name);
  return given != nullptr ? std::strtoull(given, nullptr, 10) : otherwise;
}

// Executions of a fuzz target: QUARRY_FUZZ_RUNS of the environment, else `otherwise`.
inline uint64_t FuzzRuns(uint64_t otherwise) { return GivenNumber("QUARRY_FUZZ_RUNS", otherwise); }

}  // namespace quarry

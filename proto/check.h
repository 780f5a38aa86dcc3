// Checks of our own bugs; never of input, disk or network.
#pragma once

#include <cstdio>
#include <cstdlib>

// Ends the process with the failed condition, file and line. Stays on in release builds.
#define QUARRY_CHECK(condition)                                                               \
  do {                                                                                        \
    if (!(condition)) [[unlikely]] {                                                          \
      std::fprintf(stderr, "QUARRY_CHECK failed: %s at %s:%d\n", #condition, __FILE__, __LINE__); \
      std::abort();                                                                           \
    }                                                                                         \
  } while (false)

// Medians with their spread, and interleaved timing, for the benchmarks.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <vector>

namespace quarry::perf {

struct Quantiles {
  double p10 = 0, p50 = 0, p90 = 0, p99 = 0, max = 0;
};

inline Quantiles QuantilesOf(std::vector<double> x) {
  if (x.empty()) return {};
  std::sort(x.begin(), x.end());
  const auto at = [&](double q) {
    return x[static_cast<size_t>(q * static_cast<double>(x.size() - 1) + 0.5)];
  };
  return {at(0.1), at(0.5), at(0.9), at(0.99), x.back()};
}

// The upper one of the two middle ones. Not of nothing.
inline double Median(std::vector<double> x) {
  const auto middle = x.begin() + static_cast<std::ptrdiff_t>(x.size() / 2);
  std::nth_element(x.begin(), middle, x.end());
  return *middle;
}

template <typename F>
double Microseconds(F&& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start)
      .count();
}

}  // namespace quarry::perf

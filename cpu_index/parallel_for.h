// Work shared out over threads, for builds.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <thread>
#include <vector>

namespace quarry {

// Calls f(lo, hi) for all of [0, n) in pieces of at most `grain`, on up to `threads` threads, the
// caller's being one of them; returns when all are done. Which thread gets which piece is not
// known: f must write what depends on nothing but its piece to places of that piece alone, then
// the result is the same for any number of threads. f must not throw.
template <typename F>
void ParallelFor(size_t threads, size_t n, size_t grain, F&& f) {
  const size_t pieces = (n + grain - 1) / grain;
  std::atomic<size_t> next = 0;
  const auto work = [&] {
    for (size_t piece = next++; piece < pieces; piece = next++) {
      f(piece * grain, std::min(n, (piece + 1) * grain));
    }
  };
  std::vector<std::thread> others;
  for (size_t i = 1; i < std::min(threads, pieces); ++i) others.emplace_back(work);
  work();
  for (std::thread& thread : others) thread.join();
}

}  // namespace quarry

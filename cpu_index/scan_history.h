// What searches of a head found of late: whether attending exactly was faster than estimates, and
// how many rows they needed of those that leaves' centres let expect.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <limits>

namespace quarry {

// A search that looks first and scans then takes longer than the scan alone. After three such in a
// row the next 4 scan without a look, ever more of them until one looks again: of a head that is
// always scanned one in 33 searches looks. All looks but the first are at the codes too, for leaves
// may be wrong: heads that seek records only when they are asked looked diffuse to sampled queries.
// Thread-safe; of counts made at the same time one may be lost. A copy begins anew.
class ScanHistory {
 public:
  ScanHistory() = default;
  ScanHistory(const ScanHistory&) {}
  ScanHistory& operator=(const ScanHistory&) { return *this; }

  // Whether a search that tolerates that error is to scan without a look. A smaller error takes no
  // less to read, a larger one may.
  bool ScanNext(float tolerance) {
    State s = Load();
    if (s.left == 0 || tolerance > s.tolerance) return false;
    --s.left;
    Store(s);
    return true;
  }
  // After a search that looked.
  void Looked(float tolerance, bool scanned) {
    State s = Load();
    if (scanned) {
      if (tolerance > s.tolerance) s = State{.tolerance = tolerance};
      s.streak = std::min<uint16_t>(s.streak + 1, kLongestStreak);
      s.left = s.streak < 3 ? 0 : static_cast<uint16_t>(1u << (s.streak - 1));
    } else if (tolerance <= s.tolerance) {
      s = State{};
    }
    Store(s);
  }
  // Whether a search that looks is not to believe the leaves' centres alone.
  bool LookDeeper() const { return Load().streak > 0; }

  // Of the rows expected, how many are needed; `learned`: by sampled queries, the most.
  float NeededRows(float learned) const {
    return std::min(learned, needed_rows_.load(std::memory_order_relaxed));
  }
  // What codes told, of rows that were expected.
  void Needed(uint64_t rows, uint64_t expected) {
    if (expected == 0) return;
    const float now = static_cast<float>(rows) / static_cast<float>(expected);
    const float before = needed_rows_.load(std::memory_order_relaxed);
    needed_rows_.store(before == kUnknown ? now : (before + now) / 2, std::memory_order_relaxed);
  }

 private:
  static constexpr uint16_t kLongestStreak = 6;
  static constexpr float kUnknown = std::numeric_limits<float>::infinity();
  struct State {
    float tolerance = 0;  // the largest that the streak is of
    uint16_t streak = 0;  // searches in a row that scanned after a look
    uint16_t left = 0;    // that scan without one
  };
  static_assert(sizeof(State) == sizeof(uint64_t));

  State Load() const { return std::bit_cast<State>(state_.load(std::memory_order_relaxed)); }
  void Store(State s) { state_.store(std::bit_cast<uint64_t>(s), std::memory_order_relaxed); }

  std::atomic<uint64_t> state_ = 0;
  std::atomic<float> needed_rows_ = kUnknown;
};

}  // namespace quarry

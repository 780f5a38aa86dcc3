// What searches of a head found of late: whether attending exactly was faster than estimates, and
// how many rows they needed of those that leaves' centres let expect.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace quarry {

// A search that looks before it scans takes longer than the scan alone, and one that was to read
// few rows may read many. When looks save less than is worth while, on the average of the last few,
// the next 4 searches scan without one, then 8 and more, until looks pay again: of a head that is
// always scanned one in 65 searches looks, from its first look on if sampled queries foretold it. A
// look after one that scanned is at the codes too, for leaves may be wrong: heads that seek records
// only when they are asked looked diffuse to sampled queries. Thread-safe; of counts made at the
// same time one may be lost. A copy begins anew.
class ScanHistory {
 public:
  // By the time of a scan: times are foretold no better, and a search that is to take longer than
  // so may well take longer than the scan.
  static constexpr float kWorthwhile = 0.9f;

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
  // After a search that looked: how long it took, by the time of a scan; scanned: in the end;
  // foretold: that it would not pay. Then one look that does not is enough.
  void Looked(float tolerance, float time, bool scanned, bool foretold = false) {
    State s = Load();
    if (tolerance > s.tolerance) {
      if (time < kWorthwhile) return;
      s = State{.tolerance = tolerance};
    }
    const float taken = std::min(time, kLongest) * kUnit;
    const float mean = s.looks == 0 ? taken : s.mean + (taken - s.mean) / kRemembered;
    s.mean = static_cast<uint16_t>(std::lround(mean));
    const bool pays = s.mean < kUnit * kWorthwhile;
    if (foretold && !pays) {
      s.tolerance = tolerance;  // of a larger error nothing was foretold
      s.looks = kEnoughLooks;
      s.streak = kLongestStreak;
    }
    s.looks = std::min<uint8_t>(s.looks + 1, kEnoughLooks);
    s.streak = pays ? 0 : std::min<uint8_t>(s.streak + (s.looks == kEnoughLooks), kLongestStreak);
    // What paid once may do so again.
    s.left = s.streak == 0 || time < kWorthwhile ? 0 : static_cast<uint8_t>(2u << s.streak);
    s.scanned = scanned;
    Store(s);
  }
  // Whether a search that looks is not to believe the leaves' centres alone.
  bool LookDeeper() const { return Load().scanned; }

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
  static constexpr uint8_t kEnoughLooks = 3, kLongestStreak = 5;
  static constexpr float kRemembered = 4;  // looks, about
  static constexpr float kUnit = 1024, kLongest = 8;
  static constexpr float kUnknown = std::numeric_limits<float>::infinity();
  struct State {
    float tolerance = 0;          // the largest that looks did not pay for
    uint16_t mean = 0;            // time of a look, in scans by kUnit
    uint8_t looks : 2 = 0;        // up to what is enough
    uint8_t streak : 5 = 0;       // of means that did not pay
    uint8_t scanned : 1 = false;  // in the last look's end
    uint8_t left = 0;             // searches that scan without a look
  };
  static_assert(sizeof(State) == sizeof(uint64_t));

  State Load() const { return std::bit_cast<State>(state_.load(std::memory_order_relaxed)); }
  void Store(State s) { state_.store(std::bit_cast<uint64_t>(s), std::memory_order_relaxed); }

  std::atomic<uint64_t> state_ = 0;
  std::atomic<float> needed_rows_ = kUnknown;
};

}  // namespace quarry

// What the daemon's audit of its own answers found, head group by head group.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <string>

namespace quarry {

// Figures of one (layer, KV head) of one model, or of several of them together. An audit compares
// the answer of one query position with exact attention; of its group's query heads the worst
// counts.
struct AuditFigures {
  // Ratios of actual to predicted error, in quarter octaves from 2^-8 on; the ends hold what lies
  // beyond.
  static constexpr int kRatioBuckets = 64, kBucketsPerOctave = 4, kLeastOctave = -8;

  uint64_t audits = 0;
  // ||o - exact|| / ||exact||; of a row that is merged elsewhere, of the merged answer.
  double error_sum = 0, error_max = 0;
  double predicted_sum = 0;   // AttendAnswer::error_estimate, of this KV head
  uint64_t within_twice = 0;  // the actual error was at most twice the predicted
  // |e^(lse - exact lse) - 1|: how wrong the answer weighs in a merge.
  double mass_error_sum = 0;
  // Budgets that drop what they do not attend (fixed k, softmax mass, DIPR): the share of the exact
  // softmax mass that was attended, and how many of the n attended tokens are among the n best. A
  // tolerated error: the share of the mass that lies on tokens that are read one by one, and how
  // many of the 100 best tokens are; the others are estimated. Answers that sample have no such
  // share: they are not counted here.
  uint64_t mass_audits = 0, recall_audits = 0;
  double mass_sum = 0, recall_sum = 0;
  uint64_t drifts = 0;  // times that indexes were found not to fit live queries any more
  std::array<uint64_t, kRatioBuckets> ratios{};

  friend bool operator==(const AuditFigures&, const AuditFigures&) = default;

  static int RatioBucket(double ratio) {
    const double bucket = (std::log2(ratio) - kLeastOctave) * kBucketsPerOctave;
    return static_cast<int>(std::clamp(bucket, 0.0, kRatioBuckets - 1.0));
  }

  void Merge(const AuditFigures& other) {
    audits += other.audits;
    error_sum += other.error_sum;
    error_max = std::max(error_max, other.error_max);
    predicted_sum += other.predicted_sum;
    within_twice += other.within_twice;
    mass_error_sum += other.mass_error_sum;
    mass_audits += other.mass_audits;
    mass_sum += other.mass_sum;
    recall_audits += other.recall_audits;
    recall_sum += other.recall_sum;
    drifts += other.drifts;
    for (size_t i = 0; i < ratios.size(); ++i) ratios[i] += other.ratios[i];
  }

  // Means; NaN where nothing was counted.
  double error() const { return error_sum / static_cast<double>(audits); }
  double predicted() const { return predicted_sum / static_cast<double>(audits); }
  double within_twice_share() const {
    return static_cast<double>(within_twice) / static_cast<double>(audits);
  }
  double mass_error() const { return mass_error_sum / static_cast<double>(audits); }
  double mass() const { return mass_sum / static_cast<double>(mass_audits); }
  double recall() const { return recall_sum / static_cast<double>(recall_audits); }
  // The actual error by the predicted that `share` of the audits did not exceed, within 9% (the
  // middle of its bucket); NaN without audits.
  double RatioQuantile(double share) const {
    uint64_t total = 0, below = 0;
    for (uint64_t n : ratios) total += n;
    for (int i = 0; i < kRatioBuckets; ++i) {
      below += ratios[static_cast<size_t>(i)];
      if (below > 0 && static_cast<double>(below) >= share * static_cast<double>(total)) {
        return std::exp2(kLeastOctave + (i + 0.5) / kBucketsPerOctave);
      }
    }
    return std::nan("");
  }
};

struct HeadAudit {
  std::string model;
  uint32_t layer = 0;
  uint32_t kv_head = 0;
  AuditFigures figures;
};

}  // namespace quarry

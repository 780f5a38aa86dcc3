// Columns and slashes of a head, by the attention of the prefill's last queries.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "gpu/sparse/build_index.h"

namespace quarry {

// Exact causal softmax of the last queries over all keys, summed by columns and by distances.
class LineScores {
 public:
  LineScores(const PlanInputs& inputs, uint32_t head);

  TokenRange prefill() const { return prefill_; }
  // [tokens]: the mass of each key, and of each distance.
  const std::vector<double>& columns() const { return columns_; }
  const std::vector<double>& slashes() const { return slashes_; }
  double total() const { return total_; }  // of all the queries: as many as they are

  // The share of the mass that a mask has: `columns` rising. With kWhereCheaper, row tiles that
  // BuildIndex runs dense have all of theirs. O(ranges + columns).
  double Captured(std::span<const RelativeRange> ranges, std::span<const uint32_t> columns,
                  DenseFallback fallback) const;
  // Mass of the ranges alone, and what each key has outside of them.
  double Outside(std::span<const RelativeRange> ranges, std::vector<double>* outside) const;

 private:
  // The last queries of one row tile: two at most.
  struct Tile {
    TokenRange rows;             // of the row tile, all of them
    std::vector<double> mass;    // [tokens] by key
    std::vector<double> before;  // [tokens + 1]: sums of mass
    double Sum(TokenRange keys) const { return before[keys.hi] - before[keys.lo]; }
  };

  TokenRange prefill_;
  std::vector<double> columns_, slashes_;
  std::vector<Tile> tiles_;
  double total_ = 0;
};

// Fills ranges, columns and captured: the best of each, those that are always in among them.
void ChooseLines(const LineScores& scores, const VerticalSlashPattern& pattern,
                 DenseFallback fallback, HeadPlan* plan);
// False: nothing within the budget has the mass.
bool ChooseLines(const LineScores& scores, const VerticalSlashMassPattern& pattern,
                 DenseFallback fallback, HeadPlan* plan);

}  // namespace quarry

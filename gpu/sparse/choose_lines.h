// Columns and slashes of a head, by the attention of the prefill's last queries.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "gpu/sparse/build_index.h"

namespace quarry {

// Exact causal softmax of the last queries over all keys, summed by keys and by distances.
struct LineSums {
  struct Tile {
    TokenRange rows;           // of the row tile, all of them
    std::vector<double> mass;  // [tokens] by key
  };
  std::vector<Tile> tiles;      // the row tiles that the last queries lie in
  std::vector<double> slashes;  // [tokens] by distance
};
// The row tiles that the last queries of a prefill lie in: one or two, rising.
std::vector<TokenRange> LastRowTiles(TokenRange prefill);
// Of one head, on the host.
LineSums SumLines(const PlanInputs& inputs, uint32_t head);

// What the choice asks of these sums.
class LineScores {
 public:
  LineScores(TokenRange prefill, LineSums sums);

  TokenRange prefill() const { return prefill_; }
  // [tokens]: the mass of each key, and of each distance.
  const std::vector<double>& columns() const { return columns_; }
  const std::vector<double>& slashes() const { return sums_.slashes; }
  double total() const { return total_; }  // of all the queries: as many as they are

  // The share of the mass that a mask has: `columns` rising. With kWhereCheaper, row tiles that
  // BuildIndex runs dense have all of theirs. O(ranges + columns).
  double Captured(std::span<const RelativeRange> ranges, std::span<const uint32_t> columns,
                  DenseFallback fallback) const;
  // Mass of the ranges alone, and what each key has outside of them.
  double Outside(std::span<const RelativeRange> ranges, std::vector<double>* outside) const;

 private:
  // Mass of some keys by the queries of a row tile.
  double Sum(size_t tile, TokenRange keys) const {
    return before_[tile][keys.hi] - before_[tile][keys.lo];
  }

  TokenRange prefill_;
  LineSums sums_;
  std::vector<double> columns_;
  std::vector<std::vector<double>> before_;  // [tiles][tokens + 1]: sums of mass
  double total_ = 0;
};

// Fills ranges, columns and captured: the best of each, those that are always in among them.
void ChooseLines(const LineScores& scores, const VerticalSlashPattern& pattern,
                 DenseFallback fallback, HeadPlan* plan);
// False: nothing within the budget has the mass.
bool ChooseLines(const LineScores& scores, const VerticalSlashMassPattern& pattern,
                 DenseFallback fallback, HeadPlan* plan);

}  // namespace quarry

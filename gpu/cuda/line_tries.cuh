// Columns and slashes by the last queries' sums: ChooseLines (gpu/sparse/choose_lines.cc) by a
// block of threads for each number of slashes, and which of these tries is kept. Sums are compared
// as floats and added up as whole units; else the choice is the host's.
#pragma once

#include "gpu/cuda/line_ranges.cuh"
#include "gpu/cuda/line_search.cuh"

namespace quarry::cuda {

// One try of a line. By number, columns do not depend on slashes, and two blocks choose them side
// by side.
class LineTrier {
 public:
  __device__ LineTrier(const ChooseLinesArgs& a, uint32_t line, uint32_t place, uint32_t threads,
                       LineShared* shared)
      : a_(a),
        threads_(threads),
        shared_(*shared),
        tokens_(a.tokens),
        words_((a.tokens + 31) / 32),
        line_(a.lines[line]),
        slashes_{a.sums + (size_t{line} * 3 + 2) * a.width} {
    const size_t most_ranges = a.tokens / (kRowTile + 1) + 2;
    const size_t at = size_t{line} * a.tries + place;
    const float* const sums = a.sums + size_t{line} * 3 * a.width;
    columns_ = {{sums, a.last_tiles[1].hi > a.last_tiles[1].lo ? sums + a.width : nullptr},
                {nullptr, nullptr}};
    result_ = a.results + at;
    bits_ = a.bits + at * kTryBits * words_;
    breaks_ = a.breaks + at * most_ranges;
    ranges_ = a.ranges + at * most_ranges;
    tiles_ = a.range_tiles + at * (most_ranges + 1);
  }

  // A try by mass, from the slashes on.
  __device__ void TryMass(uint32_t slashes) {
    LineTry result = {};
    result.ranges = ChooseSlashes(slashes);
    const Cost bare = CostOf(result.ranges, nullptr);
    result.dense_tiles = bare.dense_tiles;
    result.is_complete =
        static_cast<double>(bare.tiles) <= line_.most_share * static_cast<double>(bare.dense_tiles);
    if (result.is_complete != 0) {
      ColumnKeys keys = columns_;
      keys.inside[0] = Bits(kInside);
      keys.inside[1] = Bits(kInside + 1);
      MarkInside(result.ranges);
      ChooseColumns(keys, min(TilesFor(ColumnsForMass(keys)) * kKeyTile, tokens_), &result);
      Measure(&result);
    }
    if (threadIdx.x == 0) *result_ = result;
  }

  // By number, in three steps, the first two side by side.
  __device__ void ChooseSlashesByNumber() {
    const uint32_t ranges = ChooseSlashes(line_.slashes);
    MarkInside(ranges);
    if (threadIdx.x == 0) result_->ranges = ranges;
  }
  __device__ void ChooseColumnsByNumber() {
    LineTry result = {};
    ChooseColumns(columns_, min(line_.columns, tokens_), &result);
    if (threadIdx.x == 0) result_->columns = result.columns;
  }
  __device__ LineTry FinishByNumber() {
    LineTry result = {};
    result.ranges = result_->ranges;
    result.columns = result_->columns;
    result.is_complete = 1;
    Measure(&result);
    return result;
  }

 private:
  // Of the bits: slashes are done with when what is inside of the ranges is known, and working
  // memory of columns when they are chosen.
  static constexpr uint32_t kSlashes = 0, kInside = 0, kSlashWork = 1, kColumnWork = 2;
  static constexpr uint32_t kBefore = kTryBefore, kColumns = kTryColumns;
  struct Cost {
    uint64_t tiles, eighths, dense_tiles;
  };
  struct Masses {
    uint32_t in, all;  // units
  };

  __device__ uint32_t* Bits(uint32_t which) const { return bits_ + size_t{which} * words_; }
  __device__ bool HasTile(int tile) const { return columns_.sums[tile] != nullptr; }

  // How many ranges they make.
  __device__ uint32_t ChooseSlashes(uint32_t count) {
    SelectLargest(slashes_, tokens_, min(count, tokens_), threads_, &shared_, Bits(kSlashWork),
                  Bits(kSlashes));
    return RangeMaker(breaks_, ranges_, tiles_, threads_, shared_.folds)
        .Make(Bits(kSlashes), words_);
  }
  __device__ void ChooseColumns(const ColumnKeys& keys, uint32_t count, LineTry* result) {
    SelectLargest(keys, tokens_, count, threads_, &shared_, Bits(kColumnWork), Bits(kColumns));
    CountBefore();
    result->columns = count;
  }
  __device__ void Measure(LineTry* result) {
    const Cost cost = CostOf(result->ranges, Bits(kColumns));
    const Masses masses = MassOf(result->ranges, Bits(kColumns));
    result->tiles = cost.tiles;
    result->eighths = cost.eighths;
    result->dense_tiles = cost.dense_tiles;
    result->captured = masses.in;
    result->mass = masses.all;
  }

  // Which keys are in the ranges of the last queries' row tiles.
  __device__ void MarkInside(uint32_t ranges) {
    for (int tile = 0; tile < 2 && HasTile(tile); ++tile) {
      const TokenRange rows = a_.last_tiles[tile];
      for (uint32_t w = threadIdx.x; w < words_; w += threads_) {
        const uint32_t lo = w * 32, hi = max(lo, min(lo + 32, rows.hi));
        uint32_t bits = 0;
        uint32_t r =
            FirstRangeBehind(ranges_, 0, ranges, static_cast<int>(lo) - static_cast<int>(rows.lo));
        for (; r < ranges; ++r) {
          const TokenRange keys = ClipTo(ranges_[r], rows);
          if (max(keys.lo, lo) >= hi) break;
          const uint32_t from = max(keys.lo, lo) - lo, to = min(keys.hi, hi) - lo;
          if (from < to) bits |= (~0u >> (32 - (to - from))) << from;
        }
        Bits(kInside + static_cast<uint32_t>(tile))[w] = bits;
      }
    }
    __syncthreads();
  }

  // How many columns have, with the ranges, the asked share of all mass: those that are always in,
  // and as many of the best others as it takes or have any.
  __device__ uint32_t ColumnsForMass(const ColumnKeys& keys) {
    const Masses ranges = MassOf(0, nullptr);
    const uint32_t forced = min(kForcedColumns, tokens_);
    const uint32_t of_forced =
        Fold<Plus>(threadIdx.x < forced ? keys.Units(threadIdx.x) : 0u, threads_, shared_.folds)
            .all;
    const double wanted = line_.mass * static_cast<double>(ranges.all);
    const double left = wanted - static_cast<double>(ranges.in) - static_cast<double>(of_forced);
    if (left <= 0) return forced;
    // At most all mass: it fits.
    return forced +
           CountForMass(keys, tokens_, static_cast<uint32_t>(ceil(left)), threads_, &shared_);
  }

  // columns_before of the chosen columns.
  __device__ void CountBefore() {
    const uint32_t* const bits = Bits(kColumns);
    const Stretch mine = ShareOf(words_, threads_);
    uint32_t sum = 0;
    for (uint32_t w = mine.lo; w < mine.hi; ++w) sum += CountBits(bits[w]);
    uint32_t before = Fold<Plus>(sum, threads_, shared_.folds).before;
    for (uint32_t w = mine.lo; w < mine.hi; ++w) {
      Bits(kBefore)[w] = before;
      before += CountBits(bits[w]);
    }
    __syncthreads();
  }

  // Key tiles of a row tile, with the columns' if there are any.
  __device__ uint32_t TilesOfRows(uint32_t ranges_count, const uint32_t* columns,
                                  TokenRange rows) const {
    const HeadRanges ranges{ranges_, tiles_, ranges_count};
    const uint32_t of_ranges = RangeTilesOf(ranges, rows);
    if (columns == nullptr) return of_ranges;
    const uint32_t end = DiagonalOf(ranges, rows);  // a token
    const uint32_t seen =
        Bits(kBefore)[end / 32] + CountBits(columns[end / 32] & ((1u << end % 32) - 1));
    return of_ranges + TilesFor(seen);
  }

  __device__ Cost CostOf(uint32_t ranges, const uint32_t* columns) {
    Cost mine = {0, 0, 0};
    for (uint32_t lo = a_.prefill.lo + threadIdx.x * kRowTile; lo < a_.prefill.hi;
         lo += threads_ * kRowTile) {
      const TokenRange rows{lo, min(lo + kRowTile, a_.prefill.hi)};
      const uint32_t sparse = TilesOfRows(ranges, columns, rows), dense = TilesOfDense(rows);
      const bool cheaper = RunsSparse(sparse, dense);
      mine.tiles += cheaper ? sparse : dense;
      mine.eighths += cheaper ? kSparseTileEighths * sparse : 8 * uint64_t{dense};
      mine.dense_tiles += dense;
    }
    return {Fold<Plus>(mine.tiles, threads_, shared_.wide_folds).all,
            Fold<Plus>(mine.eighths, threads_, shared_.wide_folds).all,
            Fold<Plus>(mine.dense_tiles, threads_, shared_.wide_folds).all};
  }

  // The mass of ranges and of columns, if there are any.
  __device__ Masses MassOf(uint32_t ranges, const uint32_t* columns) {
    constexpr uint32_t kAtATime = 8;
    Masses mine = {0, 0};
    for (int tile = 0; tile < 2 && HasTile(tile); ++tile) {
      const float* const sums = columns_.sums[tile];
      const uint32_t* const inside = Bits(kInside + static_cast<uint32_t>(tile));
      const bool dense =
          columns != nullptr && !RunsSparse(TilesOfRows(ranges, columns, a_.last_tiles[tile]),
                                            TilesOfDense(a_.last_tiles[tile]));
      for (uint32_t at = threadIdx.x; at < tokens_; at += kAtATime * threads_) {
        float mass[kAtATime];
        uint32_t bits[kAtATime];
#pragma unroll
        for (uint32_t i = 0; i < kAtATime; ++i) {
          const uint32_t j = at + i * threads_;
          mass[i] = j < tokens_ ? sums[j] : 0;
          bits[i] = j < tokens_ ? inside[j / 32] | (columns != nullptr ? columns[j / 32] : 0) : 0;
        }
#pragma unroll
        for (uint32_t i = 0; i < kAtATime; ++i) {
          const uint32_t units = RoundToWhole(mass[i] * kMassUnits);
          mine.all += units;
          if (dense || (bits[i] >> (at + i * threads_) % 32 & 1) != 0) mine.in += units;
        }
      }
    }
    return {Fold<Plus>(mine.in, threads_, shared_.folds).all,
            Fold<Plus>(mine.all, threads_, shared_.folds).all};
  }

  const ChooseLinesArgs& a_;
  const uint32_t threads_;
  LineShared& shared_;
  const uint32_t tokens_, words_;
  const Line line_;
  const SlashKeys slashes_;
  ColumnKeys columns_;
  LineTry* result_;
  uint32_t* bits_;
  LineBreak* breaks_;
  RelativeRange* ranges_;
  uint32_t* tiles_;
};

// Grid: TryBlocks, lines.
__device__ inline void TryLines(const ChooseLinesArgs& a, uint32_t threads, LineShared* shared) {
  const Line line = a.lines[blockIdx.y];
  if (line.head == kNoHead) return;
  const bool by_mass = line.mass > 0;
  if (blockIdx.x >= (by_mass ? a.tries : 2)) return;
  LineTrier trier(a, blockIdx.y, by_mass ? blockIdx.x : 0, threads, shared);
  if (by_mass) {
    uint32_t slashes = kForcedSlashes;
    for (uint32_t i = 0; i < blockIdx.x; ++i) slashes += slashes / 2;
    trier.TryMass(slashes);
  } else if (blockIdx.x == 0) {
    trier.ChooseSlashesByNumber();
  } else {
    trier.ChooseColumnsByNumber();
  }
}

}  // namespace quarry::cuda

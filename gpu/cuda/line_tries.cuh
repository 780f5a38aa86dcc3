// Columns and slashes by the last queries' sums: ChooseLines (gpu/sparse/choose_lines.cc) by a
// block of threads for each number of slashes, and which of these tries is kept. Sums are compared
// as floats and added up as whole units; else the choice is the host's.
#pragma once

#include "gpu/cuda/block_ops.cuh"
#include "gpu/cuda/line_args.h"
#include "gpu/cuda/line_counts.cuh"

namespace quarry::cuda {

struct LineShared {
  union {
    SearchShared<32> search;
    // By mass: numbers and masses in fewer copies.
    struct {
      SearchShared<8> counts;
      uint32_t masses[256 * 8], mass_totals[256];
    } weighted;
  };
  uint32_t folds[32];
  uint64_t wide_folds[32];
};

// Distances by the mass that they have; those that are always in come first.
struct SlashKeys {
  const float* sums;
  __device__ uint32_t operator()(uint32_t s) const {
    return s < kForcedSlashes ? ~0u : BitsOf(sums[s]);
  }
};

// Keys by the mass that they have by the queries of those row tiles in whose ranges they are not.
struct ColumnKeys {
  const float* sums[2];       // by row tile; the second may be null
  const uint32_t* inside[2];  // bits; null: none is
  __device__ bool Outside(int tile, uint32_t j) const {
    return sums[tile] != nullptr &&
           (inside[tile] == nullptr || (inside[tile][j / 32] >> j % 32 & 1) == 0);
  }
  __device__ float Mass(int tile, uint32_t j) const { return Outside(tile, j) ? sums[tile][j] : 0; }
  __device__ uint32_t Units(uint32_t j) const {
    return RoundToWhole(Mass(0, j) * kMassUnits) + RoundToWhole(Mass(1, j) * kMassUnits);
  }
  __device__ uint32_t operator()(uint32_t j) const {
    return j < kForcedColumns ? ~0u : BitsOf(Mass(0, j) + Mass(1, j));
  }
};

// One try of one line. Grid: tries, lines.
class LineTrier {
 public:
  __device__ LineTrier(const ChooseLinesArgs& a, uint32_t threads, LineShared* shared)
      : a_(a),
        threads_(threads),
        shared_(*shared),
        tokens_(a.tokens),
        words_((a.tokens + 31) / 32),
        line_(a.lines[blockIdx.y]) {
    const size_t place = size_t{blockIdx.y} * gridDim.x + blockIdx.x;
    const size_t most_ranges = a.tokens / (kRowTile + 1) + 2;
    const float* const sums = a.sums + size_t{blockIdx.y} * 3 * a.width;
    columns_ = {{sums, a.last_tiles[1].hi > a.last_tiles[1].lo ? sums + a.width : nullptr},
                {nullptr, nullptr}};
    slashes_ = {sums + size_t{2} * a.width};
    result_ = a.results + place;
    bits_ = a.bits + place * 4 * words_;
    breaks_ = a.breaks + place * most_ranges;
    ranges_ = a.ranges + place * most_ranges;
    tiles_ = a.range_tiles + place * (most_ranges + 1);
  }

  __device__ void Run() {
    const bool by_mass = line_.mass > 0;
    if (line_.head == kNoHead || (!by_mass && blockIdx.x > 0)) return;
    uint32_t slashes = line_.slashes;
    if (by_mass) {
      slashes = kForcedSlashes;
      for (uint32_t i = 0; i < blockIdx.x; ++i) slashes += slashes / 2;
    }
    Select(slashes_, min(slashes, tokens_), Bits(kSlashes));
    MakeRanges();
    LineTry result = {};
    result.ranges = ranges_count_;
    const Cost bare = CostOf(nullptr);
    result.dense_tiles = bare.dense_tiles;
    result.is_complete = !by_mass || static_cast<double>(bare.tiles) <=
                                         line_.most_share * static_cast<double>(bare.dense_tiles);
    if (result.is_complete != 0) Complete(by_mass, &result);
    if (threadIdx.x == 0) *result_ = result;
  }

 private:
  // Of the bits: slashes are done with when what is inside of the ranges is known, working memory
  // when columns are.
  static constexpr uint32_t kSlashes = 0, kInside = 0, kWork = 2, kBefore = 2, kColumns = 3;
  struct Cost {
    uint64_t tiles, eighths, dense_tiles;
  };
  struct Masses {
    uint32_t in, all;  // units
  };

  __device__ uint32_t* Bits(uint32_t which) const { return bits_ + size_t{which} * words_; }
  __device__ HeadRanges Ranges() const { return {ranges_, tiles_, ranges_count_}; }
  __device__ bool HasTile(int tile) const { return columns_.sums[tile] != nullptr; }

  __device__ void Complete(bool by_mass, LineTry* result) {
    MarkInside();
    uint32_t columns = min(line_.columns, tokens_);
    ColumnKeys keys = columns_;
    if (by_mass) {
      keys.inside[0] = Bits(kInside);
      keys.inside[1] = Bits(kInside + 1);
      columns = min(TilesFor(ColumnsForMass(keys)) * kKeyTile, tokens_);
    }
    Select(keys, columns, Bits(kColumns));
    CountBefore();
    const Cost cost = CostOf(Bits(kColumns));
    const Masses masses = Captured();
    result->columns = columns;
    result->tiles = cost.tiles;
    result->eighths = cost.eighths;
    result->captured = masses.in;
    result->mass = masses.all;
  }

  // The bits of the `count` best keys.
  template <typename Keys>
  __device__ void Select(const Keys& keys, uint32_t count, uint32_t* bits) {
    const Threshold chosen = FindLargest(keys, tokens_, count, threads_, &shared_.search);
    uint32_t* const equals = Bits(kWork);
    constexpr uint32_t kAtATime = 4;
    const uint32_t lane = threadIdx.x % 32, warps = threads_ / 32;
    for (uint32_t word = threadIdx.x / 32; word < words_; word += kAtATime * warps) {
      uint32_t key[kAtATime];
#pragma unroll
      for (uint32_t i = 0; i < kAtATime; ++i) {
        const uint32_t at = (word + i * warps) * 32 + lane;
        key[i] = at < tokens_ ? keys(at) : 0;
      }
#pragma unroll
      for (uint32_t i = 0; i < kAtATime; ++i) {
        const bool exists = (word + i * warps) * 32 + lane < tokens_;
        const uint32_t above = Ballot(exists && key[i] > chosen.least);
        const uint32_t equal = Ballot(exists && key[i] == chosen.least);
        if (lane != 0 || word + i * warps >= words_) continue;
        bits[word + i * warps] = above;
        equals[word + i * warps] = equal;
      }
    }
    __syncthreads();
    const Stretch mine = ShareOf(words_, threads_);
    uint32_t sum = 0;
    for (uint32_t w = mine.lo; w < mine.hi; ++w) sum += CountBits(equals[w]);
    uint32_t rank = Fold<Plus>(sum, threads_, shared_.folds).before;
    for (uint32_t w = mine.lo; w < mine.hi && rank < chosen.ties; ++w) {
      uint32_t equal = equals[w];
      for (; equal != 0 && rank < chosen.ties; ++rank) {
        bits[w] |= 1u << FirstBit(equal);
        equal &= equal - 1;
      }
    }
    __syncthreads();
  }

  // RangesOfSlashes: two slashes are of one range if what lies between them fits the key tiles that
  // the range has anyway; how many that is depends on where the range began.
  __device__ void MakeRanges() {
    FindBreaks();
    // A gap that nothing fills ends a range whatever came before; so what is behind each can be
    // followed by a thread of its own.
    for (uint32_t i = threadIdx.x; i < breaks_count_; i += threads_) {
      if (!AlwaysBreaks(i)) continue;
      uint32_t start = breaks_[i].start;
      for (uint32_t next = i + 1; next < breaks_count_ && !AlwaysBreaks(next); ++next) {
        const LineBreak at = breaks_[next];
        if (at.start - start > kRowTile + Whole(at.before - start)) {
          start = at.start;
        } else {
          breaks_[next].before = kNoBreak;
        }
      }
    }
    __syncthreads();
    // Those that are left: each has the start of its range and the end of the one before.
    uint32_t left = 0;
    for (uint32_t first = 0; first < breaks_count_; first += threads_) {
      const uint32_t i = first + threadIdx.x;
      LineBreak mine = {kNoBreak, 0};
      if (i < breaks_count_) mine = breaks_[i];
      const bool breaks = mine.before != kNoBreak;
      const Folded<uint32_t> place = Fold<Plus>(breaks ? 1u : 0u, threads_, shared_.folds);
      if (breaks) {
        const uint32_t at = left + place.before;
        breaks_[at].start = mine.start;
        if (at > 0) breaks_[at - 1].before = mine.before;  // from here on the range's own end
      }
      left += place.all;
    }
    if (threadIdx.x == 0) breaks_[left - 1].before = last_slash_;
    __syncthreads();
    ranges_count_ = left;
    uint32_t before = 0;
    for (uint32_t first = 0; first < left; first += threads_) {
      const uint32_t i = first + threadIdx.x;
      uint32_t tiles = 0;
      if (i < left) {
        const LineBreak of = breaks_[left - 1 - i];
        const uint32_t whole = Whole(of.before - of.start);
        tiles = (kRowTile + whole) / kKeyTile;
        ranges_[i] = {-static_cast<int32_t>(of.start + whole),
                      static_cast<int32_t>(kRowTile) - static_cast<int32_t>(of.start)};
      }
      const Folded<uint32_t> sum = Fold<Plus>(tiles, threads_, shared_.folds);
      if (i < left) tiles_[i] = before + sum.before;
      before += sum.all;
    }
    if (threadIdx.x == 0) tiles_[left] = before;
    __syncthreads();
  }

  static constexpr uint32_t kNoBreak = ~0u;
  static __device__ uint32_t Whole(uint32_t keys) { return TilesFor(keys) * kKeyTile; }
  __device__ bool AlwaysBreaks(uint32_t i) const {
    const LineBreak at = breaks_[i];
    return i == 0 || (at.before != kNoBreak && at.start - at.before >= kRowTile + kKeyTile);
  }

  // Chosen slashes, distance 0 among them, that are more than a row tile behind the one before; and
  // first distance 0 itself.
  __device__ void FindBreaks() {
    const uint32_t* const bits = Bits(kSlashes);
    const auto word = [bits](uint32_t w) { return w == 0 ? bits[w] | 1 : bits[w]; };
    const Stretch mine = ShareOf(words_, threads_);
    // One more than the last slash; 0 if there is none.
    uint32_t last = 0;
    for (uint32_t w = mine.lo; w < mine.hi; ++w) {
      if (word(w) != 0) last = w * 32 + LastBit(word(w)) + 1;
    }
    const Folded<uint32_t> lasts = Fold<Larger>(last, threads_, shared_.folds);
    last_slash_ = lasts.all - 1;
    uint32_t count = 0, place = 0;
    for (int pass = 0; pass < 2; ++pass) {
      uint32_t before = lasts.before;
      for (uint32_t w = mine.lo; w < mine.hi; ++w) {
        if (word(w) == 0) continue;
        const uint32_t start = w * 32 + FirstBit(word(w));
        if (before == 0 || start - (before - 1) > kRowTile) {
          if (pass == 0) {
            ++count;
          } else {
            breaks_[place++] = {before == 0 ? 0 : before - 1, start};
          }
        }
        before = w * 32 + LastBit(word(w)) + 1;
      }
      if (pass == 0) {
        const Folded<uint32_t> places = Fold<Plus>(count, threads_, shared_.folds);
        place = places.before;
        breaks_count_ = places.all;
      }
    }
    __syncthreads();
  }

  // Which keys are in the ranges of the last queries' row tiles.
  __device__ void MarkInside() {
    for (int tile = 0; tile < 2 && HasTile(tile); ++tile) {
      const TokenRange rows = a_.last_tiles[tile];
      for (uint32_t w = threadIdx.x; w < words_; w += threads_) {
        const uint32_t lo = w * 32, hi = max(lo, min(lo + 32, rows.hi));
        uint32_t bits = 0;
        uint32_t r = FirstRangeBehind(ranges_, 0, ranges_count_,
                                      static_cast<int>(lo) - static_cast<int>(rows.lo));
        for (; r < ranges_count_; ++r) {
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
    const Masses ranges = MassOf(nullptr);
    const uint32_t forced = min(kForcedColumns, tokens_);
    const uint32_t of_forced =
        Fold<Plus>(threadIdx.x < forced ? keys.Units(threadIdx.x) : 0u, threads_, shared_.folds)
            .all;
    const double wanted = line_.mass * static_cast<double>(ranges.all);
    const double left = wanted - static_cast<double>(ranges.in) - static_cast<double>(of_forced);
    if (left <= 0) return forced;
    // At most all mass: it fits.
    return forced + CountForMass(keys, static_cast<uint32_t>(ceil(left)));
  }

  __device__ uint32_t CountForMass(const ColumnKeys& keys, uint32_t wanted) {
    using Shared = SearchShared<8>;
    auto& shared = shared_.weighted;
    uint32_t prefix = 0, known = 0, count = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
      __syncthreads();
      ClearBins<Shared>(threads_, shared.counts.counts);
      ClearBins<Shared>(threads_, shared.masses);
      __syncthreads();
      ForKeys(keys, kForcedColumns, tokens_, threads_, [&](uint32_t j, uint32_t key) {
        // Keys without mass are worth no column.
        if (key == 0 || (key & known) != prefix) return;
        AddShared(BinOf<Shared>(shared.counts.counts, key >> shift & 255), 1);
        AddShared(BinOf<Shared>(shared.masses, key >> shift & 255), keys.Units(j));
      });
      __syncthreads();
      JoinCopies<Shared>(threads_, shared.counts.counts, shared.counts.totals);
      JoinCopies<Shared>(threads_, shared.masses, shared.mass_totals);
      __syncthreads();
      if (threadIdx.x < 32) FindBin<Shared>(shared.mass_totals, wanted, shared.counts.found);
      __syncthreads();
      const uint32_t bin = shared.counts.found[0];
      // Only of all keys together there may be too little.
      const uint32_t from = bin == Shared::kBins ? 0 : bin + 1;
      const uint32_t above = threadIdx.x < 32 ? CountFrom(shared.counts.totals, from) : 0;
      count += Fold<Plus>(above, threads_, shared_.folds).all;
      if (bin == Shared::kBins) return count;
      wanted -= shared.counts.found[1];
      prefix |= bin << shift;
      known |= 255u << shift;
      if (shift == 0) {
        // Equal but for how they were rounded to units.
        const uint32_t equals = shared.counts.totals[bin];
        const uint32_t each = max(1u, shared.mass_totals[bin] / equals);
        return count + min(equals, (wanted + each - 1) / each);
      }
    }
    return count;
  }
  // The lane's part of the sum of totals[from..].
  static __device__ uint32_t CountFrom(const uint32_t* totals, uint32_t from) {
    uint32_t sum = 0;
    for (uint32_t bin = from + threadIdx.x; bin < 256; bin += 32) sum += totals[bin];
    return sum;
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
  __device__ uint32_t TilesOfRows(const uint32_t* columns, TokenRange rows) const {
    const uint32_t of_ranges = RangeTilesOf(Ranges(), rows);
    if (columns == nullptr) return of_ranges;
    const uint32_t end = DiagonalOf(Ranges(), rows);  // a token
    const uint32_t seen =
        Bits(kBefore)[end / 32] + CountBits(columns[end / 32] & ((1u << end % 32) - 1));
    return of_ranges + TilesFor(seen);
  }

  __device__ Cost CostOf(const uint32_t* columns) {
    Cost mine = {0, 0, 0};
    for (uint32_t lo = a_.prefill.lo + threadIdx.x * kRowTile; lo < a_.prefill.hi;
         lo += threads_ * kRowTile) {
      const TokenRange rows{lo, min(lo + kRowTile, a_.prefill.hi)};
      const uint32_t sparse = TilesOfRows(columns, rows), dense = TilesOfDense(rows);
      const bool cheaper = RunsSparse(sparse, dense);
      mine.tiles += cheaper ? sparse : dense;
      mine.eighths += cheaper ? kSparseTileEighths * sparse : 8 * uint64_t{dense};
      mine.dense_tiles += dense;
    }
    return {Fold<Plus>(mine.tiles, threads_, shared_.wide_folds).all,
            Fold<Plus>(mine.eighths, threads_, shared_.wide_folds).all,
            Fold<Plus>(mine.dense_tiles, threads_, shared_.wide_folds).all};
  }

  // The mass of ranges and columns, if there are any.
  __device__ Masses MassOf(const uint32_t* columns) {
    constexpr uint32_t kAtATime = 8;
    Masses mine = {0, 0};
    for (int tile = 0; tile < 2 && HasTile(tile); ++tile) {
      const float* const sums = columns_.sums[tile];
      const uint32_t* const inside = Bits(kInside + static_cast<uint32_t>(tile));
      const bool dense =
          columns != nullptr &&
          !RunsSparse(TilesOfRows(columns, a_.last_tiles[tile]), TilesOfDense(a_.last_tiles[tile]));
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
  __device__ Masses Captured() { return MassOf(Bits(kColumns)); }

  const ChooseLinesArgs& a_;
  const uint32_t threads_;
  LineShared& shared_;
  const uint32_t tokens_, words_;
  const Line line_;
  ColumnKeys columns_;
  SlashKeys slashes_;
  LineTry* result_;
  uint32_t* bits_;
  LineBreak* breaks_;
  RelativeRange* ranges_;
  uint32_t* tiles_;
  uint32_t breaks_count_ = 0, ranges_count_ = 0, last_slash_ = 0;
};

// Keeps the best try of each line: that with the fewest tiles of those that have the asked mass
// within the share, and only if it costs less than dense attention. Grid: lines.
__device__ inline void KeepLines(const KeepLinesArgs& a, uint32_t threads) {
  const ChooseLinesArgs& tried = a.tried;
  const Line line = tried.lines[blockIdx.x];
  LineTry kept = {};
  uint32_t best = 0;
  const bool by_mass = line.mass > 0;
  uint64_t fewest = ~uint64_t{0};
  for (uint32_t i = 0; line.head != kNoHead && i < (by_mass ? tried.tries : 1); ++i) {
    const LineTry at = tried.results[size_t{blockIdx.x} * tried.tries + i];
    if (at.is_complete == 0) break;  // more slashes cost more
    const bool enough =
        !by_mass ||
        (static_cast<double>(at.captured) >= line.mass * static_cast<double>(at.mass) &&
         static_cast<double>(at.tiles) <= line.most_share * static_cast<double>(at.dense_tiles));
    if (!enough || at.tiles >= fewest) continue;
    kept = at;
    best = i;
    fewest = at.tiles;
  }
  if (kept.eighths + a.choosing_eighths >= 8 * kept.dense_tiles) kept = {};
  if (threadIdx.x == 0) a.kept.results[blockIdx.x] = kept;
  if (kept.is_complete == 0) return;
  const size_t words = (tried.tokens + 31) / 32, most = tried.tokens / (kRowTile + 1) + 2;
  const size_t from = size_t{blockIdx.x} * tried.tries + best, to = blockIdx.x;
  for (uint32_t i = threadIdx.x; i < kept.ranges; i += threads) {
    a.kept.ranges[to * most + i] = tried.ranges[from * most + i];
  }
  for (uint32_t i = threadIdx.x; i <= kept.ranges; i += threads) {
    a.kept.range_tiles[to * (most + 1) + i] = tried.range_tiles[from * (most + 1) + i];
  }
  for (uint32_t i = threadIdx.x; i < words; i += threads) {
    a.kept.columns[to * words + i] = tried.bits[(from * 4 + 3) * words + i];
    a.kept.columns_before[to * words + i] = tried.bits[(from * 4 + 2) * words + i];
  }
}

// What was kept, to a plan's lists. Grid: lines.
__device__ inline void EmitLines(const EmitLinesArgs& a, uint32_t threads) {
  const LineTry kept = a.kept.results[blockIdx.x];
  if (kept.is_complete == 0) return;
  const uint32_t head = a.lines[blockIdx.x].head;
  const size_t words = (a.tokens + 31) / 32, most = a.tokens / (kRowTile + 1) + 2;
  const size_t line = blockIdx.x;
  RelativeRange* const ranges = a.plan.ranges + a.plan.range_first[head];
  uint32_t* const tiles = a.plan.range_tiles + a.plan.range_first[head] + head;
  uint32_t* const columns = a.plan.columns + a.plan.column_first[head];
  for (uint32_t i = threadIdx.x; i < kept.ranges; i += threads)
    ranges[i] = a.kept.ranges[line * most + i];
  for (uint32_t i = threadIdx.x; i <= kept.ranges; i += threads) {
    tiles[i] = a.kept.range_tiles[line * (most + 1) + i];
  }
  for (uint32_t w = threadIdx.x; w < words; w += threads) {
    uint32_t place = a.kept.columns_before[line * words + w];
    for (uint32_t bits = a.kept.columns[line * words + w]; bits != 0; bits &= bits - 1) {
      columns[place++] = w * 32 + FirstBit(bits);
    }
  }
}

}  // namespace quarry::cuda

// How a part of a search looks for what queries attend: supers, leaves, tokens.
#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "cpu_index/cluster_part.h"
#include "cpu_index/simd.h"
#include "proto/check.h"
#include "proto/half.h"

namespace quarry {
namespace {

using Depth = ClusterLimits::Depth;

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kLeast = std::numeric_limits<float>::lowest();

// Memory that no part uses now.
class ScratchPool {
 public:
  std::unique_ptr<ClusterScratch> Take() {
    absl::MutexLock lock(&mutex_);
    if (free_.empty()) return std::make_unique<ClusterScratch>();
    std::unique_ptr<ClusterScratch> scratch = std::move(free_.back());  // the last used
    free_.pop_back();
    return scratch;
  }
  void Return(std::unique_ptr<ClusterScratch> scratch) {
    if (scratch->token_score.bytes() + scratch->row_score.bytes() > kMostKept) return;
    absl::MutexLock lock(&mutex_);
    if (free_.size() < kMostFree) free_.push_back(std::move(scratch));
  }
  static ScratchPool& Get() {
    static ScratchPool* const pool = new ScratchPool;
    return *pool;
  }

 private:
  // What a search of usual size needs is kept; the rest is made anew, beside the work of filling
  // it.
  static constexpr size_t kMostFree = 256, kMostKept = 8 << 20;
  absl::Mutex mutex_;
  std::vector<std::unique_ptr<ClusterScratch>> free_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

ClusterPart::ClusterPart(std::span<const ClusterRun> runs, const ClusterQueries& queries)
    : runs_(runs),
      q_(queries),
      model_(queries.model),
      count_(queries.count()),
      scratch_(ScratchPool::Get().Take()),
      s_(*scratch_),
      found_(count_),
      exact_(count_),
      estimated_(count_) {
  for (const ClusterRun& run : runs) {
    QUARRY_CHECK(run.index->model().get() == &model_ && run.index->Fits(*run.view));
    first_super_.push_back(supers_);
    supers_ += run.index->parts().supers.blocks() * NodeLevel::kBlockNodes;
    bool whole = true;
    for (const TokenRange& range : run.ranges) {
      whole &= range.lo <= run.view->tokens().lo && range.hi >= run.view->tokens().hi;
    }
    whole_.push_back(whole);
  }
  first_super_.push_back(supers_);
}

ClusterPart::~ClusterPart() { ScratchPool::Get().Return(std::move(scratch_)); }

float ClusterPart::LogSum(std::span<const float> x) {
  float* const copy = s_.copy.Take(x.size());
  std::copy(x.begin(), x.end(), copy);
  const float largest = Kernels().max(copy, x.size());
  if (largest == kNone) return kNone;
  return largest + std::log(Kernels().exp_sum(copy, x.size(), largest));
}

float ClusterPart::SuperMass(uint32_t query) {
  float mass = kNone;
  for (size_t r = 0; r < runs_.size(); ++r) {
    const uint32_t lo = first_super_[r], n = first_super_[r + 1] - lo;
    if (whole_[r]) mass = LogAdd(mass, LogSum(SuperScores(query).subspan(lo, n)));
  }
  return kLogSuper + mass;
}

// scores: of the leaves of opened supers.
float ClusterPart::LeafMass(std::span<const float> scores) {
  float mass = kNone;
  ForOpenedSupers([&](size_t r, size_t lo, size_t n) {
    if (!whole_[r]) return;
    mass = LogAdd(mass, LogSum(scores.subspan(lo * kLeavesPerSuper, n * kLeavesPerSuper)));
  });
  return kLogLeaf + mass;
}

void ClusterPart::ScoreSupers() {
  float* const score = s_.super_score.Take(size_t{count_} * supers_);
  if (q_.every_code) {  // none stays closed
    std::fill_n(score, size_t{count_} * supers_, kNone);
    for (ClusterFindings& found : found_) found.mass = kNone;
    return;
  }
  for (size_t r = 0; r < runs_.size(); ++r) {
    const NodeLevel& level = runs_[r].index->parts().supers;
    level.Score(q_.node, q_.super_breadth, nullptr, level.blocks(), score + first_super_[r],
                supers_);
    bytes_ += size_t{level.blocks()} * NodeLevel::kBlockNodes * NodeLevel::kNodeBytes;
    CountLast(level, kSuperRows, first_super_[r], score, supers_);
  }
  for (uint32_t i = 0; i < count_; ++i) {
    found_[i].mass = SuperMass(i);
    found_[i].weights = ScoreHistogram::Of(SuperScores(i));
  }
}

// A level's last node may have fewer tokens: it scores as a full one of the same mass. `at`: of the
// level's first node.
void ClusterPart::CountLast(const NodeLevel& level, uint32_t rows, size_t at, float* score,
                              size_t ld) const {
  const uint32_t last = level.nodes() - 1, tokens = level.count(last);
  if (tokens == rows) return;
  const float less = std::log(static_cast<float>(tokens) / static_cast<float>(rows));
  for (uint32_t i = 0; i < count_; ++i) score[i * ld + at + last] += less;
}

// A query that sees a part of a run has to know its tokens one by one.
void ClusterPart::OpenSupers(std::span<const float> floors) {
  const std::vector<float> any(count_, kLeast);
  uint32_t* const opened = s_.opened_supers.Take(supers_ + kLeafRows);
  size_t n = 0;
  for (size_t r = 0; r < runs_.size() && q_.limits.depth != Depth::kSupers; ++r) {
    const uint32_t lo = first_super_[r], size = first_super_[r + 1] - lo;
    if (q_.every_code) {  // whatever their scores
      for (uint32_t s = 0; s < runs_[r].index->parts().supers.nodes(); ++s) opened[n++] = lo + s;
      continue;
    }
    const size_t found = Kernels().select(s_.super_score.data() + lo, supers_, count_, size,
                                          whole_[r] ? floors.data() : any.data(), opened + n);
    for (size_t j = n; j < n + found; ++j) opened[j] += lo;
    n += found;
  }
  s_.opened_supers.Shrink(n);
}

void ClusterPart::ScoreLeaves(std::span<const float> super_floors) {
  OpenSupers(super_floors);
  const size_t row = leaf_row();
  float* const score = s_.leaf_score.Take(count_ * row);
  float* const centre = q_.every_code ? s_.leaf_centre.Take(count_ * row) : nullptr;
  ForOpenedSupers([&](size_t r, size_t lo, size_t n) {
    const NodeLevel& level = runs_[r].index->parts().leaves;
    const uint32_t* const which = LocalSupers(r, lo, n);
    level.Score(q_.node, q_.leaf_breadth, which, static_cast<uint32_t>(n),
                score + lo * kLeavesPerSuper, row,
                q_.every_code ? centre + lo * kLeavesPerSuper : nullptr);
    bytes_ += n * kLeavesPerSuper * NodeLevel::kNodeBytes;
    if (s_.opened_supers[lo + n - 1] - first_super_[r] + 1 != (level.nodes() + 15) / 16) return;
    // The last of the run's leaves is there.
    const uint32_t last = level.nodes() - 1;
    const size_t at = (lo + n - 1) * kLeavesPerSuper;
    CountLast(level, kLeafRows, at - last / kLeavesPerSuper * kLeavesPerSuper, score, row);
  });
  for (uint32_t i = 0; i < count_; ++i) {
    float* const supers = s_.super_score.data() + size_t{i} * supers_;
    for (uint32_t n : s_.opened_supers.all()) supers[n] = kNone;
    found_[i].mass = LogAdd(SuperMass(i), LeafMass(LeafScores(i)));
    found_[i].weights = ScoreHistogram::Of(LeafScores(i));
    if (!q_.every_code) continue;
    found_[i].centre_mass = LeafMass(LeafCentres(i));
    found_[i].centres = ScoreHistogram::Of(LeafCentres(i));
  }
}

void ClusterPart::ScoreTokens(const TokenFloors& floors) {
  s_.known.Take(0);
  if (q_.every_code) {
    FindOutliers(floors.outlier);
    FindUncoded(floors.known);
  }
  OpenLeaves(floors.leaf);
  CloseOpened();
  ScoreCodes();
  FindCoarse();
  ScoreKnown();
  if (q_.every_code) RankTokens(floors);
  WeighGroups();
  ScoreDoubts();
  for (uint32_t i = 0; i < count_; ++i) found_[i].weights = ScoreHistogram::Of(TokenScores(i));
}

// The numbers within their run of n opened supers from the lo-th on.
const uint32_t* ClusterPart::LocalSupers(size_t run, size_t lo, size_t n) {
  uint32_t* const which = s_.local.Take(n);
  for (size_t j = 0; j < n; ++j) which[j] = s_.opened_supers[lo + j] - first_super_[run];
  return which;
}

// Of heads whose groups hide tokens: leaves with a token that may stand out, by its code and what
// that may miss. All supers are opened.
void ClusterPart::FindOutliers(const std::vector<float>& floors) {
  std::vector<float> offset = q_.code.offset;
  for (uint32_t i = 0; i < count_; ++i) offset[i] += q_.code_miss[i];
  const size_t row = leaf_row();
  uint32_t* const found = s_.outliers.Take(row + kLeafRows);
  size_t count = 0;
  ForOpenedSupers([&](size_t r, size_t lo, size_t) {
    const ClusterIndex::Parts& p = runs_[r].index->parts();
    kernels::CodedKeyTile tile = CodeTile(p, nullptr, p.leaves.nodes());
    tile.offset = offset.data();
    tile.centre = s_.leaf_centre.data() + lo * kLeavesPerSuper;
    tile.ld_centre = row;
    const uint32_t some = Kernels().find_codes(tile, floors.data(), found + count);
    for (size_t j = count; j < count + some; ++j) {
      found[j] += static_cast<uint32_t>(lo * kLeavesPerSuper);
    }
    count += some;
    bytes_ += p.codes.code_bytes() + 2 * p.scale.size();
  });
  s_.outliers.Shrink(count);
}

// The scores of uncoded tokens, whose leaves are opened if they stand out: beside `floors`, and
// beside one another.
void ClusterPart::FindUncoded(std::vector<float> floors) {
  size_t most = 0, n = 0;
  for (const ClusterRun& run : runs_) most += run.index->parts().uncoded.places().size();
  uint32_t* const known = s_.known.Take(most);
  float* const known_score = s_.known_score.Take(most * count_);
  std::vector<float> top(count_, kNone);
  ForOpenedSupers([&](size_t r, size_t lo, size_t) {
    const ClusterIndex::Parts& p = runs_[r].index->parts();
    const std::span<const uint32_t> places = p.uncoded.places();
    float* const score = s_.uncoded_score.Take(count_ * places.size());
    p.uncoded.Score(q_.block, score);
    bytes_ += p.uncoded.bytes();
    for (size_t j = 0; j < places.size(); ++j, ++n) {
      known[n] = static_cast<uint32_t>(lo * kSuperRows) + places[j];
      // The order is looked at only where it matters: each place is a line of its own.
      const uint32_t token = whole_[r] ? 0 : runs_[r].view->tokens().lo + p.order[places[j]];
      for (uint32_t i = 0; i < count_; ++i) {
        const TokenRange range = runs_[r].ranges[i];
        const bool seen = whole_[r] || (token >= range.lo && token < range.hi);
        // In this order what is no number has none.
        const float own = seen ? std::max(kNone, score[i * places.size() + j]) : kNone;
        known_score[n * count_ + i] = own;
        top[i] = std::max(top[i], own);
      }
    }
  });
  for (uint32_t i = 0; i < count_; ++i) {
    floors[i] = std::max(floors[i], top[i] + std::log(q_.tolerance * kOutlierShare));
  }
  std::vector<uint32_t> leaves;
  for (size_t k = 0; k < n; ++k) {
    const float* const own = known_score + k * count_;
    bool stands_out = false;
    for (uint32_t i = 0; i < count_; ++i) stands_out |= own[i] >= floors[i];
    if (stands_out) leaves.push_back(known[k] / kLeafRows);
  }
  leaves.erase(std::unique(leaves.begin(), leaves.end()), leaves.end());
  const std::span<const uint32_t> found = s_.outliers.all();
  std::vector<uint32_t> all;
  std::set_union(found.begin(), found.end(), leaves.begin(), leaves.end(),
                 std::back_inserter(all));
  std::copy(all.begin(), all.end(), s_.outliers.Take(all.size()));
}

kernels::CodedKeyTile ClusterPart::CodeTile(const ClusterIndex::Parts& p, const uint32_t* which,
                                            uint32_t blocks) const {
  kernels::CodedKeyTile tile{};
  tile.codes = p.codes.data();
  tile.key_scale = p.scale.data();
  tile.which = which;
  tile.blocks = blocks;
  tile.weights = q_.code.weight.data();
  tile.scale = q_.code.scale.data();
  tile.offset = q_.code.offset.data();
  tile.queries = count_;
  return tile;
}

void ClusterPart::OpenLeaves(const std::vector<float>& floors) {
  const size_t row = leaf_row();
  uint32_t* const opened = s_.opened.Take(row + kLeafRows);
  const std::vector<float> any(count_, kLeast);
  size_t n = 0;
  ForOpenedSupers([&](size_t r, size_t lo, size_t supers) {
    const size_t from = lo * kLeavesPerSuper;
    const size_t found = Kernels().select(s_.leaf_score.data() + from, row, count_,
                                          supers * kLeavesPerSuper,
                                          whole_[r] ? floors.data() : any.data(), opened + n);
    for (size_t j = n; j < n + found; ++j) opened[j] += static_cast<uint32_t>(from);
    n += found;
  });
  s_.opened.Shrink(n);
  if (!q_.every_code) return;
  std::vector<uint32_t> both(n + s_.outliers.size());
  both.resize(std::set_union(opened, opened + n, s_.outliers.data(),
                             s_.outliers.data() + s_.outliers.size(), both.begin()) -
              both.begin());
  std::copy(both.begin(), both.end(), s_.opened.Take(both.size()));
}

// Takes opened leaves out of the leaves' scores, and keeps their centres' scores.
void ClusterPart::CloseOpened() {
  const size_t row = leaf_row(), n = s_.opened.size();
  float* const centre = s_.centre.Take(count_ * n);
  uint32_t* const leaf = s_.opened_leaf.Take(n);
  s_.run_ends.Take(runs_.size());
  std::fill_n(s_.run_ends.data(), runs_.size(), 0u);
  for (size_t j = 0; j < n; ++j) {
    const uint32_t entry = s_.opened[j];
    leaf[j] = s_.opened_supers[entry / kLeavesPerSuper] * kLeavesPerSuper + entry % kLeavesPerSuper;
  }
  size_t j = 0;
  for (size_t r = 0; r < runs_.size(); ++r) {
    const NodeLevel& level = runs_[r].index->parts().leaves;
    const uint32_t first = first_super_[r] * kLeavesPerSuper;
    for (; j < n && leaf[j] < first_super_[r + 1] * kLeavesPerSuper; ++j) {
      leaf[j] -= first;
      const uint32_t tokens = level.count(leaf[j]);
      const float less =
          tokens == kLeafRows ? 0 : std::log(static_cast<float>(tokens) / float{kLeafRows});
      for (uint32_t i = 0; i < count_; ++i) {
        float& score = s_.leaf_score[i * row + s_.opened[j]];
        centre[i * n + j] = score - less - level.Lift(leaf[j], q_.leaf_breadth[i]) +
                            0.5f * q_.code_variance[i];
        score = kNone;
      }
    }
    s_.run_ends[r] = static_cast<uint32_t>(j);
  }
}

void ClusterPart::ScoreCodes() {
  const size_t n = s_.opened.size(), row = n * kLeafRows;
  float* const score = s_.token_score.Take(count_ * row);
  ForOpenedLeaves([&](size_t r, size_t lo, size_t leaves) {
    kernels::CodedKeyTile tile = CodeTile(runs_[r].index->parts(), s_.opened_leaf.data() + lo,
                                          static_cast<uint32_t>(leaves));
    tile.centre = s_.centre.data() + lo;
    tile.ld_centre = n;
    tile.out = score + lo * kLeafRows;
    tile.ld_out = row;
    Kernels().score_codes(tile);
    Mask(r, lo, leaves);
  });
  if (!q_.every_code) bytes_ += row * (KeyCodes::kBytes + sizeof(uint16_t));
}

// Codes miss a token's score in proportion to its scale, and so weights by codes are too small the
// more, the larger it is: those of usual tokens were made larger with their leaf's centre.
void ClusterPart::FindCoarse() {
  const size_t row = token_row();
  float* const scales = s_.token_scale.Take(row);
  ForOpenedLeaves([&](size_t r, size_t lo, size_t leaves) {
    const std::vector<uint16_t>& scale = runs_[r].index->parts().scale;
    for (size_t j = lo; j < lo + leaves; ++j) {
      const uint16_t* const of_leaf = scale.data() + size_t{s_.opened_leaf[j]} * kLeafRows;
      for (uint32_t t = 0; t < kLeafRows; ++t) scales[j * kLeafRows + t] = Bf16ToFloat(of_leaf[t]);
    }
  });
  uint32_t* const coarse = s_.coarse.Take(row + kLeafRows);
  const size_t n = Kernels().select(scales, row, 1, row, &kLeastCoarse, coarse);
  s_.coarse.Shrink(n);
  uint32_t* const step = s_.coarse_step.Take(n);
  for (size_t c = 0; c < n; ++c) {
    step[c] = static_cast<uint32_t>(
        std::min((scales[coarse[c]] - 1) * kStepsPerScale + 0.5f, kScaleSteps - 0.5f));
  }
  for (uint32_t i = 0; i < count_; ++i) {
    float* const score = OwnTokenScores(i);
    for (size_t c = 0; c < n; ++c) score[coarse[c]] += q_.coarse[i].spread[step[c]];
  }
}

// Makes the scores of coarse tokens larger by how much more than their weights they count in
// errors.
void ClusterPart::ScoreDoubts() {
  for (uint32_t i = 0; i < count_; ++i) {
    float* const score = OwnTokenScores(i);
    for (size_t c = 0; c < s_.coarse.size(); ++c) {
      score[s_.coarse[c]] += q_.coarse[i].unrest[s_.coarse_step[c]];
    }
  }
}

void ClusterPart::ScoreKnown() {
  const std::span<const uint32_t> opened = s_.opened.all();
  size_t kept = 0, leaf = 0;
  for (size_t k = 0; k < s_.known.size(); ++k) {
    const uint32_t place = s_.known[k];
    while (leaf < opened.size() && opened[leaf] < place / kLeafRows) ++leaf;
    if (leaf == opened.size()) break;
    if (opened[leaf] != place / kLeafRows) continue;  // it weighs in its leaf
    const uint32_t entry = static_cast<uint32_t>(leaf) * kLeafRows + place % kLeafRows;
    for (uint32_t i = 0; i < count_; ++i) {
      const float own = s_.known_score[k * count_ + i];
      OwnTokenScores(i)[entry] = s_.known_score[kept * count_ + i] = own;
    }
    s_.known[kept++] = entry;
  }
  s_.known.Shrink(kept);
}

// Takes out places behind a run's last token, and tokens that a query must not see.
void ClusterPart::Mask(size_t run, size_t lo, size_t leaves) {
  const ClusterIndex& index = *runs_[run].index;
  const size_t row = s_.opened.size() * kLeafRows;
  const uint32_t first = runs_[run].view->tokens().lo;
  for (size_t j = lo; j < lo + leaves; ++j) {
    const uint32_t place = s_.opened_leaf[j] * kLeafRows;
    if (whole_[run] && place + kLeafRows <= index.tokens()) continue;
    for (uint32_t t = 0; t < kLeafRows; ++t) {
      const bool there = place + t < index.tokens();
      const uint32_t token = there ? first + index.parts().order[place + t] : 0;
      for (uint32_t i = 0; i < count_; ++i) {
        const TokenRange range = runs_[run].ranges[i];
        if (there && token >= range.lo && token < range.hi) continue;
        s_.token_score[i * row + j * kLeafRows + t] = kNone;
      }
    }
  }
}

}  // namespace quarry

// How clustered indexes look for what queries attend: supers, leaves, tokens.
#include "cpu_index/cluster_search.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu_index/cluster_attend.h"
#include "cpu_index/error_cut.h"
#include "cpu_index/simd.h"
#include "proto/check.h"
#include "proto/half.h"

namespace quarry {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kAll = std::numeric_limits<float>::infinity();
constexpr float kLeast = std::numeric_limits<float>::lowest();

// Of the tolerated error: what supers, and leaves, that stay closed may make of it.
constexpr float kSuperShare = 0.3f, kLeafShare = 0.4f;
// A token whose weight is this share of the tolerated error stands out: its leaf is opened.
constexpr float kOutlierShare = 1.0f / 32;
// About so many tokens with the highest scores by their codes are scored by their rows for each
// query, where every code is read: a needle's score may be far too low, but hardly any other's is
// higher. Of 1,700 tokens with 2% of a query's mass or more, whose codes missed 3 nats of their
// scores or more, 9 in 10 were among the best 30 to 250. On pairs of needles in 131,072 tokens errors
// (mean, 95th percentile) at a tolerance of 0.02 are 0.025, 0.117 with 256, 0.018, 0.031 with 512,
// 0.017, 0.027 with 1024 and 0.009, 0.024 with 2048, whose rows take twice the time. Found by
// one bit for each of 48, 64 or 128 coordinates the best 1024 have 95th percentiles of 0.449, 0.085
// and 0.117.
constexpr uint32_t kRankedTokens = 1024;

float LogAdd(float a, float b) {
  const float most = std::max(a, b);
  return most == kNone ? kNone : most + std::log(std::exp(a - most) + std::exp(b - most));
}

}  // namespace

float ClusterSearch::LogSum(std::span<const float> x) {
  float* const copy = s_.copy.Take(x.size());
  std::copy(x.begin(), x.end(), copy);
  const float largest = Kernels().max(copy, x.size());
  if (largest == kNone) return kNone;
  return largest + std::log(Kernels().exp_sum(copy, x.size(), largest));
}

ClusterSearch::ClusterSearch(std::span<const ClusterRun> runs, const QueryBlock& queries,
                             const ClusterLimits& limits, ClusterScratch* scratch)
    : runs_(runs),
      queries_(queries),
      limits_(limits),
      model_(*runs.front().index->model()),
      count_(queries.queries),
      s_(*scratch) {
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
  MakeReady();
}

void ClusterSearch::MakeReady() {
  const uint32_t d = queries_.head_dim;
  coordinates_.resize(size_t{count_} * d);
  std::vector<float> mean_score(count_);
  kernels::ScoreTile tile{};
  tile.q = queries_.q;
  tile.queries = count_;
  tile.head_dim = d;
  tile.scale = queries_.scale;
  tile.dtype = kernels::kBf16;
  tile.k = model_.query_map.data();
  tile.tokens = d;
  tile.out = coordinates_.data();
  tile.ld_out = d;
  Kernels().score(tile);
  tile.dtype = kernels::kFp32;
  tile.k = model_.basis.mean.data();
  tile.tokens = 1;
  tile.out = mean_score.data();
  tile.ld_out = 1;
  Kernels().score(tile);
  node_ = NodeLevel::Prepare(coordinates_, d, model_.rank(), mean_score, model_.centre_step);
  const KeyCodes codes = KeyCodes::Encode(std::span<const float>(), model_.CodeBasis());
  for (uint32_t i = 0; i < count_; ++i) {
    const KeyCodes::Query code = codes.Prepare(Coordinates(i).first(model_.rank()), 0);
    code_.weight.insert(code_.weight.end(), code.weight, code.weight + KeyCodes::kCoordinates);
    code_.scale.push_back(code.scale);
    code_.offset.push_back(code.offset);
  }
  leaf_breadth_ = model_.Breadth(model_.leaf, coordinates_, count_);
  super_breadth_ = model_.Breadth(model_.super, coordinates_, count_);
  code_variance_ = model_.CodeVariance(coordinates_, count_);
  for (uint32_t i = 0; i < count_; ++i) {
    unrest_.push_back(model_.UnrestOf(code_variance_[i], leaf_breadth_[i], super_breadth_[i]));
  }
  mass_.resize(count_);
  closed_.resize(count_);
  bytes_ += model_.query_bytes();
}

std::span<const float> ClusterSearch::Coordinates(uint32_t query) const {
  return std::span(coordinates_).subspan(size_t{query} * queries_.head_dim, queries_.head_dim);
}

// In the units of the tokens' weights.
float ClusterSearch::Elsewhere(uint32_t query) const {
  return limits_.other_length.empty() ? kNone
                                      : limits_.other_length[query] - model_.log_length;
}

void ClusterSearch::Look() {
  ScoreSupers();
  const Depth depth = limits_.depth;
  if (depth == Depth::kSupers) {
    s_.opened_supers.Take(0);
    s_.opened.Take(0);
  } else {
    OpenSupers();
    ScoreLeaves();
    OpenLeaves();
  }
  CloseOpened();
  ScoreTokens();
}

// What a query's groups weigh, of the runs that are seen whole: a part of another may be the lesser
// one, and what is hidden must not make other errors matter less.
float ClusterSearch::SuperMass(uint32_t query) {
  float mass = kNone;
  for (size_t r = 0; r < runs_.size(); ++r) {
    const uint32_t lo = first_super_[r], n = first_super_[r + 1] - lo;
    if (whole_[r]) mass = LogAdd(mass, LogSum(SuperScores(query).subspan(lo, n)));
  }
  return kLogSuper + mass;
}

// scores: of the leaves of opened supers.
float ClusterSearch::LeafMass(std::span<const float> scores) {
  float mass = kNone;
  ForOpenedSupers([&](size_t r, size_t lo, size_t n) {
    if (!whole_[r]) return;
    mass = LogAdd(mass, LogSum(scores.subspan(lo * kLeavesPerSuper, n * kLeavesPerSuper)));
  });
  return kLogLeaf + mass;
}

void ClusterSearch::ScoreSupers() {
  float* const score = s_.super_score.Take(size_t{count_} * supers_);
  for (size_t r = 0; r < runs_.size(); ++r) {
    const NodeLevel& level = runs_[r].index->parts().supers;
    level.Score(node_, super_breadth_, nullptr, level.blocks(), score + first_super_[r], supers_);
    bytes_ += size_t{level.blocks()} * NodeLevel::kBlockNodes * NodeLevel::kNodeBytes;
    CountLast(level, kSuperRows, first_super_[r], score, supers_);
  }
  for (uint32_t i = 0; i < count_; ++i) {
    mass_[i] = LogAdd(SuperMass(i), Elsewhere(i));
  }
}

// A level's last node may have fewer tokens: it scores as a full one of the same mass. `at`: of the
// level's first node.
void ClusterSearch::CountLast(const NodeLevel& level, uint32_t rows, size_t at, float* score,
                              size_t ld) const {
  const uint32_t last = level.nodes() - 1, tokens = level.count(last);
  if (tokens == rows) return;
  const float less = std::log(static_cast<float>(tokens) / static_cast<float>(rows));
  for (uint32_t i = 0; i < count_; ++i) score[i * ld + at + last] += less;
}

bool ClusterSearch::Everything() const {
  const Depth depth = limits_.depth;
  return depth == Depth::kAsNeeded ? limits_.tolerance <= 0 : depth >= Depth::kCodes;
}

// A query that sees a part of a run has to know its tokens one by one.
void ClusterSearch::OpenSupers() {
  std::vector<float> least(count_, kLeast);
  const bool groups = limits_.depth == Depth::kAsNeeded && !Everything() && !model_.open_all;
  for (uint32_t i = 0; i < count_ && groups; ++i) {
    const float allowed =
        mass_[i] - kLogSuper +
        std::log(kSuperShare * limits_.tolerance / (model_.super_doubt * unrest_[i].super));
    least[i] = std::max(kLeast, OpenFrom(SuperScores(i), allowed));
  }
  uint32_t* const opened = s_.opened_supers.Take(supers_ + kLeafRows);
  size_t n = 0;
  for (size_t r = 0; r < runs_.size(); ++r) {
    const uint32_t lo = first_super_[r], size = first_super_[r + 1] - lo;
    if (model_.open_all && limits_.depth == Depth::kAsNeeded) {  // whatever their scores
      for (uint32_t s = 0; s < runs_[r].index->parts().supers.nodes(); ++s) opened[n++] = lo + s;
      continue;
    }
    const std::vector<float> any(count_, kLeast);
    const size_t found = Kernels().select(s_.super_score.data() + lo, supers_, count_, size,
                                          whole_[r] ? least.data() : any.data(), opened + n);
    for (size_t j = n; j < n + found; ++j) opened[j] += lo;
    n += found;
  }
  s_.opened_supers.Shrink(n);
}

void ClusterSearch::ScoreLeaves() {
  const size_t row = leaf_row();
  float* const score = s_.leaf_score.Take(count_ * row);
  const bool outliers = model_.open_all && limits_.depth == Depth::kAsNeeded;
  float* const centre = outliers ? s_.leaf_centre.Take(count_ * row) : nullptr;
  ForOpenedSupers([&](size_t r, size_t lo, size_t n) {
    const NodeLevel& level = runs_[r].index->parts().leaves;
    const uint32_t* const which = LocalSupers(r, lo, n);
    level.Score(node_, leaf_breadth_, which, static_cast<uint32_t>(n),
                score + lo * kLeavesPerSuper, row,
                outliers ? centre + lo * kLeavesPerSuper : nullptr);
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
    mass_[i] = LogAdd(LogAdd(SuperMass(i), LeafMass(LeafScores(i))), Elsewhere(i));
  }
  if (outliers) FindOutliers();
}

// The numbers within their run of n opened supers from the lo-th on.
const uint32_t* ClusterSearch::LocalSupers(size_t run, size_t lo, size_t n) {
  uint32_t* const which = s_.local.Take(n);
  for (size_t j = 0; j < n; ++j) which[j] = s_.opened_supers[lo + j] - first_super_[run];
  return which;
}

// Of heads whose groups hide tokens: leaves with a token that stands out by its code. All supers are
// opened.
void ClusterSearch::FindOutliers() {
  const size_t row = leaf_row();
  std::vector<float> least(count_);
  ranked_from_ = BestByCodes(kRankedTokens);
  for (uint32_t i = 0; i < count_; ++i) {
    // A lower bound of the mass: estimates from spread are least true of such heads.
    const float mass = LogAdd(LeafMass(LeafCentres(i)), Elsewhere(i));
    least[i] = std::min(mass + std::log(limits_.tolerance * kOutlierShare), ranked_from_[i]);
  }
  uint32_t* const found = s_.outliers.Take(row + kLeafRows);
  size_t count = 0;
  ForOpenedSupers([&](size_t r, size_t lo, size_t) {
    const ClusterIndex::Parts& p = runs_[r].index->parts();
    kernels::CodedKeyTile tile = CodeTile(p, nullptr, p.leaves.nodes());
    tile.centre = s_.leaf_centre.data() + lo * kLeavesPerSuper;
    tile.ld_centre = row;
    const uint32_t some = Kernels().find_codes(tile, least.data(), found + count);
    for (size_t j = count; j < count + some; ++j) {
      found[j] += static_cast<uint32_t>(lo * kLeavesPerSuper);
    }
    count += some;
    bytes_ += p.codes.code_bytes() + 2 * p.scale.size();
  });
  s_.outliers.Shrink(count);
}

kernels::CodedKeyTile ClusterSearch::CodeTile(const ClusterIndex::Parts& p, const uint32_t* which,
                                              uint32_t blocks) const {
  kernels::CodedKeyTile tile{};
  tile.codes = p.codes.data();
  tile.key_scale = p.scale.data();
  tile.which = which;
  tile.blocks = blocks;
  tile.weights = code_.weight.data();
  tile.scale = code_.scale.data();
  tile.offset = code_.offset.data();
  tile.queries = count_;
  return tile;
}

// [queries] about the score that `count` of all tokens have at least by their codes, if those of a
// leaf lie around its centre as in a normal distribution.
std::vector<float> ClusterSearch::BestByCodes(uint32_t count) {
  constexpr uint32_t kBins = kernels::kHistogramBins, kPerNat = 8, kReach = 96;  // bins
  const size_t row = leaf_row();
  std::vector<float> out;
  for (uint32_t i = 0; i < count_; ++i) {
    const float* const centre = LeafCentres(i).data();
    const float top = Kernels().max(centre, row);
    uint32_t leaves[kBins] = {};
    Kernels().histogram(centre, row, top, kPerNat, leaves);
    const float of_codes = model_.leaf.variance * leaf_breadth_[i] - code_variance_[i];
    const float deviation = kPerNat * std::sqrt(std::max(of_codes, 0.0f)) + 0.5f;
    // Of a leaf's tokens those that lie so many bins below its centre's; past kReach none.
    float spread[2 * kReach + 1];
    const auto reach = static_cast<uint32_t>(std::min(float{kReach}, 4 * deviation));
    for (uint32_t b = 0; b <= 2 * reach; ++b) {
      const float x = (static_cast<float>(b) - static_cast<float>(reach)) / deviation;
      spread[b] = 0.3989f * kLeafRows / deviation * std::exp(-0.5f * x * x);
    }
    float tokens[kBins + 2 * kReach] = {}, above = 0;  // from `reach` bins above the top
    uint32_t b = 0;
    for (; b + 1 < kBins && above < static_cast<float>(count); ++b) {
      for (uint32_t j = 0; j <= 2 * reach; ++j) {
        tokens[b + j] += static_cast<float>(leaves[b]) * spread[j];
      }
      above += tokens[b];  // the bins below are not complete yet
    }
    out.push_back(b + 1 < kBins && top != kNone
                      ? top + (static_cast<float>(reach) - static_cast<float>(b)) / kPerNat
                      : kLeast);
  }
  return out;
}

void ClusterSearch::OpenLeaves() {
  const size_t row = leaf_row();
  uint32_t* const opened = s_.opened.Take(row + kLeafRows);
  std::vector<float> least(count_, Everything() ? kLeast : kAll);
  const bool needed = limits_.depth == Depth::kAsNeeded && !Everything();
  for (uint32_t i = 0; i < count_ && needed; ++i) {
    const float allowed =
        mass_[i] - kLogLeaf +
        std::log(kLeafShare * limits_.tolerance / (model_.leaf_doubt * unrest_[i].leaf));
    least[i] = std::max(kLeast, OpenFrom(LeafScores(i), allowed));
  }
  const std::vector<float> any(count_, kLeast);
  size_t n = 0;
  ForOpenedSupers([&](size_t r, size_t lo, size_t supers) {
    const size_t from = lo * kLeavesPerSuper;
    const size_t found = Kernels().select(s_.leaf_score.data() + from, row, count_,
                                          supers * kLeavesPerSuper,
                                          whole_[r] ? least.data() : any.data(), opened + n);
    for (size_t j = n; j < n + found; ++j) opened[j] += static_cast<uint32_t>(from);
    n += found;
  });
  s_.opened.Shrink(n);
  if (ranked_from_.empty() || !needed) return;
  std::vector<uint32_t> both(n + s_.outliers.size());
  both.resize(std::set_union(opened, opened + n, s_.outliers.data(),
                             s_.outliers.data() + s_.outliers.size(), both.begin()) -
              both.begin());
  std::copy(both.begin(), both.end(), s_.opened.Take(both.size()));
}

// Takes opened leaves out of the leaves' scores, keeps their centres' scores, and adds up what closed
// groups may err by.
void ClusterSearch::CloseOpened() {
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
        centre[i * n + j] = score - less - level.Lift(leaf[j], leaf_breadth_[i]) +
                            0.5f * code_variance_[i];
        score = kNone;
      }
    }
    s_.run_ends[r] = static_cast<uint32_t>(j);
  }
}

void ClusterSearch::ScoreTokens() {
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
  if (ranked_from_.empty()) bytes_ += row * (KeyCodes::kBytes + sizeof(uint16_t));
}

// Takes out places behind a run's last token, and tokens that a query must not see.
void ClusterSearch::Mask(size_t run, size_t lo, size_t leaves) {
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

void SearchClusters(std::span<const ClusterRun> runs, const QueryBlock& queries,
                    const ClusterLimits& limits, std::span<Partial> acc,
                    std::vector<uint32_t>* refined) {
  if (runs.empty() || queries.queries == 0) return;
  static thread_local ClusterScratch scratch;
  ClusterSearch search(runs, queries, limits, &scratch);
  search.Look();
  search.Attend(acc, refined);
}

}  // namespace quarry

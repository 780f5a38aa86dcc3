// How a clustered index looks for what a query attends: supers, leaves, tokens.
#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "cpu_index/cluster_search.h"
#include "cpu_index/simd.h"
#include "proto/check.h"
#include "proto/half.h"

namespace quarry {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

// Of the tolerated error: what supers, and leaves, that stay closed may make of it.
constexpr float kSuperShare = 0.3f, kLeafShare = 0.4f;
// A token whose weight is this share of the tolerated error stands out: its leaf is opened.
constexpr float kOutlierShare = 1.0f / 32;
// About so many tokens with the highest scores by their codes are scored by their rows for each
// query, where every code is read: a needle's score may be far too low, but hardly any other's is
// higher. Of 1,700 tokens with 2% of a query's mass or more, whose codes missed 3 nats of their
// scores or more, 9 in 10 were among the best 30 to 250.
constexpr uint32_t kRankedTokens = 512;

// The least weight (a log, of a whole node) that has to be opened, so that those below it sum up to
// at most e^allowed. A histogram of quarters of a nat: no exponentials, no sort.
float OpenFrom(std::span<const float> weights, float allowed) {
  constexpr int kBins = 96;
  constexpr float kLowest = 16, kPerNat = 4;
  std::array<uint32_t, kBins> count{};
  for (float weight : weights) {
    // In this order what is no number comes to be 0.
    const float at = std::min((weight - allowed + kLowest) * kPerNat, float{kBins - 1});
    ++count[static_cast<int>(std::max(0.0f, at))];
  }
  double sum = 0;
  for (int bin = 0; bin < kBins; ++bin) {
    const float low = static_cast<float>(bin) / kPerNat - kLowest;
    sum += count[bin] * std::exp(low + 0.5f / kPerNat);
    if (sum > 1) return bin == 0 ? kNone : allowed + low;
  }
  return std::numeric_limits<float>::infinity();
}

}  // namespace

float LogSum(std::span<float> x) {
  const float largest = Kernels().max(x.data(), x.size());
  if (largest == kNone) return kNone;
  return largest + std::log(Kernels().exp_sum(x.data(), x.size(), largest));
}

float LogAdd(float a, float b) {
  const float most = std::max(a, b);
  return most == kNone ? kNone : most + std::log(std::exp(a - most) + std::exp(b - most));
}

float ClusterIndex::Inside::Breadth(std::span<const float> y) const {
  float sum = 0, length = 0;
  for (size_t a = 0; a < y.size(); ++a) {
    float row = 0;
    for (size_t b = 0; b < y.size(); ++b) row += covariance[a * KeyCodes::kCoordinates + b] * y[b];
    sum += row * y[a];
    length += y[a] * y[a];
  }
  sum += lost_variance * length / static_cast<float>(y.size());
  return std::max(sum, 1e-6f * variance) / std::max(variance, 1e-12f);
}

float ClusterIndex::CodeVariance(std::span<const float> y) const {
  float sum = 0, length = 0;
  for (size_t c = 0; c < y.size(); ++c) {
    sum += code_error_[c] * y[c] * y[c];
    length += y[c] * y[c];
  }
  sum += inside_leaf_.lost_variance * length / static_cast<float>(y.size());
  return std::min(sum, 2.0f);
}

ClusterIndex::Unrest ClusterIndex::UnrestOf(std::span<const float> y) const {
  // A weight e^x, with x normal of this variance, and a value that has an error of its own.
  constexpr float kOwn = 0.7f, kMost = 3;
  const auto unrest = [=](float variance) {
    return std::sqrt(std::exp(std::min(variance, kMost)) - 1 + kOwn);
  };
  return {unrest(CodeVariance(y)), unrest(inside_leaf_.variance * inside_leaf_.Breadth(y)),
          unrest(inside_super_.variance * inside_super_.Breadth(y))};
}

void ClusterIndex::ScoreSupers(const QueryBlock& queries, Search* s) const {
  const QueryBasis::Coordinates at = p_.basis.EncodeQueries(queries);
  for (uint32_t i = 0; i < queries.queries; ++i) {
    const std::span<const float> y = at.Row(i).first(p_.codes.basis().rank);
    s->code.push_back(p_.codes.Prepare(y, 0.0f));  // of differences from a centre
    s->leaf.push_back(p_.leaves.Prepare(y, at.mean_score[i]));
    s->super.push_back(p_.supers.Prepare(y, at.mean_score[i]));
    s->leaf_breadth.push_back(inside_leaf_.Breadth(y));
    s->super_breadth.push_back(inside_super_.Breadth(y));
    s->code_variance.push_back(CodeVariance(y));
    s->unrest.push_back(UnrestOf(y));
  }
  s->own_mass.resize(queries.queries);
  s->mass.resize(queries.queries);
  const NodeLevel& supers = p_.supers;
  const size_t row = size_t{supers.blocks()} * NodeLevel::kBlockNodes;
  s->super_score.resize(queries.queries * row);
  supers.Score(s->super, nullptr, supers.blocks(), s->super_score);
  s->bytes += row * (NodeLevel::kCentreBytes + sizeof(float));
  std::vector<float> weight(supers.nodes());
  for (uint32_t i = 0; i < queries.queries; ++i) {
    // From padded rows to rows of the supers there are.
    const float* const from = s->super_score.data() + i * row;
    float* const score = s->super_score.data() + size_t{i} * supers.nodes();
    for (uint32_t n = 0; n < supers.nodes(); ++n) {
      score[n] = supers.Lifted(n, from[n], s->super_breadth[i]);
      weight[n] = score[n] + supers.log_count(n);
    }
    s->SetMass(i, LogSum(weight), log_length_);
  }
}

void ClusterIndex::OpenSupers(float tolerance, std::span<const uint32_t> outliers,
                              Search* s) const {
  const uint32_t supers = p_.supers.nodes();
  std::vector<uint8_t> open(supers, tolerance <= 0 ? 1 : 0);
  for (uint32_t leaf : outliers) open[leaf / kLeavesPerSuper] = 1;
  std::vector<float> weight(supers);
  for (uint32_t i = 0; i < s->queries.queries && tolerance > 0; ++i) {
    for (uint32_t n = 0; n < supers; ++n) {
      weight[n] = s->super_score[size_t{i} * supers + n] + p_.supers.log_count(n);
    }
    const float from =
        OpenFrom(weight, s->mass[i] + std::log(kSuperShare * tolerance / (super_doubt_ * s->unrest[i].super)));
    for (uint32_t n = 0; n < supers; ++n) open[n] |= weight[n] >= from ? 1 : 0;
  }
  for (uint32_t n = 0; n < supers; ++n) (open[n] ? s->opened_supers : s->closed_supers).push_back(n);
}

// The leaf at a place of the opened supers' rows; may lie behind the last leaf.
uint32_t ClusterIndex::LeafAt(const Search& s, size_t at) {
  return s.opened_supers[at / kLeavesPerSuper] * kLeavesPerSuper +
         static_cast<uint32_t>(at % kLeavesPerSuper);
}

void ClusterIndex::ScoreLeaves(Search* s) const {
  const NodeLevel& leaves = p_.leaves;
  const size_t row = s->leaf_row();
  s->leaf_score.resize(s->queries.queries * row);
  leaves.Score(s->leaf, s->opened_supers.data(), static_cast<uint32_t>(s->opened_supers.size()),
               s->leaf_score);
  s->bytes += row * (NodeLevel::kCentreBytes + sizeof(float));
  std::vector<float> weight;
  for (uint32_t i = 0; i < s->queries.queries; ++i) {
    weight.resize(row);
    float* const score = s->leaf_score.data() + i * row;
    for (size_t at = 0; at < row; ++at) {
      const uint32_t leaf = LeafAt(*s, at);
      const bool is = leaf < leaves.nodes();
      score[at] = is ? leaves.Lifted(leaf, score[at], s->leaf_breadth[i]) : kNone;
      weight[at] = is ? score[at] + leaves.log_count(leaf) : kNone;
    }
    for (uint32_t n : s->closed_supers) {
      weight.push_back(s->super_score[size_t{i} * p_.supers.nodes() + n] + p_.supers.log_count(n));
    }
    s->SetMass(i, LogSum(weight), log_length_);
  }
}

void ClusterIndex::OpenLeaves(float tolerance, std::span<const uint32_t> outliers,
                              Search* s) const {
  const size_t row = s->leaf_row();
  s->opened_leaf.assign(row, tolerance <= 0 ? 1 : 0);
  std::vector<float> weight(row);
  const float log_count = std::log(static_cast<float>(kLeafRows));  // the last leaf may have fewer
  for (uint32_t i = 0; i < s->queries.queries && tolerance > 0; ++i) {
    for (size_t at = 0; at < row; ++at) weight[at] = s->leaf_score[i * row + at] + log_count;
    const float from =
        OpenFrom(weight, s->mass[i] + std::log(kLeafShare * tolerance / (leaf_doubt_ * s->unrest[i].leaf)));
    for (size_t at = 0; at < row; ++at) s->opened_leaf[at] |= weight[at] >= from ? 1 : 0;
  }
  for (size_t at = 0, next = 0; at < row; ++at) {
    const uint32_t leaf = LeafAt(*s, at);
    while (next < outliers.size() && outliers[next] < leaf) ++next;
    if (next < outliers.size() && outliers[next] == leaf) s->opened_leaf[at] = 1;
    if (leaf >= p_.leaves.nodes()) s->opened_leaf[at] = 0;
    if (s->opened_leaf[at] != 0) s->leaves.push_back(leaf);
  }
}

std::vector<uint32_t> ClusterIndex::FindOutliers(float tolerance, Search* s) const {
  if (!open_all_ || tolerance <= 0) return {};
  const uint32_t queries = s->queries.queries, leaves = p_.leaves.nodes();
  const size_t row = size_t{p_.leaves.blocks()} * NodeLevel::kBlockNodes;
  std::vector<float> centre(queries * row);
  p_.leaves.Score(s->leaf, nullptr, p_.leaves.blocks(), centre);
  s->bytes += row * NodeLevel::kCentreBytes + p_.codes.code_bytes();
  std::vector<int32_t> least(size_t{queries} * leaves);
  for (uint32_t i = 0; i < queries; ++i) {
    const std::span<const float> of_query = std::span(centre).subspan(i * row, leaves);
    // A lower bound of the mass: estimates from spread are least true of such heads.
    std::vector<float> weight(of_query.begin(), of_query.end());
    s->SetMass(i, LogSum(weight) + std::log(static_cast<float>(kLeafRows)), log_length_);
    const KeyCodes::Query& code = s->code[i];
    s->ranked_from.push_back(BestBy(of_query, code, kRankedTokens));
    const float from =
        std::min(s->mass[i] + std::log(tolerance * kOutlierShare), s->ranked_from[i]);
    for (uint32_t leaf = 0; leaf < leaves; ++leaf) {
      // Of the token whose code stands for most.
      const float above = (from - of_query[leaf]) / std::max(most_scale_[leaf], 1e-20f);
      const float sum = code.scale > 0 ? (above - code.offset) / code.scale : 1e9f;
      // In this order what is no number comes to be the least.
      least[size_t{i} * leaves + leaf] =
          static_cast<int32_t>(std::max(-1e9f, std::min(sum, 1e9f)));
    }
  }
  return p_.codes.FindBlocks(s->code, least);
}

// About the score that `count` of the run's tokens have at least by their codes, from a sample.
float ClusterIndex::BestBy(std::span<const float> centre, const KeyCodes::Query& code,
                           uint32_t count) const {
  constexpr uint32_t kSampledLeaves = 512;
  const auto leaves = static_cast<uint32_t>(centre.size());
  const uint32_t taken = std::min(leaves, kSampledLeaves);
  std::vector<uint32_t> which(taken);
  for (uint32_t l = 0; l < taken; ++l) {
    which[l] = static_cast<uint32_t>((uint64_t{2} * l + 1) * leaves / (2 * taken));
  }
  std::vector<int32_t> sums(size_t{taken} * kLeafRows);
  p_.codes.SumBlocks({&code, 1}, which, sums);
  std::vector<float> scores;
  for (size_t t = 0; t < sums.size(); ++t) {
    const uint32_t place = which[t / kLeafRows] * kLeafRows + static_cast<uint32_t>(t % kLeafRows);
    if (place >= tokens()) continue;
    const float above = code.scale * static_cast<float>(sums[t]) + code.offset;
    const float score = above * Bf16ToFloat(p_.scale[place]) + centre[which[t / kLeafRows]];
    scores.push_back(std::max(kNone, score));  // what is no number has no order
  }
  const auto rank = static_cast<size_t>(uint64_t{count} * scores.size() / tokens());
  if (rank >= scores.size()) return kNone;
  std::nth_element(scores.begin(), scores.begin() + static_cast<ptrdiff_t>(rank), scores.end(),
                   std::greater<>());
  return scores[rank];
}

void ClusterIndex::Score(const KvView& run, const QueryBlock& queries, CoarseScores* out) const {
  QUARRY_CHECK(Fits(run));
  // A query that sees a part of the run has to know its tokens one by one.
  Depth depth = queries.tolerance > 0 ? Depth::kAsNeeded : Depth::kTokens;
  for (const TokenRange& range : queries.ranges) {
    if (range.lo > run.tokens().lo || range.hi < run.tokens().hi) depth = Depth::kTokens;
  }
  Look(run, queries, depth, out);
}

// Scores beyond what floats hold become the largest, or none: budgets compare and subtract them.
void ClusterIndex::Bound(CoarseScores* out) {
  constexpr float kMost = 1e30f;
  for (float& score : out->score) score = std::min(std::max(kNone, score), kMost);
}

void ClusterIndex::Look(const KvView& run, const QueryBlock& queries, Depth depth,
                        CoarseScores* out) const {
  Search s{.queries = queries};
  ScoreSupers(queries, &s);
  const float tolerance = depth == Depth::kAsNeeded ? queries.tolerance : 0;
  if (depth == Depth::kSupers) {
    for (uint32_t n = 0; n < p_.supers.nodes(); ++n) s.closed_supers.push_back(n);
  } else {
    const std::vector<uint32_t> outliers = FindOutliers(tolerance, &s);
    OpenSupers(tolerance, outliers, &s);
    ScoreLeaves(&s);
    if (depth == Depth::kLeaves) {
      s.opened_leaf.assign(s.leaf_row(), 0);
    } else {
      OpenLeaves(tolerance, outliers, &s);
    }
  }
  out->Clear();
  out->tokens = run.tokens();
  out->bytes = s.bytes;
  ListNodes(s, out);
  Doubt(s, out);
  ScoreClosed(s, out);
  ScoreTokens(s, out);
  if (!s.ranked_from.empty()) Rank(run, s, out);
  MaskTokens(run, queries, out);
  Bound(out);
  for (uint32_t i = 0; i < queries.queries; ++i) {
    std::vector<float> weight(out->Row(i).begin(), out->Row(i).end());
    for (size_t stretch = kFullLeaves; stretch < kStretches; ++stretch) {
      const auto log_count = std::log(static_cast<float>(out->stretches[stretch].weight));
      for (uint32_t e = out->stretches[stretch - 1].end; e < out->stretches[stretch].end; ++e) {
        weight[e] += log_count;
      }
    }
    out->length.push_back(LogSum(weight) + log_length_);
  }
}

}  // namespace quarry

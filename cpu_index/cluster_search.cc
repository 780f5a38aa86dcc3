// How a clustered index looks for what a query attends: supers, leaves, tokens.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu_index/balanced_tree.h"
#include "cpu_index/cluster_index.h"
#include "cpu_index/simd.h"
#include "proto/half.h"

namespace quarry {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr uint32_t kLeavesPerSuper = kSuperRows / kLeafRows;
static_assert(kLeafRows == KeyCodes::kBlockKeys && kLeavesPerSuper == NodeLevel::kBlockNodes);

// Of the tolerated error: what supers, and leaves, that stay closed may make of it.
constexpr float kSuperShare = 0.3f, kLeafShare = 0.4f;
// A token whose weight is this share of the tolerated error stands out: its leaf is opened.
constexpr float kOutlierShare = 1.0f / 32;

// log of the sum of e^x.
float LogSum(std::span<const float> x) {
  const float largest = Kernels().max(x.data(), x.size());
  if (largest == kNone) return kNone;
  std::vector<float> copy(x.begin(), x.end());
  return largest + std::log(Kernels().exp_sum(copy.data(), copy.size(), largest));
}

// The least weight (a log, of a whole node) that has to be opened, so that those below it sum up to
// at most e^allowed. A histogram of quarters of a nat: no exponentials, no sort.
float OpenFrom(std::span<const float> weights, float allowed) {
  constexpr int kBins = 96;
  constexpr float kLowest = 16, kPerNat = 4;
  std::array<uint32_t, kBins> count{};
  for (float weight : weights) {
    const float at = std::clamp((weight - allowed + kLowest) * kPerNat, 0.0f, float{kBins - 1});
    ++count[static_cast<int>(at)];
  }
  double sum = 0;
  for (int bin = 0; bin < kBins; ++bin) {
    const float low = static_cast<float>(bin) / kPerNat - kLowest;
    sum += count[bin] * std::exp(low + 0.5f / kPerNat);
    if (sum > 1) return bin == 0 ? kNone : allowed + low;
  }
  return std::numeric_limits<float>::infinity();
}

std::vector<uint32_t> Marked(std::span<const uint8_t> marks) {
  std::vector<uint32_t> out;
  for (uint32_t i = 0; i < marks.size(); ++i) {
    if (marks[i] != 0) out.push_back(i);
  }
  return out;
}

}  // namespace

// What a search has found so far; all queries have the same nodes.
struct ClusterIndex::Search {
  std::vector<KeyCodes::Query> code;
  std::vector<NodeLevel::Query> leaf, super;  // [queries]
  // [queries] what NodeLevel calls breadth, and of a token's score around its code's.
  std::vector<float> leaf_breadth, super_breadth, code_variance;
  // [queries] log of the sum of the run's weights, estimated, and of what errors are measured by:
  // with that of the tokens elsewhere, as if their values were as long as this run's answers.
  std::vector<float> own_mass, mass;
  std::vector<uint32_t> opened_supers;  // rising
  std::vector<float> super_score;       // [queries][blocks of supers * 16], lifted
  std::vector<float> leaf_score;        // [queries][opened supers * 16], lifted
  std::vector<uint8_t> opened_leaf;     // [opened supers * 16]
  std::vector<uint32_t> leaves;         // opened, rising
  std::vector<float> token_score;       // [queries][leaves * 16], lifted
  uint32_t queries() const { return static_cast<uint32_t>(code.size()); }
  uint64_t bytes = 0;
};

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

void ClusterIndex::ScoreSupers(const QueryBlock& queries, Search* s) const {
  const QueryBasis::Coordinates at = basis_.EncodeQueries(queries);
  for (uint32_t i = 0; i < queries.queries; ++i) {
    s->code.push_back(codes_.Prepare(at.Row(i), 0.0f));  // of differences from a centre
    s->leaf.push_back(leaves_.Prepare(at.Row(i), at.mean_score[i]));
    s->super.push_back(supers_.Prepare(at.Row(i), at.mean_score[i]));
    s->leaf_breadth.push_back(inside_leaf_.Breadth(at.Row(i)));
    s->super_breadth.push_back(inside_super_.Breadth(at.Row(i)));
    s->code_variance.push_back(CodeVariance(at.Row(i)));
  }
  const size_t row = size_t{supers_.blocks()} * NodeLevel::kBlockNodes;
  s->super_score.resize(queries.queries * row);
  supers_.Score(s->super, nullptr, supers_.blocks(), s->super_score);
  s->bytes += supers_.blocks() * (kLeavesPerSuper * (NodeLevel::kCentreBytes + 4));
  std::vector<float> mass(supers_.nodes());
  for (uint32_t i = 0; i < queries.queries; ++i) {
    float* const score = s->super_score.data() + i * row;
    for (uint32_t n = 0; n < supers_.nodes(); ++n) {
      score[n] = supers_.Lifted(n, score[n], s->super_breadth[i]);
      mass[n] = score[n] + supers_.log_count(n);
    }
    s->own_mass.push_back(LogSum(mass));
    if (!queries.other_length.empty()) mass.push_back(queries.other_length[i] - log_length_);
    s->mass.push_back(LogSum(mass));
  }
}

void ClusterIndex::OpenSupers(float tolerance, std::span<const uint32_t> outliers,
                              Search* s) const {
  std::vector<uint8_t> open(supers_.nodes(), tolerance <= 0 ? 1 : 0);
  for (uint32_t leaf : outliers) open[leaf / kLeavesPerSuper] = 1;
  const size_t row = size_t{supers_.blocks()} * NodeLevel::kBlockNodes;
  std::vector<float> weight(supers_.nodes());
  for (uint32_t i = 0; i < s->queries() && tolerance > 0; ++i) {
    for (uint32_t n = 0; n < supers_.nodes(); ++n) {
      weight[n] = s->super_score[i * row + n] + supers_.log_count(n);
    }
    const float from =
        OpenFrom(weight, s->mass[i] + std::log(kSuperShare * tolerance / super_doubt_));
    for (uint32_t n = 0; n < supers_.nodes(); ++n) open[n] |= weight[n] >= from ? 1 : 0;
  }
  s->opened_supers = Marked(open);
}

// The leaf at a place of the opened supers' rows; may lie behind the last leaf.
uint32_t ClusterIndex::LeafAt(const Search& s, size_t at) {
  return s.opened_supers[at / kLeavesPerSuper] * kLeavesPerSuper +
         static_cast<uint32_t>(at % kLeavesPerSuper);
}

void ClusterIndex::OpenLeaves(const QueryBlock& queries, float tolerance,
                              std::span<const uint32_t> outliers, Search* s) const {
  const auto blocks = static_cast<uint32_t>(s->opened_supers.size());
  const size_t row = size_t{blocks} * kLeavesPerSuper;
  s->leaf_score.resize(s->queries() * row);
  leaves_.Score(s->leaf, s->opened_supers.data(), blocks, s->leaf_score);
  s->bytes += row * (NodeLevel::kCentreBytes + 4);
  s->opened_leaf.assign(row, tolerance <= 0 ? 1 : 0);
  std::vector<float> weight(row), closed;
  const size_t super_row = size_t{supers_.blocks()} * NodeLevel::kBlockNodes;
  for (uint32_t i = 0; i < s->queries(); ++i) {
    closed.clear();
    for (uint32_t n = 0, next = 0; n < supers_.nodes(); ++n) {
      if (next < blocks && s->opened_supers[next] == n) {
        ++next;
      } else {
        closed.push_back(s->super_score[i * super_row + n] + supers_.log_count(n));
      }
    }
    float* const score = s->leaf_score.data() + i * row;
    const float breadth = s->leaf_breadth[i];
    for (size_t at = 0; at < row; ++at) {
      const uint32_t leaf = LeafAt(*s, at);
      if (leaf >= leaves_.nodes()) {
        score[at] = weight[at] = kNone;
        continue;
      }
      score[at] = leaves_.Lifted(leaf, score[at], breadth);
      weight[at] = score[at] + leaves_.log_count(leaf);
    }
    closed.push_back(LogSum(weight));
    s->own_mass[i] = LogSum(closed);
    s->mass[i] = s->own_mass[i];
    if (!queries.other_length.empty()) {
      s->mass[i] = LogSum(std::array{s->mass[i], queries.other_length[i] - log_length_});
    }
    if (tolerance <= 0) continue;
    const float from =
        OpenFrom(weight, s->mass[i] + std::log(kLeafShare * tolerance / leaf_doubt_));
    for (size_t at = 0; at < row; ++at) s->opened_leaf[at] |= weight[at] >= from ? 1 : 0;
  }
  for (size_t at = 0, next = 0; at < row; ++at) {
    const uint32_t leaf = LeafAt(*s, at);
    while (next < outliers.size() && outliers[next] < leaf) ++next;
    if (next < outliers.size() && outliers[next] == leaf) s->opened_leaf[at] = 1;
    if (leaf >= leaves_.nodes()) s->opened_leaf[at] = 0;
    if (s->opened_leaf[at] != 0) s->leaves.push_back(leaf);
  }
}

std::vector<uint32_t> ClusterIndex::FindOutliers(const QueryBlock& queries, float tolerance,
                                                 Search* s) const {
  if (!open_all_ || tolerance <= 0) return {};
  const uint32_t blocks = leaves_.blocks();
  const size_t row = size_t{blocks} * NodeLevel::kBlockNodes;
  std::vector<float> score(s->queries() * row);
  leaves_.Score(s->leaf, nullptr, blocks, score);
  s->bytes += row * NodeLevel::kCentreBytes + codes_.code_bytes();
  std::vector<int32_t> least(size_t{s->queries()} * leaves_.nodes());
  for (uint32_t i = 0; i < s->queries(); ++i) {
    // A lower bound of the mass: estimates from spread are least true of such heads.
    float mass = LogSum(std::span(score).subspan(i * row, leaves_.nodes())) +
                 std::log(static_cast<float>(kLeafRows));
    if (!queries.other_length.empty()) {
      mass = LogSum(std::array{mass, queries.other_length[i] - log_length_});
    }
    const KeyCodes::Query& code = s->code[i];
    const float from = mass + std::log(tolerance * kOutlierShare);
    for (uint32_t leaf = 0; leaf < leaves_.nodes(); ++leaf) {
      // Of the token whose code stands for most.
      const float above = (from - score[i * row + leaf]) / std::max(most_scale_[leaf], 1e-20f);
      const float sum =
          code.scale > 0 ? std::clamp((above - code.offset) / code.scale, -1e9f, 1e9f) : 1e9f;
      least[size_t{i} * leaves_.nodes() + leaf] = static_cast<int32_t>(sum);
    }
  }
  return codes_.FindBlocks(s->code, least);
}

void ClusterIndex::ScoreTokens(Search* s) const {
  const size_t row = s->leaves.size() * kLeafRows;
  std::vector<int32_t> sums(s->queries() * row);
  codes_.SumBlocks(s->code, s->leaves, sums);
  if (!open_all_) s->bytes += row * KeyCodes::kBytes;
  s->bytes += row * (sizeof(uint32_t) + sizeof(uint16_t));
  s->token_score.resize(sums.size());
  const size_t leaf_row = s->opened_supers.size() * kLeavesPerSuper;
  for (uint32_t i = 0; i < s->queries(); ++i) {
    const KeyCodes::Query& code = s->code[i];
    const float breadth = s->leaf_breadth[i];
    size_t next = i * row;
    for (size_t at = 0; at < leaf_row; ++at) {
      if (s->opened_leaf[at] == 0) continue;
      // The leaf's score was lifted by its spread; a token's by what its code may miss.
      const uint32_t leaf = LeafAt(*s, at);
      const float centre = leaves_.Lowered(leaf, s->leaf_score[i * leaf_row + at], breadth) +
                           0.5f * s->code_variance[i];
      for (uint32_t t = 0; t < kLeafRows; ++t, ++next) {
        s->token_score[next] = (code.scale * static_cast<float>(sums[next]) + code.offset) *
                                   Bf16ToFloat(scale_[leaf * kLeafRows + t]) +
                               centre;
      }
    }
  }
}

void ClusterIndex::List(const KvView& run, const QueryBlock& queries, const Search& s,
                        CoarseScores* out) const {
  out->Clear();
  out->tokens = run.tokens();
  out->nodes = first_super() + supers_.nodes();
  out->bytes = s.bytes;
  out->common_doubt = common_doubt_ / token_doubt_;
  out->first.push_back(0);
  const size_t super_row = size_t{supers_.blocks()} * NodeLevel::kBlockNodes;
  const size_t leaf_row = s.opened_supers.size() * kLeavesPerSuper;
  const size_t token_row = s.leaves.size() * kLeafRows;
  const size_t most = queries.queries * (super_row + leaf_row + token_row);
  out->node.resize(most);
  out->score.resize(most);
  out->weight.resize(most);
  out->doubt.resize(most);
  size_t next = 0;
  const auto add = [&](uint32_t node, float score, uint32_t weight, float doubt) {
    out->node[next] = node;
    out->score[next] = score;
    out->weight[next] = weight;
    out->doubt[next++] = doubt;
  };
  const float log_token = std::log(token_doubt_) + log_length_;
  const float log_leaf = std::log(leaf_doubt_) + log_length_;
  const float log_super = std::log(super_doubt_) + log_length_;
  for (uint32_t i = 0; i < queries.queries; ++i) {
    const TokenRange range = queries.ranges[i];
    const bool whole = range.lo <= run.tokens().lo && range.hi >= run.tokens().hi;
    for (size_t t = 0; t < token_row; ++t) {
      const uint32_t at =
          s.leaves[t / kLeafRows] * kLeafRows + static_cast<uint32_t>(t % kLeafRows);
      if (at >= tokens()) break;
      const uint32_t token = run.tokens().lo + order_[at];
      if (!whole && (token < range.lo || token >= range.hi)) continue;
      const float score = s.token_score[i * token_row + t];
      add(at, score, 1, score + log_token);
    }
    for (size_t at = 0; at < leaf_row; ++at) {
      const uint32_t leaf = LeafAt(s, at);
      if (s.opened_leaf[at] != 0 || leaf >= leaves_.nodes()) continue;
      const float score = s.leaf_score[i * leaf_row + at];
      add(first_leaf() + leaf, score, leaves_.count(leaf),
          score + leaves_.log_count(leaf) + log_leaf);
    }
    for (uint32_t n = 0, opened = 0; n < supers_.nodes(); ++n) {
      if (opened < s.opened_supers.size() && s.opened_supers[opened] == n) {
        ++opened;
        continue;
      }
      const float score = s.super_score[i * super_row + n];
      add(first_super() + n, score, supers_.count(n), score + supers_.log_count(n) + log_super);
    }
    out->first.push_back(static_cast<uint32_t>(next));
    const std::span<const float> listed(out->score.data() + out->first[i], next - out->first[i]);
    out->length.push_back((whole ? s.own_mass[i] : LogSum(listed)) + log_length_);
  }
  out->node.resize(next);
  out->score.resize(next);
  out->weight.resize(next);
  out->doubt.resize(next);
}

void ClusterIndex::Score(const KvView& run, const QueryBlock& queries, CoarseScores* out) const {
  // A query that sees a part of the run has to know its tokens one by one.
  Depth depth = queries.tolerance > 0 ? Depth::kAsNeeded : Depth::kTokens;
  for (const TokenRange& range : queries.ranges) {
    if (range.lo > run.tokens().lo || range.hi < run.tokens().hi) depth = Depth::kTokens;
  }
  Look(run, queries, depth, out);
}

void ClusterIndex::Look(const KvView& run, const QueryBlock& queries, Depth depth,
                        CoarseScores* out) const {
  Search search;
  ScoreSupers(queries, &search);
  if (depth == Depth::kSupers) return List(run, queries, search, out);
  const float tolerance = depth == Depth::kAsNeeded ? queries.tolerance : 0;
  const std::vector<uint32_t> outliers = FindOutliers(queries, tolerance, &search);
  OpenSupers(tolerance, outliers, &search);
  OpenLeaves(queries, tolerance, outliers, &search);
  if (depth == Depth::kLeaves) {
    search.leaves.clear();
    std::fill(search.opened_leaf.begin(), search.opened_leaf.end(), 0);
  }
  ScoreTokens(&search);
  List(run, queries, search, out);
}

}  // namespace quarry

// What a clustered index's search comes to: scores of tokens and of closed groups, and their doubts.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu_index/cluster_search.h"
#include "proto/half.h"

namespace quarry {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

}  // namespace

void ClusterIndex::ListNodes(const Search& s, CoarseScores* out) const {
  out->node = s.leaves;
  out->stretches.resize(kStretches);
  auto end = static_cast<uint32_t>(s.leaves.size() * kLeafRows);
  const auto close = [&](Stretch which, uint32_t nodes, uint32_t weight) {
    end += nodes;
    out->stretches[which] = {end, weight};
  };
  close(kTokens, 0, 1);
  const auto close_level = [&](const NodeLevel& level, Stretch full, auto&& add) {
    const size_t before = out->node.size();
    add();
    auto nodes = static_cast<uint32_t>(out->node.size() - before);
    const uint32_t last = level.nodes() - 1;
    const bool partial = nodes > 0 && out->node.back() == last && level.count(last) != level.count(0);
    close(full, nodes - (partial ? 1 : 0), level.count(0));
    close(static_cast<Stretch>(full + 1), partial ? 1 : 0, level.count(last));
  };
  close_level(p_.leaves, kFullLeaves, [&] {
    for (size_t at = 0; at < s.leaf_row(); ++at) {
      const uint32_t leaf = LeafAt(s, at);
      if (s.opened_leaf[at] == 0 && leaf < p_.leaves.nodes()) out->node.push_back(leaf);
    }
  });
  close_level(p_.supers, kFullSupers, [&] {
    out->node.insert(out->node.end(), s.closed_supers.begin(), s.closed_supers.end());
  });
  out->nodes = end;
  out->score.resize(s.queries.queries * size_t{end});
}

void ClusterIndex::Doubt(const Search& s, CoarseScores* out) const {
  out->common_doubt = common_doubt_ / token_doubt_;
  out->refined_doubt = row_doubt_ / token_doubt_;
  out->exact_above = ExactAbove(out->refined_doubt);
  for (const Unrest& unrest : s.unrest) {
    const auto add = [&](uint32_t stretch, float doubt) {
      const auto weight = static_cast<float>(out->stretches[stretch].weight);
      out->doubt.push_back(std::log(weight * doubt) + log_length_);
    };
    add(kTokens, token_doubt_ * unrest.token);
    for (uint32_t stretch : {kFullLeaves, kLastLeaf}) add(stretch, leaf_doubt_ * unrest.leaf);
    for (uint32_t stretch : {kFullSupers, kLastSuper}) add(stretch, super_doubt_ * unrest.super);
  }
}

void ClusterIndex::ScoreClosed(const Search& s, CoarseScores* out) const {
  for (uint32_t i = 0; i < s.queries.queries; ++i) {
    float* score = out->score.data() + size_t{i} * out->nodes + out->stretches[kTokens].end;
    const float* const of_leaf = s.leaf_score.data() + i * s.leaf_row();
    for (size_t at = 0; at < s.leaf_row(); ++at) {
      if (s.opened_leaf[at] == 0 && of_leaf[at] != kNone) *score++ = of_leaf[at];
    }
    for (uint32_t n : s.closed_supers) {
      *score++ = s.super_score[size_t{i} * p_.supers.nodes() + n];
    }
  }
}

void ClusterIndex::ScoreTokens(const Search& s, CoarseScores* out) const {
  const size_t row = s.leaves.size() * kLeafRows;
  std::vector<int32_t> sums(s.queries.queries * row);
  p_.codes.SumBlocks(s.code, s.leaves, sums);
  if (!open_all_) out->bytes += row * KeyCodes::kBytes;
  out->bytes += row * (sizeof(uint32_t) + sizeof(uint16_t));
  for (uint32_t i = 0; i < s.queries.queries; ++i) {
    const KeyCodes::Query& code = s.code[i];
    const int32_t* sum = sums.data() + i * row;
    float* score = out->score.data() + size_t{i} * out->nodes;
    for (size_t at = 0; at < s.leaf_row(); ++at) {
      if (s.opened_leaf[at] == 0) continue;
      // The leaf's score was lifted by its spread; a token's by what its code may miss.
      const uint32_t leaf = LeafAt(s, at);
      const float lifted = s.leaf_score[i * s.leaf_row() + at];
      const float centre =
          p_.leaves.Lowered(leaf, lifted, s.leaf_breadth[i]) + 0.5f * s.code_variance[i];
      const uint16_t* const scale = p_.scale.data() + size_t{leaf} * kLeafRows;
      for (uint32_t t = 0; t < kLeafRows; ++t) {
        const float above = code.scale * static_cast<float>(sum[t]) + code.offset;
        score[t] = above * Bf16ToFloat(scale[t]) + centre;
      }
      sum += kLeafRows;
      score += kLeafRows;
    }
  }
}

// Scores the best tokens by their rows.
void ClusterIndex::Rank(const KvView& run, const Search& s, CoarseScores* out) const {
  const Listed listed = NodesOf(*out);
  std::vector<uint8_t> marks(listed.tokens());
  for (uint32_t i = 0; i < s.ranked_from.size(); ++i) {
    const float* const score = out->Row(i).data();
    // Scores of tokens count in what codes miss.
    const float from = s.ranked_from[i] + 0.5f * s.code_variance[i];
    for (size_t e = 0; e < marks.size(); ++e) marks[e] |= score[e] >= from ? 1 : 0;
  }
  Rows rows;
  std::vector<size_t> entries;
  for (size_t e = 0; e < marks.size(); ++e) {
    const uint32_t place = Places(listed, e).lo;
    if (marks[e] == 0 || place >= tokens()) continue;
    entries.push_back(e);
    rows.places.push_back(place);
  }
  ScoreRows(run, s.queries, &rows);
  out->bytes += rows.bytes;
  for (uint32_t i = 0; i < s.queries.queries; ++i) {
    float* const score = out->score.data() + size_t{i} * out->nodes;
    for (size_t r = 0; r < entries.size(); ++r) {
      score[entries[r]] = rows.score[i * entries.size() + r];
    }
  }
}

// Places behind the last token, and tokens that a query must not see.
void ClusterIndex::MaskTokens(const KvView& run, const QueryBlock& queries,
                              CoarseScores* out) const {
  const Listed listed = NodesOf(*out);
  for (uint32_t i = 0; i < queries.queries; ++i) {
    float* const score = out->score.data() + size_t{i} * out->nodes;
    for (size_t e = listed.tokens(); e > 0 && Places(listed, e - 1).lo >= tokens(); --e) {
      score[e - 1] = kNone;
    }
    const TokenRange range = queries.ranges[i];
    if (range.lo <= run.tokens().lo && range.hi >= run.tokens().hi) continue;
    for (size_t e = 0; e < listed.tokens(); ++e) {
      const uint32_t place = Places(listed, e).lo;
      if (place >= tokens()) continue;
      const uint32_t token = run.tokens().lo + p_.order[place];
      if (token < range.lo || token >= range.hi) score[e] = kNone;
    }
  }
}

}  // namespace quarry

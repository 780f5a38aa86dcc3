// The best nodes of one query's scores, over several runs, without sorting or copying them all.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "cpu_index/budget.h"

namespace quarry {

// A node that may be taken. Nodes are taken by falling rank: their score, or under sampling their
// priority.
struct RankedNode {
  float rank;
  float score;
  float mass;  // e^(score - largest score)
};

// Where the taken nodes end: those of rank > threshold are taken, and `ties` of those equal to it.
struct Cut {
  float threshold = -std::numeric_limits<float>::infinity();
  uint32_t ties = 0;
  double mass = 0;        // of what is taken
  bool all_ties = false;  // nothing of that rank is left
};

// The ranks of one query. The runs outlive it.
class RankedNodes {
 public:
  static constexpr float kNone = -std::numeric_limits<float>::infinity();

  // lift_key: of LiftKey, if the nodes are to be sampled; else 0.
  RankedNodes(std::span<const RunScores> runs, uint64_t lift_key);

  size_t nodes() const { return nodes_; }
  float largest_score() const { return largest_; }  // -infinity if no node is in the range
  // Of all nodes, as RankedNode::mass. Summed in double: no order of the runs shows in it.
  double TotalMass() const;

  // A rank that somewhat more than `count` nodes are likely to exceed; -infinity if in doubt.
  float GuessRank(uint64_t count) const;
  // A score such that the nodes below it are likely to have somewhat less than `mass` together.
  float GuessFloor(double mass) const;

  // Appends the nodes with from < rank <= to, in token order.
  void Gather(float from, float to, std::vector<RankedNode>* out) const;
  // Of each run, nodes of exactly this rank; by run.
  std::vector<uint32_t> CountEqual(float rank) const;

 private:
  template <typename F>
  void ForBlocks(F&& f) const;
  template <typename F>
  void ForSample(F&& f) const;  // f(rank, score)

  const std::span<const RunScores> runs_;
  const uint64_t lift_key_;
  size_t nodes_ = 0;
  float largest_ = kNone;
};

// The fewest of the nodes, best first, that are `tokens` or whose mass reaches `mass`, whichever comes
// first. `nodes`, not empty, is reordered.
Cut FindCut(std::vector<RankedNode>* nodes, uint64_t tokens, double mass);

}  // namespace quarry

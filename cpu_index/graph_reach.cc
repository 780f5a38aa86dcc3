#include "cpu_index/graph_reach.h"

#include "proto/check.h"

namespace quarry {
namespace {

// Follows links from what was reached last.
class Walk {
 public:
  explicit Walk(const GraphLinks& graph) : graph_(graph), reached_(graph.keys()) {}

  void Reach(uint32_t key) {
    if (reached_[key]) return;
    reached_[key] = true;
    open_.push_back(key);
    while (!open_.empty()) {
      const uint32_t at = open_.back();
      open_.pop_back();
      for (uint32_t other : graph_.Of(at)) {
        if (reached_[other]) continue;
        reached_[other] = true;
        open_.push_back(other);
      }
    }
  }
  bool reached(uint32_t key) const { return reached_[key]; }
  std::vector<bool> Take() { return std::move(reached_); }

 private:
  const GraphLinks& graph_;
  std::vector<bool> reached_;
  std::vector<uint32_t> open_;
};

bool HasRoom(const GraphLinks& graph, uint32_t key) { return graph.Of(key).size() < graph.links(); }

void AddLink(uint32_t from, uint32_t to, GraphLinks* graph) {
  uint32_t* const row = graph->Row(from);
  row[1 + row[0]++] = to;
}

}  // namespace

std::vector<bool> Reached(const GraphLinks& graph) {
  Walk walk(graph);
  for (uint32_t entry : graph.entries) walk.Reach(entry);
  return walk.Take();
}

void ReachAll(GraphLinks* graph) {
  QUARRY_CHECK(!graph->entries.empty());
  Walk walk(*graph);
  for (uint32_t entry : graph->entries) walk.Reach(entry);
  // A reached key with room. A link takes one place among the reached keys, and what it reaches
  // brings at least its own, so there always is one: the key that was linked last, to begin with.
  uint32_t spare = graph->entries.front();
  for (uint32_t key = 0; key < graph->keys(); ++key) {
    if (walk.reached(key)) continue;
    uint32_t parent = spare;
    for (uint32_t other : graph->Of(key)) {
      if (!walk.reached(other) || !HasRoom(*graph, other)) continue;
      parent = other;
      break;
    }
    QUARRY_CHECK(HasRoom(*graph, parent));
    AddLink(parent, key, graph);
    // Only a link from `spare` can have taken its room.
    if (parent == spare) spare = key;
    walk.Reach(key);
  }
}

}  // namespace quarry

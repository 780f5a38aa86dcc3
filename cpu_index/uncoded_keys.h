// The keys that codes tell least of, as they are.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "cpu_index/index_form.h"
#include "cpu_index/key_index.h"

namespace quarry {

// Codes and rows spend their bits on directions in which many keys of a run differ. A key that lies
// far out in another direction looks like any other by them, and a query that seeks it misses it by
// tens of nats. A run keeps those of its keys of which the most is left out, and every search scores
// them. Immutable; thread-safe.
class UncodedKeys {
 public:
  static constexpr uint32_t kTokensForOne = 128;

  // None: where codes leave out nothing.
  explicit UncodedKeys(uint32_t head_dim) : head_dim_(head_dim) {}
  // lost: [tokens], by place, how much codes leave out of a key; of equal ones the first places are
  // kept. order: [tokens] of each place, within the run.
  UncodedKeys(const KvView& run, std::span<const uint32_t> order, std::span<const float> lost);

  void Write(IndexWriter* out) const;
  // Of a run of so many tokens. DataLoss: cut off, places that do not rise or exist, numbers that
  // are not finite.
  static absl::StatusOr<UncodedKeys> Read(IndexReader* in, uint32_t tokens, uint32_t head_dim);

  std::span<const uint32_t> places() const { return places_; }  // rising
  // out: [queries][places().size()], the queries' own scores; queries.ranges is not used.
  void Score(const QueryBlock& queries, float* out) const;
  uint64_t bytes() const { return 4 * places_.size() + 2 * keys_.size(); }

 private:
  uint32_t head_dim_;
  std::vector<uint32_t> places_;
  std::vector<uint16_t> keys_;  // bf16 [places][head_dim]
};

}  // namespace quarry

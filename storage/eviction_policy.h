// Which of the blocks that may go goes first: the policies of the RAM tier.
#pragma once

#include <cstdint>
#include <memory>

#include "storage/block_records.h"
#include "storage/eviction_options.h"

namespace quarry {

// Gives blocks their queue and their rank in it; EvictionOrder keeps them sorted, and knows which
// may go at all. Ranks change only while a block is in no order, or by Spare. Not thread-safe.
class EvictionPolicy {
 public:
  static std::unique_ptr<EvictionPolicy> Create(const EvictionOptions& options);
  virtual ~EvictionPolicy() = default;

  // The block was published; `published` are all that are in RAM, this one included.
  virtual void Admit(BlockRecord* block, uint64_t published) = 0;
  // It was found again.
  virtual void Use(BlockRecord* block) = 0;
  // Nobody holds it any more.
  virtual void LetGo(BlockRecord* block) = 0;
  // It is its turn to go: true if it stays after all, at another place. False in the end, however
  // often it is asked without a Use between.
  virtual bool Spare(BlockRecord* block) = 0;
  // It goes for room; not asked about blocks that were purged or broken.
  virtual void Evicted(const BlockRecord& block) = 0;
  // Blocks that came back soon after they were evicted, where the policy remembers that.
  virtual uint64_t GhostHits() const { return 0; }
};

}  // namespace quarry

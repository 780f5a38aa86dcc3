#include "storage/block_records.h"

#include "proto/check.h"

namespace quarry {

uint32_t BlockRecords::New() {
  if (free_.empty()) {
    records_.emplace_back();
    return size() - 1;
  }
  const uint32_t block = free_.back();
  free_.pop_back();
  Move(block, BlockState::kEmpty);
  const uint32_t generation = records_[block].generation + 1;
  records_[block] = BlockRecord();
  records_[block].generation = generation;
  return block;
}

void BlockRecords::Free(uint32_t block) {
  Move(block, BlockState::kFree);
  records_[block].key = BlockKey();
  free_.push_back(block);
}

void BlockRecords::Move(uint32_t block, BlockState to) {
  QUARRY_CHECK(MayMove(records_[block].state, to));
  records_[block].state = to;
}

uint32_t BlockRecords::Find(TenantName tenant, const BlockId& id) const {
  auto it = by_id_.find(TenantId(tenant, id));
  return it == by_id_.end() ? kNoBlock : it->second;
}

void BlockRecords::Link(uint32_t block, uint32_t parent, uint32_t* first) {
  BlockRecord& record = records_[block];
  record.parent = parent;
  record.previous_sibling = kNoBlock;
  record.next_sibling = *first;
  if (*first != kNoBlock) records_[*first].previous_sibling = block;
  *first = block;
}

void BlockRecords::Insert(uint32_t block) {
  BlockRecord& record = records_[block];
  QUARRY_CHECK(record.state == BlockState::kPublished);
  QUARRY_CHECK(by_id_.emplace(TenantId(record.tenant, record.key.id), block).second);
  if (!record.key.parent.IsZero()) {
    const uint32_t parent = Find(record.tenant, record.key.parent);
    if (parent == kNoBlock) {
      auto [it, added] = orphans_.try_emplace(TenantId(record.tenant, record.key.parent), kNoBlock);
      Link(block, kNoBlock, &it->second);
    } else {
      Link(block, parent, &records_[parent].first_child);
      record.depth = records_[parent].depth + 1;
      ++records_[parent].children;
      if (record.held) ++records_[parent].held_children;
    }
  }
  Adopt(block);
}

void BlockRecords::Adopt(uint32_t block) {
  BlockRecord& record = records_[block];
  auto it = orphans_.find(TenantId(record.tenant, record.key.id));
  if (it == orphans_.end()) return;
  record.first_child = it->second;
  orphans_.erase(it);
  for (uint32_t child = record.first_child; child != kNoBlock;
       child = records_[child].next_sibling) {
    records_[child].parent = block;
    ++record.children;
    if (records_[child].held) ++record.held_children;
  }
}

uint32_t BlockRecords::Remove(uint32_t block) {
  BlockRecord& record = records_[block];
  by_id_.erase(TenantId(record.tenant, record.key.id));
  const uint32_t parent = record.parent;
  if (record.next_sibling != kNoBlock) {
    records_[record.next_sibling].previous_sibling = record.previous_sibling;
  }
  if (record.previous_sibling != kNoBlock) {
    records_[record.previous_sibling].next_sibling = record.next_sibling;
  } else if (parent != kNoBlock) {
    records_[parent].first_child = record.next_sibling;
  } else if (!record.key.parent.IsZero()) {
    const TenantId family(record.tenant, record.key.parent);
    if (record.next_sibling == kNoBlock) {
      orphans_.erase(family);
    } else {
      orphans_[family] = record.next_sibling;
    }
  }
  if (parent != kNoBlock) {
    --records_[parent].children;
    if (record.held) --records_[parent].held_children;
  }
  if (record.first_child != kNoBlock) {
    orphans_[TenantId(record.tenant, record.key.id)] = record.first_child;
    for (uint32_t child = record.first_child; child != kNoBlock;
         child = records_[child].next_sibling) {
      records_[child].parent = kNoBlock;
    }
  }
  record.parent = record.first_child = kNoBlock;
  record.next_sibling = record.previous_sibling = kNoBlock;
  record.children = record.held_children = 0;
  return parent;
}

}  // namespace quarry

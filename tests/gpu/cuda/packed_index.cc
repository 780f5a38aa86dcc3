#include "tests/gpu/cuda/packed_index.h"

#include <algorithm>
#include <cstring>

namespace quarry::cuda {
namespace {

constexpr size_t kAlignment = 16;
constexpr size_t kReadBehind = sizeof(RelativeRange);  // by who reads one ahead

// Items by falling tiles: what runs last is short. Among equals the heads of a row tile lie
// together, and with them those that share K and V.
std::vector<uint32_t> OrderOf(const SparseIndex& index) {
  std::vector<uint32_t> order;
  order.reserve(index.tiles.size());
  for (uint32_t t = index.row_tiles(); t-- > 0;) {
    for (uint32_t h = 0; h < index.heads; ++h) {
      order.push_back(static_cast<uint32_t>(index.At(h, t)));
    }
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](uint32_t a, uint32_t b) { return index.tiles[a] > index.tiles[b]; });
  return order;
}

}  // namespace

template <typename T>
size_t PackedIndex::Add(std::span<const T> values) {
  const size_t at = bytes_.size(), bytes = values.size_bytes();
  bytes_.resize((at + bytes + kReadBehind + kAlignment - 1) / kAlignment * kAlignment);
  if (bytes > 0) std::memcpy(&bytes_[at], values.data(), bytes);
  return at;
}

PackedIndex::PackedIndex(const SparseIndex& index)
    : columns_(index.columns.size()),
      items_(static_cast<uint32_t>(index.tiles.size())),
      heads_(index.heads),
      rows_(index.rows),
      first_token_(index.first_token),
      row_tiles_(index.row_tiles()) {
  std::vector<uint32_t> mask_first{0};
  for (uint32_t h = 0; h < index.heads; ++h) {
    const auto columns = static_cast<uint32_t>(index.ColumnsOf(h).size());
    mask_first.push_back(mask_first.back() + KeyTilesOf(columns));
  }
  masks_ = size_t{mask_first.back()} * row_tiles_;
  const auto add = [this](const auto& values) { return Add(std::span(values)); };
  places_.kind = add(index.kind);
  places_.range_first = add(index.range_first);
  places_.ranges = add(index.ranges);
  places_.column_first = add(index.column_first);
  places_.columns = add(index.columns);
  places_.block_first = add(index.block_first);
  places_.blocks = add(index.blocks);
  places_.tiles = add(index.tiles);
  places_.columns_seen = add(index.columns_seen);
  places_.order = add(OrderOf(index));
  places_.mask_first = add(mask_first);
}

void PackedIndex::Describe(const std::byte* at, SparseArgs* args) const {
  const auto point = [at](auto*& to, size_t place) {
    to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(at + place);
  };
  args->heads = heads_;
  args->rows = rows_;
  args->first_token = first_token_;
  args->row_tiles = row_tiles_;
  args->column_count = static_cast<uint32_t>(columns_);
  point(args->kind, places_.kind);
  point(args->range_first, places_.range_first);
  point(args->ranges, places_.ranges);
  point(args->column_first, places_.column_first);
  point(args->columns, places_.columns);
  point(args->block_first, places_.block_first);
  point(args->blocks, places_.blocks);
  point(args->tiles, places_.tiles);
  point(args->columns_seen, places_.columns_seen);
  point(args->order, places_.order);
  point(args->mask_first, places_.mask_first);
}

}  // namespace quarry::cuda

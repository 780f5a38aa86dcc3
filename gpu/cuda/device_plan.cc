#include "gpu/cuda/device_plan.h"

#include <algorithm>
#include <utility>
#include <variant>

#include "gpu/cuda/pieces.h"
#include "proto/check.h"
#include "proto/status_macros.h"

namespace quarry::cuda {

absl::StatusOr<std::unique_ptr<DevicePlan>> DevicePlan::Make(Device* device,
                                                             std::vector<HeadPlan> heads,
                                                             std::span<const Sizes> sizes) {
  QUARRY_CHECK(heads.size() == sizes.size());
  std::unique_ptr<DevicePlan> out(new DevicePlan(device, std::move(heads)));
  out->sizes_.assign(sizes.begin(), sizes.end());
  const size_t count = sizes.size();
  size_t ranges = 0;
  for (const Sizes& of : sizes) {
    ranges += of.ranges;
    out->columns_ += of.columns;
    out->column_tiles_ += KeyTilesOf(of.columns);
  }
  Pieces pieces;
  Places& places = out->places_;
  places.kind = pieces.Add<HeadKind>(count);
  places.range_first = pieces.Add<uint32_t>(count + 1);
  places.column_first = pieces.Add<uint32_t>(count + 1);
  places.mask_first = pieces.Add<uint32_t>(count + 1);
  places.blocks = pieces.Add<uint32_t>(count);
  places.block_place = pieces.Add<uint32_t>(count);
  const size_t without_lists = pieces.bytes();
  places.ranges = pieces.Add<RelativeRange>(ranges);
  places.range_tiles = pieces.Add<uint32_t>(ranges + count);
  places.columns = pieces.Add<uint32_t>(out->columns_);
  QUARRY_ASSIGN_OR_RETURN(out->memory_,
                          device->Allocate(pieces.bytes(), "plan of a sparse prefill"));
  const bool has_lists = std::any_of(out->heads_.begin(), out->heads_.end(),
                                     [](const HeadPlan& head) { return !head.ranges.empty(); });
  std::vector<std::byte> bytes(has_lists ? pieces.bytes() : without_lists);
  const auto at = [&]<typename T>(T, size_t place) { return At<T>(bytes.data(), place); };
  HeadKind* const kind = at(HeadKind(), places.kind);
  uint32_t* const range_first = at(0u, places.range_first);
  uint32_t* const column_first = at(0u, places.column_first);
  uint32_t* const mask_first = at(0u, places.mask_first);
  uint32_t* const blocks = at(0u, places.blocks);
  uint32_t* const block_place = at(0u, places.block_place);
  uint32_t block_heads = 0;
  for (size_t h = 0; h < count; ++h) {
    HeadPlan& head = out->heads_[h];
    kind[h] = head.kind;
    range_first[h + 1] = range_first[h] + sizes[h].ranges;
    column_first[h + 1] = column_first[h] + sizes[h].columns;
    mask_first[h + 1] = mask_first[h] + KeyTilesOf(sizes[h].columns);
    block_place[h] = block_heads;
    block_heads += head.kind == HeadKind::kBlocks;
    const auto* const pooled = std::get_if<BlockSparsePattern>(&head.pattern);
    blocks[h] = pooled != nullptr ? pooled->blocks : 0;
    if (head.ranges.empty()) continue;
    QUARRY_CHECK(head.ranges.size() == sizes[h].ranges && head.columns.size() == sizes[h].columns);
    std::copy(head.ranges.begin(), head.ranges.end(),
              at(RelativeRange(), places.ranges) + range_first[h]);
    std::copy(head.columns.begin(), head.columns.end(), at(0u, places.columns) + column_first[h]);
    uint32_t* tiles = at(0u, places.range_tiles) + range_first[h] + h;
    for (const RelativeRange& range : head.ranges) {
      tiles[1] = tiles[0] + KeyTilesOf(static_cast<uint32_t>(range.hi - range.lo));
      ++tiles;
    }
    head.ranges = {};
    head.columns = {};
  }
  QUARRY_RETURN_IF_ERROR(device->Upload(out->memory_.raw(), bytes));
  return out;
}

absl::StatusOr<std::unique_ptr<DevicePlan>> DevicePlan::Copy(Device* device,
                                                             std::vector<HeadPlan> heads) {
  std::vector<Sizes> sizes;
  for (const HeadPlan& head : heads) {
    sizes.push_back(
        {static_cast<uint32_t>(head.ranges.size()), static_cast<uint32_t>(head.columns.size())});
  }
  return Make(device, std::move(heads), sizes);
}

std::unique_ptr<DevicePlan> DevicePlan::Dense(Device* device, size_t heads) {
  return std::unique_ptr<DevicePlan>(new DevicePlan(device, std::vector<HeadPlan>(heads)));
}

absl::StatusOr<std::vector<HeadPlan>> DevicePlan::Heads() const {
  std::vector<HeadPlan> out = heads_;
  if (memory_.raw() == nullptr) return out;
  std::vector<std::byte> bytes(memory_.bytes());
  QUARRY_RETURN_IF_ERROR(device_.Download(bytes, memory_.raw()));
  const RelativeRange* ranges = At<RelativeRange>(bytes.data(), places_.ranges);
  const uint32_t* columns = At<uint32_t>(bytes.data(), places_.columns);
  for (size_t h = 0; h < out.size(); ++h) {
    out[h].ranges.assign(ranges, ranges + sizes_[h].ranges);
    out[h].columns.assign(columns, columns + sizes_[h].columns);
    ranges += sizes_[h].ranges;
    columns += sizes_[h].columns;
  }
  return out;
}

bool DevicePlan::AllDense() const {
  return std::all_of(heads_.begin(), heads_.end(),
                     [](const HeadPlan& head) { return head.kind == HeadKind::kDense; });
}

PlanArrays DevicePlan::arrays() const {
  QUARRY_CHECK(memory_.raw() != nullptr);
  std::byte* const at = memory_.raw();
  return {At<HeadKind>(at, places_.kind),         At<uint32_t>(at, places_.range_first),
          At<uint32_t>(at, places_.column_first), At<uint32_t>(at, places_.mask_first),
          At<uint32_t>(at, places_.blocks),       At<uint32_t>(at, places_.block_place),
          At<RelativeRange>(at, places_.ranges),  At<uint32_t>(at, places_.range_tiles),
          At<uint32_t>(at, places_.columns)};
}

}  // namespace quarry::cuda

#include "gpu/cuda/parts_attention.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gpu/cuda/attention.h"
#include "gpu/cuda/attention_plan.h"
#include "gpu/cuda/cuda_status.h"
#include "proto/status_macros.h"

namespace quarry::cuda {
namespace {

bool IsVectorAligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether the tensor kernel can do it: it reads and writes aligned addresses.
bool IsForTensorKernel(const DeviceAttention& a) {
  bool aligned = IsVectorAligned(a.q) && IsVectorAligned(a.o);
  for (const DeviceKv& part : a.parts) {
    aligned =
        aligned && IsVectorAligned(part.k) && IsVectorAligned(part.v) && part.head_stride % 16 == 0;
  }
  return aligned && HasTensorAttention(a.dtype, a.head_dim);
}

// `parts` in so many places, the last ones of them.
void SetParts(std::span<const DeviceKv> parts, size_t places, AttentionPart* to) {
  to += places - parts.size();
  for (const DeviceKv& part : parts) {
    *to++ = {static_cast<const std::byte*>(part.k), static_cast<const std::byte*>(part.v),
             part.head_stride, part.tokens.lo, part.tokens.hi};
  }
}

AttentionArgs ArgsOf(const DeviceAttention& a) {
  AttentionArgs args = {};
  args.members = 1;
  args.q = a.q;
  args.heads = a.heads;
  args.group = a.heads / a.kv_heads;
  args.head_dim = a.head_dim;
  args.rows = a.rows;
  args.first_token = a.first_token;
  args.window = a.window;
  args.place = a.place;
  args.vector_bytes = a.head_dim * DTypeBytes(a.dtype);
  args.splits = 1;
  args.part_count = a.place != nullptr ? kPlacedParts : static_cast<uint32_t>(a.parts.size());
  args.scale_log2 = std::numbers::log2e_v<float> / std::sqrt(static_cast<float>(a.head_dim));
  SetParts(a.parts, args.part_count, args.parts);
  return args;
}

bool HasPlacedParts(const DeviceAttention& a) {
  return !a.parts.empty() && a.parts.size() <= kPlacedParts;
}

// Whether one launch does all of them: they have places, and their rows and those lie one behind
// the other.
bool CanRunTogether(std::span<const DeviceAttention> attentions) {
  const DeviceAttention& first = attentions.front();
  const size_t vectors = size_t{first.rows} * first.heads;
  if (vectors == 0 || first.place == nullptr) return false;
  for (size_t i = 0; i < attentions.size(); ++i) {
    const DeviceAttention& a = attentions[i];
    if (a.dtype != first.dtype || a.heads != first.heads || a.kv_heads != first.kv_heads ||
        a.head_dim != first.head_dim || a.rows != first.rows || a.window != first.window) {
      return false;
    }
    const size_t skipped = i * vectors * a.head_dim;
    if (a.place != first.place + i || a.q != first.q + skipped || a.o != first.o + skipped ||
        a.lse != first.lse + i * vectors) {
      return false;
    }
    if (!HasPlacedParts(a) || !IsForTensorKernel(a)) return false;
  }
  return true;
}

}  // namespace

absl::Status PartsAttention::Attend(const DeviceAttention& a) {
  if (a.place != nullptr && !HasPlacedParts(a)) {
    return absl::InvalidArgumentError(
        absl::StrCat(a.parts.size(), " parts with a place, of 1 to ", kPlacedParts));
  }
  const bool tensor = IsForTensorKernel(a);
  std::vector<Launch> launches;
  DeviceAttention some = a;
  for (size_t at = 0; at == 0 || at < a.parts.size(); at += kMaxAttentionParts) {
    some.parts =
        a.parts.subspan(at).first(std::min<size_t>(kMaxAttentionParts, a.parts.size() - at));
    Launch& launch = launches.emplace_back(ArgsOf(some));
    if (!tensor) continue;
    const AttentionPlan plan = PlanAttention({&some, 1}, multiprocessors_);
    launch.args.splits = plan.splits;
    launch.row_tiles = plan.row_tiles;
  }
  return Run(std::move(launches), a);
}

absl::Status PartsAttention::AttendEach(std::span<const DeviceAttention> attentions) {
  while (!attentions.empty()) {
    const auto some = attentions.first(std::min<size_t>(kMaxAttentionMembers, attentions.size()));
    attentions = attentions.subspan(some.size());
    if (CanRunTogether(some)) {
      QUARRY_RETURN_IF_ERROR(AttendTogether(some));
      continue;
    }
    for (const DeviceAttention& a : some) {
      if (a.rows > 0 && a.heads > 0) QUARRY_RETURN_IF_ERROR(Attend(a));
    }
  }
  return absl::OkStatus();
}

// Of which CanRunTogether holds.
absl::Status PartsAttention::AttendTogether(std::span<const DeviceAttention> attentions) {
  const AttentionPlan plan = PlanAttention(attentions, multiprocessors_);
  Launch launch{ArgsOf(attentions.front()), plan.row_tiles};
  launch.args.splits = plan.splits;
  launch.args.members = static_cast<uint32_t>(attentions.size());
  for (size_t m = 0; m < attentions.size(); ++m) {
    SetParts(attentions[m].parts, kPlacedParts, launch.args.parts + m * kPlacedParts);
  }
  return Run({launch}, attentions.front());
}

absl::Status PartsAttention::Run(std::vector<Launch> launches, const DeviceAttention& first) {
  uint32_t partials = 0;
  for (const Launch& launch : launches) partials += launch.args.splits;
  const size_t vectors = size_t{launches.front().args.members} * first.rows * first.heads;
  const size_t elements = vectors * first.head_dim;
  DeviceBuffer memory;
  if (partials > 1) {
    QUARRY_ASSIGN_OR_RETURN(memory,
                            device_->Allocate(partials * (elements + vectors) * sizeof(float),
                                              "partials of attention"));
  }
  float* const o = partials > 1 ? memory.floats() : first.o;
  float* const lse = partials > 1 ? memory.floats() + partials * elements : first.lse;
  size_t done = 0;
  for (auto& [args, row_tiles] : launches) {
    args.o = o + done * elements;
    args.lse = lse + done * vectors;
    done += args.splits;
    QUARRY_RETURN_IF_ERROR(
        CudaStatus(row_tiles > 0 ? LaunchTensorAttention(args, first.dtype, row_tiles, stream_)
                                 : LaunchPlainAttention(args, first.dtype, stream_),
                   "attention kernel"));
  }
  if (partials == 1) return absl::OkStatus();
  return CudaStatus(
      LaunchSplitMerge({o, lse, first.o, first.lse, vectors, partials, first.head_dim}, stream_),
      "merge of partials");
}

}  // namespace quarry::cuda

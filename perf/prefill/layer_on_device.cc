#include "perf/prefill/layer_on_device.h"

#include <algorithm>

#include "gpu/sparse/sparse_index.h"
#include "perf/statistics.h"
#include "proto/check.h"
#include "proto/status_macros.h"

namespace quarry::perf {

absl::StatusOr<LayerOnDevice> LayerOnDevice::Put(Device* device, const MadeLayer& layer,
                                                 uint32_t most_rows) {
  LayerOnDevice out(device, &layer);
  const LayerKv& kv = layer.kv();
  const size_t bytes = kv.kv.head_stride * kv.kv_heads, width = out.width() * sizeof(float);
  const uint32_t last = std::min(kLastQueries, layer.options().tokens);
  QUARRY_ASSIGN_OR_RETURN(out.k_, device->Allocate(bytes, "keys of a made layer"));
  QUARRY_ASSIGN_OR_RETURN(out.v_, device->Allocate(bytes, "values of a made layer"));
  QUARRY_ASSIGN_OR_RETURN(out.last_q_, device->Allocate(last * width, "last queries"));
  QUARRY_ASSIGN_OR_RETURN(out.q_, device->Allocate(most_rows * width, "queries of a made layer"));
  QUARRY_ASSIGN_OR_RETURN(out.o_, device->Allocate(most_rows * width, "answers of a made layer"));
  QUARRY_ASSIGN_OR_RETURN(
      out.lse_, device->Allocate(size_t{most_rows} * kv.heads * sizeof(float), "log sums"));
  QUARRY_RETURN_IF_ERROR(device->Upload(out.k_.raw(), std::span(kv.Keys(0), bytes)));
  QUARRY_RETURN_IF_ERROR(device->Upload(out.v_.raw(), std::span(kv.Values(0), bytes)));
  out.part_ = {{out.k_.raw(), out.v_.raw(), kv.kv.head_stride, kv.kv.tokens}};
  return out;
}

absl::Status LayerOnDevice::PutLastQueries(std::span<const MadeHead> kinds, ThreadTeam* team) {
  const uint32_t tokens = layer_->options().tokens, last = std::min(kLastQueries, tokens);
  std::vector<float> q(last * width());
  layer_->Queries(kinds, TokenRange{tokens - last, tokens}, q.data(), team);
  return device_->Upload(last_q_.raw(), std::as_bytes(std::span<const float>(q)));
}

absl::Status LayerOnDevice::PutRows(std::span<const MadeHead> kinds, TokenRange rows,
                                    ThreadTeam* team) {
  QUARRY_CHECK(rows.size() * width() * sizeof(float) <= q_.bytes());
  host_q_.resize(std::max(host_q_.size(), rows.size() * width()));
  const std::span<float> q = std::span(host_q_).first(rows.size() * width());
  layer_->Queries(kinds, rows, q.data(), team);
  rows_ = rows;
  return device_->Upload(q_.raw(), std::as_bytes(q));
}

absl::StatusOr<double> LayerOnDevice::Plan(std::span<const HeadPattern> patterns, LayerPlan* plan) {
  const TokenRange prefill{0, layer_->options().tokens};
  const uint32_t last = std::min(kLastQueries, prefill.hi);
  absl::Status status;
  const double us = Microseconds([&] {
    auto made = device_->PlanSparse(patterns, prefill,
                                    Attention({prefill.hi - last, prefill.hi}, last_q_.floats()));
    status = made.status();
    if (!status.ok()) return;
    *plan = *std::move(made);
    status = Wait();
  });
  QUARRY_RETURN_IF_ERROR(status);
  return us / 1e3;
}

absl::StatusOr<double> LayerOnDevice::AttendDense(uint32_t rows) {
  QUARRY_CHECK(rows <= rows_.size());
  const TokenRange attended{rows_.hi - rows, rows_.hi};
  absl::Status status;
  const double us = Microseconds([&] {
    device_->Attend(Attention(attended, q_.floats() + (attended.lo - rows_.lo) * width()));
    status = Wait();
  });
  QUARRY_RETURN_IF_ERROR(status);
  return us / 1e3;
}

absl::StatusOr<double> LayerOnDevice::AttendSparse(const LayerPlan& plan) {
  absl::Status status;
  const double us = Microseconds([&] {
    status = device_->AttendSparse(*plan, Attention(rows_, q_.floats()));
    if (status.ok()) status = Wait();
  });
  QUARRY_RETURN_IF_ERROR(status);
  return us / 1e3;
}

absl::Status LayerOnDevice::Read(uint32_t token, std::span<float> o, std::span<float> lse) {
  QUARRY_CHECK(token >= rows_.lo && token < rows_.hi && o.size() == width());
  const size_t row = token - rows_.lo;
  QUARRY_RETURN_IF_ERROR(device_->Download(std::as_writable_bytes(o), o_.floats() + row * width()));
  return device_->Download(std::as_writable_bytes(lse), lse_.floats() + row * layer_->kv().heads);
}

// A download waits for all that was asked before it.
absl::Status LayerOnDevice::Wait() {
  std::byte one;
  return device_->Download(std::span(&one, 1), lse_.raw());
}

DeviceAttention LayerOnDevice::Attention(TokenRange rows, const float* q) const {
  const LayerKv& kv = layer_->kv();
  DeviceAttention a;
  a.parts = part_;
  a.dtype = kv.dtype;
  a.heads = kv.heads;
  a.kv_heads = kv.kv_heads;
  a.head_dim = kv.head_dim;
  a.first_token = rows.lo;
  a.rows = rows.size();
  a.q = q;
  // Answers stand where those of the rows do.
  const size_t first = rows.lo >= rows_.lo && rows.hi <= rows_.hi ? rows.lo - rows_.lo : 0;
  a.o = o_.floats() + first * width();
  a.lse = lse_.floats() + first * kv.heads;
  return a;
}

}  // namespace quarry::perf

// A host device that keeps what its attention gave.
#pragma once

#include <memory>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "gpu/device.h"
#include "gpu/sparse/build_index.h"

namespace quarry::testing {

class WatchedDevice final : public Device {
 public:
  struct Seen {
    uint32_t first_token, rows;
    std::vector<float> o;  // [rows][heads][head_dim]
  };
  std::vector<Seen> seen;  // by call
  uint32_t asked_to_record = 0;

  // Keeps nothing.
  absl::StatusOr<std::unique_ptr<DeviceRecording>> Record(
      const std::function<void()>& call) override {
    ++asked_to_record;
    return Device::Record(call);
  }

  void Attend(const DeviceAttention& a) override {
    inner_->Attend(a);
    See(a);
  }
  absl::StatusOr<std::unique_ptr<SparsePlan>> PlanSparse(std::span<const HeadPattern> patterns,
                                                         TokenRange prefill,
                                                         const DeviceAttention& last) override {
    return inner_->PlanSparse(patterns, prefill, last);
  }
  absl::Status AttendSparse(const SparsePlan& plan, const DeviceAttention& a) override {
    const absl::Status status = inner_->AttendSparse(plan, a);
    See(a);
    return status;
  }

  std::string_view name() const override { return "watched"; }
  absl::StatusOr<DeviceBuffer> Allocate(size_t bytes, std::string_view what) override {
    return inner_->Allocate(bytes, what);
  }
  DeviceStats Stats() const override { return inner_->Stats(); }
  absl::Status Upload(void* to, std::span<const std::byte> from) override {
    return inner_->Upload(to, from);
  }
  absl::Status Download(std::span<std::byte> to, const void* from) override {
    return inner_->Download(to, from);
  }
  void Copy(const DeviceCopy& copy) override { inner_->Copy(copy); }
  void MatMul(const float* x, const DeviceMatrix& w, float* y, size_t rows,
              Output output) override {
    inner_->MatMul(x, w, y, rows, output);
  }
  void RmsNorm(const float* x, const DeviceMatrix& weight, float eps, float* y,
               size_t rows) override {
    inner_->RmsNorm(x, weight, eps, y, rows);
  }
  void Rope(const DeviceRope& rope) override { inner_->Rope(rope); }
  void SwiGlu(const float* gate_up, float* y, size_t rows, size_t width) override {
    inner_->SwiGlu(gate_up, y, rows, width);
  }
  void Embed(const DeviceMatrix& table, std::span<const uint32_t> tokens, float* y) override {
    inner_->Embed(table, tokens, y);
  }
  void Choose(const DeviceLogits& logits, std::span<const TokenDraw> draws,
              ChosenToken* out) override {
    inner_->Choose(logits, draws, out);
  }
  void Round(const float* from, DType dtype, void* to, size_t elements) override {
    inner_->Round(from, dtype, to, elements);
  }
  void StoreKv(const DeviceKvStore& store) override { inner_->StoreKv(store); }
  void Merge(float* o_a, float* lse_a, const float* o_b, const float* lse_b, size_t rows,
             uint32_t head_dim) override {
    inner_->Merge(o_a, lse_a, o_b, lse_b, rows, head_dim);
  }
  void Release(void* data, size_t bytes) override { inner_->Release(data, bytes); }

 private:
  void See(const DeviceAttention& a) {
    seen.push_back({a.first_token, a.rows, {}});
    seen.back().o.assign(a.o, a.o + size_t{a.rows} * a.heads * a.head_dim);
  }

  const std::unique_ptr<Device> inner_ = MakeHostDevice({.threads = 2});
};

}  // namespace quarry::testing

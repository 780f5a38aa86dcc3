// A device whose memory the host cannot touch: whoever does dies. It shows that the worker keeps
// to the seam, as it must for a device with memory of its own.
#pragma once

#include <sys/mman.h>

#include <memory>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "gpu/device.h"
#include "gpu/sparse/build_index.h"
#include "proto/check.h"
#include "proto/status_macros.h"

namespace quarry::testing {

class GuardedDevice final : public Device {
  static constexpr size_t kBytes = size_t{1} << 30;

  template <typename F>
  auto Run(const F& f) {
    struct Open {
      explicit Open(GuardedDevice* d) : device(d) { device->Protect(PROT_READ | PROT_WRITE); }
      ~Open() { device->Protect(PROT_NONE); }
      GuardedDevice* const device;
    } open(this);
    return f();
  }
  void Protect(int protection) {
    const size_t pages = (end_ + 4095) / 4096 * 4096;
    QUARRY_CHECK(mprotect(memory_, pages, protection) == 0);
  }

 public:
  GuardedDevice() : inner_(MakeHostDevice({.threads = 2})) {
    memory_ = static_cast<std::byte*>(
        mmap(nullptr, kBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    QUARRY_CHECK(memory_ != MAP_FAILED);
  }
  ~GuardedDevice() override { munmap(memory_, kBytes); }

  std::string_view name() const override { return "guarded"; }
  absl::StatusOr<DeviceBuffer> Allocate(size_t bytes, std::string_view) override {
    const size_t at = end_;
    end_ += (bytes + 63) / 64 * 64;
    QUARRY_CHECK(end_ <= kBytes);  // memory is not used twice: a test is short
    used_ += bytes;
    peak_ = std::max(peak_, used_);
    return DeviceBuffer(this, memory_ + at, bytes);
  }
  void Release(void*, size_t bytes) override { used_ -= bytes; }
  DeviceStats Stats() const override { return {kBytes, used_, peak_}; }

  absl::Status Upload(void* to, std::span<const std::byte> from) override {
    return Run([&] { return inner_->Upload(to, from); });
  }
  absl::Status Download(std::span<std::byte> to, const void* from) override {
    return Run([&] { return inner_->Download(to, from); });
  }
  void Copy(const DeviceCopy& copy) override {
    Run([&] { inner_->Copy(copy); });
  }
  void MatMul(const float* x, const DeviceMatrix& w, float* y, size_t rows,
              Output output) override {
    Run([&] { inner_->MatMul(x, w, y, rows, output); });
  }
  void RmsNorm(const float* x, const DeviceMatrix& weight, float eps, float* y,
               size_t rows) override {
    Run([&] { inner_->RmsNorm(x, weight, eps, y, rows); });
  }
  void Rope(const DeviceRope& rope) override {
    Run([&] { inner_->Rope(rope); });
  }
  void SwiGlu(const float* gate_up, float* y, size_t rows, size_t width) override {
    Run([&] { inner_->SwiGlu(gate_up, y, rows, width); });
  }
  void Embed(const DeviceMatrix& table, std::span<const uint32_t> tokens, float* y) override {
    Run([&] { inner_->Embed(table, tokens, y); });
  }
  void Choose(const DeviceLogits& logits, std::span<const TokenDraw> draws,
              ChosenToken* out) override {
    Run([&] { inner_->Choose(logits, draws, out); });
  }
  void Round(const float* from, DType dtype, void* to, size_t elements) override {
    Run([&] { inner_->Round(from, dtype, to, elements); });
  }
  void StoreKv(const DeviceKvStore& store) override {
    Run([&] { inner_->StoreKv(store); });
  }
  void Attend(const DeviceAttention& attention) override {
    Run([&] { inner_->Attend(attention); });
  }
  absl::StatusOr<std::unique_ptr<SparsePlan>> PlanSparse(std::span<const HeadPattern> patterns,
                                                         TokenRange prefill,
                                                         const DeviceAttention& last) override {
    return Run([&] { return inner_->PlanSparse(patterns, prefill, last); });
  }
  absl::Status AttendSparse(const SparsePlan& plan, const DeviceAttention& attention) override {
    return Run([&] { return inner_->AttendSparse(plan, attention); });
  }
  void Merge(float* o_a, float* lse_a, const float* o_b, const float* lse_b, size_t rows,
             uint32_t head_dim) override {
    Run([&] { inner_->Merge(o_a, lse_a, o_b, lse_b, rows, head_dim); });
  }

 private:
  const std::unique_ptr<Device> inner_;
  std::byte* memory_ = nullptr;
  size_t end_ = 0;
  uint64_t used_ = 0, peak_ = 0;
};

}  // namespace quarry::testing

// A device that is memory alone: for what needs buffers and copies and nothing else.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <span>
#include <string_view>

#include "gpu/device.h"
#include "gpu/sparse/build_index.h"
#include "proto/check.h"

namespace quarry::testing {

// New memory is bytes that are NaNs of every dtype.
class MemoryDevice : public Device {
 public:
  ~MemoryDevice() override { QUARRY_CHECK(used_ == 0); }
  std::string_view name() const override { return "memory"; }
  absl::StatusOr<DeviceBuffer> Allocate(size_t bytes, std::string_view) override {
    const size_t rounded = (bytes + 128) / 128 * 128;
    void* const data = std::aligned_alloc(128, rounded);
    std::memset(data, 0xff, rounded);
    used_ += bytes;
    return DeviceBuffer(this, data, bytes);
  }
  void Release(void* data, size_t bytes) override {
    std::free(data);
    used_ -= bytes;
  }
  DeviceStats Stats() const override { return {}; }
  absl::Status Upload(void* to, std::span<const std::byte> from) override {
    std::memcpy(to, from.data(), from.size());
    return absl::OkStatus();
  }
  absl::Status Download(std::span<std::byte> to, const void* from) override {
    std::memcpy(to.data(), from, to.size());
    return absl::OkStatus();
  }

  // Not for these.
  void Copy(const DeviceCopy&) override { QUARRY_CHECK(false); }
  void MatMul(const float*, const DeviceMatrix&, float*, size_t, Output) override {
    QUARRY_CHECK(false);
  }
  void RmsNorm(const float*, const DeviceMatrix&, float, float*, size_t) override {
    QUARRY_CHECK(false);
  }
  void Rope(const DeviceRope&) override { QUARRY_CHECK(false); }
  void SwiGlu(const float*, float*, size_t, size_t) override { QUARRY_CHECK(false); }
  void Embed(const DeviceMatrix&, std::span<const uint32_t>, float*) override {
    QUARRY_CHECK(false);
  }
  void Choose(const DeviceLogits&, std::span<const TokenDraw>, ChosenToken*) override {
    QUARRY_CHECK(false);
  }
  void Round(const float*, DType, void*, size_t) override { QUARRY_CHECK(false); }
  void StoreKv(const DeviceKvStore&) override { QUARRY_CHECK(false); }
  void Attend(const DeviceAttention&) override { QUARRY_CHECK(false); }
  void Merge(float*, float*, const float*, const float*, size_t, uint32_t) override {
    QUARRY_CHECK(false);
  }

 private:
  size_t used_ = 0;
};

}  // namespace quarry::testing

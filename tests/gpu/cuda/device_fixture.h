// What the checks of the CUDA device share: one device per program, random inputs, outputs that
// are poisoned before and guarded behind.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "gpu/cuda/cuda_device.h"
#include "proto/half.h"
#include "tests/support/normal_floats.h"
#include "tests/support/seed.h"

namespace quarry {

// Bytes that are NaNs of every dtype.
inline constexpr std::byte kPoison{0xff};

// f(i) for i < n on all cores.
template <typename F>
void ForAll(size_t n, const F& f) {
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i = next++; i < n; i = next++) f(i);
  };
  std::vector<std::thread> threads;
  for (unsigned t = 1; t < std::thread::hardware_concurrency(); ++t) threads.emplace_back(work);
  work();
  for (std::thread& t : threads) t.join();
}

class CudaDeviceCheck : public ::testing::Test {
 protected:
  // The first CUDA device, or why there is none.
  static const absl::StatusOr<std::unique_ptr<Device>>& Shared() {
    static const auto* const device = [] {
      auto* made = new absl::StatusOr<std::unique_ptr<Device>>(MakeCudaDevice({}));
      if (made->ok()) std::printf("device: %s\n", std::string((**made)->name()).c_str());
      return made;
    }();
    return *device;
  }

  void SetUp() override {
    if (!Shared().ok()) GTEST_SKIP() << "no CUDA device: " << Shared().status();
    device_ = Shared()->get();
  }

  // Everything before has been done without a failure, and nothing was left behind.
  void TearDown() override {
    if (device_ == nullptr) return;
    std::byte none;
    DeviceBuffer any = Allocate(1);
    const absl::Status status = device_->Download(std::span(&none, 1), any.raw());
    EXPECT_TRUE(status.ok()) << status;
  }

  std::vector<float> Random(size_t n, float size = 1.0f) { return NormalFloats(random_, n, size); }
  uint32_t Below(uint32_t n) { return static_cast<uint32_t>(random_() % n); }

  // `values` rounded to `dtype`, as bytes.
  static std::vector<std::byte> Stored(const std::vector<float>& values, DType dtype) {
    std::vector<std::byte> out(values.size() * DTypeBytes(dtype));
    for (size_t i = 0; i < values.size(); ++i) StoreFromFloat(out.data(), i, dtype, values[i]);
    return out;
  }
  static std::vector<float> Rounded(std::vector<float> values, DType dtype) {
    const std::vector<std::byte> stored = Stored(values, dtype);
    for (size_t i = 0; i < values.size(); ++i) values[i] = LoadAsFloat(stored.data(), i, dtype);
    return values;
  }

  DeviceBuffer Allocate(size_t bytes) {
    auto out = device_->Allocate(bytes, "check");
    EXPECT_TRUE(out.ok()) << out.status();
    return out.ok() ? *std::move(out) : DeviceBuffer();
  }
  DeviceBuffer Put(std::span<const std::byte> bytes) {
    DeviceBuffer out = Allocate(bytes.size());
    const absl::Status status = device_->Upload(out.raw(), bytes);
    EXPECT_TRUE(status.ok()) << status;
    return out;
  }
  DeviceBuffer Put(const std::vector<float>& values) {
    return Put(std::as_bytes(std::span(values)));
  }

  // Room for an output of n floats, poisoned, with a guard behind it.
  DeviceBuffer Output(size_t n) {
    return Put(std::vector<std::byte>(n * sizeof(float) + kGuardBytes, kPoison));
  }
  // The output, once everything has run; its guard must be as it was.
  std::vector<float> Get(const DeviceBuffer& output) {
    std::vector<std::byte> bytes(output.bytes());
    const absl::Status status = device_->Download(bytes, output.raw());
    EXPECT_TRUE(status.ok()) << status;
    const size_t n = (bytes.size() - kGuardBytes) / sizeof(float);
    EXPECT_TRUE(std::all_of(bytes.begin() + static_cast<ptrdiff_t>(n * sizeof(float)), bytes.end(),
                            [](std::byte b) { return b == kPoison; }))
        << "written behind the output";
    std::vector<float> out(n);
    std::memcpy(out.data(), bytes.data(), n * sizeof(float));
    return out;
  }

  DeviceMatrix Load(const std::vector<float>& values, size_t rows, DType dtype) {
    const std::vector<std::byte> bytes = Stored(values, dtype);
    const HostMatrix stored{bytes, dtype, rows};
    auto out = device_->Load(std::span(&stored, 1), values.size() / rows, "check");
    EXPECT_TRUE(out.ok()) << out.status();
    EXPECT_EQ(out->dtype, dtype);
    return *std::move(out);
  }

  // |got - want| / |want|, of vectors; infinite if one has a NaN that the other lacks.
  template <typename T>
  static double Error(std::span<const float> got, std::span<const T> want) {
    double square = 0, size = 0;
    for (size_t i = 0; i < want.size(); ++i) {
      square += (got[i] - want[i]) * (got[i] - want[i]);
      size += double{want[i]} * want[i];
    }
    const double error = std::sqrt(square / std::max(size, 1e-30));
    return std::isnan(error) ? INFINITY : error;
  }
  // The largest error of any row.
  template <typename T>
  static double WorstRow(const std::vector<float>& got, const std::vector<T>& want, size_t width) {
    double worst = 0;
    for (size_t at = 0; at + width <= want.size(); at += width) {
      worst = std::max(worst, Error<T>(std::span(got).subspan(at, width),
                                       std::span(want).subspan(at, width)));
    }
    return worst;
  }

  static constexpr size_t kGuardBytes = 1024;
  Device* device_ = nullptr;
  std::mt19937_64 random_{Seed()};
};

}  // namespace quarry

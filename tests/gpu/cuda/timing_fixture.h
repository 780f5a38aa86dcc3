// What the timings of the CUDA device share.
#pragma once

#include <chrono>

#include "tests/gpu/cuda/device_fixture.h"

namespace quarry {

class CudaTimingFixture : public CudaDeviceCheck {
 protected:
  void Wait() {
    std::byte one;
    ASSERT_TRUE(device_->Download(std::span(&one, 1), any_.raw()).ok());
  }
  // Seconds of one call of f, of as many as take about a quarter of a second.
  template <typename F>
  double Time(const F& f) {
    using Clock = std::chrono::steady_clock;
    if (any_.bytes() == 0) any_ = Allocate(1);
    for (int i = 0; i < 3; ++i) f();
    Wait();
    for (int n = 4;; n *= 2) {
      const auto start = Clock::now();
      for (int i = 0; i < n; ++i) f();
      Wait();
      const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
      if (seconds > 0.25 || n > 1 << 16) return seconds / n;
    }
  }
  void TearDown() override {
    any_.Reset();
    CudaDeviceCheck::TearDown();
  }
  // Random values of `elements` of two bytes, made from few so that it does not take long.
  DeviceBuffer Noise(size_t elements, float size, bool wide) {
    const std::vector<float> some = Random(1 << 20, size);
    const DeviceBuffer from = Put(some);
    DeviceBuffer out = Allocate(elements * (wide ? 4 : 2));
    for (size_t at = 0; at < elements; at += some.size()) {
      const size_t n = std::min(some.size(), elements - at);
      const size_t bytes = wide ? 4 : 2;
      device_->Round(from.floats(), wide ? DType::kFp32 : DType::kBf16, out.raw() + at * bytes, n);
    }
    return out;
  }

  DeviceBuffer any_;
};

}  // namespace quarry

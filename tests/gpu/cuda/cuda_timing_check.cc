// How fast the CUDA device is. Not a check; asked for by
//   cuda_device_check --gtest_also_run_disabled_tests --gtest_filter='*Timing*'
// | what         | workload                                                                  |
// | attention    | a prefill's last 8,192 rows at 8K and 32K tokens, and one row (decode),   |
// |              | 32/8 heads of 128, bf16; causal work only counts                          |
// | product      | bf16 8,192 x 4,096 x 4,096 and x 14,336; one row of each (GB/s of weights) |
// | copy         | 1 GiB, and 256-byte vectors of 64 MiB from [token][head] to [head][token] |
// Products of many rows include the rounding of their activations.
#include "tests/gpu/cuda/timing_fixture.h"

namespace quarry {
namespace {

class DISABLED_CudaTiming : public CudaTimingFixture {};

TEST_F(DISABLED_CudaTiming, Attention) {
  constexpr uint32_t kHeads = 32, kKvHeads = 8, kHeadDim = 128;
  for (const uint32_t tokens : {8192u, 32768u}) {
    const size_t stride = size_t{tokens} * kHeadDim;
    const DeviceBuffer k = Noise(stride * kKvHeads, 1, false), v = Noise(stride * kKvHeads, 1, false);
    const DeviceKv part{k.raw(), v.raw(), stride * 2, {0, tokens}};
    for (const uint32_t rows : {8192u, 1u, 16u}) {
      const DeviceBuffer q = Noise(size_t{rows} * kHeads * kHeadDim, 1, true);
      const DeviceBuffer o = Allocate(q.bytes()), lse = Allocate(size_t{rows} * kHeads * 4);
      const DeviceAttention a{std::span(&part, 1), DType::kBf16,  kHeads,     kKvHeads,
                              kHeadDim,            tokens - rows, rows,       0,
                              q.floats(),          o.floats(),    lse.floats()};
      const double seconds = Time([&] { device_->Attend(a); });
      double pairs = 0;
      for (uint32_t r = 0; r < rows; ++r) pairs += a.Visible(r).size();
      std::printf("attention, %5u rows at %5u tokens: %9.1f us, %6.1f TFLOP/s, %6.0f GB/s of K and V\n",
                  rows, tokens, seconds * 1e6, pairs * kHeads * kHeadDim * 4 / seconds * 1e-12,
                  double{2} * k.bytes() / seconds * 1e-9);
    }
  }
}

TEST_F(DISABLED_CudaTiming, Products) {
  for (const size_t out : {4096, 14336}) {
    const size_t in = 4096;
    DeviceMatrix w;
    w.data = Noise(out * in, 0.02f, false);
    w.dtype = DType::kBf16;
    w.rows = out;
    w.width = in;
    for (const size_t rows : {8192, 256, 1}) {
      const DeviceBuffer x = Noise(rows * in, 1, true), y = Allocate(rows * out * 4);
      const double seconds = Time([&] {
        device_->MatMul(x.floats(), w, y.floats(), rows, Device::Output::kOverwrite);
      });
      std::printf("product, %4zu x %zu x %5zu: %9.1f us, %6.1f TFLOP/s, %6.0f GB/s of weights\n", rows, in,
                  out, seconds * 1e6, 2.0 * rows * in * out / seconds * 1e-12,
                  double{1} * w.data.bytes() / seconds * 1e-9);
    }
  }
}

TEST_F(DISABLED_CudaTiming, Copies) {
  const size_t bytes = size_t{1} << 30;
  const DeviceBuffer a = Noise(bytes / 2, 1, false), b = Allocate(bytes);
  const double whole = Time([&] { device_->Copy({b.raw(), 0, a.raw(), 0, bytes, 1}); });
  std::printf("copy of 1 GiB: %.1f us, %.0f GB/s read and written\n", whole * 1e6,
              2.0 * bytes / whole * 1e-9);
  const size_t vector = 256, heads = 8, tokens = 8192;
  const double strips = Time([&] {
    for (size_t h = 0; h < heads; ++h) {
      device_->Copy({b.raw() + h * tokens * vector, vector, a.raw() + h * vector, heads * vector,
                     vector, tokens});
    }
  });
  std::printf("8 copies of 8,192 vectors of 256 bytes: %.1f us, %.0f GB/s read and written\n", strips * 1e6,
              2.0 * heads * tokens * vector / strips * 1e-9);
  std::vector<std::byte> host(size_t{256} << 20);
  const double up = Time([&] { ASSERT_TRUE(device_->Upload(b.raw(), host).ok()); });
  const double down = Time([&] { ASSERT_TRUE(device_->Download(host, b.raw()).ok()); });
  std::printf("256 MiB: up %.1f GB/s, down %.1f GB/s\n", host.size() / up * 1e-9, host.size() / down * 1e-9);
}

TEST_F(DISABLED_CudaTiming, Rows) {
  const size_t rows = 8192, width = 4096;
  const DeviceBuffer x = Noise(rows * width, 1, true), y = Allocate(rows * width * 4);
  const DeviceMatrix weight = Load(Random(width), 1, DType::kBf16);
  const double norm = Time([&] { device_->RmsNorm(x.floats(), weight, 1e-5f, y.floats(), rows); });
  const double round = Time([&] { device_->Round(x.floats(), DType::kBf16, y.raw(), rows * width); });
  const std::vector<float> inv_freq(64, 0.01f);
  const double rope = Time([&] {
    device_->Rope({y.floats(), 0, static_cast<uint32_t>(rows), 32, 128, inv_freq, 1.0f});
  });
  const double gate = Time([&] { device_->SwiGlu(x.floats(), y.floats(), rows, width / 2); });
  std::printf("8,192 x 4,096: norm %.0f GB/s, round %.0f, rope %.0f, SwiGlu %.0f\n",
              8e-9 * rows * width / norm, 6e-9 * rows * width / round, 8e-9 * rows * width / rope,
              6e-9 * rows * width / gate);
}

}  // namespace
}  // namespace quarry

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

// Of one token of an 8B model: what a step of decode does for each context.
TEST_F(DISABLED_CudaTiming, OneToken) {
  constexpr uint32_t kHeads = 32, kKvHeads = 8, kDim = 128;
  const std::vector<float> inv_freq(64, 0.01f);
  const DeviceBuffer q = Noise(kHeads * kDim, 1, true), o = Allocate(q.bytes()),
                     lse = Allocate(kHeads * 4);
  const DeviceBuffer wide = Noise(kKvHeads * kDim, 1, true);
  const DeviceBuffer place = Put(std::vector<std::byte>(sizeof(DevicePlace)));
  const auto* const at = reinterpret_cast<const DevicePlace*>(place.raw());
  const double rope = Time([&] {
    device_->Rope({q.floats(), 7, 1, kHeads, kDim, inv_freq, 1.0f});
  });
  const double placed_rope = Time([&] {
    device_->Rope({q.floats(), 7, 1, kHeads, kDim, inv_freq, 1.0f, at});
  });
  const double round =
      Time([&] { device_->Round(wide.floats(), DType::kBf16, o.raw(), kKvHeads * kDim); });
  std::printf("a token's rope: %.2f us (%.2f by a place), rounding: %.2f\n", rope * 1e6,
              placed_rope * 1e6, round * 1e6);
  for (const uint32_t tokens : {64u, 640u, 2048u, 32768u}) {
    const DeviceBuffer k = Noise(size_t{kKvHeads} * tokens * kDim, 1, false);
    const DeviceBuffer v = Noise(size_t{kKvHeads} * tokens * kDim, 1, false);
    const DevicePlace told{tokens - 1, 0, 0};
    ASSERT_TRUE(device_->Upload(place.raw(), std::as_bytes(std::span(&told, 1))).ok());
    DeviceKvStore store{wide.raw(), wide.raw(), k.raw(),  v.raw(),    size_t{tokens} * kDim * 2,
                        kDim * 2,   1,          kKvHeads, tokens - 1, at};
    const double stored = Time([&] { device_->StoreKv(store); });
    const DeviceKv part{k.raw(), v.raw(), store.head_stride, {0, tokens}};
    DeviceAttention a;
    a.parts = {&part, 1};
    a.heads = kHeads;
    a.kv_heads = kKvHeads;
    a.head_dim = kDim;
    a.first_token = tokens - 1;
    a.rows = 1;
    a.q = q.floats();
    a.o = o.floats();
    a.lse = lse.floats();
    const double attended = Time([&] { device_->Attend(a); });
    a.place = at;
    const double placed = Time([&] { device_->Attend(a); });
    std::printf("%5u tokens: K/V stored in %.2f us, attended in %.2f (%.2f by a place)\n", tokens,
                stored * 1e6, attended * 1e6, placed * 1e6);
  }
}

TEST_F(DISABLED_CudaTiming, ChosenTokens) {
  constexpr uint32_t kVocab = 128256, kTile = 53248;
  for (const uint32_t rows : {1u, 8u}) {
    const DeviceBuffer logits = Put(Random(size_t{rows} * kVocab, 3)),
                       out = Allocate(rows * sizeof(ChosenToken));
    const double read = Time([&] {
      std::vector<float> all(size_t{rows} * kVocab);
      ASSERT_TRUE(device_->Download(std::as_writable_bytes(std::span(all)), logits.raw()).ok());
    });
    for (const TokenDraw& draw : {TokenDraw{}, TokenDraw{0.8, 1, 0.7}, TokenDraw{0.8, 0.9, 0.7}}) {
      const std::vector<TokenDraw> draws(rows, draw);
      const double chosen = Time([&] {
        device_->Choose({logits.floats(), rows, kVocab, kTile}, draws,
                        reinterpret_cast<ChosenToken*>(out.raw()));
      });
      std::printf(
          "a token of %u rows of %u logits, temperature %.1f, top_p %.1f: %.1f us; the logits come "
          "down in %.1f us\n",
          rows, kVocab, draw.temperature, draw.top_p, chosen * 1e6, read * 1e6);
    }
  }
}

}  // namespace
}  // namespace quarry

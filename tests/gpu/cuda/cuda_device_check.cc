// The CUDA device's memory, products and kernels of rows, against double references.
#include "absl/strings/match.h"
#include "gpu/sampler.h"
#include "tests/gpu/cuda/device_fixture.h"
#include "tests/gpu/token_choices.h"

namespace quarry {
namespace {

constexpr DType kDTypes[] = {DType::kBf16, DType::kFp16, DType::kFp32};

TEST_F(CudaDeviceCheck, TheBudgetCoversEverything) {
  const DeviceStats before = device_->Stats();
  EXPECT_GT(before.overhead_bytes, 0u);
  DeviceBuffer some = Allocate(300 << 20);
  const DeviceStats stats = device_->Stats();
  std::printf("budget %.0f MiB: arena %.1f used, %.1f peak, %.1f mapped; CUDA itself %.1f; the "
              "driver says %.1f taken of the card, %.1f not accounted for\n",
              stats.capacity_bytes / 1048576.0, stats.used_bytes / 1048576.0,
              stats.peak_bytes / 1048576.0, stats.mapped_bytes / 1048576.0,
              stats.overhead_bytes / 1048576.0, stats.driver_used_bytes / 1048576.0,
              (double{1} * stats.driver_used_bytes - stats.mapped_bytes - stats.overhead_bytes) /
                  1048576.0);
  EXPECT_GE(stats.used_bytes, before.used_bytes + (300 << 20));
  EXPECT_GE(stats.mapped_bytes, stats.used_bytes);
  EXPECT_LE(stats.mapped_bytes + stats.overhead_bytes, stats.capacity_bytes);
  EXPECT_GE(stats.driver_used_bytes, stats.mapped_bytes);
  const absl::Status refused = device_->Allocate(stats.capacity_bytes, "everything").status();
  EXPECT_TRUE(absl::IsResourceExhausted(refused));
  for (const std::string& word : {std::string("everything"), std::to_string(stats.capacity_bytes),
                                  std::to_string(stats.used_bytes + stats.overhead_bytes)}) {
    EXPECT_TRUE(absl::StrContains(refused.message(), word)) << refused << " lacks " << word;
  }
  // All that is left, to its last page.
  auto rest = device_->Allocate(
      (stats.capacity_bytes - stats.overhead_bytes) / (2 << 20) * (2 << 20) - stats.used_bytes,
      "the rest");
  ASSERT_TRUE(rest.ok()) << rest.status();
  const DeviceStats full = device_->Stats();
  EXPECT_LE(full.mapped_bytes + full.overhead_bytes, full.capacity_bytes);
  std::vector<std::byte> end(512, std::byte{7}), back(512);
  ASSERT_TRUE(device_->Upload(rest->raw() + rest->bytes() - 512, end).ok());
  ASSERT_TRUE(device_->Download(back, rest->raw() + rest->bytes() - 512).ok());
  EXPECT_EQ(back, end);
}

TEST_F(CudaDeviceCheck, MissingCardsAreNamed) {
  const absl::Status status = MakeCudaDevice({.ordinal = 77}).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status));
  EXPECT_TRUE(absl::StrContains(status.message(), "cuda:77")) << status;
  EXPECT_TRUE(absl::IsResourceExhausted(MakeCudaDevice({.capacity_bytes = 1 << 20}).status()));
}

TEST_F(CudaDeviceCheck, BytesOfAnySizeComeBack) {
  for (const size_t bytes : {1, 3, 4096, 5 << 20, (4 << 20) + 1, (16 << 20) - 3}) {
    std::vector<std::byte> in(bytes), out(bytes);
    for (size_t i = 0; i < bytes; ++i) in[i] = static_cast<std::byte>(random_());
    const DeviceBuffer buffer = Allocate(bytes + 1);
    ASSERT_TRUE(device_->Upload(buffer.raw() + 1, in).ok());
    const std::vector<std::byte> before = in;
    std::fill(in.begin(), in.end(), std::byte{0});  // the host may reuse it
    ASSERT_TRUE(device_->Download(out, buffer.raw() + 1).ok());
    ASSERT_EQ(out, before) << bytes;
  }
}

TEST_F(CudaDeviceCheck, FailuresAreReportedOnceAndNameTheOperation) {
  const DeviceBuffer buffer = Output(4096);
  DeviceAttention a;
  a.dtype = DType::kFp32;
  a.heads = a.kv_heads = a.rows = 1;
  a.head_dim = 1024;  // no kernel
  a.q = a.o = a.lse = buffer.floats();
  device_->Attend(a);
  std::byte one;
  const absl::Status status = device_->Download(std::span(&one, 1), buffer.raw());
  EXPECT_FALSE(status.ok());
  EXPECT_TRUE(absl::StrContains(status.message(), "Attend")) << status;
  EXPECT_TRUE(device_->Download(std::span(&one, 1), buffer.raw()).ok());
}

TEST_F(CudaDeviceCheck, ReleasedMemoryIsSafeInTheOrderOfOperations) {
  for (int round = 0; round < 50; ++round) {
    const std::vector<float> values = Random(100000);
    DeviceBuffer out = Output(values.size());
    {
      const DeviceBuffer in = Put(values);
      device_->Copy({out.raw(), 0, in.raw(), 0, values.size() * 4, 1});
    }
    const DeviceBuffer other = Put(Random(100000));  // where `in` was
    ASSERT_EQ(Get(out), values);
  }
}

TEST_F(CudaDeviceCheck, LoadStacksExactly) {
  const std::vector<float> a = Rounded(Random(3 * 40), DType::kBf16),
                           b = Rounded(Random(5 * 40), DType::kFp16);
  const std::vector<std::byte> stored_a = Stored(a, DType::kBf16), stored_b = Stored(b, DType::kFp16);
  const HostMatrix parts[] = {{stored_a, DType::kBf16, 3}, {stored_b, DType::kFp16, 5}};
  auto mixed = device_->Load(parts, 40, "mixed");
  ASSERT_TRUE(mixed.ok());
  EXPECT_EQ(mixed->dtype, DType::kFp32);
  EXPECT_EQ(mixed->rows, 8u);
  const uint32_t rows[] = {7, 0, 2, 3};
  DeviceBuffer y = Output(4 * 40);
  device_->Embed(*mixed, rows, y.floats());
  const std::vector<float> got = Get(y);
  for (size_t r = 0; r < 4; ++r) {
    for (size_t i = 0; i < 40; ++i) {
      const float want = rows[r] < 3 ? a[rows[r] * 40 + i] : b[(rows[r] - 3) * 40 + i];
      ASSERT_EQ(got[r * 40 + i], want);
    }
  }
}

TEST_F(CudaDeviceCheck, ProductsAgree) {
  struct Shape {
    size_t rows, out, in;
  };
  const Shape shapes[] = {{1, 8, 16},      {1, 1000, 512},  {2, 96, 72},    {3, 513, 129},
                          {7, 33, 1},      {17, 1024, 768}, {64, 640, 640}, {300, 200, 1111},
                          {4097, 256, 64}, {5000, 33, 40},  {129, 4096, 2048}};
  for (const DType dtype : kDTypes) {
    for (const Shape& s : shapes) {
      const std::vector<float> x = Random(s.rows * s.in), w = Random(s.out * s.in);
      const std::vector<float> wide_x = Rounded(x, dtype), wide_w = Rounded(w, dtype);
      const std::vector<float> before = Random(s.rows * s.out);
      const DeviceMatrix weights = Load(w, s.out, dtype);
      const DeviceBuffer in = Put(x), added = Put(before);
      const DeviceBuffer over = Output(s.rows * s.out);
      device_->MatMul(in.floats(), weights, over.floats(), s.rows, Device::Output::kOverwrite);
      device_->MatMul(in.floats(), weights, added.floats(), s.rows, Device::Output::kAccumulate);
      std::vector<double> want(s.rows * s.out), sum(want.size());
      ForAll(s.rows, [&](size_t r) {
        for (size_t o = 0; o < s.out; ++o) {
          double total = 0;
          for (size_t i = 0; i < s.in; ++i) {
            total += double{wide_x[r * s.in + i]} * wide_w[o * s.in + i];
          }
          want[r * s.out + o] = total;
          sum[r * s.out + o] = total + before[r * s.out + o];
        }
      });
      // x is rounded in `want` too: only sums differ.
      const double limit = dtype == DType::kFp32 ? 1e-5 : 1e-3;
      const std::string where = std::string(DTypeName(dtype)) + " " + std::to_string(s.rows) + "x" +
                                std::to_string(s.out) + "x" + std::to_string(s.in);
      EXPECT_LE(WorstRow(Get(over), want, s.out), limit) << where;
      std::vector<float> accumulated(before.size());
      ASSERT_TRUE(device_->Download(std::as_writable_bytes(std::span(accumulated)), added.raw()).ok());
      EXPECT_LE(WorstRow(accumulated, sum, s.out), limit) << where;
    }
  }
}

TEST_F(CudaDeviceCheck, RmsNormAgrees) {
  for (const DType dtype : kDTypes) {
    for (const auto& [rows, width] : {std::pair<size_t, size_t>{1, 1}, {3, 96}, {300, 1111}, {17, 8192}}) {
      const std::vector<float> x = Random(rows * width), weight = Rounded(Random(width), dtype);
      const DeviceMatrix by = Load(weight, 1, dtype);
      const DeviceBuffer in = Put(x), out = Output(rows * width);
      device_->RmsNorm(in.floats(), by, 1e-5f, out.floats(), rows);
      std::vector<double> want(x.size());
      for (size_t r = 0; r < rows; ++r) {
        double squares = 0;
        for (size_t i = 0; i < width; ++i) squares += std::pow(double{x[r * width + i]}, 2);
        const double scale = 1 / std::sqrt(squares / width + double{1e-5f});
        for (size_t i = 0; i < width; ++i) {
          want[r * width + i] = x[r * width + i] * scale * weight[i];
        }
      }
      EXPECT_LE(WorstRow(Get(out), want, width), 1e-5) << width;
      device_->RmsNorm(in.floats(), by, 1e-5f, in.floats(), rows);  // in place
      std::vector<float> placed(x.size());
      ASSERT_TRUE(device_->Download(std::as_writable_bytes(std::span(placed)), in.raw()).ok());
      EXPECT_LE(WorstRow(placed, want, width), 1e-5) << width;
    }
  }
}

TEST_F(CudaDeviceCheck, RopeAgreesUpToAMillionTokens) {
  struct Case {
    uint32_t first, rows, heads, head_dim, pairs;
  };
  for (const Case& c : {Case{0, 300, 3, 32, 12}, {131000, 5, 32, 128, 64}, {1048000, 577, 9, 96, 48},
                        {999999, 1, 1, 512, 256}}) {
    std::vector<float> inv_freq(c.pairs);
    for (uint32_t i = 0; i < c.pairs; ++i) {
      inv_freq[i] = std::pow(10000.0f, -static_cast<float>(i) / static_cast<float>(c.pairs));
    }
    const std::vector<float> x = Random(size_t{c.rows} * c.heads * c.head_dim);
    DeviceBuffer out = Output(x.size());
    ASSERT_TRUE(device_->Upload(out.raw(), std::as_bytes(std::span(x))).ok());
    device_->Rope({out.floats(), c.first, c.rows, c.heads, c.head_dim, inv_freq, 1.19f});
    std::vector<double> want(x.begin(), x.end());
    for (uint32_t r = 0; r < c.rows; ++r) {
      for (uint32_t i = 0; i < c.pairs; ++i) {
        const float angle = static_cast<float>(c.first + r) * inv_freq[i];
        const double cosine = std::cos(double{angle}) * 1.19f, sine = std::sin(double{angle}) * 1.19f;
        for (uint32_t h = 0; h < c.heads; ++h) {
          const size_t at = (size_t{r} * c.heads + h) * c.head_dim + i;
          want[at] = x[at] * cosine - x[at + c.pairs] * sine;
          want[at + c.pairs] = x[at + c.pairs] * cosine + x[at] * sine;
        }
      }
    }
    const std::vector<float> got = Get(out);
    for (size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], want[i], 1e-5) << i;
  }
}

TEST_F(CudaDeviceCheck, SwiGluAgrees) {
  for (const auto& [rows, width] : {std::pair<size_t, size_t>{1, 1}, {3, 257}, {300, 1111}, {1024, 14336}}) {
    const std::vector<float> x = Random(rows * 2 * width, 5.0f);
    const DeviceBuffer in = Put(x), out = Output(rows * width);
    device_->SwiGlu(in.floats(), out.floats(), rows, width);
    std::vector<double> want(rows * width);
    for (size_t r = 0; r < rows; ++r) {
      for (size_t i = 0; i < width; ++i) {
        const double gate = x[r * 2 * width + i], up = x[r * 2 * width + width + i];
        want[r * width + i] = gate / (1 + std::exp(-gate)) * up;
      }
    }
    EXPECT_LE(WorstRow(Get(out), want, width), 1e-5);
  }
}

TEST_F(CudaDeviceCheck, EmbedIsExact) {
  for (const DType dtype : kDTypes) {
    const size_t vocab = 777, width = 130;
    const std::vector<float> table = Rounded(Random(vocab * width), dtype);
    const DeviceMatrix loaded = Load(table, vocab, dtype);
    for (const size_t count : {1, 960, 961, 3000}) {
      std::vector<uint32_t> tokens(count);
      for (uint32_t& t : tokens) t = Below(vocab);
      const DeviceBuffer out = Output(count * width);
      device_->Embed(loaded, tokens, out.floats());
      const std::vector<float> got = Get(out);
      for (size_t r = 0; r < count; ++r) {
        ASSERT_EQ(0, std::memcmp(&got[r * width], &table[tokens[r] * width], width * 4));
      }
    }
  }
}

TEST_F(CudaDeviceCheck, RoundIsToNearestEven) {
  std::vector<float> values = {0.0f, -0.0f, 1.00390625f, 1.01171875f, 65504.0f, 65519.9f, 65520.0f,
                               -1e30f, 3.4e38f, INFINITY, -INFINITY, 5.9604645e-8f, 2.9802322e-8f,
                               6.1e-5f, 1e-40f, 9.18355e-41f};
  while (values.size() < 70001) {
    values.push_back(std::bit_cast<float>(static_cast<uint32_t>(random_())));
  }
  for (const DType dtype : kDTypes) {
    for (const size_t skip : {0, 1, 4}) {
      const std::vector<float> from(values.begin() + static_cast<ptrdiff_t>(skip), values.end());
      const DeviceBuffer in = Put(values);
      const size_t bytes = DTypeBytes(dtype);
      const DeviceBuffer out = Output((from.size() * bytes + 3) / 4 + 1);
      device_->Round(in.floats() + skip, dtype, out.raw(), from.size());
      const std::vector<float> got = Get(out);
      for (size_t i = 0; i < from.size(); ++i) {
        std::byte want[4];
        StoreFromFloat(want, 0, dtype, from[i]);
        const auto* at = reinterpret_cast<const std::byte*>(got.data()) + i * bytes;
        if (std::isnan(from[i])) {
          ASSERT_TRUE(std::isnan(LoadAsFloat(at, 0, dtype)));
        } else {
          ASSERT_EQ(0, std::memcmp(want, at, bytes)) << from[i] << " " << DTypeName(dtype);
        }
      }
    }
  }
}

TEST_F(CudaDeviceCheck, CopiesTouchNothingElse) {
  struct Case {
    size_t bytes, count, to_stride, from_stride, to_at, from_at;
  };
  std::vector<Case> cases = {{256, 3000, 256, 2048, 0, 16}, {3, 7, 10, 20, 1, 2},
                             {1 << 20, 8, (1 << 20) + 4096, 1 << 20, 0, 0}, {20, 100, 24, 20, 4, 8},
                             {192, 33, 192, 1536, 32, 16}, {16, 1, 3, 5, 16, 0}};
  for (int i = 0; i < 40; ++i) {
    Case c{1 + Below(300), 1 + Below(50), 0, 0, Below(40), Below(40)};
    c.to_stride = c.bytes + Below(64);
    c.from_stride = Below(400);
    cases.push_back(c);
  }
  for (const Case& c : cases) {
    std::vector<std::byte> from(c.from_at + c.count * std::max(c.from_stride, c.bytes) + c.bytes);
    for (std::byte& b : from) b = static_cast<std::byte>(random_());
    std::vector<std::byte> to(c.to_at + c.count * c.to_stride + c.bytes + 64, kPoison);
    const DeviceBuffer in = Put(from), out = Put(to);
    device_->Copy({out.raw() + c.to_at, c.to_stride, in.raw() + c.from_at, c.from_stride, c.bytes,
                   c.count});
    std::vector<std::byte> got(to.size());
    ASSERT_TRUE(device_->Download(got, out.raw()).ok());
    for (size_t i = 0; i < c.count; ++i) {
      std::memcpy(&to[c.to_at + i * c.to_stride], &from[c.from_at + i * c.from_stride], c.bytes);
    }
    ASSERT_EQ(got, to) << c.bytes << " x " << c.count;
  }
}

TEST_F(CudaDeviceCheck, MergesAgreeAlsoWithEmptySides) {
  for (const uint32_t head_dim : {16u, 96u, 128u, 512u}) {
    const size_t rows = 301;
    std::vector<float> o_a = Random(rows * head_dim), o_b = Random(rows * head_dim);
    std::vector<float> lse_a = Random(rows, 20.0f), lse_b = Random(rows, 20.0f);
    for (size_t r = 0; r < rows; ++r) {
      for (const auto& [lse, o, every] :
           {std::tuple{&lse_a, &o_a, size_t{3}}, {&lse_b, &o_b, size_t{5}}}) {
        if (r % every != 0) continue;
        (*lse)[r] = -INFINITY;
        std::fill_n(o->begin() + static_cast<ptrdiff_t>(r * head_dim), head_dim, 0.0f);
      }
    }
    const DeviceBuffer a = Put(o_a), b = Put(o_b), la = Put(lse_a), lb = Put(lse_b);
    device_->Merge(a.floats(), la.floats(), b.floats(), lb.floats(), rows, head_dim);
    std::vector<float> o(o_a.size()), lse(rows);
    ASSERT_TRUE(device_->Download(std::as_writable_bytes(std::span(o)), a.raw()).ok());
    ASSERT_TRUE(device_->Download(std::as_writable_bytes(std::span(lse)), la.raw()).ok());
    for (size_t r = 0; r < rows; ++r) {
      const double largest = std::max(lse_a[r], lse_b[r]);
      const bool empty = std::isinf(largest);
      const double x = empty ? 0 : std::exp(lse_a[r] - largest), y = empty ? 0 : std::exp(lse_b[r] - largest);
      if (empty) {
        ASSERT_EQ(lse[r], -INFINITY);
      } else {
        ASSERT_NEAR(lse[r], largest + std::log(x + y), 1e-5);
      }
      for (uint32_t i = 0; i < head_dim; ++i) {
        const size_t at = r * head_dim + i;
        ASSERT_NEAR(o[at], empty ? 0 : (x * o_a[at] + y * o_b[at]) / (x + y), 1e-5);
      }
    }
  }
}

TEST_F(CudaDeviceCheck, ChosenTokensAreThoseOfExactArithmetic) {
  for (const auto& [vocab, tile] :
       {std::pair{128256u, 53248u}, {32064u, 32064u}, {5003u, 17u}, {1u, 1u}, {262144u, 262144u}}) {
    const uint32_t rows = vocab > 200000 ? 2 : 70;  // more than one launch
    std::vector<std::vector<float>> logits;
    std::vector<TokenDraw> draws;
    for (uint32_t r = 0; r < rows; ++r) {
      logits.push_back(testing::MadeLogits(random_, vocab));
      draws.push_back(testing::MadeDraw(random_));
    }
    if (rows > 5 && vocab > 1) logits[5][vocab - 1] = NAN;
    const std::vector<float> tiles = testing::InTiles(logits, tile);
    const DeviceBuffer on_card = Put(tiles);
    const DeviceBuffer out = Put(std::vector<std::byte>(rows * sizeof(ChosenToken), kPoison));
    std::vector<ChosenToken> chosen(rows), again(rows);
    for (std::vector<ChosenToken>* to : {&chosen, &again}) {
      device_->Choose({on_card.floats(), rows, vocab, tile}, draws,
                      reinterpret_cast<ChosenToken*>(out.raw()));
      ASSERT_TRUE(device_->Download(std::as_writable_bytes(std::span(*to)), out.raw()).ok());
    }
    for (uint32_t r = 0; r < rows; ++r) {
      if (r == 5 && vocab > 1) {
        EXPECT_EQ(chosen[r].unfit, vocab - 1);
        continue;
      }
      ASSERT_EQ(chosen[r].unfit, kEveryToken);
      EXPECT_EQ(chosen[r].id, again[r].id);
      EXPECT_EQ(testing::WrongChoice(logits[r], draws[r], chosen[r].id, 1e-5), "")
          << "row " << r << " of " << vocab << " ids, temperature " << draws[r].temperature
          << ", top_p " << draws[r].top_p;
    }
  }
}

}  // namespace
}  // namespace quarry

// The host device's operations against plain loops in double.
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "gpu/device.h"
#include "gpu/thread_team.h"
#include "gpu/weights/codes.h"
#include "gpu/weights/matrix_layout.h"
#include "proto/half.h"
#include "proto/retrieval_types.h"
#include "proto/status_macros.h"
#include "tests/gpu/token_choices.h"
#include "tests/support/normal_floats.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

// Buffers are the host's here, so tests look into them.
class HostDeviceTest : public ::testing::Test {
 protected:
  std::vector<float> Random(size_t n, float size = 1.0f) { return NormalFloats(random_, n, size); }
  DeviceMatrix Load(const std::vector<float>& values, size_t rows,
                    WeightForm form = WeightForm::kPlain) {
    const HostMatrix stored{std::as_bytes(std::span(values)), DType::kFp32, rows};
    auto out = device_->Load(std::span(&stored, 1), values.size() / rows, "test", form);
    EXPECT_TRUE(out.ok()) << out.status();
    return *std::move(out);
  }
  // What a matrix of codes stands for.
  static std::vector<float> Decoded(const DeviceMatrix& m) {
    const MatrixLayout layout = LayoutOf(m);
    const auto* const scales = reinterpret_cast<const uint16_t*>(m.data.raw() + layout.scales_at());
    std::vector<float> out(m.rows * m.width);
    for (size_t r = 0; r < m.rows; ++r) {
      DecodeRow(m.form, m.data.raw() + r * layout.row_bytes(), scales + r * layout.scales_per_row(),
                std::span(out).subspan(r * m.width, m.width));
    }
    return out;
  }

  std::mt19937 random_{Seed()};
  std::unique_ptr<Device> device_ = MakeHostDevice({.threads = 3});
};

TEST_F(HostDeviceTest, TokensAreChosenFromRowsInTiles) {
  constexpr uint32_t kRows = 4, kVocab = 100;
  for (const uint32_t tile : {1u, 7u, 100u, 200u}) {
    std::vector<std::vector<float>> rows;
    std::vector<TokenDraw> draws;
    for (uint32_t r = 0; r < kRows; ++r) {
      rows.push_back(Random(kVocab, 2));
      draws.push_back({r * 0.5, 0.9, 0.3});
    }
    rows[3][50] = NAN;
    const std::vector<float> tiles = testing::InTiles(rows, tile);
    ChosenToken chosen[kRows];
    device_->Choose({tiles.data(), kRows, kVocab, tile}, draws, chosen);
    for (uint32_t r = 0; r < 3; ++r) {
      EXPECT_EQ(chosen[r].unfit, kEveryToken);
      EXPECT_EQ(chosen[r].id, ChooseToken(rows[r], draws[r]));
    }
    EXPECT_EQ(chosen[3].unfit, 50u);
  }
}

// What a layer of decode does with a place, called one by one with the numbers themselves, and
// recorded once and replayed with the place written anew.
TEST_F(HostDeviceTest, ReplaysAreTheOperationsForOtherTokens) {
  constexpr uint32_t kHeads = 4, kKvHeads = 2, kDim = 16, kRows = 2, kRoom = 40;
  constexpr size_t kQ = size_t{kRows} * kHeads * kDim, kKv = size_t{kRows} * kKvHeads * kDim;
  const std::vector<float> inv_freq = {1.0f, 0.3f, 0.01f};
  const DeviceMatrix w = Load(Random(kKv * kQ), kKv);
  const std::vector<float> first_k = Random(kKvHeads * 5 * kDim), first_v = Random(first_k.size());
  struct Layer {
    std::vector<float> x, k, v, room_k, room_v, o, lse, y;
  };
  const Layer start{Random(kQ),
                    Random(kKv),
                    Random(kKv),
                    Random(kKvHeads * kRoom * kDim),
                    Random(kKvHeads * kRoom * kDim),
                    std::vector<float>(kQ),
                    std::vector<float>(kRows * kHeads),
                    std::vector<float>(kKv)};
  DevicePlace place;
  const auto call = [&](Layer* l, const DevicePlace& at, const DevicePlace* placed) {
    // Without a place the operations are told where things lie.
    const size_t skip = placed != nullptr ? 0 : size_t{at.kv_slot} * kDim;
    const std::vector<DeviceKv> parts = {{first_k.data(), first_v.data(), 5 * kDim * 4, {0, 5}},
                                         {l->room_k.data() + skip,
                                          l->room_v.data() + skip,
                                          kRoom * kDim * 4,
                                          {at.kv_lo, at.first_token + kRows}}};
    device_->Rope({l->x.data(), at.first_token, kRows, kHeads, kDim, inv_freq, 1.5f, placed});
    device_->StoreKv({l->k.data(), l->v.data(), l->room_k.data(), l->room_v.data(),
                      kRoom * kDim * 4, kDim * 4, kRows, kKvHeads,
                      at.kv_slot + at.first_token - at.kv_lo, placed});
    DeviceAttention a{parts, DType::kFp32, kHeads,      kKvHeads,     kDim, at.first_token, kRows,
                      0,     l->x.data(),  l->o.data(), l->lse.data()};
    a.place = placed;
    device_->Attend(a);
    device_->MatMul(l->o.data(), w, l->y.data(), 1, Device::Output::kAccumulate);
  };
  Layer replayed = start, called = start;
  const DevicePlace recorded_for{20, 10, 3};
  auto recording = device_->Record([&] { call(&replayed, recorded_for, &place); });
  ASSERT_TRUE(recording.ok()) << recording.status();
  EXPECT_EQ(replayed.y, start.y) << "run while it was recorded";
  for (const DevicePlace& at : {recorded_for, {22, 11, 4}, {24, 24, 0}, {26, 7, 19}, {5, 5, 38}}) {
    place = at;
    device_->Replay(**recording);
    call(&called, at, nullptr);
    EXPECT_EQ(replayed.x, called.x);
    EXPECT_EQ(replayed.room_k, called.room_k);
    EXPECT_EQ(replayed.room_v, called.room_v);
    EXPECT_EQ(replayed.lse, called.lse);
    EXPECT_EQ(replayed.y, called.y);
  }
}

TEST_F(HostDeviceTest, BudgetIsKeptAndThePeakRemembered) {
  auto small = MakeHostDevice({.capacity_bytes = 1000});
  auto first = small->Allocate(600, "first");
  ASSERT_TRUE(first.ok());
  const absl::Status refused = small->Allocate(401, "second").status();
  EXPECT_TRUE(absl::IsResourceExhausted(refused)) << refused;
  for (const char* word : {"401", "second", "600", "1000"}) {
    EXPECT_NE(std::string(refused.message()).find(word), std::string::npos) << refused;
  }
  EXPECT_TRUE(small->Allocate(400, "third").ok());  // and gone at once
  EXPECT_EQ(small->Stats().used_bytes, 600u);
  first->Reset();
  EXPECT_EQ(small->Stats().used_bytes, 0u);
  EXPECT_EQ(small->Stats().peak_bytes, 1000u);
  EXPECT_TRUE(absl::IsResourceExhausted(small->Allocate(~size_t{0}, "all").status()));
  EXPECT_TRUE(small->Allocate(0, "nothing").ok());
}

TEST_F(HostDeviceTest, MovedBuffersAreReleasedOnce) {
  auto a = device_->Allocate(100, "a"), b = device_->Allocate(50, "b");
  *a = *std::move(b);
  EXPECT_EQ(device_->Stats().used_bytes, 150u);  // swapped, until the moved-from one ends
  b->Reset();
  EXPECT_EQ(device_->Stats().used_bytes, 50u);
  a->Reset();
  EXPECT_EQ(device_->Stats().used_bytes, 0u);
}

TEST_F(HostDeviceTest, WeightsAreWidenedExactlyAndStacked) {
  const std::vector<uint16_t> halves = {0x3f80, 0xc000, 0x0001, 0x7bff};
  const std::vector<float> singles = {1.5f, -2.25f, 3e-40f, 0.0f};
  const HostMatrix parts[] = {{std::as_bytes(std::span(halves)), DType::kBf16, 2},
                              {std::as_bytes(std::span(singles)), DType::kFp32, 2},
                              {std::as_bytes(std::span(halves)), DType::kFp16, 2}};
  auto loaded = device_->Load(parts, 2, "stack");
  ASSERT_TRUE(loaded.ok());
  ASSERT_EQ(loaded->rows, 6u);
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(loaded->data.floats()[i], Bf16ToFloat(halves[i]));
    EXPECT_EQ(loaded->data.floats()[4 + i], singles[i]);
    EXPECT_EQ(loaded->data.floats()[8 + i], Fp16ToFloat(halves[i]));
  }
}

TEST_F(HostDeviceTest, ProductsOfEveryShapeAreRight) {
  struct Shape {
    size_t rows, in, out;
  };
  // One row, few, many; small enough for one thread and large enough for all.
  const auto check = [&](const Shape& s, WeightForm form) {
    const std::vector<float> x = Random(s.rows * s.in);
    std::vector<float> w = Random(s.out * s.in), y = Random(s.rows * s.out);
    const std::vector<float> before = y;
    const DeviceMatrix matrix = Load(w, s.out, form);
    if (form != WeightForm::kPlain) w = Decoded(matrix);
    for (const auto output : {Device::Output::kAccumulate, Device::Output::kOverwrite}) {
      y = before;
      device_->MatMul(x.data(), matrix, y.data(), s.rows, output);
      double worst = 0;
      for (size_t r = 0; r < s.rows; ++r) {
        for (size_t o = 0; o < s.out; ++o) {
          double sum = output == Device::Output::kAccumulate ? before[r * s.out + o] : 0;
          for (size_t i = 0; i < s.in; ++i) sum += double{x[r * s.in + i]} * w[o * s.in + i];
          worst = std::max(worst, std::abs(sum - y[r * s.out + o]));
        }
      }
      EXPECT_LT(worst, 3e-6 * std::sqrt(s.in) * 10)
          << s.rows << " " << s.in << " " << s.out << " " << WeightFormName(form);
    }
  };
  for (const WeightForm form : {WeightForm::kPlain, WeightForm::kInt8, WeightForm::kInt4}) {
    for (const Shape s : {Shape{1, 7, 5},
                          {1, 1000, 6000},
                          {3, 96, 33},
                          {40, 512, 700},
                          {700, 130, 190},
                          {1, 1, 1}}) {
      check(s, form);
    }
  }
}

TEST_F(HostDeviceTest, NormRopeAndSwiGluFollowTheirFormulas) {
  constexpr size_t kRows = 300, kWidth = 96;
  const std::vector<float> x = Random(kRows * kWidth), weight = Random(kWidth);
  std::vector<float> y(x.size());
  device_->RmsNorm(x.data(), Load(weight, 1), 1e-5f, y.data(), kRows);
  for (size_t r = 0; r < kRows; ++r) {
    double squares = 0;
    for (size_t i = 0; i < kWidth; ++i) squares += std::pow(double{x[r * kWidth + i]}, 2);
    const double scale = 1 / std::sqrt(squares / kWidth + 1e-5);
    for (size_t i = 0; i < kWidth; ++i) {
      ASSERT_NEAR(y[r * kWidth + i], x[r * kWidth + i] * scale * weight[i], 1e-5);
    }
  }

  // Three heads of 32, 24 dimensions of which turn; position and inverse frequency meet in fp32.
  std::vector<float> inv_freq(12);
  for (size_t i = 0; i < 12; ++i) inv_freq[i] = std::pow(10000.0f, -static_cast<float>(i) / 12);
  std::vector<float> turned = x;
  device_->Rope({turned.data(), 100000, kRows, 3, 32, inv_freq, 1.25f});
  for (size_t r = 0; r < kRows; ++r) {
    for (size_t h = 0; h < 3; ++h) {
      const float* in = &x[r * kWidth + h * 32];
      const float* out = &turned[r * kWidth + h * 32];
      for (size_t i = 0; i < 12; ++i) {
        const float angle = static_cast<float>(100000 + r) * inv_freq[i];
        const double c = std::cos(double{angle}) * 1.25, s = std::sin(double{angle}) * 1.25;
        ASSERT_NEAR(out[i], in[i] * c - in[i + 12] * s, 2e-5);
        ASSERT_NEAR(out[i + 12], in[i + 12] * c + in[i] * s, 2e-5);
      }
      for (size_t i = 24; i < 32; ++i) ASSERT_EQ(out[i], in[i]);
    }
  }

  std::vector<float> gated(kRows * kWidth / 2);
  device_->SwiGlu(x.data(), gated.data(), kRows, kWidth / 2);
  for (size_t r = 0; r < kRows; ++r) {
    for (size_t i = 0; i < kWidth / 2; ++i) {
      const double gate = x[r * kWidth + i], up = x[r * kWidth + kWidth / 2 + i];
      ASSERT_NEAR(gated[r * kWidth / 2 + i], gate / (1 + std::exp(-gate)) * up, 1e-5);
    }
  }
}

// K and V of `tokens` tokens as [kv_head][token][head_dim].
struct KvMemory {
  std::vector<std::byte> k, v;
};

TEST_F(HostDeviceTest, AttentionIsExactOverPartsWindowsAndGroups) {
  constexpr uint32_t kTokens = 500;
  struct Case {
    DType dtype;
    uint32_t heads, kv_heads, head_dim, first_token, rows, window;
    std::vector<TokenRange> held;
  };
  const std::vector<Case> cases = {
      {DType::kFp32, 4, 4, 16, 0, 500, 0, {{0, 500}}},
      {DType::kBf16, 6, 2, 128, 400, 100, 0, {{0, 128}, {300, 500}}},
      {DType::kFp16, 4, 2, 96, 499, 1, 0, {{0, 7}, {498, 500}}},
      {DType::kFp32, 8, 1, 64, 130, 200, 48, {{0, 330}}},
      {DType::kBf16, 2, 1, 80, 90, 33, 20, {{0, 16}, {95, 123}}},  // row 0 sees nothing of these
      {DType::kFp32, 2, 2, 32, 10, 3, 0, {}},
  };
  for (const Case& c : cases) {
    const size_t vector = c.head_dim * DTypeBytes(c.dtype);
    std::vector<KvMemory> memory;
    std::vector<DeviceKv> parts;
    for (const TokenRange& range : c.held) {
      KvMemory& m = memory.emplace_back();
      const size_t elements = size_t{c.kv_heads} * range.size() * c.head_dim;
      for (auto* side : {&m.k, &m.v}) {
        side->resize(elements * DTypeBytes(c.dtype));
        const std::vector<float> values = Random(elements);
        for (size_t i = 0; i < elements; ++i) {
          StoreFromFloat(side->data(), i, c.dtype, values[i]);
        }
      }
      parts.push_back({m.k.data(), m.v.data(), range.size() * vector, range});
    }
    const size_t width = size_t{c.heads} * c.head_dim;
    const std::vector<float> q = Random(c.rows * width, 2.0f);
    std::vector<float> o(q.size(), NAN), lse(size_t{c.rows} * c.heads, NAN);
    const DeviceAttention attention{parts,      c.dtype,       c.heads,   c.kv_heads,
                                    c.head_dim, c.first_token, c.rows,    c.window,
                                    q.data(),   o.data(),      lse.data()};
    device_->Attend(attention);
    ASSERT_LE(c.first_token + c.rows, kTokens);
    for (uint32_t r = 0; r < c.rows; ++r) {
      const uint32_t position = c.first_token + r;
      for (uint32_t h = 0; h < c.heads; ++h) {
        const uint32_t kv_head = h / (c.heads / c.kv_heads);
        double sum = 0;
        std::vector<double> want(c.head_dim, 0.0);
        for (size_t p = 0; p < parts.size(); ++p) {
          for (uint32_t t = c.held[p].lo; t < c.held[p].hi; ++t) {
            if (t > position || (c.window != 0 && position - t >= c.window)) continue;
            const size_t at = (size_t{kv_head} * c.held[p].size() + t - c.held[p].lo) * c.head_dim;
            double z = 0;
            for (uint32_t d = 0; d < c.head_dim; ++d) {
              z += double{q[r * width + h * c.head_dim + d]} *
                   LoadAsFloat(memory[p].k.data(), at + d, c.dtype);
            }
            const double w = std::exp(z / std::sqrt(double{1} * c.head_dim));
            sum += w;
            for (uint32_t d = 0; d < c.head_dim; ++d) {
              want[d] += w * LoadAsFloat(memory[p].v.data(), at + d, c.dtype);
            }
          }
        }
        const float got = lse[size_t{r} * c.heads + h];
        if (sum == 0) {
          EXPECT_EQ(got, kEmptyLse);
        } else {
          ASSERT_NEAR(got, std::log(sum), 1e-4) << "row " << r << " head " << h;
        }
        for (uint32_t d = 0; d < c.head_dim; ++d) {
          const double expected = sum == 0 ? 0.0 : want[d] / sum;
          ASSERT_NEAR(o[r * width + h * c.head_dim + d], expected, 1e-4)
              << "row " << r << " head " << h;
        }
      }
    }
  }
}

TEST_F(HostDeviceTest, CopiesAreStridedAndRoundingIsToEven) {
  std::vector<uint8_t> from(64), to(64, 0xff);
  for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<uint8_t>(i);
  device_->Copy({to.data() + 1, 10, from.data() + 2, 20, 3, 3});
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(to[10 * i], 0xff);
    for (size_t b = 0; b < 3; ++b) EXPECT_EQ(to[1 + 10 * i + b], 2 + 20 * i + b);
    EXPECT_EQ(to[10 * i + 4], 0xff);
  }
  const float values[] = {1.00390625f, 1.01171875f, -0.0f};  // halfway between bf16 neighbours
  uint16_t rounded[3];
  device_->Round(values, DType::kBf16, rounded, 3);
  EXPECT_EQ(rounded[0], 0x3f80);
  EXPECT_EQ(rounded[1], 0x3f82);
  EXPECT_EQ(rounded[2], 0x8000);
}

TEST(ThreadTeamTest, EveryIterationRunsOnceWhateverTheSizes) {
  for (const uint32_t threads : {1u, 2u, 5u}) {
    ThreadTeam team(threads);
    EXPECT_EQ(team.threads(), threads);
    for (int round = 0; round < 200; ++round) {
      const size_t n = static_cast<size_t>(round) % 17;
      std::vector<std::atomic<int>> ran(n);
      size_t plain = 0;  // written by one iteration, read after the loop
      team.For(n, [&](size_t i) {
        ++ran[i];
        if (i == n / 2) plain = n;
      });
      for (auto& count : ran) EXPECT_EQ(count, 1);
      EXPECT_EQ(plain, n);
    }
  }
}

}  // namespace
}  // namespace quarry

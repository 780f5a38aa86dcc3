// Coding at every level this processor has, against the format's document in double.
#include "storage/codecs/kv_codecs.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "proto/byte_digest.h"
#include "proto/half.h"
#include "proto/head_dim.h"
#include "tests/support/coded_reference.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

constexpr KvCodec kCodecs[] = {KvCodec::kFp8, KvCodec::kInt8, KvCodec::kInt4};
constexpr KvPart kParts[] = {KvPart::kKey, KvPart::kValue};
constexpr DType kDTypes[] = {DType::kBf16, DType::kFp16, DType::kFp32};
constexpr std::byte kPoison{0xa5};

double MostOf(DType dtype) {
  if (dtype == DType::kFp16) return 65504;
  return dtype == DType::kBf16 ? 0x1.fep127 : std::numeric_limits<float>::max();
}

// Rows of a strip in memory of their own, at an odd address where their dtype allows it.
struct Rows {
  std::vector<std::byte> memory;
  DType dtype;
  size_t count;

  Rows(size_t count, DType dtype) : dtype(dtype), count(count) {
    memory.assign(count * DTypeBytes(dtype) + 2, kPoison);
  }
  std::byte* data() { return memory.data() + 1; }
  const std::byte* data() const { return memory.data() + 1; }
  float operator[](size_t i) const { return LoadAsFloat(data(), i, dtype); }
  void Set(size_t i, double x) { StoreFromFloat(data(), i, dtype, static_cast<float>(x)); }
  bool EndsUntouched() const { return memory.front() == kPoison && memory.back() == kPoison; }
};

// Numbers as a head's are: channels of different sizes and means, some tokens far larger.
Rows RandomRows(const CodedStrip& strip, DType dtype, std::mt19937* random) {
  Rows rows(size_t{strip.tokens} * strip.head_dim, dtype);
  std::normal_distribution<double> normal;
  std::vector<double> mean(strip.head_dim), size(strip.head_dim);
  for (uint32_t c = 0; c < strip.head_dim; ++c) {
    mean[c] = (*random)() % 8 == 0 ? 10 * normal(*random) : 0;
    size[c] = std::exp(normal(*random));
  }
  for (uint32_t t = 0; t < strip.tokens; ++t) {
    const double larger = (*random)() % 16 == 0 ? 20 : 1;
    for (uint32_t c = 0; c < strip.head_dim; ++c) {
      rows.Set(size_t{t} * strip.head_dim + c, larger * (mean[c] + size[c] * normal(*random)));
    }
  }
  return rows;
}

std::vector<CodedStrip> Strips(std::mt19937* random) {
  std::vector<CodedStrip> strips;
  const uint32_t tokens[] = {1, 3, 4, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 128, 200, 256};
  for (KvCodec codec : kCodecs) {
    for (KvPart part : kParts) {
      for (uint32_t d = kHeadDimStep; d <= kMaxHeadDim; d += kHeadDimStep) {
        strips.push_back({codec, part, d, tokens[(*random)() % std::size(tokens)]});
      }
      for (uint32_t n : tokens) strips.push_back({codec, part, 48, n});
    }
  }
  return strips;
}

std::string NameOf(const CodedStrip& strip, DType dtype) {
  return std::string(KvCodecName(strip.codec)) + (strip.part == KvPart::kKey ? " K" : " V") +
         ", head_dim " + std::to_string(strip.head_dim) + ", " + std::to_string(strip.tokens) +
         " tokens of " + std::string(DTypeName(dtype));
}

class KvCodecsTest : public ::testing::TestWithParam<SimdLevel> {
 protected:
  // As EncodeStrip and DecodeStrip do, at the level of the test.
  template <typename F>
  static void ForEachTile(const CodedStrip& strip, DType dtype, F&& f) {
    for (uint32_t t = 0; t < strip.tokens; t += coded::kTileTokens) {
      f(codecs::Tile{static_cast<uint8_t>(strip.codec), static_cast<uint8_t>(strip.part),
                     static_cast<uint8_t>(dtype), strip.head_dim,
                     std::min(coded::kTileTokens, strip.tokens - t)},
        size_t{t} * strip.head_dim * DTypeBytes(dtype),
        t / coded::kTileTokens * strip.whole_tile_bytes());
    }
  }
  std::vector<std::byte> Encode(const CodedStrip& strip, const Rows& rows) {
    std::vector<std::byte> out(strip.bytes() + 2, kPoison);
    ForEachTile(strip, rows.dtype, [&](const codecs::Tile& tile, size_t row, size_t at) {
      table().encode(tile, rows.data() + row, reinterpret_cast<uint8_t*>(out.data() + 1 + at));
    });
    EXPECT_TRUE(out.front() == kPoison && out.back() == kPoison) << "wrote past the strip";
    return {out.begin() + 1, out.end() - 1};
  }
  Rows Decode(const CodedStrip& strip, std::span<const std::byte> coded, DType dtype) {
    Rows out(size_t{strip.tokens} * strip.head_dim, dtype);
    ForEachTile(strip, dtype, [&](const codecs::Tile& tile, size_t row, size_t at) {
      table().decode(tile, reinterpret_cast<const uint8_t*>(coded.data() + at), out.data() + row);
    });
    EXPECT_TRUE(out.EndsUntouched()) << "wrote past the rows";
    return out;
  }
  const codecs::Table& table() { return codecs::TableOf(GetParam()); }
};

// Scales are the least that reach every number, and codes the nearest to it.
TEST_P(KvCodecsTest, CodesAreTheNearestUnderTheFormatsScales) {
  std::mt19937 random(Seed());
  for (const CodedStrip& strip : Strips(&random)) {
    const DType dtype = kDTypes[random() % 3];
    const Rows rows = RandomRows(strip, dtype, &random);
    const std::vector<std::byte> coded = Encode(strip, rows);
    ASSERT_TRUE(CheckCodedStrip(strip, coded).ok()) << NameOf(strip, dtype);
    const CodedReference reference(strip, coded);
    for (uint32_t t = 0; t < strip.tokens; ++t) {
      for (uint32_t c = 0; c < strip.head_dim; ++c) {
        const double x = rows[size_t{t} * strip.head_dim + c];
        const double step = reference.Scale(t, c), zero = reference.Zero(t, c);
        const double y = (x - zero) / step;
        // Half a step, that of the code's size for fp8. The coder finds y by three roundings of an
        // fp32, so that a y that is nearly between two codes may get either.
        const double roundings = std::abs(y) * 3 * 0x1p-24;
        const double half = strip.codec != KvCodec::kFp8
                                ? 0.5
                                : std::exp2(std::max(-6, std::ilogb(std::abs(y) + 1e-30)) - 4);
        ASSERT_LE(std::abs(x - reference.Number(t, c)) / step, half * (1 + 1e-7) + roundings)
            << NameOf(strip, dtype) << ", token " << t << ", channel " << c << ", " << x;
        const double least = strip.codec == KvCodec::kInt4   ? 0
                             : strip.codec == KvCodec::kInt8 ? -127
                                                             : -448;
        const double most = strip.codec == KvCodec::kInt4 ? 15 : -least;
        ASSERT_TRUE(y >= least - 1e-4 && y <= most * (1 + 1e-6)) << NameOf(strip, dtype);
      }
    }
  }
}

// A scale is no larger than it must be: by the last bit of a bf16, and that of a zero point.
TEST_P(KvCodecsTest, ScalesAreAsSmallAsTheNumbersAllow) {
  std::mt19937 random(Seed() + 1);
  for (KvCodec codec : kCodecs) {
    for (KvPart part : kParts) {
      const CodedStrip strip{codec, part, 80, 100};
      const Rows rows = RandomRows(strip, DType::kFp32, &random);
      const std::vector<std::byte> coded = Encode(strip, rows);
      const CodedReference reference(strip, coded);
      for (uint32_t t = 0; t < strip.tokens; ++t) {
        for (uint32_t c = 0; c < strip.head_dim; ++c) {
          double least = 1e300, most = -1e300;
          for (const auto& [i, j] : reference.SharesScaleWith(t, c)) {
            const double x = rows[size_t{i} * strip.head_dim + j];
            least = std::min(least, x);
            most = std::max(most, x);
          }
          const double range = codec == KvCodec::kInt4   ? (most - reference.Zero(t, c)) / 15
                               : codec == KvCodec::kInt8 ? std::max(-least, most) / 127
                                                         : std::max(-least, most) / 448;
          ASSERT_GE(reference.Scale(t, c), range * (1 - 1e-6));
          ASSERT_LE(reference.Scale(t, c), range * (1 + 0x1p-7));
          if (codec != KvCodec::kInt4) continue;
          ASSERT_LE(reference.Zero(t, c), least);
          ASSERT_GE(reference.Zero(t, c), least - std::abs(least) * 0x1p-7);
        }
      }
    }
  }
}

TEST_P(KvCodecsTest, EveryLevelWritesTheSameBytes) {
  std::mt19937 random(Seed() + 2);
  for (const CodedStrip& strip : Strips(&random)) {
    for (DType dtype : kDTypes) {
      Rows rows = RandomRows(strip, dtype, &random);
      for (size_t i = 0; i < rows.count; i += 5) rows.Set(i, random() % 2 == 0 ? 0.0 : -0.0);
      const std::vector<std::byte> coded = Encode(strip, rows);
      std::vector<std::byte> want(strip.bytes());
      ForEachTile(strip, dtype, [&](const codecs::Tile& tile, size_t row, size_t at) {
        codecs::ScalarTable().encode(tile, rows.data() + row,
                                     reinterpret_cast<uint8_t*>(want.data() + at));
      });
      ASSERT_EQ(coded, want) << NameOf(strip, dtype);
    }
  }
}

// Any codes, under scales that are ones.
TEST_P(KvCodecsTest, DecodesWhatTheFormatSays) {
  std::mt19937 random(Seed() + 3);
  for (const CodedStrip& strip : Strips(&random)) {
    const DType dtype = kDTypes[random() % 3];
    std::vector<std::byte> coded = Encode(strip, RandomRows(strip, DType::kFp32, &random));
    for (uint32_t t = 0; t < strip.tokens; t += coded::kTileTokens) {
      const uint32_t tokens = std::min(coded::kTileTokens, strip.tokens - t);
      const uint8_t codec = static_cast<uint8_t>(strip.codec);
      const uint64_t at =
          t / coded::kTileTokens * strip.whole_tile_bytes() +
          coded::ScaleBytes(codec, static_cast<uint8_t>(strip.part), strip.head_dim, tokens);
      for (uint32_t i = 0; i < coded::CodeBytes(codec, strip.head_dim, tokens); ++i) {
        coded[at + i] = static_cast<std::byte>(random());
      }
    }
    const Rows got = Decode(strip, coded, dtype);
    const CodedReference reference(strip, coded);
    for (uint32_t t = 0; t < strip.tokens; ++t) {
      for (uint32_t c = 0; c < strip.head_dim; ++c) {
        const double x = std::clamp(reference.Number(t, c), -MostOf(dtype), MostOf(dtype));
        char want[4];
        StoreFromFloat(want, 0, dtype, static_cast<float>(x));
        ASSERT_EQ(got[size_t{t} * strip.head_dim + c], LoadAsFloat(want, 0, dtype))
            << NameOf(strip, dtype) << ", token " << t << ", channel " << c;
      }
    }
  }
}

TEST_P(KvCodecsTest, ZerosAndEqualNumbersComeBackExactly) {
  for (KvCodec codec : kCodecs) {
    for (KvPart part : kParts) {
      const CodedStrip strip{codec, part, 96, 70};
      for (DType dtype : kDTypes) {
        for (double x : {0.0, -0.0, 1.5, -2.0, 0x1p-14}) {
          if (x != 0 && codec != KvCodec::kInt4) continue;
          Rows rows(size_t{strip.tokens} * strip.head_dim, dtype);
          for (size_t i = 0; i < rows.count; ++i) rows.Set(i, x);
          const Rows got = Decode(strip, Encode(strip, rows), dtype);
          for (size_t i = 0; i < rows.count; ++i) {
            ASSERT_EQ(got[i], x) << NameOf(strip, dtype) << ", " << x;
          }
        }
      }
    }
  }
}

// One number dwarfs all: it is kept to a code's step, and takes only its scale's others along.
TEST_P(KvCodecsTest, AnOutlierCostsOnlyThoseThatShareItsScale) {
  std::mt19937 random(Seed() + 4);
  for (KvCodec codec : kCodecs) {
    for (KvPart part : kParts) {
      const CodedStrip strip{codec, part, 96, 140};
      Rows rows = RandomRows(strip, DType::kFp32, &random);
      const Rows before = Decode(strip, Encode(strip, rows), DType::kFp32);
      const uint32_t t = static_cast<uint32_t>(random() % strip.tokens), c = random() % 96;
      rows.Set(size_t{t} * 96 + c, 3e4);
      const std::vector<std::byte> coded = Encode(strip, rows);
      const Rows after = Decode(strip, coded, DType::kFp32);
      EXPECT_NEAR(after[size_t{t} * 96 + c], 3e4, 3e4 / 16);
      std::vector<bool> shares(rows.count);
      for (const auto& [i, j] : CodedReference(strip, coded).SharesScaleWith(t, c)) {
        shares[size_t{i} * 96 + j] = true;
      }
      for (size_t i = 0; i < rows.count; ++i) {
        if (shares[i]) continue;
        ASSERT_EQ(after[i], before[i]) << NameOf(strip, DType::kFp32);
      }
    }
  }
}

TEST_P(KvCodecsTest, HugeAndTinyNumbersAreBoundedAndFinite) {
  std::mt19937 random(Seed() + 5);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (KvCodec codec : kCodecs) {
    for (KvPart part : kParts) {
      const CodedStrip strip{codec, part, 64, 90};
      for (DType dtype : kDTypes) {
        for (int round = 0; round < 4; ++round) {
          Rows rows(size_t{strip.tokens} * strip.head_dim, dtype);
          const float most = static_cast<float>(MostOf(dtype));
          const float numbers[] = {most,   -most,  1e-40f,    -1e-45f,   0.0f,
                                   -0.0f,  1e-30f, 0x1p-126f, -1e30f,    1.0f,
                                   -1e-6f, 6e-8f,  kInfinity, -kInfinity};
          for (size_t i = 0; i < rows.count; ++i) {
            rows.Set(i, numbers[random() % (round < 2 ? 12 : std::size(numbers))]);
          }
          const std::vector<std::byte> coded = Encode(strip, rows);
          ASSERT_TRUE(CheckCodedStrip(strip, coded).ok()) << NameOf(strip, dtype);
          const Rows got = Decode(strip, coded, dtype);
          const CodedReference reference(strip, coded);
          for (size_t i = 0; i < rows.count; ++i) {
            ASSERT_TRUE(std::isfinite(got[i]));
            if (dtype == DType::kFp16 && !std::isfinite(rows[i])) continue;  // coded as 65,536
            const double x = std::clamp<double>(rows[i], -0x1p120, 0x1p120);
            const double step = reference.Scale(static_cast<uint32_t>(i / 64), i % 64);
            const double bound =
                codec == KvCodec::kFp8 ? std::max(std::abs(x) / 16, step * 0x1p-10) : step / 2;
            ASSERT_NEAR(got[i], std::clamp(x, -MostOf(dtype), MostOf(dtype)),
                        bound * 1.001 + std::abs(x) * 0.005)
                << NameOf(strip, dtype) << ", " << rows[i];
          }
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, KvCodecsTest, ::testing::ValuesIn(SupportedSimdLevels()),
                         [](const auto& param) { return std::string(SimdLevelName(param.param)); });

// What is on a disk must be read by later versions: another digest is another format.
TEST(KvCodecsFormatTest, BytesAreThoseOfTheFirstVersion) {
  const uint64_t want[] = {9575186576700890397u, 18274367142735792639u, 11232114829891075829u,
                           4586083880577400335u, 8382892941162070309u,  17855902280756758509u};
  size_t n = 0;
  for (KvCodec codec : kCodecs) {
    for (KvPart part : kParts) {
      const CodedStrip strip{codec, part, 80, 150};
      std::vector<float> rows(size_t{strip.tokens} * strip.head_dim);
      uint32_t x = 12345;
      for (float& r : rows) {
        x = x * 1664525u + 1013904223u;
        r = static_cast<float>(static_cast<int32_t>(x)) * 0x1p-28f;
      }
      std::vector<std::byte> coded(strip.bytes());
      EncodeStrip(strip, DType::kFp32, rows.data(), coded);
      EXPECT_EQ(DigestOf(coded).low, want[n]) << KvCodecName(codec) << " " << n;
      ++n;
    }
  }
}

TEST(KvCodecsFormatTest, StripsComeBackThroughTheWholeCall) {
  std::mt19937 random(Seed() + 6);
  const CodedStrip strip{KvCodec::kInt8, KvPart::kKey, 128, kBlockTokens};
  const Rows rows = RandomRows(strip, DType::kBf16, &random);
  std::vector<std::byte> coded(strip.bytes());
  EncodeStrip(strip, DType::kBf16, rows.data(), coded);
  Rows got(rows.count, DType::kBf16);
  ASSERT_TRUE(DecodeStrip(strip, coded, DType::kBf16, got.data()).ok());
  const CodedReference reference(strip, coded);
  for (uint32_t t = 0; t < strip.tokens; ++t) {
    for (uint32_t c = 0; c < 128; ++c) {
      ASSERT_EQ(got[t * 128 + c],
                Bf16ToFloat(FloatToBf16(static_cast<float>(reference.Number(t, c)))));
    }
  }
}

// Whatever a disk gives: refused with the rows untouched, or finite numbers.
TEST(KvCodecsFormatTest, DamageIsRefusedOrFinite) {
  std::mt19937 random(Seed() + 7);
  for (int round = 0; round < 2000; ++round) {
    const CodedStrip strip{kCodecs[random() % 3], kParts[random() % 2],
                           static_cast<uint32_t>(16 * (1 + random() % 8)),
                           static_cast<uint32_t>(1 + random() % 100)};
    std::vector<std::byte> coded(strip.bytes());
    EncodeStrip(strip, DType::kFp32, RandomRows(strip, DType::kFp32, &random).data(), coded);
    for (uint32_t i = 0; i < 1 + random() % 20; ++i) {
      coded[random() % coded.size()] = static_cast<std::byte>(random());
    }
    if (random() % 4 == 0) coded.resize(random() % coded.size());
    Rows rows(size_t{strip.tokens} * strip.head_dim, DType::kFp32);
    const std::vector<std::byte> untouched = rows.memory;
    const absl::Status status = DecodeStrip(strip, coded, DType::kFp32, rows.data());
    if (!status.ok()) {
      EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
      EXPECT_EQ(rows.memory, untouched);
      continue;
    }
    for (size_t i = 0; i < rows.count; ++i) ASSERT_TRUE(std::isfinite(rows[i]));
  }
}

}  // namespace
}  // namespace quarry

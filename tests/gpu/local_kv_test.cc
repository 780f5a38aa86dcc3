// The static window: what it holds and what is elsewhere are disjoint and together everything.
#include "gpu/local_kv.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <vector>

#include "tests/support/seed.h"

namespace quarry {
namespace {

constexpr KvShape kShape{
    .layers = 1, .heads = 4, .kv_heads = 2, .head_dim = 16, .dtype = DType::kBf16};
constexpr size_t kTokenBytes = 2 * 32;

// Token t's vectors are filled with bytes that follow from t, the head and the part.
uint8_t ByteOf(uint32_t token, uint32_t head, bool is_value) {
  return static_cast<uint8_t>(token * 7 + head * 101 + (is_value ? 53 : 0));
}
std::vector<uint8_t> Tokens(uint32_t first, uint32_t count, bool is_value) {
  std::vector<uint8_t> out(count * kTokenBytes);
  for (uint32_t t = 0; t < count; ++t) {
    for (uint32_t h = 0; h < 2; ++h) {
      std::memset(&out[t * kTokenBytes + h * 32], ByteOf(first + t, h, is_value), 32);
    }
  }
  return out;
}
absl::Status Append(LocalKv* kv, uint32_t first, uint32_t count) {
  return kv->Append(first, count, Tokens(first, count, false).data(),
                    Tokens(first, count, true).data());
}

// Parts and Elsewhere cut [0, tokens) into disjoint pieces, and the parts hold the right bytes.
void ExpectWhole(const LocalKv& kv, uint32_t tokens) {
  std::vector<int> seen(tokens, 0);
  const TokenRange elsewhere = kv.Elsewhere(tokens);
  for (uint32_t t = elsewhere.lo; t < elsewhere.hi; ++t) ++seen.at(t);
  for (const DeviceKv& part : kv.Parts()) {
    for (uint32_t t = part.tokens.lo; t < part.tokens.hi; ++t) {
      ++seen.at(t);
      for (uint32_t h = 0; h < 2; ++h) {
        const size_t at = h * part.head_stride + (t - part.tokens.lo) * 32;
        for (const bool is_value : {false, true}) {
          const auto* bytes = static_cast<const uint8_t*>(is_value ? part.v : part.k) + at;
          ASSERT_EQ(bytes[0], ByteOf(t, h, is_value)) << "token " << t << " head " << h;
          ASSERT_EQ(bytes[31], ByteOf(t, h, is_value));
        }
      }
    }
  }
  for (uint32_t t = 0; t < tokens; ++t) ASSERT_EQ(seen[t], 1) << "token " << t << " of " << tokens;
}

// The same by way of what a step is told.
void ExpectPlaced(const LocalKv& kv, uint32_t tokens) {
  std::vector<DeviceKv> parts = kv.PlacedParts();
  const DevicePlace place = kv.Place(tokens);
  DeviceKv& last = parts.back();
  last.k = static_cast<const std::byte*>(last.k) + place.kv_slot * 32;
  last.v = static_cast<const std::byte*>(last.v) + place.kv_slot * 32;
  EXPECT_EQ(last.tokens.lo, place.kv_lo);
  EXPECT_EQ(last.tokens.hi, tokens);
  EXPECT_EQ(parts, kv.Parts());
}

TEST(LocalKvTest, EveryTokenIsHeldOrElsewhereOnceDuringSlidesTruncationsAndClones) {
  std::mt19937 random(Seed());
  const auto device = MakeHostDevice({});
  for (const LocalKv::Window window : {LocalKv::Window{8, 16, false},
                                       {0, 16, false},
                                       {8, 0, false},
                                       {0, 0, false},
                                       {5, 1, false},
                                       {200, 300, false},
                                       {8, 16, true}}) {
    for (int run = 0; run < 20; ++run) {
      LocalKv kv(device.get(), kShape, window);
      uint32_t tokens = 0;
      while (tokens < 400) {
        const uint32_t count = random() % 5 == 0 ? 1 + random() % 60 : 1;
        ASSERT_TRUE(Append(&kv, tokens, count).ok());
        ExpectWhole(kv, tokens + count);
        if (random() % 4 == 0) {  // voided: back to what was complete
          kv.Truncate(tokens);
          ExpectWhole(kv, tokens);
          continue;
        }
        tokens += count;
        kv.Slide(tokens);
        ExpectWhole(kv, tokens);
        const auto [first, last] = window.Kept(tokens);
        uint64_t held = 0;
        for (const DeviceKv& part : kv.Parts()) held += part.tokens.size();
        EXPECT_EQ(held, first.size() + last.size());
        if (random() % 8 == 0) {
          auto copy = kv.Clone();
          ASSERT_TRUE(copy.ok());
          ASSERT_TRUE(Append(&kv, tokens, 3).ok());  // the original goes its own way
          ExpectWhole(*copy, tokens);
          kv = *std::move(copy);
        }
      }
    }
  }
  EXPECT_EQ(device->Stats().used_bytes, 0u);
}

TEST(LocalKvTest, SlidingHoldsLittleMoreThanTheWindowAndStaysWhereItIs) {
  const auto device = MakeHostDevice({});
  LocalKv kv(device.get(), kShape, {128, 512, false});
  const void* memory = nullptr;
  for (uint32_t t = 0; t < 5000; ++t) {
    ASSERT_TRUE(Append(&kv, t, 1).ok());
    if (t >= 128) ExpectPlaced(kv, t + 1);
    kv.Slide(t + 1);
    if (t == 1000) memory = kv.PlacedParts().back().k;
    if (t > 1000) {
      ASSERT_EQ(kv.PlacedParts().back().k, memory) << t;
    }
  }
  ExpectWhole(kv, 5000);
  EXPECT_LE(kv.bytes(), (128 + 512) * 2 * kTokenBytes * 5 / 4);
  EXPECT_EQ(kv.bytes(), device->Stats().used_bytes);
}

TEST(LocalKvTest, TheWindowOfALayerIsTakenFromItsBuffer) {
  const auto device = MakeHostDevice({});
  TokenSpan all(device.get(), kShape);
  ASSERT_TRUE(all.Append(0, 300, Tokens(0, 300, false).data(), Tokens(0, 300, true).data()).ok());
  for (const uint32_t tokens : {300u, 200u, 20u, 5u}) {
    LocalKv kv(device.get(), kShape, {8, 16, false});
    TokenSpan context(device.get(), kShape);
    ASSERT_TRUE(context.AppendFrom(all, {0, tokens}).ok());
    ASSERT_TRUE(kv.Assign(context, tokens).ok());
    ExpectWhole(kv, tokens);
    ASSERT_TRUE(Append(&kv, tokens, 10).ok());
    ExpectWhole(kv, tokens + 10);
  }
}

TEST(LocalKvTest, AFullDeviceIsRefusedAndNothingIsLost) {
  const auto device = MakeHostDevice({.capacity_bytes = 64 * 2 * kTokenBytes});
  LocalKv kv(device.get(), kShape, {0, 0, true});
  uint32_t tokens = 0;
  absl::Status status;
  while ((status = Append(&kv, tokens, 4)).ok()) {
    tokens += 4;
    ASSERT_LE(tokens, 64u);
  }
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  ExpectWhole(kv, tokens);
}

}  // namespace
}  // namespace quarry

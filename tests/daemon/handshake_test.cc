#include "daemon/handshake.h"

#include <cstring>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace quarry {
namespace {

using ::testing::HasSubstr;

shm::HelloRequest Hello(uint16_t min, uint16_t max, uint32_t slots = 0, uint64_t bytes = 0) {
  shm::HelloRequest hello{};
  hello.magic = shm::kMagic;
  hello.min_version = min;
  hello.max_version = max;
  hello.slots = slots;
  hello.slot_bytes = bytes;
  return hello;
}

std::string Message(const absl::Status& s) { return std::string(s.message()); }

TEST(HandshakeTest, PicksTheHighestCommonVersion) {
  const ShmOptions options;
  EXPECT_EQ(Negotiate(Hello(1, 9), options, {2, 5})->version, 5);
  EXPECT_EQ(Negotiate(Hello(1, 3), options, {2, 5})->version, 3);
  EXPECT_EQ(Negotiate(Hello(5, 9), options, {2, 5})->version, 5);
  EXPECT_EQ(Negotiate(Hello(2, 2), options, {2, 5})->version, 2);
}

TEST(HandshakeTest, DisjointVersionsAreRefusedNamingBothRanges) {
  for (const auto& [min, max] : {std::pair<uint16_t, uint16_t>{6, 9}, {0, 1}}) {
    const auto refused = Negotiate(Hello(min, max), {}, {2, 5});
    ASSERT_EQ(refused.status().code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(Message(refused.status()), HasSubstr("2 to 5"));
    EXPECT_THAT(Message(refused.status()),
                HasSubstr(std::to_string(min) + " to " + std::to_string(max)));
  }
}

TEST(HandshakeTest, AnInvertedRangeOrWrongMagicIsInvalid) {
  EXPECT_EQ(Negotiate(Hello(3, 2), {}, {1, 5}).status().code(), absl::StatusCode::kInvalidArgument);
  shm::HelloRequest hello = Hello(1, 1);
  hello.magic ^= 1;
  EXPECT_EQ(Negotiate(hello, {}, {1, 1}).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(HandshakeTest, ZeroAsksForTheDefaults) {
  ShmOptions options;
  options.default_slots = 8;
  options.default_slot_bytes = 1 << 20;
  const auto geometry = Negotiate(Hello(1, 1), options, {});
  ASSERT_TRUE(geometry.ok()) << geometry.status();
  EXPECT_EQ(geometry->slots, 8u);
  EXPECT_EQ(geometry->slot_bytes, 1u << 20);
}

TEST(HandshakeTest, SizesAreRoundedUpAndRegionsDoNotOverlap) {
  for (const uint32_t slots : {1u, 3u, 5u, 63u, 64u}) {
    for (const uint64_t bytes : {uint64_t{1}, uint64_t{16385}, uint64_t{1 << 20}}) {
      const auto g = Negotiate(Hello(1, 1, slots, bytes), {}, {});
      ASSERT_TRUE(g.ok()) << g.status();
      EXPECT_GE(g->slots, slots);
      EXPECT_EQ(g->slots & (g->slots - 1), 0u);
      EXPECT_GE(g->slot_bytes, std::max(bytes, shm::kMinSlotBytes));
      EXPECT_EQ(g->slot_bytes % 4096, 0u);
      EXPECT_GE(g->slots_offset, shm::kHeaderBytes + g->slots * sizeof(shm::SubmitEntry));
      EXPECT_EQ(g->slots_offset % 4096, 0u);
      EXPECT_EQ(g->total_bytes, g->slots_offset + g->slots * g->slot_bytes);
    }
  }
}

TEST(HandshakeTest, MoreThanTheLimitsIsRefusedNamingThem) {
  ShmOptions options;
  options.max_slots = 32;
  options.max_slot_bytes = 1 << 20;
  const auto slots = Negotiate(Hello(1, 1, 33), options, {});
  EXPECT_EQ(slots.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(Message(slots.status()), HasSubstr("shm.max_slots is 32"));
  const auto bytes = Negotiate(Hello(1, 1, 1, (1 << 20) + 1), options, {});
  EXPECT_EQ(bytes.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(Message(bytes.status()), HasSubstr("shm.max_slot_bytes is 1048576"));
  EXPECT_FALSE(Negotiate(Hello(1, 1, ~0u, ~0ull), options, {}).ok());
}

TEST(HandshakeTest, ClientNamesAreMadePrintableAndNeedNoTerminator) {
  shm::HelloRequest hello = Hello(1, 1);
  EXPECT_EQ(ClientNameOf(hello), "unnamed");
  std::memset(hello.client_name, 'a', sizeof(hello.client_name));
  EXPECT_EQ(ClientNameOf(hello), std::string(sizeof(hello.client_name), 'a'));
  std::strcpy(hello.client_name, "a b\n\x1b[31m");
  EXPECT_EQ(ClientNameOf(hello), "a?b??[31m");
}

TEST(HandshakeTest, RepliesCarryTheRangeAndTerminatedText) {
  const std::string longest(1000, 'x');
  const shm::HelloReply refusal = RefusalOf(absl::UnavailableError(longest), {2, 5});
  EXPECT_EQ(refusal.magic, shm::kMagic);
  EXPECT_EQ(refusal.version, 0);
  EXPECT_EQ(refusal.min_version, 2);
  EXPECT_EQ(refusal.max_version, 5);
  EXPECT_EQ(refusal.status, static_cast<uint32_t>(absl::StatusCode::kUnavailable));
  EXPECT_EQ(std::strlen(refusal.message), sizeof(refusal.message) - 1);
  const shm::HelloReply accepted = AcceptanceOf(*Negotiate(Hello(1, 1, 4), {}, {}), {}, 9, longest);
  EXPECT_EQ(accepted.session, 9u);
  EXPECT_EQ(accepted.slots, 4u);
  EXPECT_EQ(std::strlen(accepted.tenant), sizeof(accepted.tenant) - 1);
}

}  // namespace
}  // namespace quarry

#include "cpu_index/index_form.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "proto/half.h"

namespace quarry {
namespace {

std::vector<std::byte> Sample() {
  IndexWriter writer("sample", 3);
  writer.Put(uint32_t{7});
  const std::vector<float> numbers = {1.5f, 2.5f, -3.0f};
  writer.PutAll(std::span<const float>(numbers));
  return std::move(writer).Finish();
}

TEST(IndexFormTest, WhatWasWrittenIsRead) {
  const std::vector<std::byte> bytes = Sample();
  EXPECT_EQ(bytes.size(), kIndexFormHeaderBytes + 16 + kIndexFormDigestBytes);
  absl::StatusOr<IndexReader> reader = IndexReader::Open("sample", 3, bytes);
  ASSERT_TRUE(reader.ok()) << reader.status();
  uint32_t seven = 0;
  std::vector<float> numbers(3);
  EXPECT_TRUE(reader->Get(&seven).ok());
  EXPECT_EQ(reader->left(), 12u);
  EXPECT_EQ(reader->Finish().code(), absl::StatusCode::kDataLoss);
  EXPECT_TRUE(reader->GetAll(std::span(numbers)).ok());
  EXPECT_EQ(seven, 7u);
  EXPECT_EQ(numbers, (std::vector<float>{1.5f, 2.5f, -3.0f}));
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(reader->Get(&seven).code(), absl::StatusCode::kDataLoss);
}

TEST(IndexFormTest, NumbersThatAreNotFiniteOrTooSmallAreRefusedByName) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const float wrong : {-0.5f, kInfinity, -kInfinity, std::nanf("")}) {
    IndexWriter writer("sample", 3);
    writer.PutAll(std::span<const float>(std::vector<float>{0.0f, 1.5f, wrong}));
    writer.PutAll(std::span<const uint16_t>(std::vector<uint16_t>{0, FloatToBf16(wrong)}));
    const std::vector<std::byte> bytes = std::move(writer).Finish();
    absl::StatusOr<IndexReader> reader = IndexReader::Open("sample", 3, bytes);
    ASSERT_TRUE(reader.ok()) << reader.status();
    float one = 0;
    std::vector<float> two;
    std::vector<uint16_t> halves;
    EXPECT_TRUE(reader->GetNumber("weight", 0, &one).ok());
    const absl::Status status = reader->GetNumbers("weight", 2, 0, &two);
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << wrong;
    EXPECT_NE(status.message().find("weight"), std::string::npos) << status;
    const absl::Status half = reader->GetBf16("half", 2, kAnyNumber, &halves);
    EXPECT_EQ(half.ok(), wrong == -0.5f) << wrong;
  }
}

TEST(IndexFormTest, NoMemoryIsMadeForMoreThanIsLeft) {
  const std::vector<std::byte> bytes = Sample();
  absl::StatusOr<IndexReader> reader = IndexReader::Open("sample", 3, bytes);
  ASSERT_TRUE(reader.ok()) << reader.status();
  std::vector<uint64_t> words;
  for (const uint64_t count : {uint64_t{3}, uint64_t{1} << 60, ~uint64_t{0}}) {
    EXPECT_EQ(reader->GetVector(count, &words).code(), absl::StatusCode::kDataLoss) << count;
    EXPECT_EQ(words.capacity(), 0u);
  }
  EXPECT_TRUE(reader->Want<uint64_t>(2).ok());
  EXPECT_TRUE(reader->GetVector(2, &words).ok());
  EXPECT_TRUE(reader->Finish().ok());
}

TEST(IndexFormTest, TheKindIsToldWithoutTheChecksum) {
  std::vector<std::byte> bytes = Sample();
  bytes.back() ^= std::byte{1};
  EXPECT_EQ(*IndexReader::KindOf(bytes), "sample");
  EXPECT_EQ(IndexReader::KindOf(std::span(bytes).first(55)).status().code(),
            absl::StatusCode::kDataLoss);
  bytes[0] ^= std::byte{1};
  EXPECT_EQ(IndexReader::KindOf(bytes).status().code(), absl::StatusCode::kDataLoss);
}

TEST(IndexFormTest, AnotherKindOrVersionIsRefused) {
  const std::vector<std::byte> bytes = Sample();
  const absl::Status kind = IndexReader::Open("simple", 3, bytes).status();
  EXPECT_EQ(kind.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(kind.message().find("'sample' and version 3"), std::string::npos) << kind;
  EXPECT_EQ(IndexReader::Open("sample", 4, bytes).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(IndexFormTest, EveryBitThatIsAlteredAndEveryByteThatIsMissingIsFound) {
  const std::vector<std::byte> bytes = Sample();
  for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    std::vector<std::byte> altered = bytes;
    altered[bit / 8] ^= std::byte{1} << static_cast<int>(bit % 8);
    EXPECT_EQ(IndexReader::Open("sample", 3, altered).status().code(), absl::StatusCode::kDataLoss)
        << "bit " << bit;
  }
  for (size_t n = 0; n < bytes.size(); ++n) {
    EXPECT_EQ(IndexReader::Open("sample", 3, std::span(bytes).first(n)).status().code(),
              absl::StatusCode::kDataLoss);
  }
}

}  // namespace
}  // namespace quarry

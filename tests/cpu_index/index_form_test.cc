#include "cpu_index/index_form.h"

#include <gtest/gtest.h>

#include <random>

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

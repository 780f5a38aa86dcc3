#include "cpu_index/any_index.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu_index/budget.h"
#include "cpu_index/cluster_index.h"
#include "cpu_index/code_scan.h"
#include "cpu_index/graph_index.h"
#include "cpu_index/index_form.h"
#include "proto/byte_digest.h"
#include "tests/cpu_index/graph_case.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

using testing::GraphCase;
using Bytes = std::vector<std::byte>;

const char* const kKinds[] = {"exact", "graph", "codes", "clusters"};

// Sampled queries, scaled as scores are.
std::vector<float> Sample(GraphCase* c) {
  std::vector<float> queries;
  c->MakeQueries(40, &queries);
  for (float& x : queries) x *= GraphCase::kScale;
  return queries;
}

template <typename T>
std::unique_ptr<KeyIndex> Made(absl::StatusOr<std::unique_ptr<T>> index) {
  if (index.ok()) return *std::move(index);
  ADD_FAILURE() << index.status();
  return nullptr;
}

std::unique_ptr<KeyIndex> Build(const std::string& kind, const GraphCase& c,
                                const std::vector<float>& sample, uint32_t threads = 1) {
  if (kind == "exact") return MakeExactScan();
  if (kind == "codes") return Made(CodeScan::Build(c.view, sample));
  if (kind == "clusters") return Made(ClusterIndex::Build(c.view, sample));
  return Made(
      GraphIndex::Build(c.view, sample, {.query_keys = 30, .links = 12, .threads = threads}));
}

Bytes Form(const KeyIndex& index) {
  auto bytes = SerializeIndex(index);
  EXPECT_TRUE(bytes.ok()) << bytes.status();
  return bytes.ok() ? *bytes : Bytes();
}

// Both passes of the case's queries under a budget; everything that comes of it, as bits.
std::vector<uint64_t> Answer(const KeyIndex& index, const GraphCase& c, const Budget& budget) {
  QueryBlock queries = c.queries;
  queries.tolerance = budget.error;
  CoarseScores coarse;
  index.Score(c.view, queries, &coarse);
  RunAllotment allotment;
  for (uint32_t i = 0; i < queries.queries; ++i) {
    const RunScores scores{&coarse, i};
    RunShare share;
    AllocateBudget(budget, {&scores, 1}, {&share, 1});
    allotment.threshold.push_back(share.threshold);
    allotment.ties.push_back(share.ties);
    allotment.exact.push_back(share.exact);
  }
  std::vector<float> acc(size_t{queries.queries} * queries.head_dim);
  std::vector<Partial> partials(queries.queries);
  for (uint32_t i = 0; i < queries.queries; ++i) {
    partials[i].acc = std::span(acc).subspan(size_t{i} * queries.head_dim, queries.head_dim);
  }
  index.Refine(c.view, queries, coarse, allotment, partials);
  std::vector<uint64_t> out{coarse.bytes, coarse.nodes};
  for (const auto* numbers : {&coarse.score, &coarse.doubt, &coarse.length, &acc}) {
    for (float x : *numbers) out.push_back(std::bit_cast<uint32_t>(x));
  }
  out.insert(out.end(), coarse.node.begin(), coarse.node.end());
  for (const Partial& partial : partials) {
    out.insert(out.end(),
               {partial.tokens, partial.bytes, std::bit_cast<uint32_t>(partial.max),
                std::bit_cast<uint32_t>(partial.sum), std::bit_cast<uint32_t>(partial.doubt)});
  }
  return out;
}

std::vector<Budget> Budgets() {
  std::vector<Budget> out(6);
  out[1].kind = Budget::Kind::kFixedK;
  out[1].k = 50;
  out[2].kind = Budget::Kind::kTopP;
  out[2].mass = 0.9f;
  out[3].kind = Budget::Kind::kDipr;
  out[3].beta = 2;
  out[4].kind = out[5].kind = Budget::Kind::kError;
  out[4].error = 0.02f;
  out[5].error = 0.2f;
  return out;
}

TEST(AnyIndexTest, WhatWasReadBackAnswersBitForBitLikeTheOriginal) {
  for (const uint32_t tokens : {1u, 17u, 2500u}) {
    GraphCase c(tokens, Seed());
    const std::vector<float> sample = Sample(&c);
    for (const std::string kind : kKinds) {
      SCOPED_TRACE(kind);
      const std::unique_ptr<KeyIndex> index = Build(kind, c, sample);
      ASSERT_NE(index, nullptr);
      for (const bool open_all : {false, true}) {
        if (auto* const clusters = dynamic_cast<ClusterIndex*>(index.get())) {
          clusters->set_open_all(open_all);
        }
        const Bytes bytes = Form(*index);
        const auto again = DeserializeIndex(bytes);
        ASSERT_TRUE(again.ok()) << again.status();
        EXPECT_EQ((*again)->kind(), kind);
        EXPECT_TRUE((*again)->Fits(c.view));
        EXPECT_EQ(Form(**again), bytes);
        for (const Budget& budget : Budgets()) {
          c.ranges.assign(c.ranges.size(), c.view.tokens());
          EXPECT_EQ(Answer(**again, c, budget), Answer(*index, c, budget));
          c.ranges[1].hi -= tokens / 3;
          EXPECT_EQ(Answer(**again, c, budget), Answer(*index, c, budget));
        }
      }
    }
  }
}

TEST(AnyIndexTest, EqualBuildsHaveEqualBytesAndOthersDoNot) {
  GraphCase c(1500, Seed()), other(1500, Seed() + 1);
  const std::vector<float> sample = Sample(&c), other_sample = Sample(&other);
  for (const std::string kind : {"graph", "codes", "clusters"}) {
    SCOPED_TRACE(kind);
    const Bytes bytes = Form(*Build(kind, c, sample));
    EXPECT_EQ(Form(*Build(kind, c, sample, 3)), bytes);
    EXPECT_NE(Form(*Build(kind, other, other_sample)), bytes);
  }
}

TEST(AnyIndexTest, AnIndexFitsRunsOfItsOwnSizeOnly) {
  GraphCase c(400, Seed()), longer(401, Seed());
  const std::vector<float> sample = Sample(&c);
  KvView wide = c.view;
  wide.head_dim = 128;
  for (const std::string kind : kKinds) {
    SCOPED_TRACE(kind);
    const std::unique_ptr<KeyIndex> index = Build(kind, c, sample);
    ASSERT_NE(index, nullptr);
    EXPECT_TRUE(index->Fits(c.view));
    EXPECT_EQ(index->Fits(longer.view), kind == "exact");
    EXPECT_EQ(index->Fits(wide), kind == "exact");
  }
}

// Gives altered bytes the size and the checksum that they should have.
void Reseal(Bytes* bytes) {
  const size_t sealed = bytes->size() - kIndexFormDigestBytes;
  const uint64_t size = sealed - kIndexFormHeaderBytes;
  std::memcpy(bytes->data() + 32, &size, sizeof(size));
  const ByteDigest digest = DigestOf(std::span(*bytes).first(sealed));
  std::memcpy(bytes->data() + sealed, &digest, sizeof(digest));
}

bool IsRefusal(const absl::Status& status) {
  return status.code() == absl::StatusCode::kDataLoss ||
         status.code() == absl::StatusCode::kInvalidArgument;
}

TEST(AnyIndexTest, WhatIsCutOffOrAlteredIsRefused) {
  std::mt19937 random(Seed());
  GraphCase c(700, Seed());
  const std::vector<float> sample = Sample(&c);
  for (const std::string kind : kKinds) {
    SCOPED_TRACE(kind);
    const Bytes bytes = Form(*Build(kind, c, sample));
    for (size_t n = 0; n < bytes.size(); n += 97) {
      ASSERT_TRUE(IsRefusal(DeserializeIndex(std::span(bytes).first(n)).status())) << n << " bytes";
      if (n < kIndexFormHeaderBytes + kIndexFormDigestBytes) continue;
      Bytes sealed(bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(n));
      Reseal(&sealed);
      ASSERT_EQ(DeserializeIndex(sealed).status().code(), absl::StatusCode::kDataLoss) << n;
    }
    for (int round = 0; round < 2000; ++round) {
      Bytes altered = bytes;
      const size_t at = random() % altered.size();
      const auto change =
          static_cast<std::byte>(round % 2 == 0 ? 1u << random() % 8 : 1 + random() % 255);
      altered[at] ^= change;
      ASSERT_TRUE(IsRefusal(DeserializeIndex(altered).status())) << "byte " << at;
    }
  }
}

TEST(AnyIndexTest, OtherKindsAndVersionsAreRefused) {
  GraphCase c(100, 1);
  const std::vector<float> sample = Sample(&c);
  for (const std::string kind : kKinds) {
    Bytes bytes = Form(*Build(kind, c, sample));
    EXPECT_EQ(ClusterIndex::Deserialize(bytes).ok(), kind == "clusters");
    EXPECT_EQ(CodeScan::Deserialize(bytes).ok(), kind == "codes");
    EXPECT_EQ(GraphIndex::Deserialize(bytes).ok(), kind == "graph");
    const uint32_t version = 2;
    std::memcpy(bytes.data() + 24, &version, sizeof(version));
    Reseal(&bytes);
    EXPECT_EQ(DeserializeIndex(bytes).status().code(), absl::StatusCode::kInvalidArgument);
  }
  const absl::Status status = DeserializeIndex(IndexWriter("tree", 1).Finish()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("'tree'"), std::string::npos) << status;
}

// Words that mean something to a form, or something awful.
std::array<uint32_t, 16> Words(uint32_t tokens) {
  return {0,
          1,
          2,
          48,
          64,
          65,
          tokens - 1,
          tokens,
          tokens + 1,
          0x7fffffff,
          0x80000000,
          0xffffffff,
          std::bit_cast<uint32_t>(std::numeric_limits<float>::quiet_NaN()),
          std::bit_cast<uint32_t>(std::numeric_limits<float>::infinity()),
          std::bit_cast<uint32_t>(std::numeric_limits<float>::max()),
          std::bit_cast<uint32_t>(-1e30f)};
}

// Places in the data of words that may be sizes, and of the last ones.
std::vector<size_t> Telling(const Bytes& bytes, uint32_t tokens) {
  std::vector<size_t> out;
  const size_t end = bytes.size() - kIndexFormDigestBytes;
  for (size_t at = kIndexFormHeaderBytes; at + sizeof(uint32_t) <= end; at += sizeof(uint32_t)) {
    uint32_t word = 0;
    std::memcpy(&word, bytes.data() + at, sizeof(word));
    if (at + 64 > end || word == tokens || word == 64 || word == 48 || word == 1) out.push_back(at);
  }
  return out;
}

Bytes Mangled(const Bytes& bytes, const std::vector<size_t>& telling, uint32_t tokens,
              std::mt19937* random) {
  Bytes out = bytes;
  const auto words = Words(tokens);
  const size_t data = bytes.size() - kIndexFormHeaderBytes - kIndexFormDigestBytes;
  if (data < sizeof(uint32_t)) return out;
  for (uint32_t i = 1 + (*random)() % 3; i > 0; --i) {
    const size_t any = kIndexFormHeaderBytes + (*random)() % (data - sizeof(uint32_t) + 1);
    const uint32_t word = words[(*random)() % words.size()];
    switch ((*random)() % 5) {
      case 0:
        out[any] = static_cast<std::byte>((*random)());
        break;
      case 1:
        std::memcpy(out.data() + telling[(*random)() % telling.size()], &word, sizeof(word));
        break;
      case 2:
        std::memcpy(out.data() + any / 4 * 4, &word, sizeof(word));
        break;
      case 3:  // two bytes that may be a bf16
        std::memcpy(out.data() + any / 2 * 2, reinterpret_cast<const char*>(&word) + 2, 2);
        break;
      default: {  // a piece of it elsewhere
        const size_t from = kIndexFormHeaderBytes + (*random)() % data / 4 * 4, to = any / 4 * 4;
        const size_t n = (*random)() % 256;
        std::memmove(out.data() + to, bytes.data() + from,
                     std::min(n, bytes.size() - kIndexFormDigestBytes - std::max(from, to)));
      }
    }
  }
  if ((*random)() % 16 == 0) out.resize(out.size() - 4 + (*random)() % 9);
  Reseal(&out);
  return out;
}

TEST(AnyIndexTest, WrongDataWithARightChecksumIsRefusedOrCanBeSearched) {
  constexpr uint32_t kTokens = 600;
  std::mt19937 random(Seed());
  GraphCase c(kTokens, Seed());
  const std::vector<float> sample = Sample(&c);
  const std::vector<Budget> budgets = Budgets();
  for (const std::string kind : {"graph", "codes", "clusters"}) {
    SCOPED_TRACE(kind);
    const Bytes bytes = Form(*Build(kind, c, sample));
    const std::vector<size_t> telling = Telling(bytes, kTokens);
    int searched = 0, refused = 0;
    for (int round = 0; round < 4000; ++round) {
      const auto index = DeserializeIndex(Mangled(bytes, telling, kTokens, &random));
      if (!index.ok()) {
        ASSERT_TRUE(IsRefusal(index.status())) << index.status();
        ++refused;
        continue;
      }
      if (!(*index)->Fits(c.view)) continue;
      c.ranges.assign(c.ranges.size(), c.view.tokens());
      if (random() % 4 == 0) c.ranges[0].lo += random() % kTokens;
      Answer(**index, c, budgets[random() % budgets.size()]);
      ++searched;
    }
    EXPECT_GT(searched, 100);
    EXPECT_GT(refused, 100);
  }
}

template <typename T>
Bytes With(const Bytes& bytes, size_t at, T value) {
  Bytes out = bytes;
  std::memcpy(out.data() + at, &value, sizeof(value));
  Reseal(&out);
  return out;
}

TEST(AnyIndexTest, AnOrderThatIsNoPermutationIsRefused) {
  constexpr uint32_t kTokens = 600, kPadded = 608, kDim = GraphCase::kHeadDim, kCoded = 48;
  GraphCase c(kTokens, Seed());
  const Bytes bytes = Form(*Build("clusters", c, Sample(&c)));
  // Behind the basis, the codes' variances and steps, and the codes.
  constexpr size_t kAt = kIndexFormHeaderBytes + 4 * (4 + 2 * kDim + 2 * kDim * kDim + 1) +
                         4 * (4 + kCoded + 1 + kCoded) + kPadded * KeyCodes::kBytes;
  std::vector<uint32_t> order(kTokens);
  std::memcpy(order.data(), bytes.data() + kAt, order.size() * sizeof(uint32_t));
  std::vector<uint32_t> sorted = order;
  std::sort(sorted.begin(), sorted.end());
  for (uint32_t t = 0; t < kTokens; ++t) ASSERT_EQ(sorted[t], t);
  const absl::Status twice = DeserializeIndex(With(bytes, kAt + 4, order[0])).status();
  EXPECT_EQ(twice.code(), absl::StatusCode::kDataLoss);
  EXPECT_NE(twice.message().find("comes twice"), std::string::npos) << twice;
  const absl::Status behind = DeserializeIndex(With(bytes, kAt + 4, kTokens)).status();
  EXPECT_EQ(behind.code(), absl::StatusCode::kDataLoss);
  EXPECT_NE(behind.message().find("token 600 of 600 does not exist"), std::string::npos) << behind;
}

TEST(AnyIndexTest, DoubtsThatNoBuildHasAreRefused) {
  GraphCase c(300, Seed());
  const Bytes bytes = Form(*Build("clusters", c, Sample(&c)));
  // The last words: five doubts, the log of a length, how codes are read.
  const size_t end = bytes.size() - kIndexFormDigestBytes, doubts = end - 7 * sizeof(uint32_t);
  for (size_t i = 0; i < 5; ++i) {
    for (const float doubt : {0.0f, -1.0f, 1e9f, std::numeric_limits<float>::quiet_NaN()}) {
      const absl::Status status = DeserializeIndex(With(bytes, doubts + 4 * i, doubt)).status();
      EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << doubt;
      EXPECT_NE(status.message().find("doubt"), std::string::npos) << status;
    }
    EXPECT_TRUE(DeserializeIndex(With(bytes, doubts + 4 * i, 0.5f)).ok());
  }
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(DeserializeIndex(With(bytes, end - 8, -kInfinity)).status().code(),
            absl::StatusCode::kDataLoss);
  EXPECT_EQ(DeserializeIndex(With(bytes, end - 4, uint32_t{2})).status().code(),
            absl::StatusCode::kDataLoss);
}

TEST(AnyIndexTest, QueriesNearTheEndOfFloatsDoNoHarm) {
  GraphCase c(600, Seed());
  const auto index = Build("clusters", c, Sample(&c));
  ASSERT_NE(index, nullptr);
  std::vector<float> q(size_t{GraphCase::kGroup} * GraphCase::kHeadDim);
  for (size_t i = 0; i < q.size(); ++i) q[i] = i % 3 == 0 ? -3e38f : 3e38f;
  c.queries.q = q.data();
  for (const bool open_all : {false, true}) {
    dynamic_cast<ClusterIndex&>(*index).set_open_all(open_all);
    for (const Budget& budget : Budgets()) {
      EXPECT_EQ(Answer(*index, c, budget), Answer(*index, c, budget));
    }
  }
}

class Unkept final : public KeyIndex {
 public:
  std::string_view kind() const override { return "unkept"; }
  void AttendAll(const KvView&, const QueryBlock&, std::span<Partial>) const override {}
  void Score(const KvView&, const QueryBlock&, CoarseScores*) const override {}
  void Refine(const KvView&, const QueryBlock&, const CoarseScores&, const RunAllotment&,
              std::span<Partial>) const override {}
};

TEST(AnyIndexTest, AnIndexWithoutAFormSaysSo) {
  const absl::Status status = SerializeIndex(Unkept()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
  EXPECT_NE(status.message().find("unkept"), std::string::npos) << status;
}

}  // namespace
}  // namespace quarry

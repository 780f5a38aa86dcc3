#include "cpu_index/any_index.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "cpu_index/budget.h"
#include "cpu_index/cluster_learn.h"
#include "cpu_index/cluster_search.h"
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

std::unique_ptr<KeyIndex> Clusters(const GraphCase& c, const std::vector<float>& sample) {
  auto learned = LearnClusters({&c.view, 1}, sample, {.scan_if_faster = false});
  if (learned.ok()) return std::move(learned->indexes.front());
  ADD_FAILURE() << learned.status();
  return nullptr;
}

std::unique_ptr<KeyIndex> Build(const std::string& kind, const GraphCase& c,
                                const std::vector<float>& sample, uint32_t threads = 1) {
  if (kind == "exact") return MakeExactScan();
  if (kind == "codes") return Made(CodeScan::Build(c.view, sample));
  if (kind == "clusters") return Clusters(c, sample);
  return Made(
      GraphIndex::Build(c.view, sample, {.query_keys = 30, .links = 12, .threads = threads}));
}

Bytes Form(const KeyIndex& index) {
  auto bytes = SerializeIndex(index);
  EXPECT_TRUE(bytes.ok()) << bytes.status();
  return bytes.ok() ? *bytes : Bytes();
}

// What comes of attention, as bits.
std::vector<uint64_t> Bits(std::span<const Partial> partials, std::span<const float> acc) {
  std::vector<uint64_t> out;
  for (float x : acc) out.push_back(std::bit_cast<uint32_t>(x));
  for (const Partial& partial : partials) {
    out.insert(out.end(),
               {partial.tokens, partial.bytes, std::bit_cast<uint32_t>(partial.max),
                std::bit_cast<uint32_t>(partial.sum), std::bit_cast<uint32_t>(partial.doubt)});
  }
  return out;
}

// Both passes of the case's queries under a budget.
void Attend(const TokenIndex& index, const GraphCase& c, const Budget& budget,
            std::span<Partial> partials) {
  CoarseScores coarse;
  index.Score(c.view, c.queries, &coarse);
  RunAllotment allotment;
  for (uint32_t i = 0; i < c.queries.queries; ++i) {
    const RunScores scores{&coarse, i};
    RunShare share;
    AllocateBudget(budget, {&scores, 1}, {&share, 1});
    allotment.threshold.push_back(share.threshold);
    allotment.ties.push_back(share.ties);
  }
  index.Refine(c.view, c.queries, coarse, allotment, partials);
}

// The case's queries under a budget; tolerated errors are for clusters, and these for no others.
std::vector<uint64_t> Answer(const KeyIndex& index, const GraphCase& c, const Budget& budget) {
  std::vector<float> acc(size_t{c.queries.queries} * c.queries.head_dim);
  std::vector<Partial> partials(c.queries.queries);
  for (uint32_t i = 0; i < c.queries.queries; ++i) {
    partials[i].acc = std::span(acc).subspan(size_t{i} * c.queries.head_dim, c.queries.head_dim);
  }
  const bool tolerant = budget.kind == Budget::Kind::kError;
  if (const auto* const clusters = dynamic_cast<const ClusterIndex*>(&index)) {
    const ClusterRun run{clusters, &c.view, c.ranges};
    ClusterLimits limits;
    limits.tolerance = tolerant ? budget.error : 0;
    const std::vector<uint32_t> most(c.queries.queries, budget.k > 0 ? budget.k : ~0u);
    limits.most_tokens = most;
    SearchClusters({&run, 1}, c.queries, limits, partials);
  } else if (!tolerant) {
    Attend(dynamic_cast<const TokenIndex&>(index), c, budget, partials);
  }
  return Bits(partials, acc);
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
    uint32_t known = 0;
    std::memcpy(&known, bytes.data() + 24, sizeof(known));
    EXPECT_EQ(known, kind == "clusters" ? 7u : kind == "graph" ? 2u : 1u);
    for (const uint32_t version : {known - 1, known + 1}) {
      std::memcpy(bytes.data() + 24, &version, sizeof(version));
      Reseal(&bytes);
      EXPECT_EQ(DeserializeIndex(bytes).status().code(), absl::StatusCode::kInvalidArgument);
    }
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

class Unkept final : public KeyIndex {
 public:
  std::string_view kind() const override { return "unkept"; }
};

TEST(AnyIndexTest, AnIndexWithoutAFormSaysSo) {
  const absl::Status status = SerializeIndex(Unkept()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
  EXPECT_NE(status.message().find("unkept"), std::string::npos) << status;
}

}  // namespace
}  // namespace quarry

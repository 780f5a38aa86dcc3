// Clusters as bytes: shared models, and wrong numbers under a right checksum.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu_index/any_index.h"
#include "cpu_index/index_form.h"
#include "proto/byte_digest.h"
#include "tests/cpu_index/cluster_case.h"

namespace quarry {
namespace {

using testing::ClusterAnswer;
using testing::ClusterHead;
using testing::ClusterRuns;
using testing::Search;
using testing::Within;

using Bytes = std::vector<std::byte>;
using Models = std::vector<std::shared_ptr<const ClusterModel>>;
constexpr uint32_t kTokens = 600, kRun = 300;
constexpr float kMost = std::numeric_limits<float>::max();

// What a part of an index takes of its bytes.
template <typename T>
size_t BytesOf(const T& part) {
  IndexWriter writer("part", 1);
  part.Write(&writer);
  return std::move(writer).Finish().size() - kIndexFormHeaderBytes - kIndexFormDigestBytes;
}

// Two runs, the first one's bytes, and where some things stand in them.
class ClusterFormTest : public ::testing::Test {
 protected:
  void SetUp() override {
    runs_.Learn();
    bytes_ = runs_.indexes[0]->Serialize();
    model_end_ = kIndexFormHeaderBytes + BytesOf(*runs_.model);
    doubts_ = model_end_ - 16 * sizeof(uint32_t);
    order_ = model_end_ + BytesOf(runs_.indexes[0]->parts().codes);
  }

  template <typename T>
  Bytes With(size_t at, T value) const {
    Bytes out = bytes_;
    std::memcpy(out.data() + at, &value, sizeof(value));
    const size_t sealed = out.size() - kIndexFormDigestBytes;
    const ByteDigest digest = DigestOf(std::span(out).first(sealed));
    std::memcpy(out.data() + sealed, &digest, sizeof(digest));
    return out;
  }
  static void ExpectDataLoss(const Bytes& bytes, const std::string& says) {
    const absl::Status status = ClusterIndex::Deserialize(bytes).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
    EXPECT_NE(status.message().find(says), std::string::npos) << status;
  }
  // What is read back of both runs of a changed model can be searched, or is refused.
  void ExpectSearchable(const std::function<void(ClusterModel*)>& change) {
    auto model = std::make_shared<ClusterModel>(*runs_.model);
    change(model.get());
    for (const KvView& view : runs_.views) {
      if (!ClusterIndex::Build(view, model).ok()) return;  // as no keys of its
    }
    runs_.Rebuild(model);
    ClusterRuns again(head_, {kRun, kTokens});
    for (const auto& index : runs_.indexes) {
      Models known;
      if (!again.indexes.empty()) known.push_back(again.indexes[0]->model());
      auto read = ClusterIndex::Deserialize(index->Serialize(), known);
      if (!read.ok()) {
        ASSERT_EQ(read.status().code(), absl::StatusCode::kDataLoss) << read.status();
        return;
      }
      again.indexes.push_back(*std::move(read));
    }
    ++searched_;
    for (const float tolerated : {0.0f, 0.05f, 0.9f}) {
      const std::vector<TokenRange> ranges = {
          head_.all(), {ClusterHead::kFirst + 10, ClusterHead::kFirst + 333}, head_.all()};
      const ClusterAnswer found = Search(again, head_.Queries(0, 3), ranges, Within(tolerated));
      for (const uint32_t token : found.refined) {
        ASSERT_LT(token - ClusterHead::kFirst, kTokens);
      }
      EXPECT_TRUE(std::adjacent_find(found.refined.begin(), found.refined.end()) ==
                  found.refined.end());
      Search(again, head_.Queries(1, 1), std::span(ranges).first(1), Within(tolerated));
    }
  }

  const ClusterHead head_{kTokens, 64, 2};
  ClusterRuns runs_{head_, {kRun, kTokens}};
  Bytes bytes_;
  int searched_ = 0;
  size_t model_end_ = 0, doubts_ = 0, order_ = 0;
};

TEST_F(ClusterFormTest, RunsOfOneModelShareItWhenReadBack) {
  const auto first = ClusterIndex::Deserialize(bytes_);
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_NE((*first)->model(), runs_.model);
  auto unlike = std::make_shared<ClusterModel>(*runs_.model);
  unlike->token_doubt *= 1.01f;
  const Models known = {unlike, (*first)->model()};
  const auto second = ClusterIndex::Deserialize(runs_.indexes[1]->Serialize(), known);
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ((*second)->model(), (*first)->model());
  EXPECT_EQ((*second)->Serialize(), runs_.indexes[1]->Serialize());
  // So does what is read as an index of any kind.
  const auto any = DeserializeIndex(bytes_, known);
  ASSERT_TRUE(any.ok()) << any.status();
  EXPECT_EQ(dynamic_cast<const ClusterIndex&>(**any).model(), (*first)->model());
  // Together they answer as what was written.
  ClusterRuns again(head_, {kRun, kTokens});
  again.indexes.push_back(*ClusterIndex::Deserialize(bytes_, known));
  again.indexes.push_back(*ClusterIndex::Deserialize(runs_.indexes[1]->Serialize(), known));
  const std::vector<TokenRange> ranges(4, head_.all());
  for (const float tolerated : {0.0f, 0.02f, 0.2f}) {
    const ClusterAnswer wanted = Search(runs_, head_.Queries(0, 4), ranges, Within(tolerated));
    const ClusterAnswer found = Search(again, head_.Queries(0, 4), ranges, Within(tolerated));
    EXPECT_EQ(found.o, wanted.o);
    EXPECT_EQ(found.refined, wanted.refined);
    EXPECT_EQ(found.bytes, wanted.bytes);
  }
}

TEST_F(ClusterFormTest, UncodedKeysHavePlacesThatRiseAndFiniteNumbers) {
  const UncodedKeys& uncoded = runs_.indexes[0]->parts().uncoded;
  ASSERT_EQ(uncoded.places().size(), kRun / UncodedKeys::kTokensForOne);
  const size_t keys = bytes_.size() - kIndexFormDigestBytes -
                      uncoded.places().size() * head_.head_dim * sizeof(uint16_t);
  const size_t places = keys - uncoded.places().size_bytes();
  EXPECT_EQ(ClusterIndex::Deserialize(With(places, uncoded.places()[0])).status(),
            absl::OkStatus());
  ExpectDataLoss(With(places, kRun), "uncoded key is at place 300 of 300");
  ExpectDataLoss(With(places + sizeof(uint32_t), uncoded.places()[0]), "uncoded key is at place");
  ExpectDataLoss(With(places - sizeof(uint32_t), kRun + 1), "301 uncoded keys of 300");
  ExpectDataLoss(With(keys + 6, uint16_t{0x7f80}), "uncoded key");
}

TEST_F(ClusterFormTest, AnotherModelIsNotShared) {
  auto other = std::make_shared<ClusterModel>(*runs_.model);
  other->token_doubt *= 1.01f;
  const Models known = {other};
  const auto index = ClusterIndex::Deserialize(bytes_, known);
  ASSERT_TRUE(index.ok()) << index.status();
  EXPECT_NE((*index)->model(), other);
  EXPECT_EQ((*index)->model()->token_doubt, runs_.model->token_doubt);
  EXPECT_EQ((*index)->Serialize(), bytes_);
}

TEST_F(ClusterFormTest, EverythingThatAModelHasIsKept) {
  auto model = std::make_shared<ClusterModel>(*runs_.model);
  model->open_all = !model->open_all;
  model->scan_if_faster = !model->scan_if_faster;
  model->learned_queries = 12345;
  model->learned_tokens = 6789;
  model->log_length = -2.5f;
  model->needed_rows = 0.75f;
  model->scans_from = 0.05f;
  model->correction = {0.25f, -0.5f, 1};
  runs_.Rebuild(model);
  const auto index = ClusterIndex::Deserialize(runs_.indexes[0]->Serialize());
  ASSERT_TRUE(index.ok()) << index.status();
  const ClusterModel& read = *(*index)->model();
  EXPECT_EQ(read.open_all, model->open_all);
  EXPECT_EQ(read.scan_if_faster, model->scan_if_faster);
  EXPECT_EQ(read.needed_rows, 0.75f);
  EXPECT_EQ(read.scans_from, 0.05f);
  EXPECT_EQ(read.correction, model->correction);
  EXPECT_EQ(read.learned_queries, 12345u);
  EXPECT_EQ(read.learned_tokens, 6789u);
  EXPECT_EQ(read.log_length, -2.5f);
  EXPECT_EQ(read.query_map, model->query_map);
  EXPECT_EQ(read.row_variance, model->row_variance);
  EXPECT_EQ(read.leaf.slope, model->leaf.slope);
}

TEST_F(ClusterFormTest, AnOrderThatIsNoPermutationIsRefused) {
  std::vector<uint32_t> order(kRun);
  std::memcpy(order.data(), bytes_.data() + order_, order.size() * sizeof(uint32_t));
  std::vector<uint32_t> sorted = order;
  std::sort(sorted.begin(), sorted.end());
  for (uint32_t t = 0; t < kRun; ++t) ASSERT_EQ(sorted[t], t);
  ExpectDataLoss(With(order_ + 4, order[0]), "comes twice");
  ExpectDataLoss(With(order_ + 4, kRun), "token 300 of 300 does not exist");
}

TEST_F(ClusterFormTest, DoubtsThatNoModelHasAreRefused) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (size_t i = 0; i < 5; ++i) {
    for (const float doubt : {0.0f, -1.0f, 1e9f, kNan, kInfinity}) {
      ExpectDataLoss(With(doubts_ + 4 * i, doubt), "doubt");
    }
    EXPECT_TRUE(ClusterIndex::Deserialize(With(doubts_ + 4 * i, 0.5f)).ok());
  }
  ExpectDataLoss(With(doubts_ + 20, 0.9f), "caution");
  ExpectDataLoss(With(doubts_ + 24, -kInfinity), "length");
  ExpectDataLoss(With(doubts_ + 32, -0.1f), "share of rows");
  ExpectDataLoss(With(doubts_ + 32, 1e30f), "share of rows");
  for (const float from : {-0.1f, 0.03f, 1e30f, kInfinity, kNan}) {
    ExpectDataLoss(With(doubts_ + 36, from), "scans are faster");
  }
  for (const float correction : {-1.2f, 1.2f, kNan}) {
    ExpectDataLoss(With(doubts_ + 40, correction), "correction");
  }
  ExpectDataLoss(With(model_end_ - 12, uint32_t{4}), "flags 4");
  EXPECT_TRUE(ClusterIndex::Deserialize(With(model_end_ - 8, ~0u)).ok());
}

TEST_F(ClusterFormTest, QuantisersThatAreNotTheModelsAreRefused) {
  // The codes' steps stand behind the four words of their basis, its variances, and a size.
  const size_t steps = model_end_ + (4 + 48 + 1) * sizeof(uint32_t);
  for (size_t at = steps; at < steps + 48 * sizeof(float); at += sizeof(float)) {
    float step = 0;
    std::memcpy(&step, bytes_.data() + at, sizeof(step));
    ExpectDataLoss(With(at, 2 * step + 1), "quantisers");
  }
}

TEST_F(ClusterFormTest, ModelsOfAnyNumbersThatAreReadCanBeSearched) {
  for (const float x : {0.0f, 1e-30f, 1e30f, kMost}) {
    SCOPED_TRACE(x);
    ExpectSearchable([=](ClusterModel* m) { m->leaf.variance = m->super.variance = x; });
    ExpectSearchable([=](ClusterModel* m) {
      std::fill(m->leaf.covariance.begin(), m->leaf.covariance.end(), -x);
      std::fill(m->super.covariance.begin(), m->super.covariance.end(), x);
    });
    ExpectSearchable([=](ClusterModel* m) {
      m->leaf.variance = m->super.variance = m->lost_variance = 0;
      std::fill(m->leaf.covariance.begin(), m->leaf.covariance.end(), -x);
      std::fill(m->super.covariance.begin(), m->super.covariance.end(), -x);
    });
    ExpectSearchable([=](ClusterModel* m) { m->lost_variance = x; });
    ExpectSearchable([=](ClusterModel* m) { m->log_length = x; });
    ExpectSearchable([=](ClusterModel* m) { m->log_length = -x; });
    ExpectSearchable([=](ClusterModel* m) {
      std::fill(m->code_error.begin(), m->code_error.end(), x);
    });
    ExpectSearchable([=](ClusterModel* m) {
      std::fill(m->centre_step.begin(), m->centre_step.end(), x);
      m->open_all = true;
    });
    ExpectSearchable([=](ClusterModel* m) {
      std::fill(m->basis.mean.begin(), m->basis.mean.end(), x);
      m->open_all = true;
    });
  }
  for (const float doubt : {1e-6f, 1e3f}) {
    ExpectSearchable([=](ClusterModel* m) {
      m->super_doubt = m->leaf_doubt = m->common_doubt = m->token_doubt = m->row_doubt = doubt;
    });
    ExpectSearchable([=](ClusterModel* m) { m->row_doubt = doubt; });
  }
  EXPECT_GT(searched_, 20);
}

}  // namespace
}  // namespace quarry

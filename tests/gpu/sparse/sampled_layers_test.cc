#include "gpu/sparse/sampled_layers.h"

#include <gtest/gtest.h>

#include <cstring>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "gpu/sequence.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

struct Copy {
  std::vector<std::byte> k, v;
  std::vector<float> q;
};

class SampledLayersTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto model = Model::Load(QUARRY_TEST_MODELS "/tiny/phi3-partial-rotary", device_.get());
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
    tokens_ = MadeTokens(150, model_->config().vocab, Seed());
  }
  std::map<uint32_t, Copy> Sample(uint32_t layers_at_a_time) {
    std::map<uint32_t, Copy> out;
    const absl::Status status = SampleLayers(
        *model_, *device_, {tokens_, 150, layers_at_a_time}, [&](const SampledLayer& layer) {
          EXPECT_EQ(layer.layer, out.size());
          Copy& copy = out[layer.layer];
          const size_t bytes = layer.kv.kv.head_stride * layer.kv.kv_heads;
          copy.k.assign(layer.kv.Keys(0), layer.kv.Keys(0) + bytes);
          copy.v.assign(layer.kv.Values(0), layer.kv.Values(0) + bytes);
          copy.q.assign(layer.q.begin(), layer.q.end());
          return absl::OkStatus();
        });
    EXPECT_TRUE(status.ok()) << status;
    return out;
  }

  std::unique_ptr<Device> device_ = MakeHostDevice({.threads = 2});
  std::unique_ptr<Model> model_;
  std::vector<uint32_t> tokens_;
};

TEST_F(SampledLayersTest, AreTheSequencesWhateverTheNumberAtATime) {
  const std::map<uint32_t, Copy> all = Sample(0), single = Sample(1);
  const ModelConfig& config = model_->config();
  ASSERT_EQ(all.size(), config.layers);
  ASSERT_EQ(single.size(), config.layers);
  SequenceOptions options;
  options.kv_dtype = config.dtype;
  auto sequence = Sequence::Open(*model_, *device_, nullptr, options, tokens_, 150);
  ASSERT_TRUE(sequence.ok()) << sequence.status();
  ASSERT_TRUE((*sequence)->Extend(tokens_, Sequence::Role::kPrompt).ok());
  const KvShape& shape = (*sequence)->shape();
  for (uint32_t l = 0; l < config.layers; ++l) {
    EXPECT_EQ(all.at(l).q.size(), size_t{150} * config.heads * config.head_dim);
    EXPECT_TRUE(all.at(l).q == single.at(l).q);
    EXPECT_TRUE(all.at(l).k == single.at(l).k);
    EXPECT_TRUE(all.at(l).v == single.at(l).v);
    std::vector<std::byte> k(all.at(l).k.size()), v(k.size());
    ASSERT_TRUE((*sequence)->ReadKv(l, k, v).ok());
    const size_t row = shape.vector_bytes();
    for (uint32_t t = 0; t < 150; ++t) {
      for (uint32_t h = 0; h < shape.kv_heads; ++h) {
        const size_t from = (size_t{t} * shape.kv_heads + h) * row, to = (h * 150 + t) * row;
        ASSERT_EQ(std::memcmp(&k[from], &all.at(l).k[to], row), 0);
        ASSERT_EQ(std::memcmp(&v[from], &all.at(l).v[to], row), 0);
      }
    }
  }
}

TEST_F(SampledLayersTest, AnErrorEndsTheRun) {
  int taken = 0;
  const absl::Status status =
      SampleLayers(*model_, *device_, {tokens_, 150, 1}, [&](const SampledLayer&) {
        ++taken;
        return absl::AbortedError("enough");
      });
  EXPECT_TRUE(absl::IsAborted(status)) << status;
  EXPECT_EQ(taken, 1);
}

TEST(MadeTokensTest, FollowFromTheSeedAndRepeat) {
  const std::vector<uint32_t> a = MadeTokens(2000, 5000, 7);
  ASSERT_EQ(a.size(), 2000u);
  EXPECT_EQ(a, MadeTokens(2000, 5000, 7));
  EXPECT_NE(a, MadeTokens(2000, 5000, 8));
  std::map<std::pair<uint32_t, uint32_t>, int> pairs;
  int again = 0;
  for (size_t i = 0; i + 1 < a.size(); ++i) {
    EXPECT_LT(a[i], 5000u);
    again += pairs[{a[i], a[i + 1]}]++ > 0;
  }
  EXPECT_GT(again, 150);
}

}  // namespace
}  // namespace quarry

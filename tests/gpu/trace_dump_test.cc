// What a run leaves as traces: attention computed from them is what the worker computed.
#include "gpu/trace_dump.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <set>

#include "perf/trace.h"
#include "proto/half.h"
#include "tests/gpu/fake_service.h"
#include "tests/gpu/tiny_models.h"
#include "tests/gpu/watched_device.h"

namespace quarry {
namespace {

using perf::Trace;
using testing::FakeService;
using testing::WatchedDevice;

constexpr uint32_t kPrompt = 100, kDecoded = 12;

class TraceDumpTest : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "quarry-dump-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    directory_ = name;
    auto model = Model::Load(std::string(QUARRY_TEST_MODELS) + "/tiny/" + GetParam(), &device_);
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
    for (uint32_t i = 0; i < kPrompt + kDecoded; ++i) {
      tokens_.push_back((i * i * 37 + 11) % model_->config().vocab);
    }
    options_.kv_dtype = DType::kFp32;
    options_.window = {8, 16, false};
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  QueryRecorder Recorder(const QueryRecorderOptions& options = {}) const {
    auto recorder = QueryRecorder::Create(model_->config(), options);
    EXPECT_TRUE(recorder.ok()) << recorder.status();
    return *std::move(recorder);
  }
  // Runs the prompt and each token behind it, and writes the traces.
  std::map<std::string, Trace> Dump(KvService* service, QueryRecorder recorder) {
    options_.recorder = &recorder;
    auto opened = Sequence::Open(*model_, device_, service, options_,
                                 std::span(tokens_).first(kPrompt), kPrompt + kDecoded);
    EXPECT_TRUE(opened.ok()) << opened.status();
    options_.recorder = nullptr;  // others' sequences do not run with it
    Sequence& s = **opened;
    const auto run = [&](uint32_t lo, uint32_t hi, Sequence::Role role) {
      device_.seen.clear();
      const auto logits = s.Extend(std::span(tokens_).subspan(lo, hi - lo), role);
      EXPECT_TRUE(logits.ok()) << logits.status();
      Keep();
    };
    run(s.tokens(), kPrompt, Sequence::Role::kPrompt);
    for (uint32_t t = kPrompt; t < kPrompt + kDecoded; ++t) {
      run(t, t + 1, Sequence::Role::kBudgeted);
    }
    const absl::Status status = DumpTraces(s, recorder, "tiny", directory_);
    EXPECT_TRUE(status.ok()) << status;
    std::map<std::string, Trace> out;
    const auto paths = perf::ListTraces(directory_);
    EXPECT_TRUE(paths.ok()) << paths.status();
    for (const std::string& path : *paths) {
      auto trace = perf::ReadTrace(path);
      EXPECT_TRUE(trace.ok()) << trace.status();
      out.emplace(trace->name, *std::move(trace));
    }
    return out;
  }
  // The outputs of the device's attention, by layer and position; one call for each layer.
  void Keep() {
    for (uint32_t l = 0; l < device_.seen.size(); ++l) {
      const WatchedDevice::Seen& seen = device_.seen[l];
      const size_t width = seen.o.size() / seen.rows;
      for (uint32_t r = 0; r < seen.rows; ++r) {
        outputs_[{l, seen.first_token + r}].assign(seen.o.begin() + r * width,
                                                   seen.o.begin() + (r + 1) * width);
      }
    }
  }
  // Attention by plain sums of one of the trace's queries over [0, position].
  static std::vector<float> Attend(const Trace& t, const std::vector<float>& all, uint32_t index,
                                   uint32_t position) {
    std::vector<float> out;
    for (uint32_t head = 0; head < t.heads; ++head) {
      const uint32_t kv_head = head / t.group();
      const auto q = t.Queries(all, index, kv_head).subspan(head % t.group() * t.head_dim);
      std::vector<double> o(t.head_dim);
      double total = 0;
      for (uint32_t i = 0; i <= position; ++i) {
        double z = 0;
        for (uint32_t d = 0; d < t.head_dim; ++d) {
          z += double{q[d]} *
               LoadAsFloat(t.Keys(kv_head).data(), size_t{i} * t.head_dim + d, t.dtype);
        }
        const double weight = std::exp(z * t.scale);
        total += weight;
        for (uint32_t d = 0; d < t.head_dim; ++d) {
          o[d] +=
              weight * LoadAsFloat(t.Values(kv_head).data(), size_t{i} * t.head_dim + d, t.dtype);
        }
      }
      for (double x : o) out.push_back(static_cast<float>(x / total));
    }
    return out;
  }
  static void ExpectNear(std::span<const float> got, std::span<const float> want, float share) {
    ASSERT_EQ(got.size(), want.size());
    float largest = 0, worst = 0;
    for (size_t i = 0; i < want.size(); ++i) {
      largest = std::max(largest, std::abs(want[i]));
      worst = std::max(worst, std::abs(got[i] - want[i]));
    }
    EXPECT_GT(largest, 0);
    EXPECT_LE(worst, share * largest);
  }

  std::string directory_;
  WatchedDevice device_;
  std::unique_ptr<Model> model_;
  std::vector<uint32_t> tokens_;
  SequenceOptions options_;
  std::map<std::pair<uint32_t, uint32_t>, std::vector<float>> outputs_;
};

TEST_P(TraceDumpTest, AttentionFromTheTraceIsWhatTheWorkerComputed) {
  for (const DType dtype : {DType::kFp32, DType::kBf16}) {
    options_.kv_dtype = dtype;
    const auto traces = Dump(nullptr, Recorder({.prompt_queries = 20, .last_queries = 5}));
    ASSERT_EQ(traces.size(), model_->config().layers);
    for (const auto& [name, t] : traces) {
      SCOPED_TRACE(name);
      EXPECT_EQ(t.tokens, kPrompt + kDecoded);
      EXPECT_EQ(t.dtype, dtype);
      EXPECT_EQ(t.model, "tiny");
      ASSERT_EQ(t.q_pos.size(), kDecoded);
      ASSERT_EQ(t.q_train_pos.size(), 25u);
      for (const bool training : {true, false}) {
        const auto& positions = training ? t.q_train_pos : t.q_pos;
        for (uint32_t i = 0; i < positions.size(); ++i) {
          const auto o = Attend(t, training ? t.q_train : t.q, i, positions[i]);
          ExpectNear(o, outputs_.at({t.layer, positions[i]}),
                     dtype == DType::kFp32 ? 1e-4f : 5e-3f);
        }
      }
    }
  }
}

TEST_P(TraceDumpTest, ThroughAServiceTheTraceIsTheSame) {
  const auto full = Dump(nullptr, Recorder());
  FakeService service, failing, reusing;
  failing.fail_attend = 3 * static_cast<int>(model_->config().layers) + 1;
  failing.failure = absl::ResourceExhaustedError("queue full");
  FakeService origin;
  auto prefix = Sequence::Open(*model_, device_, &origin, options_,
                               std::span(tokens_).first(kPrompt), kPrompt);
  ASSERT_TRUE((*prefix)->Extend(std::span(tokens_).first(kPrompt), Sequence::Role::kPrompt).ok());
  reusing.reuse = &origin.contexts.begin()->second;
  reusing.reuse_tokens = 40;
  for (FakeService* s : {&service, &failing, &reusing}) {
    const auto traces = Dump(s, Recorder());
    ASSERT_EQ(traces.size(), full.size());
    for (const auto& [name, want] : full) {
      SCOPED_TRACE(name);
      const Trace& t = traces.at(name);
      const auto floats = [](const std::vector<std::byte>& x) {
        return std::span(reinterpret_cast<const float*>(x.data()), x.size() / 4);
      };
      ExpectNear(floats(t.k), floats(want.k), 1e-4f);
      ExpectNear(floats(t.v), floats(want.v), 1e-4f);
      EXPECT_EQ(t.q_pos, want.q_pos);
      ExpectNear(t.q, want.q, 1e-4f);
      // Of a reused prefix there are keys, but no queries.
      const uint32_t computed = s == &reusing ? kPrompt - 40 : kPrompt;
      ASSERT_EQ(t.q_train_pos.size(), computed);
      EXPECT_EQ(t.q_train_pos.back(), kPrompt - 1);
      ExpectNear(t.q_train, std::span(want.q_train).last(t.q_train.size()), 1e-4f);
    }
  }
  EXPECT_GT(failing.attends, service.attends) << "no token was computed again";
}

TEST_P(TraceDumpTest, ForksLeaveNothingInTheTrace) {
  QueryRecorder recorder = Recorder();
  options_.recorder = &recorder;
  auto s = Sequence::Open(*model_, device_, nullptr, options_, {}, kPrompt + kDecoded);
  ASSERT_TRUE((*s)->Extend(std::span(tokens_).first(kPrompt), Sequence::Role::kPrompt).ok());
  auto fork = (*s)->Fork();
  ASSERT_TRUE((*fork)->Extend(std::span(tokens_).first(3), Sequence::Role::kBudgeted).ok());
  EXPECT_TRUE(recorder.layers().at(0).decoded.positions.empty());
  EXPECT_EQ(recorder.layers().at(0).prompt.positions.size(), kPrompt);
}

TEST_P(TraceDumpTest, OnlyChosenLayersAreWritten) {
  const auto traces = Dump(nullptr, Recorder({.layers = {1}}));
  ASSERT_EQ(traces.size(), 1u);
  EXPECT_EQ(traces.begin()->first, "layer-01");
  EXPECT_EQ(traces.begin()->second.layer, 1u);
  const absl::Status status = QueryRecorder::Create(model_->config(), {.layers = {0, 99}}).status();
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  EXPECT_NE(std::string(status.message()).find("layer 99"), std::string::npos) << status;
}

TEST_P(TraceDumpTest, PlacesAreSpreadEvenlyAndFollowTheirSeed) {
  const auto positions = [&](uint32_t seed) {
    QueryRecorder recorder =
        Recorder({.layers = {0}, .prompt_queries = 100, .last_queries = 10, .seed = seed});
    recorder.BeginPrompt({500, 10510});
    std::vector<float> q(size_t{10510} * model_->config().heads * model_->config().head_dim);
    EXPECT_TRUE(recorder.Take(0, 500, 10010, q.data(), device_).ok());
    return recorder.layers().at(0).prompt.positions;
  };
  const std::vector<uint32_t> a = positions(1);
  ASSERT_EQ(a.size(), 110u);
  for (uint32_t i = 0; i < 100; ++i) {
    EXPECT_GE(a[i], 500 + 100 * i);
    EXPECT_LT(a[i], 500 + 100 * (i + 1));
  }
  for (uint32_t i = 0; i < 10; ++i) EXPECT_EQ(a[100 + i], 10500 + i);
  EXPECT_EQ(a, positions(1));
  EXPECT_NE(a, positions(2));
}

INSTANTIATE_TEST_SUITE_P(Models, TraceDumpTest,
                         ::testing::Values("llama-untied-mha", "llama3-rope",
                                           "phi3-partial-rotary"),
                         TinyModelName);

TEST(QueryRecorderTest, ASlidingWindowIsRefused) {
  auto device = MakeHostDevice({.threads = 1});
  const auto model =
      Model::Load(std::string(QUARRY_TEST_MODELS) + "/tiny/phi3-sliding-window", device.get());
  ASSERT_TRUE(model.ok()) << model.status();
  const absl::Status status = QueryRecorder::Create((*model)->config(), {}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented) << status;
  EXPECT_NE(std::string(status.message()).find("48"), std::string::npos) << status;
}

}  // namespace
}  // namespace quarry

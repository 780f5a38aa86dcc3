#include "perf/trace.h"

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <random>
#include <utility>

#include "gpu/safetensors.h"
#include "proto/half.h"

namespace quarry::perf {
namespace {

constexpr uint32_t kTokens = 7, kKvHeads = 2, kHeads = 6, kDim = 16;

// Element d of KV head h of token i, different everywhere and exact in every dtype.
float ElementOf(uint32_t part, uint32_t h, uint32_t i, uint32_t d) {
  return static_cast<float>(((part * kKvHeads + h) * kTokens + i) * kDim + d) - 224;
}

Trace Small(DType dtype) {
  Trace t;
  t.name = "small";
  t.model = "a model";
  t.layer = 11;
  t.scale = 0.3f;
  t.tokens = kTokens;
  t.kv_heads = kKvHeads;
  t.heads = kHeads;
  t.head_dim = kDim;
  t.dtype = dtype;
  for (uint32_t part = 0; part < 2; ++part) {
    std::vector<std::byte>& out = part == 0 ? t.k : t.v;
    out.resize(size_t{kTokens} * kKvHeads * kDim * DTypeBytes(dtype));
    size_t at = 0;
    for (uint32_t h = 0; h < kKvHeads; ++h) {
      for (uint32_t i = 0; i < kTokens; ++i) {
        for (uint32_t d = 0; d < kDim; ++d) {
          StoreFromFloat(out.data(), at++, dtype, ElementOf(part, h, i, d));
        }
      }
    }
  }
  for (uint32_t i = 0; i < 3 * kHeads * kDim; ++i) t.q_train.push_back(0.1f * i);
  t.q_train_pos = {0, 3, kTokens - 1};
  for (uint32_t i = 0; i < 2 * kHeads * kDim; ++i) t.q.push_back(-0.1f * i);
  t.q_pos = {5, 6};
  return t;
}

class TraceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "quarry-trace-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    directory_ = name;
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }
  std::string Path(const std::string& name) const { return directory_ + "/" + name; }

  // A file of the small trace, to be changed before it is written.
  struct Parts {
    std::vector<std::pair<std::string, TensorView>> tensors;
    std::map<std::string, std::string> metadata;
    TensorView& at(const std::string& name) {
      for (auto& [known, tensor] : tensors) {
        if (known == name) return tensor;
      }
      std::abort();
    }
  };
  // What ReadTrace says about the small trace's file after a change.
  absl::Status Changed(const std::function<void(Parts*)>& change) {
    EXPECT_TRUE(WriteTrace(Small(DType::kFp32), Path("good.safetensors")).ok());
    const auto good = SafetensorsFile::Open(Path("good.safetensors"));
    EXPECT_TRUE(good.ok()) << good.status();
    Parts parts;
    parts.metadata = (*good)->metadata();
    for (const auto& [name, tensor] : (*good)->tensors()) parts.tensors.emplace_back(name, tensor);
    change(&parts);
    EXPECT_TRUE(WriteSafetensors(Path("bad.safetensors"), parts.tensors, parts.metadata).ok());
    return ReadTrace(Path("bad.safetensors")).status();
  }
  // `words`: the tensor and the numbers that the message must give, beside the file.
  void ExpectRefused(const std::vector<std::string>& words,
                     const std::function<void(Parts*)>& change) {
    const absl::Status status = Changed(change);
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_NE(std::string(status.message()).find("bad.safetensors"), std::string::npos) << status;
    for (const std::string& word : words) {
      EXPECT_NE(std::string(status.message()).find(word), std::string::npos)
          << status << " does not say " << word;
    }
  }

  std::string directory_;
};

TEST_F(TraceTest, ComesBackAsItWasWrittenInEveryDtype) {
  for (const DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    SCOPED_TRACE(DTypeName(dtype));
    const Trace t = Small(dtype);
    ASSERT_TRUE(WriteTrace(t, Path("small.safetensors")).ok());
    const absl::StatusOr<Trace> back = ReadTrace(Path("small.safetensors"));
    ASSERT_TRUE(back.ok()) << back.status();
    EXPECT_EQ(back->name, "small");
    EXPECT_EQ(back->model, t.model);
    EXPECT_EQ(back->layer, t.layer);
    EXPECT_EQ(back->scale, t.scale);
    EXPECT_EQ(back->tokens, t.tokens);
    EXPECT_EQ(back->kv_heads, t.kv_heads);
    EXPECT_EQ(back->heads, t.heads);
    EXPECT_EQ(back->head_dim, t.head_dim);
    EXPECT_EQ(back->dtype, t.dtype);
    EXPECT_EQ(back->k, t.k);
    EXPECT_EQ(back->v, t.v);
    EXPECT_EQ(back->q_train, t.q_train);
    EXPECT_EQ(back->q, t.q);
    EXPECT_EQ(back->q_train_pos, t.q_train_pos);
    EXPECT_EQ(back->q_pos, t.q_pos);
  }
}

TEST_F(TraceTest, FilesHoldTokensBeforeHeads) {
  ASSERT_TRUE(WriteTrace(Small(DType::kBf16), Path("small.safetensors")).ok());
  const auto file = SafetensorsFile::Open(Path("small.safetensors"));
  ASSERT_TRUE(file.ok()) << file.status();
  for (uint32_t part = 0; part < 2; ++part) {
    const absl::StatusOr<TensorView> tensor = (*file)->Find(part == 0 ? "k" : "v");
    ASSERT_TRUE(tensor.ok());
    ASSERT_EQ(tensor->shape, (std::vector<uint64_t>{kTokens, kKvHeads, kDim}));
    for (size_t i = 0; i < tensor->elements(); ++i) {
      const size_t row = i / kDim;
      EXPECT_EQ(tensor->at(i), ElementOf(part, row % kKvHeads, row / kKvHeads, i % kDim));
    }
  }
}

TEST_F(TraceTest, OtherEnginesMayHaveHalfQueriesAndLongPositions) {
  std::vector<std::byte> q(2 * kHeads * kDim * 2);
  for (size_t i = 0; i < 2 * kHeads * kDim; ++i) StoreFromFloat(q.data(), i, DType::kFp16, 0.5f);
  const std::vector<int64_t> positions = {4, 6};
  const absl::Status status = Changed([&](Parts* p) {
    p->at("q") = {TensorDType::kFp16, {2, kHeads, kDim}, q};
    p->at("q_pos") = {TensorDType::kInt64, {2}, std::as_bytes(std::span(positions))};
    p->metadata["engine"] = "another";
  });
  EXPECT_TRUE(status.ok()) << status;
  const absl::StatusOr<Trace> t = ReadTrace(Path("bad.safetensors"));
  EXPECT_EQ(t->q, std::vector<float>(2 * kHeads * kDim, 0.5f));
  EXPECT_EQ(t->q_pos, (std::vector<uint32_t>{4, 6}));
}

TEST_F(TraceTest, ShapesThatDisagreeAreNamed) {
  ExpectRefused({"tensor v", "[14, 1, 16]", "[7, 2, 16]"}, [](Parts* p) {
    p->at("v").shape = {14, 1, 16};
  });
  ExpectRefused({"tensor k", "[7, 32]"}, [](Parts* p) { p->at("k").shape = {7, 32}; });
  ExpectRefused({"tensor q", "[2, 3, 32]", "16"}, [](Parts* p) { p->at("q").shape = {2, 3, 32}; });
  ExpectRefused({"tensor q_train", "[6, 3, 16]"}, [](Parts* p) {
    p->at("q_train").shape = {6, 3, 16};
  });
  ExpectRefused({"tensor q_pos", "2"}, [](Parts* p) { p->at("q_pos").shape = {1, 2}; });
  ExpectRefused({"tensor q:", "3 heads", "2 KV heads"}, [](Parts* p) {
    p->at("q").shape = {4, 3, 16};
  });
  ExpectRefused({"tensor k", "empty"}, [](Parts* p) {
    p->at("k").shape = {0, 2, 16};
    p->at("k").bytes = {};
  });
  ExpectRefused({"tensor q:", "empty"}, [](Parts* p) {
    p->at("q").shape = {0, 6, 16};
    p->at("q").bytes = {};
  });
}

TEST_F(TraceTest, HeadsThatNoKernelTakesAreNamed) {
  for (const uint32_t dim : {8u, 24u, 72u, 528u, 576u}) {
    Trace t = Small(DType::kBf16);
    t.head_dim = dim;
    t.k.assign(size_t{kTokens} * kKvHeads * dim * 2, std::byte{0});
    t.v = t.k;
    t.q_train.assign(3 * kHeads * dim, 0.0f);
    t.q.assign(2 * kHeads * dim, 0.0f);
    ASSERT_TRUE(WriteTrace(t, Path("bad.safetensors")).ok());
    const absl::Status status = ReadTrace(Path("bad.safetensors")).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    for (const std::string& word :
         {std::string("bad.safetensors"), "head_dim " + std::to_string(dim)}) {
      EXPECT_NE(std::string(status.message()).find(word), std::string::npos) << status;
    }
  }
}

// What no writer of ours makes: the header as text.
TEST_F(TraceTest, HeadersThatCannotBeAreNamed) {
  const auto refused = [this](uint64_t header_bytes, const std::string& header) {
    std::ofstream out(Path("bad.safetensors"), std::ios::binary);
    out.write(reinterpret_cast<const char*>(&header_bytes), sizeof(header_bytes));
    out << header << std::string(64, '\0');
    out.close();
    const absl::Status status = ReadTrace(Path("bad.safetensors")).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_NE(std::string(status.message()).find("bad.safetensors"), std::string::npos) << status;
    return std::string(status.message());
  };
  const auto tensor = [&refused](const std::string& shape, const std::string& dtype) {
    const std::string header = R"({"k":{"dtype":")" + dtype + R"(","shape":)" + shape +
                               R"(,"data_offsets":[0,64]}})";
    return refused(header.size(), header);
  };
  EXPECT_NE(refused(1 << 20, "{}").find("header of 1048576 bytes"), std::string::npos);
  EXPECT_NE(refused(uint64_t{0} - 1, "{}").find("header of 18446744073709551615 bytes"),
            std::string::npos);
  // Products that are 32 elements of bf16 if they wrap around.
  EXPECT_NE(tensor("[4294967296,4294967296,1]", "BF16").find("too large"), std::string::npos);
  EXPECT_NE(tensor("[9223372036854775824,2,1]", "BF16").find("too large"), std::string::npos);
  EXPECT_NE(tensor("[-1,2,16]", "BF16").find("not a count"), std::string::npos);
  EXPECT_NE(tensor("[1,1,8]", "F64").find("dtype F64"), std::string::npos);
}

TEST_F(TraceTest, MissingTensorsAndWrongDtypesAreNamed) {
  for (size_t i = 0; i < 6; ++i) {
    std::string name;
    const absl::Status status = Changed([&](Parts* p) {
      name = p->tensors[i].first;
      p->tensors.erase(p->tensors.begin() + i);
    });
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_NE(std::string(status.message()).find("tensor " + name), std::string::npos) << status;
  }
  ExpectRefused({"tensor k", "integers"}, [](Parts* p) { p->at("k").dtype = TensorDType::kInt32; });
  ExpectRefused({"tensor q_pos", "integers"},
                [](Parts* p) { p->at("q_pos").dtype = TensorDType::kFp32; });
  const std::vector<uint16_t> half(kTokens * kKvHeads * kDim);
  ExpectRefused({"tensor v", "bf16", "fp32"}, [&](Parts* p) {
    p->at("v").dtype = TensorDType::kBf16;
    p->at("v").bytes = std::as_bytes(std::span(half));
  });
}

TEST_F(TraceTest, PositionsPastTheKeysAreNamed) {
  for (const int32_t wrong : {int32_t{kTokens}, -1, std::numeric_limits<int32_t>::max()}) {
    const std::vector<int32_t> positions = {0, wrong, 2};
    ExpectRefused(
        {"tensor q_train_pos", "element 1 is " + std::to_string(wrong), "7 keys"},
        [&](Parts* p) { p->at("q_train_pos").bytes = std::as_bytes(std::span(positions)); });
  }
}

TEST_F(TraceTest, PositionsThatDoNotRiseAreNamed) {
  for (const int32_t wrong : {2, 3}) {
    const std::vector<int32_t> positions = {1, 3, wrong};
    ExpectRefused(
        {"tensor q_train_pos", "element 2 is " + std::to_string(wrong), "behind 3"},
        [&](Parts* p) { p->at("q_train_pos").bytes = std::as_bytes(std::span(positions)); });
  }
}

TEST_F(TraceTest, NumbersThatAreNoneAreNamedWithTheirPlace) {
  for (const DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    for (const float wrong : {std::numeric_limits<float>::quiet_NaN(),
                              -std::numeric_limits<float>::infinity(), 65536.0f}) {
      Trace t = Small(dtype);
      // KV head 1, token 3, element 2.
      StoreFromFloat(t.v.data(), (kTokens + 3) * kDim + 2, dtype, wrong);
      ASSERT_TRUE(WriteTrace(t, Path("bad.safetensors")).ok());
      const absl::Status status = ReadTrace(Path("bad.safetensors")).status();
      EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
      EXPECT_NE(std::string(status.message()).find("tensor v: element [3, 1, 2]"),
                std::string::npos)
          << status;
    }
  }
  Trace t = Small(DType::kBf16);
  t.q_train[kHeads * kDim + 2 * kDim + 1] = std::numeric_limits<float>::infinity();
  ASSERT_TRUE(WriteTrace(t, Path("bad.safetensors")).ok());
  const absl::Status status = ReadTrace(Path("bad.safetensors")).status();
  EXPECT_NE(std::string(status.message()).find("tensor q_train: element [1, 2, 1] is inf"),
            std::string::npos)
      << status;
}

TEST_F(TraceTest, NumbersOfAllSizesThatFp16HasAreTaken) {
  for (const DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    Trace t = Small(dtype);
    StoreFromFloat(t.k.data(), 0, dtype, dtype == DType::kBf16 ? 65280.0f : 65504.0f);
    StoreFromFloat(t.k.data(), 1, dtype, -65280.0f);
    ASSERT_TRUE(WriteTrace(t, Path("large.safetensors")).ok());
    EXPECT_TRUE(ReadTrace(Path("large.safetensors")).ok());
  }
}

TEST_F(TraceTest, MetadataIsNeededAndChecked) {
  for (const char* key : {"scale", "model", "layer"}) {
    ExpectRefused({"no metadata", key}, [&](Parts* p) { p->metadata.erase(key); });
  }
  for (const char* scale : {"0", "-1", "nan", "inf", "1e30", "some", ""}) {
    ExpectRefused({"scale", scale}, [&](Parts* p) { p->metadata["scale"] = scale; });
  }
  ExpectRefused({"layer", "-3"}, [](Parts* p) { p->metadata["layer"] = "-3"; });
}

TEST_F(TraceTest, TruncatedFilesAreRefusedWhereverTheyEnd) {
  ASSERT_TRUE(WriteTrace(Small(DType::kBf16), Path("good.safetensors")).ok());
  std::ifstream in(Path("good.safetensors"), std::ios::binary);
  const std::string all{std::istreambuf_iterator<char>(in), {}};
  ASSERT_GT(all.size(), 1000u);
  for (size_t bytes = 0; bytes < all.size(); ++bytes) {
    std::ofstream(Path("cut.safetensors"), std::ios::binary) << all.substr(0, bytes);
    const absl::Status status = ReadTrace(Path("cut.safetensors")).status();
    ASSERT_TRUE(absl::IsInvalidArgument(status)) << bytes << " bytes: " << status;
  }
}

TEST_F(TraceTest, WhatDoesNotFitIsNotWritten) {
  Trace t = Small(DType::kBf16);
  t.v.pop_back();
  absl::Status status = WriteTrace(t, Path("x.safetensors"));
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  EXPECT_NE(std::string(status.message()).find("tensor v"), std::string::npos) << status;
  t = Small(DType::kBf16);
  t.q_train_pos.pop_back();
  status = WriteTrace(t, Path("x.safetensors"));
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  EXPECT_NE(std::string(status.message()).find("tensor q_train"), std::string::npos) << status;
  EXPECT_FALSE(std::filesystem::exists(Path("x.safetensors")));
  EXPECT_TRUE(absl::IsUnavailable(WriteTrace(Small(DType::kBf16), "/nonexistent/x.safetensors")));
}

TEST_F(TraceTest, DirectoriesAreListedInTheOrderOfNames) {
  EXPECT_TRUE(absl::IsNotFound(ListTraces(directory_).status()));
  EXPECT_TRUE(absl::IsNotFound(ListTraces("/nonexistent").status()));
  for (const char* name : {"b.safetensors", "a-2.safetensors", "a-10.safetensors"}) {
    ASSERT_TRUE(WriteTrace(Small(DType::kBf16), Path(name)).ok());
  }
  std::ofstream(Path("notes.txt")) << "other";
  const auto names = ListTraces(directory_);
  ASSERT_TRUE(names.ok()) << names.status();
  EXPECT_EQ(*names, (std::vector<std::string>{Path("a-10.safetensors"), Path("a-2.safetensors"),
                                              Path("b.safetensors")}));
}

}  // namespace
}  // namespace quarry::perf

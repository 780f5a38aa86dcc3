// Malformed model files: every one is refused by name, none is read past its end.
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>

#include "gpu/model.h"
#include "gpu/safetensors.h"

namespace quarry {
namespace {

class SafetensorsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "quarry-st-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    directory_ = name;
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  std::string Write(const std::string& header, size_t data_bytes, uint64_t length = ~0ull) {
    const std::string path = directory_ + "/model.safetensors";
    std::ofstream out(path, std::ios::binary);
    if (length == ~0ull) length = header.size();
    out.write(reinterpret_cast<const char*>(&length), 8);
    out << header << std::string(data_bytes, '\0');
    return path;
  }
  void ExpectRefused(const std::string& header, size_t data_bytes, const char* word) {
    auto file = SafetensorsFile::Open(Write(header, data_bytes));
    ASSERT_FALSE(file.ok()) << header;
    EXPECT_TRUE(absl::IsInvalidArgument(file.status())) << file.status();
    EXPECT_NE(std::string(file.status().message()).find(word), std::string::npos)
        << file.status() << " does not say " << word;
    EXPECT_NE(std::string(file.status().message()).find("model.safetensors"), std::string::npos);
  }

  std::string directory_;
};

TEST_F(SafetensorsTest, ReadsWhatIsWellFormed) {
  auto file = SafetensorsFile::Open(
      Write(R"({"__metadata__":{"a":"b"},"x":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
            R"("y":{"dtype":"BF16","shape":[],"data_offsets":[24,26]}})",
            26));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ((*file)->metadata().at("a"), "b");
  EXPECT_EQ((*file)->Find("x")->elements(), 6u);
  EXPECT_EQ((*file)->Find("y")->elements(), 1u);
  EXPECT_TRUE(absl::IsNotFound((*file)->Find("z").status()));
}

TEST_F(SafetensorsTest, MalformedHeadersAreRefusedByName) {
  ExpectRefused("", 0, "JSON");
  ExpectRefused("[]", 0, "JSON");
  ExpectRefused("{\"x\":", 4, "JSON");
  ExpectRefused(R"({"x":3})", 4, "tensor x");
  ExpectRefused(R"({"x":{"dtype":"F8","shape":[1],"data_offsets":[0,1]}})", 1, "F8");
  ExpectRefused(R"({"x":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", 4, "dimension");
  ExpectRefused(R"({"x":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}})", 8, "8 bytes");
  ExpectRefused(R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 4, "of 4");
  ExpectRefused(R"({"x":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})", 4, "tensor x");
  ExpectRefused(R"({"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", 0,
                "too large");
  ExpectRefused(R"({"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                R"("y":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}})",
                6, "overlap");
  ExpectRefused(R"({"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                R"("y":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}})",
                12, "hole");
  ExpectRefused(R"({"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                R"("x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
                4, "twice");
  ExpectRefused(R"({"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 9, "end at byte");
}

TEST_F(SafetensorsTest, ImpossibleHeaderLengthsAreRefused) {
  for (uint64_t length : {uint64_t{100}, uint64_t{1} << 40, ~uint64_t{0} - 1}) {
    auto file = SafetensorsFile::Open(Write("{}", 0, length));
    EXPECT_TRUE(absl::IsInvalidArgument(file.status())) << file.status();
  }
  const std::string path = directory_ + "/short";
  std::ofstream(path) << "abc";
  EXPECT_FALSE(SafetensorsFile::Open(path).ok());
  std::ofstream(directory_ + "/empty");
  EXPECT_FALSE(SafetensorsFile::Open(directory_ + "/empty").ok());
}

TEST_F(SafetensorsTest, TruncatedAndMutatedFilesNeverCrash) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  const std::string source =
      std::string(QUARRY_TEST_MODELS) + "/tiny/llama-untied-mha/model.safetensors";
  std::ifstream in(source, std::ios::binary);
  const std::string whole{std::istreambuf_iterator<char>(in), {}};
  ASSERT_GT(whole.size(), 1000u);
  uint64_t header = 0;
  std::memcpy(&header, whole.data(), 8);
  for (int i = 0; i < 400; ++i) {
    std::string bytes = whole;
    if (i % 2 == 0) {
      bytes.resize(random() % whole.size());
    } else {
      for (int flips = 0; flips < 3; ++flips) {
        bytes[random() % (header + 8)] ^= static_cast<char>(1u << (random() % 8));
      }
    }
    const std::string path = directory_ + "/model.safetensors";
    std::ofstream(path, std::ios::binary) << bytes;
    auto file = SafetensorsFile::Open(path);
    if (i % 2 == 0) {
      EXPECT_FALSE(file.ok()) << "a file cut at " << bytes.size();
    }
    if (!file.ok()) continue;
    for (const auto& [name, tensor] : (*file)->tensors()) {
      if (tensor.elements() > 0) (void)tensor.at(tensor.elements() - 1);
    }
  }
}

// A copy of a good model, with one thing wrong.
class ModelFolderTest : public SafetensorsTest {
 protected:
  void Copy() {
    for (const auto& entry : std::filesystem::directory_iterator(std::string(QUARRY_TEST_MODELS) +
                                                                 "/tiny/llama-untied-mha")) {
      std::filesystem::copy(entry.path(), directory_);
    }
  }
  void Replace(const std::string& from, const std::string& to) {
    std::ifstream in(directory_ + "/config.json");
    std::string text{std::istreambuf_iterator<char>(in), {}};
    const size_t at = text.find(from);
    ASSERT_NE(at, std::string::npos) << from;
    text.replace(at, from.size(), to);
    std::ofstream(directory_ + "/config.json") << text;
  }
  absl::Status Load() {
    device_ = MakeHostDevice({});
    return Model::Load(directory_, device_.get()).status();
  }
  std::unique_ptr<Device> device_;
};

TEST_F(ModelFolderTest, WrongShapesAndUnknownArchitecturesAreNamed) {
  Copy();
  ASSERT_TRUE(Load().ok()) << Load();
  Replace("\"intermediate_size\":", "\"intermediate_size\": 999, \"was\":");
  absl::Status status = Load();
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  EXPECT_NE(std::string(status.message()).find("999"), std::string::npos) << status;
  EXPECT_NE(std::string(status.message()).find("mlp"), std::string::npos) << status;
}

TEST_F(ModelFolderTest, UnknownArchitectureIsUnimplementedByName) {
  Copy();
  Replace("LlamaForCausalLM", "GptForCausalLM");
  EXPECT_TRUE(absl::IsUnimplemented(Load())) << Load();
  EXPECT_NE(std::string(Load().message()).find("GptForCausalLM"), std::string::npos);
}

TEST_F(ModelFolderTest, DeviceBudgetIsARefusalWithNumbers) {
  Copy();
  device_ = MakeHostDevice({.capacity_bytes = 10000});
  const absl::Status status = Model::Load(directory_, device_.get()).status();
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_NE(std::string(status.message()).find("10000"), std::string::npos) << status;
}

}  // namespace
}  // namespace quarry

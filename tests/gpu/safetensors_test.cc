// Malformed model files: every one is refused by name, none is read past its end.
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <random>

#include <nlohmann/json.hpp>

#include "gpu/model.h"
#include "gpu/safetensors.h"
#include "tests/support/seed.h"

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
  std::mt19937 random(Seed());
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
      std::filesystem::copy(entry.path(), directory_,
                            std::filesystem::copy_options::overwrite_existing);
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
  void WriteFile(const std::string& name, const nlohmann::json& header, const std::string& data) {
    const std::string text = header.dump();
    const uint64_t length = text.size();
    std::ofstream out(directory_ + "/" + name, std::ios::binary);
    out.write(reinterpret_cast<const char*>(&length), 8);
    out << text << data;
  }
  // Changes the header and the data of model.safetensors.
  void Rewrite(const std::function<void(nlohmann::json*, std::string*)>& change) {
    std::ifstream in(directory_ + "/model.safetensors", std::ios::binary);
    const std::string file{std::istreambuf_iterator<char>(in), {}};
    uint64_t length = 0;
    std::memcpy(&length, file.data(), 8);
    nlohmann::json header = nlohmann::json::parse(file.substr(8, length));
    std::string data = file.substr(8 + length);
    change(&header, &data);
    WriteFile("model.safetensors", header, data);
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

TEST_F(ModelFolderTest, ATensorThatTheArchitectureLacksIsRefusedByName) {
  Copy();
  Rewrite([](nlohmann::json* header, std::string* data) {
    (*header)["model.layers.0.self_attn.q_proj.bias"] = {
        {"dtype", "F32"}, {"shape", {1}}, {"data_offsets", {data->size(), data->size() + 4}}};
    data->append(4, '\0');
  });
  EXPECT_TRUE(absl::IsUnimplemented(Load())) << Load();
  EXPECT_NE(std::string(Load().message()).find("q_proj.bias"), std::string::npos) << Load();
}

TEST_F(ModelFolderTest, MissingAndIntegerTensorsAreNamed) {
  Copy();
  const std::string name = "model.layers.1.mlp.down_proj.weight";
  Rewrite([&](nlohmann::json* header, std::string*) {
    (*header)[name + "2"] = (*header)[name];
    header->erase(name);
  });
  EXPECT_TRUE(absl::IsNotFound(Load())) << Load();
  EXPECT_NE(std::string(Load().message()).find(name), std::string::npos) << Load();
  std::filesystem::remove(directory_ + "/model.safetensors");
  std::filesystem::remove(directory_ + "/config.json");
  Copy();
  Rewrite([&](nlohmann::json* header, std::string*) { (*header)[name]["dtype"] = "I32"; });
  EXPECT_TRUE(absl::IsInvalidArgument(Load())) << Load();
  EXPECT_NE(std::string(Load().message()).find("integers"), std::string::npos) << Load();
}

TEST_F(ModelFolderTest, ShardsMustAgreeWithTheirIndex) {
  Copy();
  // Two shards: the first tensor, and the others.
  nlohmann::json whole, map;
  std::string bytes;
  Rewrite([&](nlohmann::json* header, std::string* data) {
    whole = *header;
    bytes = *data;
  });
  std::filesystem::remove(directory_ + "/model.safetensors");
  const auto write = [&](const std::string& file, const std::vector<std::string>& names) {
    nlohmann::json header;
    std::string data;
    for (const std::string& name : names) {
      const size_t lo = whole[name]["data_offsets"][0], hi = whole[name]["data_offsets"][1];
      header[name] = whole[name];
      header[name]["data_offsets"] = {data.size(), data.size() + hi - lo};
      data += bytes.substr(lo, hi - lo);
      map[name] = file;
    }
    WriteFile(file, header, data);
  };
  const auto index = [&](const nlohmann::json& weight_map) {
    std::ofstream(directory_ + "/model.safetensors.index.json")
        << nlohmann::json{{"metadata", {{"total_size", 1}}}, {"weight_map", weight_map}};
  };
  std::vector<std::string> names;
  for (const auto& [name, entry] : whole.items()) {
    if (name != "__metadata__") names.push_back(name);
  }
  write("a.safetensors", {names[0]});
  write("b.safetensors", {names.begin() + 1, names.end()});
  index(map);
  EXPECT_TRUE(Load().ok()) << Load();

  const auto refused = [&](const nlohmann::json& weight_map, const char* word) {
    index(weight_map);
    const absl::Status status = Load();
    EXPECT_FALSE(status.ok());
    EXPECT_NE(std::string(status.message()).find(word), std::string::npos)
        << status << " does not say " << word;
  };
  nlohmann::json wrong = map;
  wrong["ghost"] = "a.safetensors";
  refused(wrong, "ghost");
  wrong = map;
  wrong[names[1]] = "../b.safetensors";
  refused(wrong, names[1].c_str());
  wrong = map;
  wrong[names[1]] = 7;
  refused(wrong, names[1].c_str());
  wrong = map;
  wrong[names[1]] = "none.safetensors";
  refused(wrong, "none.safetensors");
  wrong = map;
  wrong[names[0]] = "b.safetensors";  // it lies in a.safetensors, which nothing else needs
  refused(wrong, names[0].c_str());
  wrong = map;
  wrong[names[1]] = "a.safetensors";  // it lies in b.safetensors, which others need
  refused(wrong, names[1].c_str());
  refused(nlohmann::json::object(), "weight_map");
  refused("text", "weight_map");
  write("b.safetensors", names);  // the first one now stands in both
  map[names[0]] = "a.safetensors";
  refused(map, "another file");
  std::ofstream(directory_ + "/model.safetensors.index.json") << "{";
  EXPECT_TRUE(absl::IsInvalidArgument(Load()));
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

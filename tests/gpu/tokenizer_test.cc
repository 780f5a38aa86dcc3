#include "gpu/tokenizer.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"

namespace quarry {
namespace {

const std::string kModels = QUARRY_TEST_MODELS;

TEST(TokenizerTest, AgreesWithSentencePiecesOwnPackage) {
  auto tokenizer = Tokenizer::Load(kModels + "/tokenizer");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  std::ifstream in(kModels + "/tokenizer/golden.json");
  const nlohmann::json golden = nlohmann::json::parse(in);
  ASSERT_FALSE(golden["cases"].empty());
  for (const nlohmann::json& wanted : golden["cases"]) {
    const auto ids = (*tokenizer)->Encode(wanted["text"].get<std::string>());
    ASSERT_TRUE(ids.ok()) << ids.status();
    EXPECT_EQ(*ids, wanted["ids"].get<std::vector<uint32_t>>()) << wanted["text"];
    EXPECT_EQ((*tokenizer)->Decode(*ids), wanted["decoded"].get<std::string>());
  }
}

TEST(TokenizerTest, ShowsIdsThatItDoesNotHaveAsUnknown) {
  auto tokenizer = Tokenizer::Load(kModels + "/tokenizer");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  const std::vector<uint32_t> ids = {9, 250, 2048, ~0u, 157};
  EXPECT_NE((*tokenizer)->Decode(ids).find("archive"), std::string::npos)
      << (*tokenizer)->Decode(ids);
}

TEST(TokenizerTest, AFolderWithoutATokenizerSaysSo) {
  const absl::Status status = Tokenizer::Load(kModels + "/llama-a").status();
  EXPECT_TRUE(absl::IsNotFound(status)) << status;
  EXPECT_NE(std::string(status.message()).find("token ids"), std::string::npos);
}

TEST(TokenizerTest, ADamagedFileIsNamed) {
  const std::filesystem::path folder =
      std::filesystem::temp_directory_path() / absl::StrCat("quarry-tokenizer-", getpid());
  std::filesystem::create_directory(folder);
  std::ofstream(folder / "tokenizer.model") << "not a model";
  const absl::Status status = Tokenizer::Load(folder.string()).status();
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  EXPECT_NE(std::string(status.message()).find(folder.string()), std::string::npos) << status;
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace quarry

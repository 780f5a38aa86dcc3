#include "gpu/sparse/pattern.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <set>
#include <string>

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

PatternFile RandomFile(std::mt19937_64* random) {
  const auto below = [random](uint32_t n) { return static_cast<uint32_t>((*random)() % n); };
  // Of any bits that a share can have.
  const auto share = [random] { return 1 - std::uniform_real_distribution<double>(0, 1)(*random); };
  PatternFile file{"a \"model\"\n\xc3\xa9", 1 + below(4), 1 + below(9), {}};
  for (uint32_t i = 0; i < file.layers * file.heads; ++i) {
    const Pattern choices[] = {DensePattern{},
                               AShapePattern{below(5000), 1 + below(100000)},
                               VerticalSlashPattern{below(5000), below(kMostPatternCount)},
                               VerticalSlashMassPattern{share(), share()},
                               BlockSparsePattern{1 + below(1000)},
                               BlockScoredPattern{share()}};
    HeadPattern head{choices[below(6)]};
    if (below(2) == 0) {
      head.tiles_share = share();
      head.error = share() * 1e-9;
    }
    file.patterns.push_back(head);
  }
  return file;
}

TEST(PatternTest, FilesReadBackAsTheyWereAndAreCanonical) {
  std::mt19937_64 random(Seed());
  for (int round = 0; round < 100; ++round) {
    const PatternFile file = RandomFile(&random);
    const std::string text = WritePatterns(file);
    const absl::StatusOr<PatternFile> read = ParsePatterns(text);
    ASSERT_TRUE(read.ok()) << read.status() << text;
    EXPECT_EQ(*read, file) << text;
    EXPECT_EQ(WritePatterns(*read), text);
    // Other spacing and order of keys say the same.
    const absl::StatusOr<PatternFile> spaced = ParsePatterns(nlohmann::json::parse(text).dump(7));
    ASSERT_TRUE(spaced.ok());
    EXPECT_EQ(*spaced, file);
    EXPECT_EQ(PatternsDigest(*spaced), PatternsDigest(file));
  }
}

TEST(PatternTest, FilesAreSavedWholeAndLoaded) {
  std::mt19937_64 random(Seed());
  const PatternFile file = RandomFile(&random);
  const std::string path = absl::StrCat(::testing::TempDir(), "patterns.", random(), ".json");
  ASSERT_TRUE(SavePatterns(file, path).ok());
  const absl::StatusOr<PatternFile> read = LoadPatterns(path);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(*read, file);
  std::remove(path.c_str());
  EXPECT_TRUE(absl::IsNotFound(LoadPatterns(path).status())) << LoadPatterns(path).status();
  EXPECT_FALSE(LoadPatterns(::testing::TempDir()).ok());
  EXPECT_FALSE(SavePatterns(file, "/nowhere/at/all").ok());
}

// A file of one layer and one head.
std::string OneHead(const std::string& head) {
  return absl::StrCat(
      R"({"format":"quarry.prefill-patterns.v1","model":"m","layers":1,"heads":1,"patterns":[[)",
      head, "]]}");
}

TEST(PatternTest, WhatIsNotRightIsRefusedByName) {
  ASSERT_TRUE(ParsePatterns(OneHead(R"({"pattern":"dense"})")).ok());
  const struct {
    std::string text, named;
  } cases[] = {
      {"", "not JSON"},
      {"{", "not JSON"},
      {"[]", "no object"},
      {OneHead("{}"), "patterns[0][0].pattern is missing"},
      {OneHead("7"), "patterns[0][0] is no object"},
      {OneHead(R"({"pattern":7})"), "patterns[0][0].pattern is no text"},
      {OneHead(R"({"pattern":"waves"})"), "\"waves\" is not known"},
      {OneHead(R"({"pattern":"dense","columns":1})"), "patterns[0][0].columns is not known"},
      {OneHead(R"({"pattern":"a_shape","sinks":1})"), "patterns[0][0].local is missing"},
      {OneHead(R"({"pattern":"a_shape","sinks":1,"local":0})"), "patterns[0][0].local 0"},
      {OneHead(R"({"pattern":"a_shape","sinks":-1,"local":1})"), "patterns[0][0].sinks -1"},
      {OneHead(R"({"pattern":"a_shape","sinks":1.5,"local":1})"), "sinks is no whole number"},
      {OneHead(R"({"pattern":"a_shape","sinks":"1","local":1})"), "sinks is no whole number"},
      {OneHead(R"({"pattern":"a_shape","sinks":1,"sinks":2,"local":1})"), "sinks stands twice"},
      {OneHead(R"({"pattern":"vertical_slash","columns":4294967296,"slashes":1})"),
       "patterns[0][0].columns 4294967296"},
      {OneHead(R"({"pattern":"vertical_slash","columns":1,"slashes":1,"mass":0.5})"),
       "patterns[0][0].columns is not known"},
      {OneHead(R"({"pattern":"vertical_slash","mass":0.5})"), "max_tiles_share is missing"},
      {OneHead(R"({"pattern":"vertical_slash","mass":0,"max_tiles_share":1})"),
       "patterns[0][0].mass 0"},
      {OneHead(R"({"pattern":"vertical_slash","mass":0.5,"max_tiles_share":1.01})"),
       "patterns[0][0].max_tiles_share 1.01"},
      {OneHead(R"({"pattern":"block_sparse","blocks":0})"), "patterns[0][0].blocks 0"},
      {OneHead(R"({"pattern":"block_scored","threshold":true})"), "threshold is no number"},
      {OneHead(R"({"pattern":"block_scored","threshold":2})"), "threshold 2"},
      {OneHead(R"({"pattern":"dense","expected":{"error":0.1}})"),
       "patterns[0][0].expected.tiles_share is missing"},
      {OneHead(R"({"pattern":"dense","expected":{"error":-1,"tiles_share":1}})"),
       "patterns[0][0].expected.error"},
      {OneHead(R"({"pattern":"dense","expected":{"error":1,"tiles_share":1,"mass":1}})"),
       "patterns[0][0].expected.mass is not known"},
      {R"({"format":"v2","model":"m","layers":1,"heads":1,"patterns":[]})", "format is not"},
      {R"({"format":"quarry.prefill-patterns.v1","layers":1,"heads":1,"patterns":[]})",
       "model is missing"},
      {R"({"format":"quarry.prefill-patterns.v1","model":"m","layers":0,"heads":1,"patterns":[]})",
       "layers is 0"},
      {R"({"format":"quarry.prefill-patterns.v1","model":"m","layers":1,"heads":5000,)"
       R"("patterns":[]})",
       "heads 5000"},
      {R"({"format":"quarry.prefill-patterns.v1","model":"m","layers":1,"heads":1,"patterns":[],)"
       R"("extra":0})",
       "extra is not known"},
      {R"({"format":"quarry.prefill-patterns.v1","model":"m","layers":2,"heads":1,)"
       R"("patterns":[[]]})",
       "patterns has 1 layers of 2"},
      {R"({"format":"quarry.prefill-patterns.v1","model":"m","layers":1,"heads":2,)"
       R"("patterns":[[{"pattern":"dense"}]]})",
       "patterns[0] has 1 heads of 2"},
  };
  for (const auto& c : cases) {
    const absl::StatusOr<PatternFile> read = ParsePatterns(c.text);
    ASSERT_TRUE(absl::IsInvalidArgument(read.status())) << c.text << read.status();
    EXPECT_NE(std::string(read.status().message()).find(c.named), std::string::npos)
        << read.status() << " lacks: " << c.named;
  }
}

TEST(PatternTest, RandomDamageIsNeverAccepted) {
  // Cutting a file anywhere leaves none.
  std::mt19937_64 random(Seed());
  const std::string text = WritePatterns(RandomFile(&random));
  for (size_t n = 0; n + 2 < text.size(); n += 1 + random() % 7) {
    EXPECT_FALSE(ParsePatterns(std::string_view(text).substr(0, n)).ok()) << n;
  }
}

TEST(PatternTest, DigestIsOfWhatIsAttendedAlone) {
  PatternFile file{"m", 1, 2, {{AShapePattern{1, 2}}, {BlockScoredPattern{0.5}}}};
  const RecipeDigest digest = PatternsDigest(file);
  // Computed once by hashlib over the documented encoding: a reader in another language agrees.
  EXPECT_EQ(digest.Hex(), "15f499311d3b1a06d252de42b97ca79f2923d5e599c5a8f3a4002eddbb70cf5d");
  file.model = "other";
  file.patterns[0].error = 0.25;
  file.patterns[0].tiles_share = 0.5;
  EXPECT_EQ(PatternsDigest(file), digest);

  std::set<std::string> seen{digest.Hex()};
  for (const Pattern& other :
       {Pattern(AShapePattern{2, 1}), Pattern(AShapePattern{1, 3}),
        Pattern(VerticalSlashPattern{1, 2}), Pattern(VerticalSlashMassPattern{0.5, 0.5}),
        Pattern(VerticalSlashMassPattern{0.5, std::nextafter(0.5, 1.0)}),
        Pattern(BlockSparsePattern{1}), Pattern(BlockScoredPattern{0.5}),
        Pattern(DensePattern{})}) {
    file.patterns[0].pattern = other;
    EXPECT_TRUE(seen.insert(PatternsDigest(file).Hex()).second) << PatternText(other);
  }
  std::swap(file.patterns[0], file.patterns[1]);
  EXPECT_TRUE(seen.insert(PatternsDigest(file).Hex()).second);
}

TEST(PatternTest, OnlyDenseHeadsMakeExactKv) {
  PatternFile file{"m", 2, 1, {{}, {}}};
  EXPECT_TRUE(RecipeOf(file).dense());
  file.patterns[1].pattern = AShapePattern{4, 4};
  EXPECT_EQ(RecipeOf(file).digest, PatternsDigest(file));
  EXPECT_FALSE(RecipeOf(file).dense());
}

TEST(PatternTest, WhatIsNoNumberIsNoParameter) {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_FALSE(ValidatePattern(BlockScoredPattern{kNan}).ok());
  EXPECT_FALSE(ValidatePattern(VerticalSlashMassPattern{kNan, 1}).ok());
  EXPECT_TRUE(ValidatePattern(VerticalSlashMassPattern{1, 1}).ok());
}

}  // namespace
}  // namespace quarry

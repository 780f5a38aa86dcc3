#include "proto/identity.h"

#include <cmath>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

namespace quarry {
namespace {

using Json = nlohmann::json;

std::string BytesOfHex(const std::string& hex) {
  std::string out;
  for (size_t i = 0; i + 1 < hex.size(); i += 2) {
    out.push_back(static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16)));
  }
  return out;
}

template <typename D>
D DigestOfHex(const std::string& hex) {
  const std::string bytes = BytesOfHex(hex);
  D d;
  EXPECT_EQ(bytes.size(), d.bytes.size());
  std::memcpy(d.bytes.data(), bytes.data(), std::min(bytes.size(), d.bytes.size()));
  return d;
}

template <typename D>
std::vector<D> DigestsOfHex(const Json& list) {
  std::vector<D> out;
  for (const Json& hex : list) out.push_back(DigestOfHex<D>(hex));
  return out;
}

template <typename D>
D Filled(uint8_t byte) {
  D d;
  d.bytes.fill(byte);
  return d;
}

std::vector<uint32_t> Tokens(uint32_t first, uint32_t step = 1) {
  std::vector<uint32_t> tokens(kBlockTokens);
  for (uint32_t i = 0; i < kBlockTokens; ++i) tokens[i] = first + i * step;
  return tokens;
}

class GoldenIdentityTest : public ::testing::Test {
 protected:
  GoldenIdentityTest() {
    std::ifstream in(QUARRY_GOLDEN_IDENTITY);
    EXPECT_TRUE(in.good()) << QUARRY_GOLDEN_IDENTITY;
    golden_ = Json::parse(in);
  }
  // Compares every vector of `kind`; a kind without vectors fails.
  void Check(const std::string& kind, const std::function<std::string(const Json&)>& hex_of) {
    ASSERT_FALSE(golden_.at(kind).empty());
    for (const auto& [name, vector] : golden_.at(kind).items()) {
      EXPECT_EQ(hex_of(vector), vector.at("digest").get<std::string>()) << kind << " " << name;
    }
  }
  Json golden_;
};

TEST_F(GoldenIdentityTest, RopeSignaturesAreTheGoldenOnes) {
  const std::map<std::string, DType> dtypes = {
      {"bf16", DType::kBf16}, {"fp16", DType::kFp16}, {"fp32", DType::kFp32}};
  const std::map<std::string, RopeRegime> regimes = {
      {"none", RopeRegime::kNone}, {"short", RopeRegime::kShort}, {"long", RopeRegime::kLong}};
  Check("rope", [&](const Json& v) {
    RopeSpec rope;
    rope.inv_freq = v.at("inv_freq").get<std::vector<float>>();
    rope.attention_scale = v.at("attention_scale");
    rope.rotary_dim = v.at("rotary_dim");
    rope.interleaved = v.at("interleaved");
    rope.dtype = dtypes.at(v.at("dtype"));
    rope.regime = regimes.at(v.at("regime"));
    return RopeSignatureOf(rope).Hex();
  });
}

TEST_F(GoldenIdentityTest, NamespaceDigestsAreTheGoldenOnes) {
  Check("namespace", [](const Json& v) {
    NamespaceFields fields;
    fields.tenant = v.at("tenant");
    fields.weights = DigestOfHex<WeightsDigest>(v.at("weights"));
    fields.tokenizer = DigestOfHex<TokenizerDigest>(v.at("tokenizer"));
    fields.adapters = DigestsOfHex<AdapterDigest>(v.at("adapters"));
    fields.rope = DigestOfHex<RopeSignature>(v.at("rope"));
    fields.recipe = DigestOfHex<RecipeDigest>(v.at("recipe"));
    return NamespaceDigestOf(fields).Hex();
  });
}

TEST_F(GoldenIdentityTest, BlockIdsAreTheGoldenOnes) {
  Check("block", [](const Json& v) {
    return BlockIdOf(DigestOfHex<BlockId>(v.at("parent")),
                     DigestOfHex<NamespaceDigest>(v.at("namespace")),
                     Tokens(v.at("first_token"), v.at("token_step")),
                     DigestsOfHex<InputDigest>(v.at("inputs")))
        .Hex();
  });
}

TEST_F(GoldenIdentityTest, EngineBlockIdsAreTheGoldenOnes) {
  Check("engine_block", [](const Json& v) {
    return EngineBlockIdOf(v.at("tenant").get<std::string>(),
                           v.at("engine_namespace").get<std::string>(), BytesOfHex(v.at("key")))
        .Hex();
  });
}

TEST_F(GoldenIdentityTest, BudgetRecipesAreTheGoldenOnes) {
  const std::map<std::string, Budget::Kind> kinds = {{"unlimited", Budget::Kind::kUnlimited},
                                                     {"fixed_k", Budget::Kind::kFixedK},
                                                     {"top_p", Budget::Kind::kTopP},
                                                     {"error", Budget::Kind::kError},
                                                     {"dipr", Budget::Kind::kDipr},
                                                     {"softmax_lift", Budget::Kind::kSoftmaxLift}};
  Check("recipe", [&](const Json& v) {
    const Budget budget{kinds.at(v.at("kind")), v.at("k"),           v.at("mass"),
                        v.value("error", 0.0f), v.value("beta", 0.0f), v.value("seed", 0u)};
    return RecipeOf(budget, v.at("window_first"), v.at("window_last")).digest.Hex();
  });
}

TEST_F(GoldenIdentityTest, StretchIdsAreTheGoldenOnes) {
  Check("stretch", [](const Json& v) {
    return StretchIdOf(DigestOfHex<NamespaceDigest>(v.at("namespace")),
                       Tokens(v.at("first_token"), v.at("token_step")),
                       DigestsOfHex<InputDigest>(v.at("inputs")))
        .Hex();
  });
}

TEST_F(GoldenIdentityTest, PlacedBlockIdsAreTheGoldenOnes) {
  Check("index_namespace", [](const Json& v) {
    return IndexNamespaceOf(DigestOfHex<NamespaceDigest>(v["namespace"])).Hex();
  });
  Check("run_index", [](const Json& v) {
    return RunIndexIdOf(v["tenant"].get<std::string>(), v["full_key"].get<std::string>()).Hex();
  });
  Check("placed", [](const Json& v) {
    return PlacedBlockIdOf(DigestOfHex<BlockId>(v.at("parent")),
                           DigestOfHex<BlockId>(v.at("stored")), v.at("shift"))
        .Hex();
  });
}

TEST_F(GoldenIdentityTest, ShiftedRecipesAreTheGoldenOnes) {
  Check("shifted_recipe", [](const Json& v) {
    return ShiftedRecipeOf({DigestOfHex<RecipeDigest>(v.at("recipe"))}).digest.Hex();
  });
}

RopeSpec SomeRope() {
  RopeSpec rope;
  rope.inv_freq = {1.0f, 0.5f, 0.25f, 0.125f};
  rope.rotary_dim = 8;
  return rope;
}

NamespaceFields SomeFields() {
  NamespaceFields fields;
  fields.tenant = "acme";
  fields.weights = Filled<WeightsDigest>(1);
  fields.tokenizer = Filled<TokenizerDigest>(2);
  fields.adapters = {Filled<AdapterDigest>(3), Filled<AdapterDigest>(4)};
  fields.rope = RopeSignatureOf(SomeRope());
  return fields;
}

// Every change gives a digest that none of the others gave.
template <typename T, typename F>
void ExpectAllDiffer(const T& base, F digest_of,
                     const std::vector<std::pair<const char*, std::function<void(T&)>>>& changes) {
  std::map<std::string, std::string> seen = {{digest_of(base).Hex(), "unchanged"}};
  for (const auto& [name, change] : changes) {
    T changed = base;
    change(changed);
    const auto [at, fresh] = seen.emplace(digest_of(changed).Hex(), name);
    EXPECT_TRUE(fresh) << name << " has the digest of: " << at->second;
  }
}

TEST(NamespaceDigestTest, OneDifferingFieldIsAnotherNamespace) {
  using F = NamespaceFields;
  ExpectAllDiffer<F>(
      SomeFields(), NamespaceDigestOf,
      {{"tenant", [](F& f) { f.tenant = "acmf"; }},
       {"tenant with a NUL behind", [](F& f) { f.tenant.push_back('\0'); }},
       {"no tenant", [](F& f) { f.tenant.clear(); }},
       {"last bit of weights", [](F& f) { f.weights.bytes[31] ^= 1; }},
       {"first bit of tokenizer", [](F& f) { f.tokenizer.bytes[0] ^= 0x80; }},
       {"first adapter", [](F& f) { f.adapters[0].bytes[5] ^= 1; }},
       {"second adapter", [](F& f) { f.adapters[1].bytes[5] ^= 1; }},
       {"order of adapters", [](F& f) { std::swap(f.adapters[0], f.adapters[1]); }},
       {"one adapter", [](F& f) { f.adapters.pop_back(); }},
       {"no adapters", [](F& f) { f.adapters.clear(); }},
       {"an adapter twice", [](F& f) { f.adapters.push_back(f.adapters[1]); }},
       {"an all-zero adapter", [](F& f) { f.adapters.push_back({}); }},
       {"rope", [](F& f) { f.rope.bytes[31] ^= 1; }},
       {"recipe", [](F& f) { f.recipe.bytes[0] = 1; }},
       {"weights and tokenizer swapped",
        [](F& f) { std::swap(f.weights.bytes, f.tokenizer.bytes); }},
       {"rope and recipe swapped", [](F& f) { std::swap(f.rope.bytes, f.recipe.bytes); }}});
}

TEST(NamespaceDigestTest, BytesThatMoveAcrossAFieldBoundaryAreAnotherNamespace) {
  // The rope signature's bytes become a second adapter's: both go weights, tokenizer, 9, 8, 0.
  NamespaceFields a = SomeFields(), b = SomeFields();
  a.adapters = {Filled<AdapterDigest>(9)};
  a.rope = Filled<RopeSignature>(8);
  b.adapters = {Filled<AdapterDigest>(9), Filled<AdapterDigest>(8)};
  b.rope = RopeSignature{};
  EXPECT_NE(NamespaceDigestOf(a), NamespaceDigestOf(b));
  // A tenant that spells the next field's encoding.
  NamespaceFields c = SomeFields();
  c.tenant += std::string("\x20\0\0\0\0\0\0\0", 8) + std::string(32, '\x01');
  EXPECT_NE(NamespaceDigestOf(c), NamespaceDigestOf(SomeFields()));
}

TEST(RopeSignatureTest, OneDifferingFieldIsAnotherSignature) {
  using R = RopeSpec;
  ExpectAllDiffer<R>(
      SomeRope(), RopeSignatureOf,
      {{"a frequency by one ulp",
        [](R& r) { r.inv_freq[2] = std::nextafter(r.inv_freq[2], 1.0f); }},
       {"order of frequencies", [](R& r) { std::swap(r.inv_freq[0], r.inv_freq[1]); }},
       {"one frequency fewer", [](R& r) { r.inv_freq.pop_back(); }},
       {"one frequency more", [](R& r) { r.inv_freq.push_back(1.0f); }},  // the scale's bits
       {"attention_scale", [](R& r) { r.attention_scale = 1.5f; }},
       {"rotary_dim", [](R& r) { r.rotary_dim = 10; }},
       {"interleaved", [](R& r) { r.interleaved = true; }},
       {"dtype", [](R& r) { r.dtype = DType::kBf16; }},
       {"dtype fp16", [](R& r) { r.dtype = DType::kFp16; }},
       {"regime short", [](R& r) { r.regime = RopeRegime::kShort; }},
       {"regime long", [](R& r) { r.regime = RopeRegime::kLong; }}});
}

// The regime says which factors apply; the length up to which it does changes no key vector.
TEST(RopeSignatureTest, TheRegimesLengthIsNotPartOfIt) {
  RopeSpec limited = SomeRope();
  limited.regime_max_tokens = 4096;
  EXPECT_EQ(RopeSignatureOf(limited), RopeSignatureOf(SomeRope()));
}

struct BlockInput {
  BlockId parent = Filled<BlockId>(7);
  NamespaceDigest name_space = Filled<NamespaceDigest>(8);
  std::vector<uint32_t> tokens = Tokens(5);
  std::vector<InputDigest> inputs = {Filled<InputDigest>(1), Filled<InputDigest>(2)};
};

TEST(BlockIdTest, OneDifferingPartIsAnotherBlock) {
  using B = BlockInput;
  ExpectAllDiffer<B>(
      B(), [](const B& b) { return BlockIdOf(b.parent, b.name_space, b.tokens, b.inputs); },
      {{"parent", [](B& b) { b.parent.bytes[31] ^= 1; }},
       {"no parent", [](B& b) { b.parent = {}; }},
       {"namespace", [](B& b) { b.name_space.bytes[0] ^= 1; }},
       {"parent and namespace swapped",
        [](B& b) { std::swap(b.parent.bytes, b.name_space.bytes); }},
       {"first token", [](B& b) { ++b.tokens.front(); }},
       {"last token", [](B& b) { ++b.tokens.back(); }},
       {"high byte of a token", [](B& b) { b.tokens[100] ^= 0x80000000u; }},
       {"order of tokens", [](B& b) { std::swap(b.tokens[0], b.tokens[1]); }},
       {"an input", [](B& b) { b.inputs[1].bytes[9] ^= 1; }},
       {"order of inputs", [](B& b) { std::swap(b.inputs[0], b.inputs[1]); }},
       {"one input fewer", [](B& b) { b.inputs.pop_back(); }},
       {"no inputs", [](B& b) { b.inputs.clear(); }},
       {"an all-zero input", [](B& b) { b.inputs.push_back({}); }}});
}

TEST(BlockIdDeathTest, ABlockHasExactly256Tokens) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const std::vector<uint32_t> tokens(255);
  EXPECT_DEATH(BlockIdOf({}, {}, tokens, {}), "kBlockTokens");
}

TEST(StretchIdTest, OneDifferingPartIsAnotherStretch) {
  using B = BlockInput;
  ExpectAllDiffer<B>(
      B(), [](const B& b) { return StretchIdOf(b.name_space, b.tokens, b.inputs); },
      {{"namespace", [](B& b) { b.name_space.bytes[0] ^= 1; }},
       {"first token", [](B& b) { ++b.tokens.front(); }},
       {"last token", [](B& b) { ++b.tokens.back(); }},
       {"order of tokens", [](B& b) { std::swap(b.tokens[0], b.tokens[1]); }},
       {"an input", [](B& b) { b.inputs[1].bytes[9] ^= 1; }},
       {"no inputs", [](B& b) { b.inputs.clear(); }}});
}

TEST(PlacedBlockIdTest, NeitherTheStoredBlocksIdNorAnotherPlacesIsIt) {
  const auto parent = Filled<BlockId>(7), stored = Filled<BlockId>(8);
  std::set<BlockId> ids = {parent, stored};
  ids.insert(PlacedBlockIdOf(parent, stored, 0));
  ids.insert(PlacedBlockIdOf(parent, stored, 256));
  ids.insert(PlacedBlockIdOf(parent, stored, -256));
  ids.insert(PlacedBlockIdOf(stored, parent, 256));
  ids.insert(PlacedBlockIdOf({}, stored, 256));
  EXPECT_EQ(ids.size(), 7u);
}

TEST(RecipeTest, WhatFollowsAShiftedStretchIsOfItsOwnRecipe) {
  const NumericRecipe budget = RecipeOf({Budget::Kind::kFixedK, 256, 1.0f}, 4, 512);
  EXPECT_FALSE(ShiftedRecipeOf({}).dense());
  EXPECT_NE(ShiftedRecipeOf({}), budget);
  EXPECT_NE(ShiftedRecipeOf(budget), budget);
  EXPECT_NE(ShiftedRecipeOf(budget), ShiftedRecipeOf({}));
}

TEST(EngineBlockIdTest, BytesThatMoveAcrossAFieldBoundaryAreAnotherBlock) {
  std::set<BlockId> ids;
  ids.insert(EngineBlockIdOf("acme", "vllm", "key"));
  ids.insert(EngineBlockIdOf("acm", "evllm", "key"));
  ids.insert(EngineBlockIdOf("acme", "vllmk", "ey"));
  ids.insert(EngineBlockIdOf("acme", "vll", "mkey"));
  ids.insert(EngineBlockIdOf("acme", "", "vllmkey"));
  ids.insert(EngineBlockIdOf("", "acmevllm", "key"));
  ids.insert(EngineBlockIdOf("acme", "vllm", std::string("key\0", 4)));
  ids.insert(EngineBlockIdOf("acme", "vllm", "Key"));
  EXPECT_EQ(ids.size(), 8u);
}

TEST(RecipeTest, UnlimitedIsDenseWhateverTheRest) {
  EXPECT_TRUE(RecipeOf({Budget::Kind::kUnlimited, 77, 0.5f}, 4, 512).dense());
}

TEST(RecipeTest, EveryPartOfABudgetCounts) {
  using Kind = Budget::Kind;
  std::set<RecipeDigest> seen;
  size_t n = 0;
  const auto add = [&](const Budget& budget, uint32_t first, uint32_t last) {
    const NumericRecipe recipe = RecipeOf(budget, first, last);
    EXPECT_FALSE(recipe.dense());
    seen.insert(recipe.digest);
    ++n;
  };
  add({Kind::kFixedK, 256, 1.0f}, 4, 512);
  add({Kind::kFixedK, 257, 1.0f}, 4, 512);
  add({Kind::kFixedK, 256, 1.0f}, 5, 512);
  add({Kind::kFixedK, 256, 1.0f}, 4, 513);
  add({Kind::kFixedK, 256, 1.0f}, 512, 4);
  add({Kind::kTopP, 256, 1.0f}, 4, 512);
  add({Kind::kTopP, 256, 0.9f}, 4, 512);
  add({Kind::kTopP, 0, 0.9f}, 4, 512);
  add({.kind = Kind::kError, .error = 0.9f}, 4, 512);
  add({.kind = Kind::kError, .error = 0.8f}, 4, 512);
  add({.kind = Kind::kDipr, .beta = 0.9f}, 4, 512);
  add({.kind = Kind::kDipr, .k = 256, .beta = 0.9f}, 4, 512);
  add({.kind = Kind::kSoftmaxLift, .k = 256}, 4, 512);
  add({.kind = Kind::kSoftmaxLift, .k = 256, .seed = 1}, 4, 512);
  EXPECT_EQ(seen.size(), n);
}

// A fixed k takes no notice of the mass, so neither does its recipe.
TEST(RecipeTest, MassOfAFixedKIsIgnored) {
  using Kind = Budget::Kind;
  EXPECT_EQ(RecipeOf({Kind::kFixedK, 256, 0.3f}, 4, 512),
            RecipeOf({Kind::kFixedK, 256, 0.9f}, 4, 512));
}

}  // namespace
}  // namespace quarry

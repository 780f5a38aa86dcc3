// What may be reused by whom.
#include <vector>

#include "proto/identity.h"
#include "tests/daemon/engine_fixture.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

constexpr uint32_t kTokens = 600;  // two whole blocks and a rest
constexpr uint32_t kWhole = 512;

NumericRecipe SparseRecipe(uint8_t which) {
  NumericRecipe recipe;
  recipe.digest.bytes[0] = which;
  return recipe;
}

class EngineIdentityTest : public EngineTest {
 protected:
  void SetUp() override {
    Start();
    Cache(session_, base_, data_);
    ASSERT_EQ(Reused(session_, base_), kWhole);
  }
  OpenRequest base_ = OpenFor(SmallModel(), Tokens(kTokens), 1000);
  KvData data_{SmallShape(), kTokens, Seed()};
};

TEST_F(EngineIdentityTest, OneDifferingFieldOfTheNamespaceIsAMiss) {
  struct Case {
    const char* field;
    std::function<void(OpenRequest&)> change;
  };
  const std::vector<Case> cases = {
      {"weights", [](OpenRequest& r) { r.spec.weights.bytes[31] ^= 1; }},
      {"tokenizer", [](OpenRequest& r) { r.spec.tokenizer.bytes[31] ^= 1; }},
      {"adapters", [](OpenRequest& r) { r.spec.adapters.emplace_back(); }},
      {"inv_freq", [](OpenRequest& r) { r.spec.rope.inv_freq[3] *= 1.0000002f; }},
      {"attention_scale", [](OpenRequest& r) { r.spec.rope.attention_scale = 1.19024f; }},
      {"rotary_dim",
       [](OpenRequest& r) {
         r.spec.rope.rotary_dim -= 2;
         r.spec.rope.inv_freq.pop_back();
       }},
      {"interleaved", [](OpenRequest& r) { r.spec.rope.interleaved = true; }},
      {"rope dtype", [](OpenRequest& r) { r.spec.rope.dtype = DType::kBf16; }},
      {"regime", [](OpenRequest& r) { r.spec.rope.regime = RopeRegime::kLong; }},
      {"recipe", [](OpenRequest& r) { r.recipe = SparseRecipe(1); }},
      {"accepted recipes", [](OpenRequest& r) { r.accepts = {SparseRecipe(1)}; }},
      {"multimodal inputs", [](OpenRequest& r) { r.inputs.emplace_back(); }},
      {"first token", [](OpenRequest& r) { r.tokens[0] ^= 1; }},
      {"layers", [](OpenRequest& r) { r.spec.shape.layers = 1; }},
      {"KV heads", [](OpenRequest& r) { r.spec.shape.kv_heads = 1; }},
      {"heads", [](OpenRequest& r) { r.spec.shape.heads = 8; }},
      {"dtype", [](OpenRequest& r) { r.spec.shape.dtype = DType::kFp16; }},
  };
  for (const Case& c : cases) {
    OpenRequest request = base_;
    c.change(request);
    EXPECT_EQ(Reused(session_, request), 0u) << c.field;
  }
  OpenRequest renamed = base_;
  renamed.spec.name = "the same model by another name";
  EXPECT_EQ(Reused(session_, renamed), kWhole);
  EXPECT_EQ(Reused(session_, base_), kWhole);
}

TEST_F(EngineIdentityTest, AnotherTenantFindsNothing) {
  const SessionId mallory = NewSession("mallory");
  EXPECT_EQ(Reused(mallory, base_), 0u);
  auto prefix = engine_->FindLongestPrefix(mallory, base_);
  ASSERT_TRUE(prefix.ok());
  EXPECT_EQ(prefix->tokens, 0u);
  auto blocks = engine_->ListBlocks(mallory, 100);
  ASSERT_TRUE(blocks.ok());
  EXPECT_TRUE(blocks->empty());
}

TEST_F(EngineIdentityTest, AnotherTenantsContextIsNotFoundByAnyCall) {
  const OpenResult opened = OpenAndFill(session_, base_, data_);
  const ContextId context = opened.context;
  const SessionId mallory = NewSession("mallory");
  EXPECT_TRUE(absl::IsNotFound(engine_->Info(mallory, context).status()));
  EXPECT_TRUE(absl::IsNotFound(engine_->Seal(mallory, context).status()));
  EXPECT_TRUE(absl::IsNotFound(engine_->Close(mallory, context)));
  EXPECT_TRUE(absl::IsNotFound(engine_->Fork(mallory, {context, 1, 10, {}}).status()));
  EXPECT_TRUE(absl::IsNotFound(engine_->DeclareTokens(mallory, context, {})));
  EXPECT_TRUE(absl::IsNotFound(engine_->LeaseContextBlock(mallory, context, 0).status()));
  std::vector<std::byte> k(data_.token_bytes()), v(data_.token_bytes());
  EXPECT_TRUE(absl::IsNotFound(engine_->Read(mallory, context, 0, {0, 1}, k, v)));
  const auto row = AttendOne(*engine_, mallory, SmallShape(), context, 0, {0, 10}, Seed());
  EXPECT_TRUE(absl::IsNotFound(row->answer.status)) << row->answer.status;
  EXPECT_TRUE(absl::IsNotFound(engine_->TopK(mallory, row->row, 3, true).status));
  AppendRequest append;
  append.context = context;
  EXPECT_TRUE(absl::IsNotFound(engine_->Append(mallory, append)));
  PinRequest pin;
  pin.name = "mine";
  pin.context = context;
  EXPECT_TRUE(absl::IsNotFound(engine_->Pin(mallory, pin).status()));
  auto list = engine_->ListContexts(mallory);
  ASSERT_TRUE(list.ok());
  EXPECT_TRUE(list->empty());
  // Extents belong to tenants, too.
  auto lease = engine_->LeaseContextBlock(session_, context, 0);
  ASSERT_TRUE(lease.ok()) << lease.status();
  EXPECT_TRUE(engine_->Extent(session_, lease->extent).ok());
  EXPECT_TRUE(absl::IsNotFound(engine_->Extent(mallory, lease->extent).status()));
}

TEST_F(EngineIdentityTest, ShortRegimePrefixIsNeverReturnedToALongRegimeContext) {
  OpenRequest request = base_;
  request.spec.rope.regime = RopeRegime::kShort;
  request.spec.rope.regime_max_tokens = 1000;
  Cache(session_, request, data_);
  EXPECT_EQ(Reused(session_, request), kWhole);
  request.spec.rope.regime = RopeRegime::kLong;
  request.spec.rope.regime_max_tokens = 0;
  EXPECT_EQ(Reused(session_, request), 0u);
}

TEST_F(EngineIdentityTest, AcceptedRecipesAreTriedInOrderAtEachBlock) {
  OpenRequest sparse = base_;
  sparse.recipe = SparseRecipe(1);
  Cache(session_, sparse, data_);
  const auto block_of = [&](std::vector<NumericRecipe> accepts) {
    OpenRequest request = base_;
    request.accepts = std::move(accepts);
    auto opened = engine_->Open(session_, request);
    EXPECT_TRUE(opened.ok());
    EXPECT_OK(engine_->Close(session_, opened->context));
    EXPECT_EQ(opened->reused_tokens, kWhole);
    return std::pair(opened->reused_blocks, opened->reused_dense);
  };
  const auto [dense_blocks, dense] = block_of({NumericRecipe{}, SparseRecipe(1)});
  const auto [sparse_blocks, not_dense] = block_of({SparseRecipe(1), NumericRecipe{}});
  EXPECT_TRUE(dense);
  EXPECT_FALSE(not_dense);
  EXPECT_NE(dense_blocks[0], sparse_blocks[0]);

  // A dense continuation of a sparse block: found only by who accepts both.
  ASSERT_TRUE(engine_->Purge(session_, {false, std::nullopt, {sparse_blocks[1]}}).ok());
  OpenRequest mixed = base_;
  mixed.accepts = {SparseRecipe(1)};
  EXPECT_EQ(Reused(session_, mixed), kBlockTokens);
  Cache(session_, mixed, data_);  // appends densely after the sparse block
  EXPECT_EQ(Reused(session_, mixed), kBlockTokens);
  mixed.accepts = {SparseRecipe(1), NumericRecipe{}};
  EXPECT_EQ(Reused(session_, mixed), kWhole);
}

TEST_F(EngineIdentityTest, TheLastTokenIsNeverReused) {
  for (const auto& [tokens, reused] :
       {std::pair(1u, 0u), std::pair(256u, 0u), std::pair(257u, 256u), std::pair(512u, 256u),
        std::pair(513u, 512u)}) {
    OpenRequest request = base_;
    request.tokens.resize(tokens);
    EXPECT_EQ(Reused(session_, request), reused) << tokens;
    auto prefix = engine_->FindLongestPrefix(session_, request);
    ASSERT_TRUE(prefix.ok());
    EXPECT_EQ(prefix->tokens, reused);
    EXPECT_EQ(prefix->blocks.size(), reused / kBlockTokens);
  }
}

TEST_F(EngineIdentityTest, TwoContextsWithACommonPrefixHoldOneCopy) {
  WaitUntilUnleased();
  const uint64_t cached = engine_->Stats().store.bytes;
  const OpenResult a = OpenAndFill(session_, base_, data_);
  const uint64_t one = engine_->Stats().store.bytes;
  const OpenResult b = OpenAndFill(session_, base_, data_);
  EXPECT_EQ(a.reused_blocks, b.reused_blocks);
  EXPECT_EQ(a.reused_blocks.size(), 2u);
  EXPECT_EQ(a.reused_blocks[0], BlockIdOf({},
                                          NamespaceDigestOf({"alice",
                                                             base_.spec.weights,
                                                             base_.spec.tokenizer,
                                                             {},
                                                             RopeSignatureOf(base_.spec.rope),
                                                             {}}),
                                          std::span(base_.tokens).first(kBlockTokens), {}));
  // Each has its own two blocks for tokens 512 to 999, and no more.
  EXPECT_EQ(one - cached, 2 * SmallShape().block_bytes());
  EXPECT_EQ(engine_->Stats().store.bytes - one, 2 * SmallShape().block_bytes());
}

TEST_F(EngineIdentityTest, TheEarlierOfTwoWritersWinsAndBothUseItsBlocks) {
  OpenRequest request = base_;
  request.tokens = Tokens(kTokens, 777000);
  const KvData other(SmallShape(), kTokens, Seed() + 1);
  auto first = engine_->Open(session_, request);
  auto second = engine_->Open(session_, request);
  ASSERT_TRUE(first.ok() && second.ok());
  ASSERT_OK(AppendAll(*engine_, session_, first->context, data_, {0, kTokens}));
  ASSERT_TRUE(engine_->Seal(session_, first->context).ok());
  ASSERT_OK(AppendAll(*engine_, session_, second->context, other, {0, kTokens}));
  ASSERT_TRUE(engine_->Seal(session_, second->context).ok());
  EXPECT_EQ(engine_->Stats().store.duplicate_publishes, 2u);

  auto a = engine_->LeaseContextBlock(session_, first->context, 0);
  auto b = engine_->LeaseContextBlock(session_, second->context, 0);
  ASSERT_TRUE(a.ok() && b.ok());
  EXPECT_EQ(a->extent, b->extent);
  EXPECT_EQ(a->offset, b->offset);
  // The loser reads the winner's whole blocks and its own unpublished rest.
  KvData merged = data_;
  merged.Overwrite(kWhole, other);
  const auto row =
      AttendOne(*engine_, session_, SmallShape(), second->context, 1, {0, kTokens}, Seed());
  ASSERT_TRUE(row->answer.status.ok()) << row->answer.status;
  EXPECT_LE(WorstError(merged, *row), 1e-3);
}

TEST_F(EngineIdentityTest, KvOfAnotherShapeStaysPrivateAndCorrect) {
  OpenRequest request = base_;
  request.spec.shape.dtype = DType::kFp32;
  const KvData data(request.spec.shape, kTokens, Seed());
  const OpenResult opened = OpenAndFill(session_, request, data);
  EXPECT_EQ(opened.reused_tokens, 0u);
  auto info = engine_->Seal(session_, opened.context);
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_EQ(info->shared_tokens, 0u);
  EXPECT_EQ(engine_->Stats().publish_failures, 1u);
  const auto row =
      AttendOne(*engine_, session_, request.spec.shape, opened.context, 0, {0, kTokens}, Seed());
  ASSERT_TRUE(row->answer.status.ok()) << row->answer.status;
  EXPECT_LE(WorstError(data, *row), 1e-5);
}

TEST_F(EngineIdentityTest, AForkOfApproximateTokensIsNeverPublishedAsDense) {
  OpenRequest sparse = base_;
  sparse.recipe = SparseRecipe(1);
  sparse.tokens = Tokens(kTokens, 5000);
  const OpenResult parent = OpenAndFill(session_, sparse, data_);
  // Token 300 lies in the sparse parent's second block.
  auto fork = engine_->Fork(session_, {parent.context, 300, 1000, NumericRecipe{}});
  ASSERT_TRUE(fork.ok()) << fork.status();
  const std::vector<uint32_t> more = Tokens(300, 9000);
  ASSERT_OK(engine_->DeclareTokens(session_, *fork, more));
  ASSERT_OK(AppendAll(*engine_, session_, *fork, data_, {300, kTokens}));
  auto info = engine_->Seal(session_, *fork);
  ASSERT_TRUE(info.ok());
  EXPECT_EQ(info->shared_tokens, kBlockTokens);  // the parent's sparse first block

  // The other way round, approximate tokens after dense ones are approximate.
  OpenRequest dense = base_;
  dense.tokens = Tokens(kTokens, 7000);
  const OpenResult dense_parent = OpenAndFill(session_, dense, data_);
  auto sparse_fork = engine_->Fork(session_, {dense_parent.context, 300, 1000, SparseRecipe(1)});
  ASSERT_TRUE(sparse_fork.ok());
  ASSERT_OK(engine_->DeclareTokens(session_, *sparse_fork, more));
  ASSERT_OK(AppendAll(*engine_, session_, *sparse_fork, data_, {300, kTokens}));
  info = engine_->Seal(session_, *sparse_fork);
  ASSERT_TRUE(info.ok());
  EXPECT_EQ(info->shared_tokens, kWhole);
  OpenRequest search = dense;
  search.tokens.resize(300);
  search.tokens.insert(search.tokens.end(), more.begin(), more.end());
  EXPECT_EQ(Reused(session_, search), kBlockTokens);
  search.accepts = {NumericRecipe{}, SparseRecipe(1)};
  EXPECT_EQ(Reused(session_, search), kWhole);
}

}  // namespace
}  // namespace quarry

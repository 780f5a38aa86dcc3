// The life of a context, and what the engine refuses.
#include <vector>

#include "tests/daemon/engine_fixture.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

MATCHER_P2(IsStatus, code, text, "") {
  *result_listener << arg;
  return arg.code() == code && std::string(arg.message()).find(text) != std::string::npos;
}
constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kPrecondition = absl::StatusCode::kFailedPrecondition;

class EngineContextTest : public EngineTest {
 protected:
  void SetUp() override { Start(); }

  ContextId Open(uint32_t tokens, uint32_t max_tokens, uint32_t first = 1000) {
    auto opened = engine_->Open(session_, OpenFor(SmallModel(), Tokens(tokens, first), max_tokens));
    EXPECT_TRUE(opened.ok()) << opened.status();
    return opened.ok() ? opened->context : ContextId{};
  }
  AppendRequest Request(ContextId context, TokenRange range, uint32_t layer = 0) {
    AppendRequest request;
    request.context = context;
    request.layer = layer;
    request.kv_heads = SmallShape().kv_heads;
    request.range = range;
    request.k = data_.k(layer, range.lo);
    request.v = data_.v(layer, range.lo);
    return request;
  }
  ContextInfo Info(ContextId context) {
    auto info = engine_->Info(session_, context);
    EXPECT_TRUE(info.ok()) << info.status();
    return info.value_or(ContextInfo{});
  }
  KvData data_{SmallShape(), 1000, Seed()};
};

TEST_F(EngineContextTest, AppendsOutOfOrderOrOfTheWrongShapeNameTheNumbers) {
  const ContextId c = Open(0, 600);
  ASSERT_OK(engine_->Append(session_, Request(c, {0, 10})));
  EXPECT_THAT(engine_->Append(session_, Request(c, {11, 12})),
              IsStatus(kInvalid, "next token is 10"));
  EXPECT_THAT(engine_->Append(session_, Request(c, {9, 12})),
              IsStatus(kInvalid, "next token is 10"));
  EXPECT_THAT(engine_->Append(session_, Request(c, {10, 10})), IsStatus(kInvalid, "[10, 10)"));
  EXPECT_THAT(engine_->Append(session_, Request(c, {12, 10})), IsStatus(kInvalid, "[12, 10)"));
  EXPECT_THAT(engine_->Append(session_, Request(c, {10, 601})),
              IsStatus(kPrecondition, "max_tokens 600"));
  AppendRequest request = Request(c, {10, 11});
  request.layer = 2;
  EXPECT_THAT(engine_->Append(session_, request), IsStatus(kInvalid, "layer 2 of 2"));
  request = Request(c, {10, 11});
  request.first_kv_head = 1;
  EXPECT_THAT(engine_->Append(session_, request), IsStatus(kInvalid, "[1, 3) of 2"));
  request.first_kv_head = ~0u;
  EXPECT_THAT(engine_->Append(session_, request), IsStatus(kInvalid, "of 2"));
  request = Request(c, {10, 11});
  request.kv_heads = 0;
  EXPECT_THAT(engine_->Append(session_, request), IsStatus(kInvalid, "[0, 0) of 2"));
  request = Request(c, {10, 11});
  request.k = nullptr;
  EXPECT_THAT(engine_->Append(session_, request), IsStatus(kInvalid, "missing"));
  EXPECT_OK(engine_->Append(session_, Request(c, {10, 11})));
  EXPECT_EQ(Info(c).tokens, 0u);  // layer 1 has none yet
}

TEST_F(EngineContextTest, TokenIdsMustAgreeWithThoseKnown) {
  const ContextId c = Open(5, 600);
  AppendRequest request = Request(c, {0, 10});
  std::vector<uint32_t> ids = Tokens(10);
  request.new_token_ids = std::span(ids).first(7);
  EXPECT_THAT(engine_->Append(session_, request), IsStatus(kInvalid, "7 token ids"));
  ids[2] = 5;
  request.new_token_ids = ids;
  EXPECT_THAT(engine_->Append(session_, request), IsStatus(kInvalid, "token 2 has id 1002, not 5"));
  EXPECT_EQ(Info(c).known_tokens, 5u);
  ids = Tokens(10);
  request.new_token_ids = ids;
  EXPECT_OK(engine_->Append(session_, request));
  EXPECT_EQ(Info(c).known_tokens, 10u);
  // The other writer of the same tokens may say the same.
  AppendRequest other = Request(c, {0, 10}, 1);
  other.new_token_ids = ids;
  EXPECT_OK(engine_->Append(session_, other));
  // Ids of the unknown rest alone.
  AppendRequest rest = Request(c, {10, 20});
  EXPECT_OK(engine_->Append(session_, rest));
  AppendRequest gap = Request(c, {20, 25});
  const std::vector<uint32_t> five = Tokens(5, 20);
  gap.new_token_ids = five;
  EXPECT_THAT(engine_->Append(session_, gap), IsStatus(kInvalid, "gap after the 10 known"));
  const std::vector<uint32_t> fifteen = Tokens(15, 1010);
  gap.new_token_ids = fifteen;
  EXPECT_OK(engine_->Append(session_, gap));
  EXPECT_EQ(Info(c).known_tokens, 25u);
  const std::vector<uint32_t> many = Tokens(576);
  EXPECT_THAT(engine_->DeclareTokens(session_, c, many),
              IsStatus(kPrecondition, "576 token ids after 25 known pass max_tokens 600"));
}

TEST_F(EngineContextTest, ABadQuerySampleIsNamedAndAdvancesNothing) {
  const KvShape shape = SmallShape();
  const KvData data(shape, 40, Seed());
  auto opened = engine_->Open(session_, OpenFor(SmallModel(shape), {}, 40));
  ASSERT_TRUE(opened.ok());
  const size_t floats = size_t{shape.kv_heads} * shape.group() * shape.head_dim;
  std::vector<float> samples(3 * floats, 0.5f);
  std::vector<uint32_t> positions = {0, 20, 39};
  AppendRequest request;
  request.context = opened->context;
  request.kv_heads = shape.kv_heads;
  request.range = {0, 20};
  request.k = data.k(0, 0);
  request.v = data.v(0, 0);
  request.query_samples = samples.data();
  request.query_positions = positions;
  for (const float bad : {std::nanf(""), INFINITY, -INFINITY}) {
    samples[2 * floats - 1] = bad;
    EXPECT_THAT(engine_->Append(session_, request),
                IsStatus(kInvalid, "query sample 1 at position 20 of layer 0 has NaN or infinity"));
  }
  samples[2 * floats - 1] = 0;
  positions[2] = 40;
  EXPECT_THAT(engine_->Append(session_, request),
              IsStatus(kInvalid, "query sample 2 at position 40 of layer 0 is not below max_tokens"));
  positions[2] = 39;  // of a later append's tokens: a client may split what it sends
  EXPECT_OK(engine_->Append(session_, request));
}

TEST_F(EngineContextTest, NanInKOrVNamesLayerTokenAndHeadAndAdvancesNothing) {
  for (const DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    for (const float bad : {std::nanf(""), INFINITY, -INFINITY}) {
      const KvShape shape = SmallShape(dtype);
      KvData data(shape, 400, Seed());
      auto opened = engine_->Open(session_, OpenFor(SmallModel(shape), {}, 400));
      ASSERT_TRUE(opened.ok());
      StoreFromFloat(data.v(1, 300), shape.head_dim + 31, dtype, bad);
      AppendRequest request;
      request.context = opened->context;
      request.layer = 1;
      request.kv_heads = 2;
      request.range = {0, 400};
      request.k = data.k(1, 0);
      request.v = data.v(1, 0);
      EXPECT_THAT(engine_->Append(session_, request),
                  IsStatus(kInvalid, "NaN or infinity in V of layer 1, token 300, KV head 1"));
      request.range = {0, 300};
      EXPECT_OK(engine_->Append(session_, request));
      ASSERT_OK(engine_->Close(session_, opened->context));
    }
  }
}

TEST_F(EngineContextTest, LayersAndHeadsAreWrittenBySeveralWriters) {
  const ContextId c = Open(600, 600);
  for (const uint32_t layer : {1u, 0u}) {
    for (const uint32_t head : {1u, 0u}) {
      EXPECT_EQ(Info(c).tokens, 0u);
      // One head's part of [token][kv_head][head_dim].
      const size_t bytes = SmallShape().vector_bytes();
      std::string k, v;
      for (uint32_t t = 0; t < 600; ++t) {
        k.append(data_.k(layer, t) + head * bytes, bytes);
        v.append(data_.v(layer, t) + head * bytes, bytes);
      }
      AppendRequest request = Request(c, {0, 600}, layer);
      request.first_kv_head = head;
      request.kv_heads = 1;
      request.k = k.data();
      request.v = v.data();
      ASSERT_OK(engine_->Append(session_, request));
    }
  }
  EXPECT_EQ(Info(c).tokens, 600u);
  auto sealed = engine_->Seal(session_, c);
  ASSERT_TRUE(sealed.ok());
  EXPECT_EQ(sealed->shared_tokens, 512u);
  const auto row = AttendOne(*engine_, session_, SmallShape(), c, 1, {0, 600}, Seed());
  ASSERT_TRUE(row->answer.status.ok());
  EXPECT_LE(WorstError(data_, *row), 1e-3);
}

TEST_F(EngineContextTest, ALayerIsAttendedAsSoonAsItIsThere) {
  const ContextId c = Open(0, 600);
  ASSERT_OK(engine_->Append(session_, Request(c, {0, 300}, 0)));
  EXPECT_TRUE(AttendOne(*engine_, session_, SmallShape(), c, 0, {0, 300}, 1)->answer.status.ok());
  EXPECT_THAT(AttendOne(*engine_, session_, SmallShape(), c, 0, {0, 301}, 1)->answer.status,
              IsStatus(kInvalid, "[0, 301) of layer 0, which has 300"));
  EXPECT_THAT(AttendOne(*engine_, session_, SmallShape(), c, 1, {0, 1}, 1)->answer.status,
              IsStatus(kInvalid, "which has 0"));
}

TEST_F(EngineContextTest, WrongRowsAreRefusedEachWithItsOwnStatus) {
  const ContextId c = Open(0, 600);
  ASSERT_OK(AppendAll(*engine_, session_, c, data_, {0, 300}));
  std::vector<std::unique_ptr<OwnedRow>> rows;
  std::vector<std::string> expected;
  const auto add = [&](std::string text, std::function<void(OwnedRow&)> change) {
    rows.push_back(std::make_unique<OwnedRow>(SmallShape(), c, 0, TokenRange{0, 300}, 5));
    change(*rows.back());
    expected.push_back(std::move(text));
  };
  add("layer 7", [](OwnedRow& r) { r.row.layer = 7; });
  add("heads [1, 3)", [](OwnedRow& r) {
    r.row.first_head = 1;
    r.row.heads = 2;
  });
  add("heads [0, 3)", [](OwnedRow& r) { r.row.heads = 3; });
  add("heads [2, 6)", [](OwnedRow& r) { r.row.first_head = 2; });
  add("heads [0, 0)", [](OwnedRow& r) { r.row.heads = 0; });
  add("heads [4294967294,", [](OwnedRow& r) { r.row.first_head = ~1u; });
  add("tokens [5, 4)", [](OwnedRow& r) { r.row.range = {5, 4}; });
  add("[0, 4294967295)", [](OwnedRow& r) { r.row.range = {0, ~0u}; });
  add("dtype 9", [](OwnedRow& r) { r.row.q_dtype = static_cast<DType>(9); });
  add("NaN or infinity in a query", [](OwnedRow& r) { r.q[100] = INFINITY; });
  add("fixed budget of 0", [](OwnedRow& r) { r.row.budget.kind = Budget::Kind::kFixedK; });
  add("mass of 1.5", [](OwnedRow& r) { r.row.budget = {Budget::Kind::kTopP, 0, 1.5f}; });
  add("mass of nan", [](OwnedRow& r) { r.row.budget = {Budget::Kind::kTopP, 0, std::nanf("")}; });
  const auto add_budget = [&](std::string text, const Budget& budget) {
    add(std::move(text), [&budget](OwnedRow& r) { r.row.budget = budget; });
  };
  for (float error : {0.0f, 1.0f, -0.5f, std::nanf("")}) {
    add_budget(absl::StrCat("error of ", error), {.kind = Budget::Kind::kError, .error = error});
  }
  for (float beta : {-1.0f, INFINITY, std::nanf("")}) {
    add_budget(absl::StrCat("beta of ", beta), {.kind = Budget::Kind::kDipr, .beta = beta});
  }
  add_budget("sampling budget of 0", {.kind = Budget::Kind::kSoftmaxLift});
  add("unknown budget kind 9",
      [](OwnedRow& r) { r.row.budget.kind = static_cast<Budget::Kind>(9); });
  add("room for 3", [](OwnedRow& r) { r.answer.o = r.answer.o.first(3); });
  add("", [](OwnedRow&) {});
  AttendRows(*engine_, session_, rows);
  for (size_t i = 0; i + 1 < rows.size(); ++i) {
    EXPECT_THAT(rows[i]->answer.status, IsStatus(kInvalid, expected[i])) << i;
  }
  ASSERT_TRUE(rows.back()->answer.status.ok()) << rows.back()->answer.status;
  EXPECT_LE(WorstError(data_, *rows.back()), 1e-3);
  const EngineStats stats = engine_->Stats();
  EXPECT_EQ(stats.attend_rows, rows.size());
  EXPECT_EQ(stats.attend_failures, rows.size() - 1);
}

TEST_F(EngineContextTest, ATokenIsStoredOnceAndOnlyWhenItsRowIsGood) {
  const ContextId c = Open(0, 300);
  ASSERT_OK(AppendAll(*engine_, session_, c, data_, {0, 299}));
  const auto decode = [&](uint32_t position, std::function<void(OwnedRow&)> change) {
    std::unique_ptr<OwnedRow> rows[1] = {
        std::make_unique<OwnedRow>(SmallShape(), c, 0, TokenRange{0, 299}, 5)};
    OwnedRow& row = *rows[0];
    row.row.has_token = true;
    row.row.token_position = position;
    row.row.k = data_.k(0, 299);
    row.row.v = data_.v(0, 299);
    change(row);
    AttendRows(*engine_, session_, rows);
    return row.answer.status;
  };
  EXPECT_THAT(decode(299, [](OwnedRow& r) { r.q[0] = INFINITY; }), IsStatus(kInvalid, "query"));
  KvData bad = data_;
  StoreFromFloat(bad.k(0, 299), 3, DType::kBf16, std::nanf(""));
  EXPECT_THAT(decode(299, [&](OwnedRow& r) { r.row.k = bad.k(0, 299); }),
              IsStatus(kInvalid, "NaN or infinity in K of layer 0, token 299, KV head 0"));
  EXPECT_THAT(decode(299, [](OwnedRow& r) { r.row.range.hi = 301; }), IsStatus(kInvalid, "301"));
  EXPECT_THAT(decode(298, [](OwnedRow&) {}), IsStatus(kPrecondition, "next token is 299"));
  EXPECT_THAT(decode(300, [](OwnedRow&) {}), IsStatus(kPrecondition, "max_tokens 300"));
  EXPECT_THAT(decode(~0u, [](OwnedRow&) {}), IsStatus(kPrecondition, "max_tokens 300"));
  EXPECT_OK(decode(299, [](OwnedRow& r) { r.row.range.hi = 300; }));
  EXPECT_THAT(decode(299, [](OwnedRow&) {}), IsStatus(kPrecondition, "next token is 300"));
}

TEST_F(EngineContextTest, SpeculativeTokensOfOneBatchSeeTheEarlierOnes) {
  const ContextId c = Open(0, 300);
  ASSERT_OK(AppendAll(*engine_, session_, c, data_, {0, 290}));
  std::vector<std::unique_ptr<OwnedRow>> rows;
  for (uint32_t t = 290; t < 295; ++t) {
    rows.push_back(std::make_unique<OwnedRow>(SmallShape(), c, 0, TokenRange{0, t + 1}, t));
    rows.back()->row.has_token = true;
    rows.back()->row.token_position = t;
    rows.back()->row.k = data_.k(0, t);
    rows.back()->row.v = data_.v(0, t);
  }
  AttendRows(*engine_, session_, rows);
  for (const auto& row : rows) {
    ASSERT_TRUE(row->answer.status.ok()) << row->answer.status;
    EXPECT_LE(WorstError(data_, *row), 1e-3);
  }
}

TEST_F(EngineContextTest, MaxTokensPinsTheRopeRegime) {
  OpenRequest request = OpenFor(SmallModel(), {}, 4097);
  request.spec.rope.regime = RopeRegime::kShort;
  request.spec.rope.regime_max_tokens = 4096;
  EXPECT_THAT(engine_->Open(session_, request).status(),
              IsStatus(kPrecondition, "max_tokens 4097 is above the 4096 tokens of the short"));
  request.max_tokens = 4096;
  auto opened = engine_->Open(session_, request);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_THAT(engine_->Fork(session_, {opened->context, 0, 5000, {}}).status(),
              IsStatus(kPrecondition, "4096"));
}

TEST_F(EngineContextTest, WrongOpensAreRefused) {
  EXPECT_THAT(engine_->Open(session_, OpenFor(SmallModel(), {}, 0)).status(),
              IsStatus(kInvalid, "max_tokens is 0"));
  EXPECT_THAT(engine_->Open(session_, OpenFor(SmallModel(), Tokens(11), 10)).status(),
              IsStatus(kInvalid, "11 tokens for a context of max_tokens 10"));
  EXPECT_THAT(engine_->Open(session_, OpenFor(SmallModel(), {}, ~0u)).status(),
              IsStatus(kInvalid, "4294967295"));
  OpenRequest request = OpenFor(SmallModel(), {}, 10);
  request.spec.shape.head_dim = 7;
  EXPECT_FALSE(engine_->Open(session_, request).ok());
  request = OpenFor(SmallModel(), {}, 10);
  request.accepts.resize(65);
  EXPECT_THAT(engine_->Open(session_, request).status(), IsStatus(kInvalid, "65"));
  EXPECT_EQ(engine_->Stats().contexts, 0u);
  EXPECT_EQ(engine_->Stats().store.blocks, 0u);
}

TEST_F(EngineContextTest, AFullArenaRefusesAtOpenAndNotLater) {
  EngineOptions options = SmallOptions();
  options.arena.capacity_bytes = 4 << 20;
  Start(options);
  const uint64_t block = SmallShape().block_bytes();
  const auto fits = static_cast<uint32_t>((4 << 20) / block) * kBlockTokens;
  std::vector<ContextId> open;
  absl::Status refused;
  while (refused.ok()) {
    auto opened = engine_->Open(session_, OpenFor(SmallModel(), {}, fits / 4));
    refused = opened.status();
    if (opened.ok()) open.push_back(opened->context);
    ASSERT_LE(open.size(), 4u);
  }
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted) << refused;
  EXPECT_GE(open.size(), 3u);
  for (const ContextId c : open) {
    KvData data(SmallShape(), fits / 4, Seed());
    EXPECT_OK(AppendAll(*engine_, session_, c, data, {0, fits / 4}));
    EXPECT_FALSE(engine_->Fork(session_, {c, 10, fits, {}}).ok());
  }
  ASSERT_OK(engine_->Close(session_, open.back()));
  EXPECT_TRUE(engine_->Open(session_, OpenFor(SmallModel(), {}, fits / 4)).ok());
}

TEST_F(EngineContextTest, ForksShareWhatIsFullAndCopyTheRest) {
  const ContextId parent = Open(600, 1000);
  ASSERT_OK(AppendAll(*engine_, session_, parent, data_, {0, 600}));
  EXPECT_THAT(engine_->Fork(session_, {parent, 601, 1000, {}}).status(),
              IsStatus(kPrecondition, "only 600 are complete"));
  EXPECT_THAT(engine_->Fork(session_, {parent, 600, 500, {}}).status(),
              IsStatus(kInvalid, "max_tokens 500"));
  for (const uint32_t at : {0u, 1u, 255u, 256u, 300u, 512u, 600u}) {
    SCOPED_TRACE(at);
    auto fork = engine_->Fork(session_, {parent, at, 700, {}});
    ASSERT_TRUE(fork.ok()) << fork.status();
    EXPECT_EQ(Info(*fork).tokens, at);
    EXPECT_EQ(Info(*fork).known_tokens, at);
    KvData forked = data_;
    forked.Overwrite(at, KvData(SmallShape(), 1000, Seed() + at + 1));
    ASSERT_OK(AppendAll(*engine_, session_, *fork, forked, {at, 650}));
    const auto row = AttendOne(*engine_, session_, SmallShape(), *fork, 0, {0, 650}, 3);
    ASSERT_TRUE(row->answer.status.ok()) << row->answer.status;
    EXPECT_LE(WorstError(forked, *row), 1e-3);
    const auto same = AttendOne(*engine_, session_, SmallShape(), parent, 0, {0, 600}, 3);
    ASSERT_TRUE(same->answer.status.ok());
    EXPECT_LE(WorstError(data_, *same), 1e-3);
    EXPECT_OK(engine_->Close(session_, *fork));
  }
  // Both go on from the same token.
  auto fork = engine_->Fork(session_, {parent, 600, 1000, {}});
  ASSERT_TRUE(fork.ok());
  ASSERT_OK(AppendAll(*engine_, session_, parent, data_, {600, 1000}));
  KvData forked = data_;
  forked.Overwrite(600, KvData(SmallShape(), 1000, Seed() + 9));
  ASSERT_OK(AppendAll(*engine_, session_, *fork, forked, {600, 1000}));
  EXPECT_LE(
      WorstError(data_, *AttendOne(*engine_, session_, SmallShape(), parent, 0, {0, 1000}, 3)),
      1e-3);
  EXPECT_LE(
      WorstError(forked, *AttendOne(*engine_, session_, SmallShape(), *fork, 0, {0, 1000}, 3)),
      1e-3);
}

TEST_F(EngineContextTest, AForkOutlivesItsParentAndPublishesWhatTheyShare) {
  const ContextId parent = Open(0, 600);  // ids unknown: nothing is published
  ASSERT_OK(AppendAll(*engine_, session_, parent, data_, {0, 600}));
  auto fork = engine_->Fork(session_, {parent, 600, 600, {}});
  ASSERT_TRUE(fork.ok());
  ASSERT_OK(engine_->Close(session_, parent));
  EXPECT_EQ(Info(*fork).shared_tokens, 0u);
  const std::vector<uint32_t> ids = Tokens(600);
  ASSERT_OK(engine_->DeclareTokens(session_, *fork, ids));
  auto sealed = engine_->Seal(session_, *fork);
  ASSERT_TRUE(sealed.ok());
  EXPECT_EQ(sealed->shared_tokens, 512u);
  EXPECT_EQ(Reused(session_, OpenFor(SmallModel(), ids, 600)), 512u);
}

TEST_F(EngineContextTest, ReadReturnsTheBytesAppended) {
  const ContextId c = Open(600, 600);
  ASSERT_OK(AppendAll(*engine_, session_, c, data_, {0, 600}));
  ASSERT_TRUE(engine_->Seal(session_, c).ok());
  for (const TokenRange range : {TokenRange{0, 600}, {255, 257}, {599, 600}, {7, 7}}) {
    std::vector<std::byte> k(range.size() * data_.token_bytes()), v(k.size());
    ASSERT_OK(engine_->Read(session_, c, 1, range, k, v));
    if (range.empty()) continue;  // no buffers either
    EXPECT_EQ(std::memcmp(k.data(), data_.k(1, range.lo), k.size()), 0);
    EXPECT_EQ(std::memcmp(v.data(), data_.v(1, range.lo), v.size()), 0);
  }
  std::vector<std::byte> k(data_.token_bytes()), v(k.size());
  EXPECT_THAT(engine_->Read(session_, c, 1, {600, 601}, k, v), IsStatus(kInvalid, "has 600"));
  EXPECT_THAT(engine_->Read(session_, c, 2, {0, 1}, k, v), IsStatus(kInvalid, "layer 2 of 2"));
  EXPECT_THAT(engine_->Read(session_, c, 0, {0, 2}, k, v), IsStatus(kInvalid, "bytes for"));
}

TEST_F(EngineContextTest, ASealedContextTakesNoMore) {
  const ContextId c = Open(600, 1000);
  ASSERT_OK(AppendAll(*engine_, session_, c, data_, {0, 600}));
  auto info = engine_->Seal(session_, c);
  ASSERT_TRUE(info.ok());
  EXPECT_TRUE(info->sealed);
  EXPECT_EQ(info->shared_tokens, 512u);
  EXPECT_EQ(info->shared_bytes, 2 * SmallShape().block_bytes());
  EXPECT_EQ(info->private_bytes, 2 * SmallShape().block_bytes());
  EXPECT_THAT(engine_->Append(session_, Request(c, {600, 601})), IsStatus(kPrecondition, "sealed"));
}

TEST_F(EngineContextTest, ClosedContextsGiveBackTheirMemoryAndLeaveWhatIsPublished) {
  const ContextId c = Open(600, 1000);
  ASSERT_OK(AppendAll(*engine_, session_, c, data_, {0, 600}));
  ASSERT_TRUE(engine_->Seal(session_, c).ok());
  EXPECT_EQ(engine_->Stats().store.blocks, 4u);
  ASSERT_OK(engine_->Close(session_, c));
  EXPECT_TRUE(absl::IsNotFound(engine_->Info(session_, c).status()));
  WaitUntilUnleased();
  const BlockStoreStats stats = engine_->Stats().store;
  EXPECT_EQ(stats.blocks, 2u);
  EXPECT_EQ(stats.leased, 0u);
  EXPECT_EQ(stats.reserved_bytes, 0u);
}

TEST_F(EngineContextTest, AContextOfAnotherSessionOfTheTenantMayBeUsedAndEndsWithItsOpener) {
  const ContextId c = Open(600, 600);
  const SessionId rank1 = NewSession("alice");
  ASSERT_OK(engine_->Append(session_, Request(c, {0, 600}, 0)));
  ASSERT_OK(engine_->Append(rank1, Request(c, {0, 600}, 1)));
  EXPECT_TRUE(AttendOne(*engine_, rank1, SmallShape(), c, 1, {0, 600}, 1)->answer.status.ok());
  engine_->EndSession(rank1);
  EXPECT_EQ(Info(c).tokens, 600u);
  const SessionId other = NewSession("alice");
  engine_->EndSession(session_);
  EXPECT_TRUE(absl::IsNotFound(engine_->Info(other, c).status()));
  EXPECT_TRUE(absl::IsNotFound(engine_->Info(session_, c).status()));
}

TEST_F(EngineContextTest, LimitsOnContextsSessionsAndLeasesAreKept) {
  EngineOptions options = SmallOptions();
  options.max_contexts = 2;
  options.max_sessions = 2;
  options.max_leases_per_session = 2;
  Start(options);
  const OpenResult first = OpenAndFill(session_, OpenFor(SmallModel(), Tokens(600), 600), data_);
  ASSERT_TRUE(engine_->Seal(session_, first.context).ok());
  Open(0, 10);
  EXPECT_TRUE(
      absl::IsResourceExhausted(engine_->Open(session_, OpenFor(SmallModel(), {}, 10)).status()));
  EXPECT_TRUE(
      absl::IsResourceExhausted(engine_->Fork(session_, {first.context, 1, 10, {}}).status()));
  const SessionId second = NewSession("bob");
  EXPECT_TRUE(absl::IsResourceExhausted(engine_->StartSession("carol", "x").status()));
  engine_->EndSession(second);
  EXPECT_TRUE(engine_->StartSession("carol", "x").ok());
  EXPECT_FALSE(engine_->StartSession("", "x").ok());

  auto a = engine_->LeaseContextBlock(session_, first.context, 0);
  auto b = engine_->LeaseContextBlock(session_, first.context, 1);
  ASSERT_TRUE(a.ok() && b.ok());
  EXPECT_THAT(engine_->LeaseContextBlock(session_, first.context, 2).status(),
              IsStatus(kPrecondition, "block 2 is not published"));
  EXPECT_THAT(engine_->LeaseContextBlock(session_, first.context, 3).status(),
              IsStatus(kInvalid, "block 3 of 3"));
  EXPECT_TRUE(
      absl::IsResourceExhausted(engine_->LeaseContextBlock(session_, first.context, 0).status()));
  EXPECT_EQ(engine_->Stats().leases, 2u);
  EXPECT_OK(engine_->ReleaseLease(session_, a->lease));
  EXPECT_TRUE(absl::IsNotFound(engine_->ReleaseLease(session_, a->lease)));
  EXPECT_TRUE(engine_->LeaseContextBlock(session_, first.context, 0).ok());
}

TEST_F(EngineContextTest, DrainRefusesNewWorkAndFinishesTheOld) {
  const ContextId c = Open(0, 600);
  ASSERT_OK(AppendAll(*engine_, session_, c, data_, {0, 300}));
  engine_->Drain();
  EXPECT_TRUE(absl::IsUnavailable(engine_->Open(session_, OpenFor(SmallModel(), {}, 10)).status()));
  EXPECT_TRUE(absl::IsUnavailable(engine_->Append(session_, Request(c, {300, 301}))));
  EXPECT_TRUE(absl::IsUnavailable(engine_->Fork(session_, {c, 1, 10, {}}).status()));
  const std::string bytes = "abc";
  EXPECT_TRUE(absl::IsUnavailable(
      engine_->Put(session_, "n", "k", std::as_bytes(std::span(bytes)), std::nullopt).status()));
  EXPECT_TRUE(AttendOne(*engine_, session_, SmallShape(), c, 0, {0, 300}, 1)->answer.status.ok());
}

TEST(EngineOptionsTest, WrongOptionsNameKeyAndValue) {
  EngineOptions options;
  options.run_tokens = 1000;
  EXPECT_THAT(Engine::Create(options).status(), IsStatus(kInvalid, "run_tokens = 1000"));
  options = {};
  options.task_tokens = 0;
  EXPECT_THAT(Engine::Create(options).status(), IsStatus(kInvalid, "task_tokens = 0"));
}

}  // namespace
}  // namespace quarry

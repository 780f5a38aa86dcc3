#include "proto/convert.h"

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/seed.h"

namespace quarry {
namespace {

using ::testing::HasSubstr;

template <typename D>
D Filled(uint8_t byte) {
  D d;
  d.bytes.fill(byte);
  return d;
}

// What a peer would parse.
template <typename Message>
Message Sent(const Message& message) {
  Message out;
  EXPECT_TRUE(out.ParseFromString(message.SerializeAsString()));
  return out;
}

template <typename T>
void ExpectInvalid(const absl::StatusOr<T>& result, const std::string& text) {
  EXPECT_EQ(result.status().code(), absl::StatusCode::kInvalidArgument) << result.status();
  EXPECT_THAT(std::string(result.status().message()), HasSubstr(text));
}

TEST(ConvertTest, AuditsGoThereAndBack) {
  HeadAudit audit{"llama", 3, 2, {}};
  AuditFigures& f = audit.figures;
  f.audits = 10;
  f.error_sum = 0.5;
  f.error_max = 0.25;
  f.predicted_sum = 0.75;
  f.within_twice = 9;
  f.mass_error_sum = 0.125;
  f.mass_audits = 4;
  f.mass_sum = 3.5;
  f.recall_audits = 5;
  f.recall_sum = 4.5;
  f.drifts = 1;
  f.ratios.front() = 6;
  f.ratios.back() = 1u << 20;
  const wire::HeadAudit message = Sent(ToProto(audit));
  const auto read = FromProto(message);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(read->model, audit.model);
  EXPECT_EQ(read->layer, audit.layer);
  EXPECT_EQ(read->kv_head, audit.kv_head);
  EXPECT_EQ(read->figures, audit.figures);
  wire::HeadAudit wrong = message;
  wrong.add_ratios(1);
  ExpectInvalid(FromProto(wrong), "ratios has 65 numbers, must have 64");
}

ModelSpec SomeSpec() {
  ModelSpec spec;
  spec.name = "llama";
  spec.shape = {32, 16, 8, 64, DType::kFp16};
  spec.weights = Filled<WeightsDigest>(1);
  spec.tokenizer = Filled<TokenizerDigest>(2);
  spec.adapters = {Filled<AdapterDigest>(4), Filled<AdapterDigest>(3)};
  spec.rope.inv_freq = {1.0f, 0.1f};
  spec.rope.rotary_dim = 4;
  spec.rope.attention_scale = 1.25f;
  spec.rope.interleaved = true;
  spec.rope.dtype = DType::kBf16;
  spec.rope.regime = RopeRegime::kLong;
  spec.rope.regime_max_tokens = 131072;
  return spec;
}

void ExpectSame(const ModelSpec& a, const ModelSpec& b) {
  EXPECT_EQ(a.name, b.name);
  EXPECT_EQ(a.shape, b.shape);
  EXPECT_EQ(a.weights, b.weights);
  EXPECT_EQ(a.tokenizer, b.tokenizer);
  EXPECT_EQ(a.adapters, b.adapters);
  EXPECT_EQ(a.rope.inv_freq, b.rope.inv_freq);
  EXPECT_EQ(a.rope.attention_scale, b.rope.attention_scale);
  EXPECT_EQ(a.rope.rotary_dim, b.rope.rotary_dim);
  EXPECT_EQ(a.rope.interleaved, b.rope.interleaved);
  EXPECT_EQ(a.rope.dtype, b.rope.dtype);
  EXPECT_EQ(a.rope.regime, b.rope.regime);
  EXPECT_EQ(a.rope.regime_max_tokens, b.rope.regime_max_tokens);
}

OpenRequest SomeOpen() {
  OpenRequest open;
  open.spec = SomeSpec();
  open.tokens = {5, 0, 4294967295u};
  open.inputs = {Filled<InputDigest>(9), Filled<InputDigest>(8)};
  open.max_tokens = 4096;
  open.recipe = {Filled<RecipeDigest>(6)};
  open.accepts = {{Filled<RecipeDigest>(6)}, {}};
  open.reuse_shifted = true;
  return open;
}

TEST(ConvertTest, OpenSurvivesTheWire) {
  const OpenRequest open = SomeOpen();
  const auto back = FromProto(Sent(ToProto(open)));
  ASSERT_TRUE(back.ok()) << back.status();
  ExpectSame(back->spec, open.spec);
  EXPECT_EQ(back->tokens, open.tokens);
  EXPECT_EQ(back->inputs, open.inputs);
  EXPECT_EQ(back->max_tokens, open.max_tokens);
  EXPECT_EQ(back->recipe, open.recipe);
  EXPECT_EQ(back->accepts, open.accepts);
  EXPECT_TRUE(back->reuse_shifted);
}

TEST(ConvertTest, ALimitOfLoadingIsATimeOrNone) {
  EXPECT_FALSE(FromProto(Sent(ToProto(SomeOpen())))->max_load_ms.has_value());
  OpenRequest open = SomeOpen();
  open.max_load_ms = 0;
  EXPECT_EQ(FromProto(Sent(ToProto(open)))->max_load_ms, 0.0);
  open.max_load_ms = -1;
  ExpectInvalid(FromProto(ToProto(open)), "max_load_ms");
  open.max_load_ms = std::nan("");
  ExpectInvalid(FromProto(ToProto(open)), "max_load_ms");
}

TEST(ConvertTest, LongestPrefixSurvivesTheWire) {
  const LongestPrefix prefix{512, {Filled<BlockId>(1), Filled<BlockId>(2)}, 256, 4096, 0.5};
  const auto back = FromProto(Sent(ToProto(prefix)));
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->tokens, prefix.tokens);
  EXPECT_EQ(back->blocks, prefix.blocks);
  EXPECT_EQ(back->ram_tokens, prefix.ram_tokens);
  EXPECT_EQ(back->load_bytes, prefix.load_bytes);
  EXPECT_EQ(back->expected_load_ms, prefix.expected_load_ms);
}

TEST(ConvertTest, NoAcceptedRecipesMeansTheOwnOne) {
  wire::OpenRequest message = ToProto(SomeOpen());
  message.clear_accepted_recipes();
  const auto back = FromProto(message);
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->accepts, std::vector<NumericRecipe>{SomeOpen().recipe});
}

TEST(ConvertTest, AnEmptyRecipeIsDense) {
  wire::OpenRequest message = ToProto(SomeOpen());
  message.clear_recipe();
  const auto back = FromProto(message);
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_TRUE(back->recipe.dense());
}

TEST(ConvertTest, OpenReplySurvivesTheWire) {
  const OpenResult result{{77}, 512,   {Filled<BlockId>(1), Filled<BlockId>(2)},  768,
                          1.5,  false, {{{768, 1024}, -512}, {{1280, 1536}, 256}}};
  const auto back = FromProto(Sent(ToProto(result)));
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->context, result.context);
  EXPECT_EQ(back->reused_tokens, result.reused_tokens);
  EXPECT_EQ(back->reused_blocks, result.reused_blocks);
  EXPECT_EQ(back->unloaded_tokens, result.unloaded_tokens);
  EXPECT_EQ(back->expected_load_ms, result.expected_load_ms);
  EXPECT_EQ(back->reused_dense, result.reused_dense);
  EXPECT_EQ(back->shifted, result.shifted);
}

TEST(ConvertTest, AppendSurvivesTheWire) {
  const std::string k = "kkkkkkkk", v("vv\0vvvvv", 8);
  const std::vector<uint32_t> ids = {1, 2}, positions = {3};
  const std::vector<float> samples = {0.5f, -1.5f};
  AppendRequest append;
  append.context = {1ull << 40};
  append.layer = 3;
  append.first_kv_head = 1;
  append.kv_heads = 2;
  append.range = {10, 12};
  append.k = k.data();
  append.v = v.data();
  append.new_token_ids = ids;
  append.query_samples = samples.data();
  append.query_positions = positions;
  const wire::AppendRequest message = Sent(ToProto(append, k.size(), v.size(), samples.size()));
  const auto back = FromProto(message);
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->context, append.context);
  EXPECT_EQ(back->layer, append.layer);
  EXPECT_EQ(back->first_kv_head, append.first_kv_head);
  EXPECT_EQ(back->kv_heads, append.kv_heads);
  EXPECT_EQ(back->range, append.range);
  EXPECT_EQ(std::string(static_cast<const char*>(back->k), 8), k);
  EXPECT_EQ(std::string(static_cast<const char*>(back->v), 8), v);
  EXPECT_EQ(std::vector(back->new_token_ids.begin(), back->new_token_ids.end()), ids);
  EXPECT_EQ(std::vector(back->query_positions.begin(), back->query_positions.end()), positions);
  EXPECT_EQ(std::vector(back->query_samples, back->query_samples + 2), samples);
}

TEST(ConvertTest, AppendWithUnequalKAndVIsRefused) {
  wire::AppendRequest message;
  message.set_layer(7);
  message.set_k("1234");
  message.set_v("123");
  ExpectInvalid(FromProto(message), "layer 7");
}

TEST(ConvertTest, ForkSurvivesTheWire) {
  const ForkRequest fork{{5}, 100, 200, {Filled<RecipeDigest>(3)}};
  const auto back = FromProto(Sent(ToProto(fork)));
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->context, fork.context);
  EXPECT_EQ(back->tokens, fork.tokens);
  EXPECT_EQ(back->max_tokens, fork.max_tokens);
  EXPECT_EQ(back->recipe, fork.recipe);
}

TEST(ConvertTest, ContextInfoSurvivesTheWire) {
  const ContextInfo info{{5}, "llama", SomeSpec().shape, 1, 2, 3, 4, true, 1ull << 50, 6, 512};
  const auto back = FromProto(Sent(ToProto(info)));
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->context, info.context);
  EXPECT_EQ(back->model, info.model);
  EXPECT_EQ(back->shape, info.shape);
  EXPECT_EQ(back->tokens, info.tokens);
  EXPECT_EQ(back->known_tokens, info.known_tokens);
  EXPECT_EQ(back->shared_tokens, info.shared_tokens);
  EXPECT_EQ(back->max_tokens, info.max_tokens);
  EXPECT_EQ(back->sealed, info.sealed);
  EXPECT_EQ(back->shifted_tokens, info.shifted_tokens);
  EXPECT_EQ(back->private_bytes, info.private_bytes);
  EXPECT_EQ(back->shared_bytes, info.shared_bytes);
}

TEST(ConvertTest, PinSurvivesTheWireWithAndWithoutAContext) {
  PinRequest pin{"system prompt", {Filled<BlockId>(1)}, std::nullopt, 60000};
  auto back = FromProto(Sent(ToProto(pin)));
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->name, pin.name);
  EXPECT_EQ(back->blocks, pin.blocks);
  EXPECT_EQ(back->context, pin.context);
  EXPECT_EQ(back->ttl_ms, pin.ttl_ms);
  pin.context = ContextId{9};
  back = FromProto(Sent(ToProto(pin)));
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->context, pin.context);
}

TEST(ConvertTest, FlushesKeepEveryField) {
  FlushRequest request;
  request.whole_tenant = true;
  request.context = ContextId{7};
  request.blocks = {Filled<BlockId>(1), Filled<BlockId>(2)};
  const auto back = FromProto(Sent(ToProto(request)));
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_TRUE(back->whole_tenant);
  EXPECT_EQ(back->context, request.context);
  EXPECT_EQ(back->blocks, request.blocks);
  const FlushResult result = FromProto(Sent(ToProto(FlushResult{1, 2, 3, 4, 5, 6, "full", 7})));
  EXPECT_EQ(result.durable_blocks, 1u);
  EXPECT_EQ(result.durable_bytes, 2u);
  EXPECT_EQ(result.leading_blocks, 3u);
  EXPECT_EQ(result.pending_blocks, 4u);
  EXPECT_EQ(result.refused_blocks, 5u);
  EXPECT_EQ(result.missing_blocks, 6u);
  EXPECT_EQ(result.refusal, "full");
  EXPECT_EQ(result.tokens, 7u);
}

TEST(ConvertTest, PurgeTakesExactlyOneSelector) {
  // Bit 0: whole tenant, bit 1: namespace, bit 2: blocks.
  for (int selectors = 0; selectors < 8; ++selectors) {
    PurgeRequest purge;
    purge.whole_tenant = (selectors & 1) != 0;
    if ((selectors & 2) != 0) purge.name_space = Filled<NamespaceDigest>(5);
    if ((selectors & 4) != 0) purge.blocks = {Filled<BlockId>(1), Filled<BlockId>(2)};
    const int set = __builtin_popcount(static_cast<unsigned>(selectors));
    const auto back = FromProto(Sent(ToProto(purge)));
    if (set != 1) {
      ExpectInvalid(back, "purge sets " + std::to_string(set));
      continue;
    }
    ASSERT_TRUE(back.ok()) << back.status();
    EXPECT_EQ(back->whole_tenant, purge.whole_tenant);
    EXPECT_EQ(back->name_space, purge.name_space);
    EXPECT_EQ(back->blocks, purge.blocks);
  }
}

TEST(ConvertTest, BudgetsSurviveTheWire) {
  for (const Budget& budget : {Budget{}, Budget{Budget::Kind::kFixedK, 256, 1.0f},
                               Budget{Budget::Kind::kTopP, 0, 0.9375f},
                               Budget{.kind = Budget::Kind::kError, .k = 9, .error = 0.0625f},
                               Budget{.kind = Budget::Kind::kDipr, .beta = 6.5f},
                               Budget{.kind = Budget::Kind::kSoftmaxLift, .k = 7, .seed = ~0u}}) {
    const auto back = FromProto(Sent(ToProto(budget)));
    ASSERT_TRUE(back.ok()) << back.status();
    EXPECT_EQ(*back, budget);
  }
}

TEST(ConvertTest, ByteDigestSurvivesTheWire) {
  const ByteDigest digest{~0ull, 1};
  EXPECT_EQ(FromProto(Sent(ToProto(digest))), digest);
}

TEST(ConvertTest, AttendRowSurvivesTheWire) {
  const std::string q(4 * 16 * 2, 'q'), k(2 * 16 * 4, 'k'), v(2 * 16 * 4, 'v');
  AttendRow row;
  row.context = {3};
  row.layer = 2;
  row.range = {1, 99};
  row.first_head = 4;
  row.heads = 4;
  row.budget = {Budget::Kind::kFixedK, 64, 1.0f};
  row.merged = true;
  row.q_dtype = DType::kBf16;
  row.q = q.data();
  row.has_token = true;
  row.token_position = 98;
  row.k = k.data();
  row.v = v.data();
  const wire::AttendRow message =
      Sent(ToProto(row, /*head_dim=*/16, /*group=*/2, /*kv_dtype=*/DType::kFp32));
  const auto back = FromProto(message);
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->row.context, row.context);
  EXPECT_EQ(back->row.layer, row.layer);
  EXPECT_EQ(back->row.range, row.range);
  EXPECT_EQ(back->row.first_head, row.first_head);
  EXPECT_EQ(back->row.heads, row.heads);
  EXPECT_EQ(back->row.budget, row.budget);
  EXPECT_EQ(back->row.q_dtype, row.q_dtype);
  EXPECT_TRUE(back->row.merged);
  EXPECT_TRUE(back->row.has_token);
  EXPECT_EQ(back->row.token_position, row.token_position);
  EXPECT_EQ(std::string(static_cast<const char*>(back->row.q), back->q_bytes), q);
  EXPECT_EQ(std::string(static_cast<const char*>(back->row.k), back->k_bytes), k);
  EXPECT_EQ(std::string(static_cast<const char*>(back->row.v), back->v_bytes), v);

  row.has_token = false;
  const auto without = FromProto(Sent(ToProto(row, 16, 2, DType::kFp32)));
  ASSERT_TRUE(without.ok()) << without.status();
  EXPECT_FALSE(without->row.has_token);
  EXPECT_EQ(without->k_bytes, 0u);
}

TEST(ConvertTest, AttendAnswerSurvivesTheWire) {
  std::vector<float> o = {1, 2, 3, 4}, lse = {-1, kEmptyLse}, o_back(4), lse_back(2);
  const AttendAnswer answer{absl::OkStatus(), {1, 9}, 16, 1ull << 40, 0.25f, o, lse, 7};
  AttendAnswer back;
  back.o = o_back;
  back.lse = lse_back;
  ASSERT_TRUE(FromProto(Sent(ToProto(answer)), &back).ok());
  EXPECT_TRUE(back.status.ok());
  EXPECT_EQ(back.covered, answer.covered);
  EXPECT_EQ(back.tokens_attended, answer.tokens_attended);
  EXPECT_EQ(back.bytes_touched, answer.bytes_touched);
  EXPECT_EQ(back.error_estimate, answer.error_estimate);
  EXPECT_EQ(back.shifted_tokens, answer.shifted_tokens);
  EXPECT_EQ(o_back, o);
  EXPECT_EQ(lse_back, lse);

  AttendAnswer smaller;
  smaller.o = std::span(o_back).first(3);
  smaller.lse = lse_back;
  EXPECT_EQ(FromProto(ToProto(answer), &smaller).code(), absl::StatusCode::kDataLoss);
}

TEST(ConvertTest, ARowsErrorSurvivesTheWireWithoutItsNumbers) {
  AttendAnswer answer;
  answer.status = absl::NotFoundError("context 7 is not there");
  std::vector<float> o(4, 9.0f);
  answer.o = o;
  const wire::AttendAnswer message = Sent(ToProto(answer));
  EXPECT_TRUE(message.o().empty());
  AttendAnswer back;
  EXPECT_EQ(FromProto(message, &back), answer.status);
  EXPECT_EQ(back.status, answer.status);
}

TEST(ConvertTest, TopKSurvivesTheWire) {
  TopKAnswer answer;
  answer.heads = {{{7, 1.5f}, {3, 0.5f}}, {}};
  answer.k = {"kk", ""};
  answer.v = {"vv", ""};
  answer.shifted_tokens = 9;
  const auto back = FromProto(Sent(ToProto(answer)));
  ASSERT_TRUE(back.ok()) << back.status();
  ASSERT_EQ(back->heads.size(), 2u);
  ASSERT_EQ(back->heads[0].size(), 2u);
  EXPECT_EQ(back->heads[0][1].token, 3u);
  EXPECT_EQ(back->heads[0][1].score, 0.5f);
  EXPECT_EQ(back->k, answer.k);
  EXPECT_EQ(back->v, answer.v);
  EXPECT_EQ(back->shifted_tokens, answer.shifted_tokens);

  wire::TopKReply torn = ToProto(answer);
  torn.mutable_heads(0)->mutable_scores()->RemoveLast();
  EXPECT_EQ(FromProto(torn).status().code(), absl::StatusCode::kDataLoss);
}

TEST(ConvertTest, DigestsOfAnotherLengthAreRefusedByName) {
  for (const size_t n : {1, 31, 33, 64}) {
    const std::string bytes(n, 'x');
    wire::OpenRequest open = ToProto(SomeOpen());
    open.mutable_model()->set_weights_digest(bytes);
    ExpectInvalid(FromProto(open), "weights_digest");
    open = ToProto(SomeOpen());
    open.mutable_model()->set_tokenizer_digest(bytes);
    ExpectInvalid(FromProto(open), "tokenizer_digest");
    open = ToProto(SomeOpen());
    open.mutable_model()->set_adapter_digests(1, bytes);
    ExpectInvalid(FromProto(open), "adapter_digests");
    open = ToProto(SomeOpen());
    open.set_input_digests(0, bytes);
    ExpectInvalid(FromProto(open), "input_digests");
    open = ToProto(SomeOpen());
    open.set_recipe(bytes);
    ExpectInvalid(FromProto(open), "recipe");
    open = ToProto(SomeOpen());
    open.set_accepted_recipes(0, bytes);
    ExpectInvalid(FromProto(open), "accepted_recipes");
    wire::OpenReply reply;
    reply.add_reused_blocks(bytes);
    ExpectInvalid(FromProto(reply), "reused_blocks");
    wire::ForkRequest fork;
    fork.set_recipe(bytes);
    ExpectInvalid(FromProto(fork), "recipe");
    wire::PinRequest pin;
    pin.add_blocks(bytes);
    ExpectInvalid(FromProto(pin), "blocks");
    wire::FlushRequest flush;
    flush.add_blocks(bytes);
    ExpectInvalid(FromProto(flush), "blocks");
    wire::PurgeRequest purge;
    purge.set_namespace_digest(bytes);
    ExpectInvalid(FromProto(purge), "namespace_digest");
  }
  // A digest that must be there may not be empty either.
  wire::OpenRequest open = ToProto(SomeOpen());
  open.mutable_model()->clear_weights_digest();
  ExpectInvalid(FromProto(open), "weights_digest");
}

TEST(ConvertTest, UnknownEnumsAreRefused) {
  // 257 is 1 after truncation to a byte.
  for (const int value : {-1, 0, 4, 255, 257, 2147483647}) {
    wire::ModelSpec spec = ToProto(SomeSpec());
    spec.mutable_shape()->set_dtype(static_cast<wire::DType>(value));
    ExpectInvalid(FromProto(Sent(spec)), "shape dtype is " + std::to_string(value));
    spec = ToProto(SomeSpec());
    spec.mutable_rope()->set_dtype(static_cast<wire::DType>(value));
    ExpectInvalid(FromProto(Sent(spec)), "rope dtype is " + std::to_string(value));
    wire::AttendRow row;
    row.set_q_dtype(static_cast<wire::DType>(value));
    ExpectInvalid(FromProto(Sent(row)), "q_dtype is " + std::to_string(value));
  }
  for (const int value : {-1, 3, 256, 2147483647}) {
    wire::ModelSpec spec = ToProto(SomeSpec());
    spec.mutable_rope()->set_regime(static_cast<wire::RopeRegime>(value));
    ExpectInvalid(FromProto(Sent(spec)), "rope regime is " + std::to_string(value));
    wire::Budget budget;
    const int kind = value == 3 ? 6 : value;  // known kinds end at 5
    budget.set_kind(static_cast<wire::BudgetKind>(kind));
    ExpectInvalid(FromProto(Sent(budget)), "budget kind is " + std::to_string(kind));
  }
}

TEST(ConvertTest, AModelThatIsNoModelIsRefusedWithItsField) {
  wire::OpenRequest open = ToProto(SomeOpen());
  open.mutable_model()->mutable_shape()->set_kv_heads(5);
  ExpectInvalid(FromProto(open), "kv_heads 5");
  ExpectInvalid(FromProto(wire::OpenRequest()), "dtype");
}

// Whatever the bytes: either they do not parse, or the conversion gives a value or an error.
template <typename Message>
void TakeAnything(const std::string& bytes, size_t* parsed) {
  Message message;
  if (!message.ParseFromString(bytes)) return;
  ++*parsed;
  const auto result = FromProto(message);
  if (!result.ok()) {
    EXPECT_FALSE(result.status().message().empty());
  }
}

void TakeAnythingAsAnswer(const std::string& bytes) {
  wire::AttendAnswer message;
  if (!message.ParseFromString(bytes)) return;
  std::vector<float> o(4), lse(2);
  AttendAnswer answer;
  answer.o = o;
  answer.lse = lse;
  const absl::Status status = FromProto(message, &answer);
  EXPECT_EQ(status.ok(), answer.status.ok() && message.o().size() == 16 &&
                             message.lse().size() == 8);
}

size_t TakeAnythingAsEverything(const std::string& bytes) {
  size_t parsed = 0;
  TakeAnything<wire::ModelSpec>(bytes, &parsed);
  TakeAnything<wire::KvShape>(bytes, &parsed);
  TakeAnything<wire::OpenRequest>(bytes, &parsed);
  TakeAnything<wire::OpenReply>(bytes, &parsed);
  TakeAnything<wire::AppendRequest>(bytes, &parsed);
  TakeAnything<wire::ForkRequest>(bytes, &parsed);
  TakeAnything<wire::ContextInfo>(bytes, &parsed);
  TakeAnything<wire::PinRequest>(bytes, &parsed);
  TakeAnything<wire::FlushRequest>(bytes, &parsed);
  TakeAnything<wire::PurgeRequest>(bytes, &parsed);
  TakeAnything<wire::Budget>(bytes, &parsed);
  TakeAnything<wire::AttendRow>(bytes, &parsed);
  TakeAnything<wire::TopKReply>(bytes, &parsed);
  TakeAnythingAsAnswer(bytes);
  return parsed;
}

TEST(ConvertFuzzTest, TruncatedAndDamagedMessagesGiveErrorsOrValues) {
  std::mt19937 random(Seed());
  AttendRow row;
  const std::string q(64, 'q');
  row.heads = 2;
  row.q = q.data();
  const std::string whole[] = {ToProto(SomeOpen()).SerializeAsString(),
                               ToProto(SomeSpec()).SerializeAsString(),
                               ToProto(row, 8, 1, DType::kBf16).SerializeAsString()};
  size_t parsed = 0;
  for (const std::string& bytes : whole) {
    for (size_t n = 0; n < bytes.size(); ++n) {
      parsed += TakeAnythingAsEverything(bytes.substr(0, n));
      std::string damaged = bytes;
      damaged[n] = static_cast<char>(random());
      parsed += TakeAnythingAsEverything(damaged);
    }
  }
  EXPECT_GT(parsed, 0u);
}

TEST(ConvertFuzzTest, RandomBytesGiveErrorsOrValues) {
  std::mt19937 random(Seed());
  size_t parsed = 0;
  for (int i = 0; i < 20000; ++i) {
    std::string bytes(random() % 40, '\0');
    for (char& c : bytes) c = static_cast<char>(random());
    // Small field numbers, so that many of them are those of our messages.
    if (!bytes.empty()) bytes[0] &= 0x7f;
    parsed += TakeAnythingAsEverything(bytes);
  }
  EXPECT_GT(parsed, 0u);
}

}  // namespace
}  // namespace quarry

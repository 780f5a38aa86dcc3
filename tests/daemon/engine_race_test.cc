// Sessions that append, fork, attend, read, seal and end all at once. Every answer that comes is
// checked; nothing may be freed under anybody (run under ASan and TSan).
#include <atomic>
#include <thread>
#include <vector>

#include "tests/daemon/uniform_fixture.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

constexpr uint32_t kTokens = 3000;

// Errors that a call may meet when contexts and sessions end at any moment.
bool MayHappen(const absl::Status& status) {
  return status.ok() || absl::IsNotFound(status) || absl::IsCancelled(status) ||
         absl::IsResourceExhausted(status);
}

class EngineRaceTest : public EngineTest {
 protected:
  EngineRaceTest() : sequence_(kTokens, Seed()), model_(SmallModel(UniformSequence::Shape())) {}

  void StartSmall() {
    EngineOptions options = SmallOptions();
    options.arena.capacity_bytes = 16 << 20;
    options.run_tokens = 512;
    Start(options);
  }

  // One client's life, again and again.
  void Client(uint64_t seed, int lives) {
    std::mt19937_64 random(seed);
    for (int life = 0; life < lives; ++life) {
      const SessionId session = NewSession("alice");
      std::vector<std::pair<ContextId, uint32_t>> contexts;  // and how many tokens they hold
      for (int step = 0; step < 12; ++step) Step(random, session, &contexts);
      engine_->EndSession(session);
    }
  }

  void Step(std::mt19937_64& random, SessionId session,
            std::vector<std::pair<ContextId, uint32_t>>* contexts) {
    if (contexts->empty() || random() % 6 == 0) return OpenOne(random, session, contexts);
    auto& [context, tokens] = (*contexts)[random() % contexts->size()];
    switch (random() % 8) {
      case 0:
      case 1: {
        const uint32_t more = std::min<uint32_t>(kTokens, tokens + 1 + random() % 700);
        if (more == tokens) return;
        const absl::Status status =
            AppendAll(*engine_, session, context, sequence_.data(), {tokens, more});
        if (status.ok()) tokens = more;
        EXPECT_TRUE(MayHappen(status) || absl::IsFailedPrecondition(status)) << status;
        return;
      }
      case 2: {
        auto fork = engine_->Fork(
            session, {context, static_cast<uint32_t>(random() % (tokens + 1)), kTokens, {}});
        EXPECT_TRUE(MayHappen(fork.status())) << fork.status();
        if (!fork.ok()) return;
        auto info = engine_->Info(session, *fork);
        const uint32_t at = info.ok() ? info->tokens : 0;
        const std::vector<uint32_t> ids = Tokens(kTokens - at, 1000 + at);
        EXPECT_TRUE(MayHappen(engine_->DeclareTokens(session, *fork, ids)));
        contexts->emplace_back(*fork, at);
        return;
      }
      case 3:
        EXPECT_TRUE(MayHappen(engine_->Close(session, context)));
        std::erase_if(*contexts, [c = context](const auto& other) { return other.first == c; });
        return;
      case 4:
        EXPECT_TRUE(MayHappen(engine_->Seal(session, context).status()));
        return;
      default:
        return AttendSome(random, session, context, tokens);
    }
  }

  void OpenOne(std::mt19937_64& random, SessionId session,
               std::vector<std::pair<ContextId, uint32_t>>* contexts) {
    const auto known = static_cast<uint32_t>(random() % kTokens);
    auto opened = engine_->Open(session, OpenFor(model_, Tokens(known), kTokens));
    EXPECT_TRUE(MayHappen(opened.status())) << opened.status();
    if (!opened.ok()) return;
    const std::vector<uint32_t> rest = Tokens(kTokens - known, 1000 + known);
    EXPECT_TRUE(MayHappen(engine_->DeclareTokens(session, opened->context, rest)));
    contexts->emplace_back(opened->context, opened->reused_tokens);
  }

  void AttendSome(std::mt19937_64& random, SessionId session, ContextId context, uint32_t tokens) {
    std::vector<std::unique_ptr<OwnedRow>> rows;
    for (int i = 0; i < 3; ++i) {
      const auto hi = static_cast<uint32_t>(random() % (tokens + 1));
      const auto lo = static_cast<uint32_t>(random() % (hi + 1));
      rows.push_back(std::make_unique<OwnedRow>(UniformSequence::Shape(), context, 0,
                                                TokenRange{lo, hi}, random()));
      if (random() % 2 == 0) {
        rows.back()->row.budget = {Budget::Kind::kFixedK, 1 + static_cast<uint32_t>(random() % 900),
                                   1.0f};
      }
    }
    AttendRows(*engine_, session, rows);
    for (const auto& row : rows) {
      EXPECT_TRUE(MayHappen(row->answer.status)) << row->answer.status;
      if (!row->answer.status.ok()) continue;
      const bool fixed = row->row.budget.kind == Budget::Kind::kFixedK;
      const uint32_t count =
          fixed ? std::min(row->row.range.size(), row->row.budget.k) : row->row.range.size();
      EXPECT_TRUE(sequence_.IsMeanOfFirst(*row, count));
    }
    std::vector<std::byte> k(tokens * sequence_.data().token_bytes()), v(k.size());
    const absl::Status read = engine_->Read(session, context, 0, {0, tokens}, k, v);
    EXPECT_TRUE(MayHappen(read)) << read;
    if (read.ok() && tokens > 0) {
      EXPECT_EQ(std::memcmp(v.data(), sequence_.data().v(0, 0), v.size()), 0);
    }
  }

  UniformSequence sequence_;
  ModelSpec model_;
};

TEST_F(EngineRaceTest, ClientsThatDoEverythingAtOnceGetRightAnswers) {
  StartSmall();
  std::vector<std::thread> clients;
  for (int i = 0; i < 4; ++i) {
    clients.emplace_back([this, i] { Client(Seed() + 100 + i, 12); });
  }
  for (std::thread& client : clients) client.join();
  engine_->EndSession(session_);
  WaitUntilUnleased();
  const EngineStats stats = engine_->Stats();
  EXPECT_EQ(stats.contexts, 0u);
  EXPECT_EQ(stats.sessions, 0u);
  EXPECT_EQ(stats.leases, 0u);
  EXPECT_EQ(stats.store.reserved_bytes, 0u);
  EXPECT_EQ(stats.store.blocks, stats.store.published);
  EXPECT_GT(stats.attend_rows, stats.attend_failures);
}

TEST_F(EngineRaceTest, ASessionEndsInTheMiddleOfItsAttends) {
  StartSmall();
  for (int round = 0; round < 30; ++round) {
    const SessionId session = NewSession("alice");
    const OpenResult opened =
        OpenAndFill(session, OpenFor(model_, Tokens(kTokens), kTokens), sequence_.data());
    std::atomic<bool> ended{false};
    std::vector<std::thread> attenders;
    for (int i = 0; i < 3; ++i) {
      attenders.emplace_back([&, i] {
        std::mt19937_64 random(Seed() + round * 10 + i);
        while (!ended.load()) AttendSome(random, session, opened.context, kTokens);
        // Late comers learn that it has ended.
        const auto row =
            AttendOne(*engine_, session, UniformSequence::Shape(), opened.context, 0, {0, 10}, 1);
        EXPECT_TRUE(absl::IsNotFound(row->answer.status)) << row->answer.status;
      });
    }
    absl::SleepFor(absl::Microseconds(Seed() * 31 % 500 * round));
    engine_->EndSession(session);
    ended.store(true);
    for (std::thread& attender : attenders) attender.join();
  }
}

TEST_F(EngineRaceTest, TwoAppendsToOneHeadNeverMix) {
  StartSmall();
  auto opened = engine_->Open(session_, OpenFor(model_, Tokens(kTokens), kTokens));
  ASSERT_TRUE(opened.ok());
  std::atomic<uint32_t> accepted{0};
  std::vector<std::thread> writers;
  for (int i = 0; i < 3; ++i) {
    writers.emplace_back([&] {
      while (accepted.load() < kTokens) {
        const uint32_t at = accepted.load();
        const uint32_t next = std::min(kTokens, at + 37);
        if (at == next) return;
        // Of writers that are equally far, one is taken.
        if (AppendAll(*engine_, session_, opened->context, sequence_.data(), {at, next}).ok()) {
          EXPECT_EQ(accepted.exchange(next), at);
        }
      }
    });
  }
  for (std::thread& writer : writers) writer.join();
  const auto row =
      AttendOne(*engine_, session_, UniformSequence::Shape(), opened->context, 0, {0, kTokens}, 1);
  ASSERT_TRUE(row->answer.status.ok());
  EXPECT_TRUE(sequence_.IsMeanOfFirst(*row, kTokens));
}

}  // namespace
}  // namespace quarry

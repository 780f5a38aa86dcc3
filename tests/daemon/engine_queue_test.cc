// The bound on attends that wait.
#include "tests/daemon/engine_fixture.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

using EngineQueueTest = EngineTest;

// The one executor thread is kept in the first batch's `done`, so the second one fills the queue.
TEST_F(EngineQueueTest, AnAttendThatMeetsAFullQueueIsRefusedAndLaterOnesAreServed) {
  EngineOptions options = SmallOptions();
  options.executor_threads = 1;
  options.max_queued_batches = 1;
  options.inline_bytes = 0;
  Start(options);
  const KvData data(SmallShape(), 600, Seed());
  const ContextId context =
      OpenAndFill(session_, OpenFor(SmallModel(), Tokens(600), 601), data).context;
  OwnedRow first(SmallShape(), context, 0, {0, 600}, Seed());
  absl::Notification answered, release;
  engine_->Attend(session_, {&first.row, 1}, {&first.answer, 1}, [&] {
    answered.Notify();
    release.WaitForNotification();
  });
  answered.WaitForNotification();
  EXPECT_EQ(engine_->Stats().queued_batches, 0u);
  OwnedRow second(SmallShape(), context, 0, {0, 600}, Seed());
  absl::Notification second_answered;
  engine_->Attend(session_, {&second.row, 1}, {&second.answer, 1},
                  [&] { second_answered.Notify(); });
  EXPECT_EQ(engine_->Stats().queued_batches, 1u);
  for (const uint64_t refused : {1u, 2u}) {
    const auto row = AttendOne(*engine_, session_, SmallShape(), context, 0, {0, 600}, 1);
    EXPECT_TRUE(absl::IsResourceExhausted(row->answer.status)) << row->answer.status;
    EXPECT_THAT(std::string(row->answer.status.message()),
                ::testing::HasSubstr("full with 1 batches"));
    EXPECT_EQ(engine_->Stats().refused_batches, refused);
  }
  release.Notify();
  second_answered.WaitForNotification();
  EXPECT_TRUE(first.answer.status.ok()) << first.answer.status;
  EXPECT_TRUE(second.answer.status.ok()) << second.answer.status;
  const auto later = AttendOne(*engine_, session_, SmallShape(), context, 0, {0, 600}, 2);
  ASSERT_TRUE(later->answer.status.ok()) << later->answer.status;
  EXPECT_LE(WorstError(data, *later), 1e-3);
}

TEST_F(EngineQueueTest, ARowWhoseScratchPassesTheLimitStoresNoTokenAndSmallerOnesAreServed) {
  EngineOptions options = SmallOptions();
  options.max_attend_scratch_bytes = 64 << 10;
  Start(options);
  const KvData data(SmallShape(), 5001, Seed());
  const ContextId context =
      OpenAndFill(session_, OpenFor(SmallModel(), Tokens(5000), 5001), data).context;
  OwnedRow row(SmallShape(), context, 0, {0, 5001}, Seed());
  row.row.budget = {Budget::Kind::kFixedK, 10, 1.0f};  // scores of every token
  row.row.has_token = true;
  row.row.token_position = 5000;
  row.row.k = data.k(0, 5000);
  row.row.v = data.v(0, 5000);
  for (int i = 0; i < 2; ++i) {  // what was charged is given back
    absl::Notification done;
    engine_->Attend(session_, {&row.row, 1}, {&row.answer, 1}, [&] { done.Notify(); });
    done.WaitForNotification();
    EXPECT_TRUE(absl::IsResourceExhausted(row.answer.status)) << row.answer.status;
    EXPECT_THAT(std::string(row.answer.status.message()),
                ::testing::HasSubstr("max_attend_scratch_bytes is 65536"));
  }
  const auto beyond = AttendOne(*engine_, session_, SmallShape(), context, 0, {0, 5001}, 3);
  EXPECT_TRUE(absl::IsInvalidArgument(beyond->answer.status)) << "no token was stored";
  const auto exact = AttendOne(*engine_, session_, SmallShape(), context, 0, {0, 5000}, 2);
  ASSERT_TRUE(exact->answer.status.ok()) << exact->answer.status;
  EXPECT_LE(WorstError(data, *exact), 1e-3);
}

}  // namespace
}  // namespace quarry

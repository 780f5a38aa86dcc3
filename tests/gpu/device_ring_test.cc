// Attends that a device rings, against a scripted server: what is sent, what becomes of the
// answers, and that every wait ends. The device is one in the host's memory.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/rung_attends.h"
#include "gpu/device.h"
#include "tests/client/scripted.h"

namespace quarry {
namespace {

using testing::Answer;
using testing::Connect;
using testing::Contexts;
using testing::FakeServer;
using ::testing::HasSubstr;
using testing::kLong;
using testing::kShape;
using testing::PodAt;
using testing::Raw;
using testing::Request;
using testing::Text;

// More messages than the ring has entries: the server has 4 slots.
constexpr uint32_t kRows = 3, kMessages = 11;
constexpr size_t kQ = size_t{kShape.heads} * kShape.head_dim;
constexpr size_t kKv = size_t{kShape.kv_heads} * kShape.head_dim;
constexpr float kFarLse = 1.5f;

float FarO(uint32_t layer, uint32_t row) { return static_cast<float>(10 * layer + row); }

// Answers every row with its layer's and row's o; `change` may alter the answer pods.
using Change = std::function<void(uint32_t layer, std::vector<shm::AttendAnswerPod>*)>;
Answer AnswerTo(const Request& request, const Change& change) {
  if (request.opcode == shm::Opcode::kCall) return Contexts();
  if (request.opcode != shm::Opcode::kAttend) return {};
  const auto header = PodAt<shm::AttendHeader>(request.payload);
  std::vector<shm::AttendAnswerPod> pods(header.rows);
  uint32_t layer = 0;
  for (uint32_t r = 0; r < header.rows; ++r) {
    const auto row =
        PodAt<shm::AttendRowPod>(request.payload, sizeof(header) + r * sizeof(shm::AttendRowPod));
    layer = row.layer;
    const std::vector<float> o(kQ, FarO(layer, r)), lse(kShape.heads, kFarLse);
    std::memcpy(request.slot_start + row.o_offset, o.data(), o.size() * 4);
    std::memcpy(request.slot_start + row.lse_offset, lse.data(), lse.size() * 4);
    pods[r].generation = request.generation;
    pods[r].covered_lo = row.range_lo;
    pods[r].covered_hi = row.range_hi;
    pods[r].tokens_attended = 100 * layer + r;
  }
  if (change) change(layer, &pods);
  std::string payload;
  for (const shm::AttendAnswerPod& pod : pods) payload += Raw(pod);
  return {.payload = payload};
}

std::vector<AttendRow> Rows() {
  std::vector<AttendRow> rows(kRows);
  for (uint32_t r = 0; r < kRows; ++r) {
    rows[r].context = {5};
    rows[r].range = {2, 9 + r};
    rows[r].heads = kShape.heads;
    rows[r].has_token = true;
    rows[r].token_position = 20 + r;
  }
  return rows;
}

class DeviceRingTest : public ::testing::Test {
 protected:
  DeviceRingTest()
      : q_(kRows * kQ), k_(kRows * kKv), v_(k_.size()), o_(q_.size()), lse_(kRows * kShape.heads) {
    for (size_t i = 0; i < q_.size(); ++i) q_[i] = 0.5f + static_cast<float>(i);
    for (size_t i = 0; i < k_.size(); ++i) k_[i] = 1000.0f + static_cast<float>(i);
    for (size_t i = 0; i < v_.size(); ++i) v_[i] = 2000.0f + static_cast<float>(i);
  }

  void Start(FakeServer::Script script, absl::Duration deadline = kLong) {
    server_ = std::make_unique<FakeServer>(std::move(script));
    auto client = Connect(*server_, deadline);
    ASSERT_TRUE(client.ok()) << client.status();
    client_ = *std::move(client);
  }
  void Begin() {
    auto rung = client_->RingElsewhere(Rows(), kMessages);
    ASSERT_TRUE(rung.ok()) << rung.status();
    rung_ = *std::move(rung);
    outcomes_.assign(kMessages * RungOutcomeBytes(kRows), std::byte{0xee});
  }
  DeviceRing Message(uint32_t i) {
    DeviceRing ring;
    if (i > 0) {
      ring.before = outcomes_.data() + (i - 1) * RungOutcomeBytes(kRows);
      ring.before_generation = rung_->messages()[i - 1].generation;
    }
    ring.layout = rung_->layout();
    ring.message = rung_->messages()[i];
    ring.head = rung_->heads().data() + i * ring.layout.head_bytes;
    ring.q = q_.data();
    ring.k = k_.data();
    ring.v = v_.data();
    ring.o = o_.data();
    ring.lse = lse_.data();
    ring.outcome = outcomes_.data() + i * RungOutcomeBytes(kRows);
    return ring;
  }
  // The window's part of an answer: o = -1, as heavy as the daemon's.
  void FillWindow() {
    std::fill(o_.begin(), o_.end(), -1.0f);
    std::fill(lse_.begin(), lse_.end(), kFarLse);
  }
  void RingAndTake(uint32_t i) {
    FillWindow();
    device_->Ring(Message(i));
    device_->TakeAnswer(Message(i));
  }
  absl::Status Read(uint32_t i) {
    answers_.assign(kRows, AttendAnswer());
    return rung_->Read(
        i, std::span(outcomes_).subspan(i * RungOutcomeBytes(kRows), RungOutcomeBytes(kRows)),
        answers_);
  }

  std::unique_ptr<Device> device_ = MakeHostDevice({.threads = 1});
  std::unique_ptr<FakeServer> server_;
  std::unique_ptr<Client> client_;
  std::unique_ptr<RungAttends> rung_;
  std::vector<float> q_, k_, v_, o_, lse_;
  std::vector<std::byte> outcomes_;
  std::vector<AttendAnswer> answers_;
};

TEST_F(DeviceRingTest, MessagesAreThoseThatTheHostWouldSend) {
  Start({.serve = [](const Request& r) { return AnswerTo(r, nullptr); }});
  ASSERT_NO_FATAL_FAILURE(Begin());
  for (uint32_t i = 0; i < kMessages; ++i) {
    RingAndTake(i);
    for (uint32_t r = 0; r < kRows; ++r) {
      // Both parts weigh the same.
      EXPECT_FLOAT_EQ(o_[r * kQ + 7], (FarO(i, r) - 1) / 2) << i << " " << r;
      EXPECT_FLOAT_EQ(lse_[r * kShape.heads + 1], kFarLse + std::log(2.0f));
    }
    EXPECT_TRUE(Read(i).ok());
    for (uint32_t r = 0; r < kRows; ++r) {
      EXPECT_TRUE(answers_[r].status.ok()) << answers_[r].status;
      EXPECT_EQ(answers_[r].covered, Rows()[r].range);
      EXPECT_EQ(answers_[r].tokens_attended, 100 * i + r);
    }
  }
  rung_.reset();
  // The same by the host, on the same channel.
  for (uint32_t i = 0; i < kMessages; ++i) {
    std::vector<AttendRow> rows = Rows();
    std::vector<AttendAnswer> answers(kRows);
    for (uint32_t r = 0; r < kRows; ++r) {
      rows[r].layer = i;
      rows[r].q = q_.data() + r * kQ;
      rows[r].k = k_.data() + r * kKv;
      rows[r].v = v_.data() + r * kKv;
      answers[r].o = std::span(o_).subspan(r * kQ, kQ);
      answers[r].lse = std::span(lse_).subspan(r * kShape.heads, kShape.heads);
    }
    // Layer 2 and more is not the shape's; the scripted server does not mind.
    ASSERT_TRUE(client_->Attend(rows, answers).ok());
  }
  std::vector<Request> attends;
  for (const Request& r : server_->requests()) {
    if (r.opcode == shm::Opcode::kAttend) attends.push_back(r);
  }
  ASSERT_EQ(attends.size(), 2 * kMessages);
  const auto layout_end = sizeof(shm::AttendHeader) + kRows * sizeof(shm::AttendRowPod);
  for (uint32_t i = 0; i < kMessages; ++i) {
    const std::string &rung = attends[i].payload, &sent = attends[kMessages + i].payload;
    ASSERT_EQ(rung.size(), sent.size());
    EXPECT_EQ(rung.substr(0, layout_end), sent.substr(0, layout_end)) << i;
    for (uint32_t r = 0; r < kRows; ++r) {
      const auto pod =
          PodAt<shm::AttendRowPod>(sent, sizeof(shm::AttendHeader) + r * sizeof(shm::AttendRowPod));
      for (const auto& [offset, bytes] :
           {std::pair{pod.q_offset, kQ * 4}, {pod.k_offset, kKv * 4}, {pod.v_offset, kKv * 4}}) {
        const size_t at = offset - shm::kSlotPayload;
        EXPECT_EQ(rung.substr(at, bytes), sent.substr(at, bytes)) << i << " " << r;
      }
    }
  }
}

TEST_F(DeviceRingTest, RowsThatDoNotCountAreNotMerged) {
  // In message 1 a row is refused, in 2 one is of another generation, 3 is refused as a whole.
  Start({.serve = [](const Request& r) {
    uint32_t whole = 0;
    Answer answer = AnswerTo(r, [&](uint32_t layer, std::vector<shm::AttendAnswerPod>* pods) {
      if (layer == 1) (*pods)[1].status = static_cast<uint32_t>(absl::StatusCode::kOutOfRange);
      if (layer == 2) ++(*pods)[2].generation;
      if (layer == 3) whole = static_cast<uint32_t>(absl::StatusCode::kInvalidArgument);
    });
    answer.status = whole;
    return answer;
  }});
  ASSERT_NO_FATAL_FAILURE(Begin());
  for (uint32_t i = 0; i < kMessages; ++i) {
    RingAndTake(i);
    const absl::Status status = Read(i);
    EXPECT_EQ(status.code(), i == 3 ? absl::StatusCode::kInvalidArgument : absl::StatusCode::kOk);
    for (uint32_t r = 0; r < kRows; ++r) {
      const bool merged = !(i == 1 && r == 1) && !(i == 2 && r == 2) && i != 3;
      EXPECT_EQ(answers_[r].status.ok(), merged) << i << " " << r;
      if (i == 1 && r == 1) {
        EXPECT_THAT(Text(answers_[r].status), HasSubstr("layer 1,"));
      }
      EXPECT_FLOAT_EQ(o_[r * kQ], merged ? (FarO(i, r) - 1) / 2 : -1.0f) << i << " " << r;
    }
  }
  rung_.reset();
  EXPECT_TRUE(client_->Nop().ok());
}

TEST_F(DeviceRingTest, WhatWasNotRungLeavesNoTrace) {
  Start({.serve = [](const Request& r) { return AnswerTo(r, nullptr); }});
  for (uint32_t rung = 0; rung <= kMessages; ++rung) {
    for (int again = 0; again < 3; ++again) {
      ASSERT_NO_FATAL_FAILURE(Begin());
      for (uint32_t i = 0; i < rung; ++i) RingAndTake(i);
      rung_.reset();
      EXPECT_TRUE(client_->Nop().ok());
    }
  }
  // Every generation was new to its slot: the daemon would close the session else.
  std::map<uint32_t, uint32_t> last;
  for (const Request& r : server_->requests()) {
    EXPECT_NE(last[r.slot], r.generation);
    EXPECT_NE(r.generation, ~0u);
    last[r.slot] = r.generation;
  }
}

TEST_F(DeviceRingTest, OthersWaitUntilTheDeviceHasEnded) {
  Start({.serve = [](const Request& r) { return AnswerTo(r, nullptr); }});
  ASSERT_NO_FATAL_FAILURE(Begin());
  std::atomic<bool> answered{false};
  std::thread other([&] {
    EXPECT_TRUE(client_->Nop().ok());
    answered = true;
  });
  for (uint32_t i = 0; i < kMessages; ++i) RingAndTake(i);
  EXPECT_TRUE(Read(kMessages - 1).ok());
  absl::SleepFor(absl::Milliseconds(20));
  EXPECT_FALSE(answered);
  EXPECT_TRUE(absl::IsFailedPrecondition(client_->RingElsewhere(Rows(), 1).status()));
  rung_.reset();
  other.join();
  EXPECT_EQ(server_->requests().back().opcode, shm::Opcode::kNop);
}

TEST_F(DeviceRingTest, ASilentDaemonIsGivenUpAtTheDeadline) {
  Start({.serve =
             [](const Request& r) {
               Answer answer = AnswerTo(r, nullptr);
               if (r.opcode != shm::Opcode::kAttend) return answer;
               const auto row = PodAt<shm::AttendRowPod>(r.payload, sizeof(shm::AttendHeader));
               answer.given = row.layer < 2;
               return answer;
             }},
        absl::Milliseconds(300));
  ASSERT_NO_FATAL_FAILURE(Begin());
  const absl::Time begun = absl::Now();
  for (uint32_t i = 0; i < kMessages; ++i) RingAndTake(i);  // all end
  EXPECT_GE(absl::Now() - begun, absl::Milliseconds(250));
  EXPECT_LT(absl::Now() - begun, kLong / 2);
  for (uint32_t i = 0; i < kMessages; ++i) {
    const absl::Status status = Read(i);
    EXPECT_EQ(absl::IsUnavailable(status), i >= 2) << i << " " << status;
    if (i >= 2) {
      EXPECT_THAT(Text(status), HasSubstr(absl::StrCat("message ", i)));
    }
  }
  EXPECT_FLOAT_EQ(o_[0], -1.0f);                  // nothing was merged
  EXPECT_EQ(server_->requests().size(), 1 + 3u);  // nothing was submitted behind it
  rung_.reset();
  EXPECT_TRUE(absl::IsUnavailable(client_->Nop()));
}

// A daemon that was stopped and goes on may answer what was given up: it does not count any more,
// and the waits behind it end too.
TEST_F(DeviceRingTest, ALateAnswerNeitherCountsNorHoldsUpTheMessagesBehindIt) {
  Start({.serve =
             [](const Request& r) {
               if (r.opcode == shm::Opcode::kAttend) return Answer{.given = false};
               return AnswerTo(r, nullptr);
             }},
        absl::Milliseconds(500));
  ASSERT_NO_FATAL_FAILURE(Begin());
  RingAndTake(0);
  EXPECT_FLOAT_EQ(o_[0], -1.0f);
  const Request late = server_->requests().back();
  ASSERT_EQ(late.opcode, shm::Opcode::kAttend);
  server_->AnswerLater(late, AnswerTo(late, nullptr));
  for (uint32_t i = 1; i < kMessages; ++i) RingAndTake(i);
  // As if the device had seen it.
  const RungOutcome seen{late.generation, 0};
  std::memcpy(outcomes_.data(), &seen, sizeof(seen));
  for (uint32_t i = 0; i < kMessages; ++i) EXPECT_TRUE(absl::IsUnavailable(Read(i))) << i;
  EXPECT_EQ(server_->requests().back().generation, late.generation);
}

TEST_F(DeviceRingTest, ADaemonThatHangsUpIsNoticedQuickly) {
  Start({.serve = [](const Request& r) {
    Answer answer = AnswerTo(r, nullptr);
    answer.hang_up = r.opcode == shm::Opcode::kAttend;
    return answer;
  }});
  ASSERT_NO_FATAL_FAILURE(Begin());
  const absl::Time begun = absl::Now();
  for (uint32_t i = 0; i < kMessages; ++i) RingAndTake(i);
  EXPECT_LT(absl::Now() - begun, kLong / 2);
  EXPECT_TRUE(absl::IsUnavailable(Read(0)));
}

TEST_F(DeviceRingTest, RowsThatADeviceCannotRingAreNamed) {
  Start({.serve = [](const Request& r) { return AnswerTo(r, nullptr); }});
  for (int wrong = 0; wrong < 4; ++wrong) {
    std::vector<AttendRow> rows = Rows();
    if (wrong == 0) rows[1].range = {};
    if (wrong == 1) rows[1].has_token = false;
    if (wrong == 2) rows[1].q_dtype = DType::kBf16;
    if (wrong == 3) rows[1].heads = 2;
    const absl::Status status = client_->RingElsewhere(rows, kMessages).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << wrong << " " << status;
    EXPECT_THAT(Text(status), HasSubstr("attend row 1")) << wrong;
  }
  EXPECT_TRUE(absl::IsInvalidArgument(client_->RingElsewhere({}, kMessages).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(client_->RingElsewhere(Rows(), 0).status()));
  EXPECT_TRUE(client_->Nop().ok());
}

}  // namespace
}  // namespace quarry

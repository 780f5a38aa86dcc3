// The worker's JSON lines, with a fake service behind them.
#include "gpu/serve.h"

#include <gtest/gtest.h>

#include <sstream>
#include <string>

#include <nlohmann/json.hpp>

#include "tests/gpu/fake_service.h"

namespace quarry {
namespace {

using nlohmann::json;
using testing::FakeService;

class ServeTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto model = Model::Load(kModel, device_.get());
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
    for (int i = 0; i < 60; ++i) prompt_.push_back((i * 37 + 11) % model_->config().vocab);
    options_.kv_dtype = DType::kFp32;
    options_.window = {8, 16, false};
    options_.max_attend_rows = 20;
  }
  static json MustAnswer(WorkerSession* session, const json& request) {
    json answer = session->Answer(request);
    EXPECT_EQ(answer["status"], "OK") << request << " -> " << answer;
    return answer;
  }
  void ExpectError(const json& request, const char* status, const char* word) {
    WorkerSession session(*model_, *device_, nullptr, options_);
    MustAnswer(&session, {{"op", "open"}, {"tokens", prompt_}, {"max_tokens", 100}});
    const json answer = session.Answer(request);
    EXPECT_EQ(answer["status"], status) << request << " -> " << answer;
    EXPECT_NE(answer["error"].get<std::string>().find(word), std::string::npos) << answer;
  }

  const std::string kModel = std::string(QUARRY_TEST_MODELS) + "/tiny/llama-untied-mha";
  std::unique_ptr<Device> device_ = MakeHostDevice({.threads = 2});
  std::unique_ptr<Model> model_;
  SequenceOptions options_;
  std::vector<uint32_t> prompt_;
};

TEST_F(ServeTest, DaemonAndFullGiveTheSameAnswersAndCountTheirCost) {
  FakeService service;
  WorkerSession full(*model_, *device_, nullptr, options_);
  WorkerSession daemon(*model_, *device_, &service, options_);
  for (WorkerSession* session : {&full, &daemon}) {
    const json opened =
        MustAnswer(session, {{"op", "open"}, {"tokens", prompt_}, {"max_tokens", 100}});
    EXPECT_EQ(opened["sequence"], 1);
    EXPECT_EQ(opened["tokens"], 60);
    EXPECT_EQ(opened["reused_tokens"], 0);
    EXPECT_EQ(opened["head_steps"], 0) << "a prefill is not counted";
    EXPECT_GE(opened["ttft_ms"], 0.0);
  }
  const json ask = {{"op", "ask"}, {"sequence", 1}, {"tokens", {5, 6, 7}}, {"new", 6}};
  const json a = MustAnswer(&full, ask), b = MustAnswer(&daemon, ask);
  EXPECT_EQ(a["predicted"], b["predicted"]);
  ASSERT_EQ(a["predicted"].size(), 6u);
  EXPECT_EQ(a["tokens"], 60 + 3 + 5) << "the last prediction is not fed back";
  EXPECT_EQ(a["head_steps"], b["head_steps"]);
  for (const json& answer : {a, b}) {
    EXPECT_EQ(answer["tokens_attended_mean"], answer["tokens_in_reach_mean"]);
    EXPECT_NEAR(answer["tokens_in_reach_mean"].get<double>(), 64.5, 1e-9);
  }
  EXPECT_EQ(a["bytes_moved"], 0);
  EXPECT_GT(b["bytes_moved"], 0);
  EXPECT_GT(b["daemon_tokens_attended_mean"], 30.0);
  EXPECT_LT(b["worker_kv_bytes"].get<double>(), a["worker_kv_bytes"].get<double>());
  EXPECT_EQ(MustAnswer(&daemon, {{"op", "stats"}})["worker_kv_bytes"], b["worker_kv_bytes"]);
}

TEST_F(ServeTest, GoldTokensAreFedInPlaceOfThePredictedOnes) {
  WorkerSession session(*model_, *device_, nullptr, options_);
  MustAnswer(&session, {{"op", "open"}, {"tokens", prompt_}, {"max_tokens", 100}});
  const json forked = MustAnswer(&session, {{"op", "fork"}, {"sequence", 1}});
  EXPECT_EQ(forked["sequence"], 2);
  const json gold = MustAnswer(
      &session, {{"op", "ask"}, {"sequence", 1}, {"tokens", {9}}, {"new", 2}, {"gold", {3, 4}}});
  EXPECT_EQ(gold["tokens"], 63) << "the whole gold answer is in the context";
  // The same tokens as a prompt predict the same.
  const json first = MustAnswer(&session, {{"op", "ask"}, {"sequence", 2}, {"tokens", {9}}});
  const json second = MustAnswer(&session, {{"op", "ask"}, {"sequence", 2}, {"tokens", {3}}});
  EXPECT_EQ(gold["predicted"][0], first["predicted"][0]);
  EXPECT_EQ(gold["predicted"][1], second["predicted"][0]);
}

TEST_F(ServeTest, AForkedAskLeavesTheSequenceAsItWas) {
  FakeService service;
  WorkerSession session(*model_, *device_, &service, options_);
  MustAnswer(&session, {{"op", "open"}, {"tokens", prompt_}, {"max_tokens", 100}});
  json ask = {{"op", "ask"}, {"sequence", 1}, {"tokens", {9, 8}}, {"new", 4}, {"fork", true}};
  const json once = MustAnswer(&session, ask), again = MustAnswer(&session, ask);
  EXPECT_EQ(once["predicted"], again["predicted"]);
  EXPECT_EQ(service.contexts.size(), 1u) << "the forks are closed";
  ask["stop"] = {once["predicted"][1]};
  const json stopped = MustAnswer(&session, ask);
  EXPECT_LE(stopped["predicted"].size(), 2u);
  EXPECT_EQ(stopped["predicted"].back(), once["predicted"][1]);
  EXPECT_EQ(MustAnswer(&session, {{"op", "close"}, {"sequence", 1}})["status"], "OK");
  EXPECT_TRUE(service.contexts.empty());
  EXPECT_EQ(session.Answer(ask)["status"], "NOT_FOUND");
}

TEST_F(ServeTest, ABatchIsAnsweredAsItsAsksAlone) {
  FakeService service;
  for (KvService* const kv :
       {static_cast<KvService*>(nullptr), static_cast<KvService*>(&service)}) {
    WorkerSession alone(*model_, *device_, kv, options_), session(*model_, *device_, kv, options_);
    for (WorkerSession* each : {&alone, &session}) {
      for (const int skipped : {0, 13, 29}) {
        const std::vector<uint32_t> prompt(prompt_.begin() + skipped, prompt_.end());
        MustAnswer(each, {{"op", "open"}, {"tokens", prompt}, {"max_tokens", 100}});
      }
    }
    // Questions and answers of several lengths, one with a stop, one sampled, one on a fork.
    json asks = {{{"sequence", 1}, {"tokens", {5}}, {"new", 7}},
                 {{"sequence", 2}, {"tokens", {6, 7, 8}}, {"new", 3}, {"gold", {1, 2, 3}}},
                 {{"sequence", 3}, {"tokens", {9}}, {"new", 9}, {"temperature", 0.7}, {"seed", 5}},
                 {{"sequence", 1}, {"tokens", {4}}, {"new", 5}, {"fork", true}}};
    for (int again = 0; again < 2; ++again) {
      // A fork is of what its sequence was before the batch.
      std::vector<json> wanted(4);
      for (const size_t i : {3, 0, 1, 2}) {
        json ask = asks[i];
        ask["op"] = "ask";
        wanted[i] = MustAnswer(&alone, ask);
      }
      const json got = MustAnswer(&session, {{"op", "batch"}, {"asks", asks}});
      ASSERT_EQ(got["answers"].size(), 4u);
      for (size_t i = 0; i < 4; ++i) {
        const json& answer = got["answers"][i];
        EXPECT_EQ(answer["status"], "OK") << answer;
        for (const char* field : {"predicted", "tokens", "head_steps", "bytes_moved"}) {
          EXPECT_EQ(answer[field], wanted[i][field]) << i << " " << field;
        }
      }
      asks[0]["stop"] = {wanted[0]["predicted"][1]};
    }
    MustAnswer(&session, {{"op", "close"}, {"sequence", 2}});
    const json rest = MustAnswer(&session, {{"op", "batch"},
                                            {"asks",
                                             {{{"sequence", 1}, {"tokens", {5}}, {"new", 2}},
                                              {{"sequence", 3}, {"tokens", {5}}, {"new", 2}}}}});
    EXPECT_EQ(rest["answers"][1]["predicted"].size(), 2u);
  }
  EXPECT_TRUE(service.contexts.empty());
}

TEST_F(ServeTest, WhatIsWrongWithOneAskOfABatchIsItsAnswer) {
  WorkerSession session(*model_, *device_, nullptr, options_);
  MustAnswer(&session, {{"op", "open"}, {"tokens", prompt_}, {"max_tokens", 100}});
  const json got =
      MustAnswer(&session, {{"op", "batch"},
                            {"asks",
                             {{{"sequence", 1}, {"tokens", {5}}, {"new", 2}},
                              {{"sequence", 7}, {"tokens", {5}}},
                              {{"sequence", 1}, {"tokens", {5}}},
                              5,
                              {{"sequence", 1}, {"tokens", {5, 99999}}, {"fork", true}}}}});
  const json& answers = got["answers"];
  EXPECT_EQ(answers[0]["predicted"].size(), 2u);
  EXPECT_EQ(answers[1]["status"], "NOT_FOUND");
  EXPECT_NE(answers[2]["error"].get<std::string>().find("asks[2] names sequence 1 once more"),
            std::string::npos);
  EXPECT_EQ(answers[3]["status"], "INVALID_ARGUMENT");
  EXPECT_NE(answers[4]["error"].get<std::string>().find("has id 99999"), std::string::npos);
  EXPECT_TRUE(MustAnswer(&session, {{"op", "batch"}, {"asks", json::array()}})["answers"].empty());
  ExpectError({{"op", "batch"}}, "INVALID_ARGUMENT", "asks");
}

TEST_F(ServeTest, AnEmptyOpenIsFilledByTheFirstAsk) {
  WorkerSession session(*model_, *device_, nullptr, options_);
  const json opened =
      MustAnswer(&session, {{"op", "open"}, {"tokens", json::array()}, {"max_tokens", 100}});
  EXPECT_FALSE(opened.contains("predicted"));
  const json direct =
      MustAnswer(&session, {{"op", "open"}, {"tokens", prompt_}, {"max_tokens", 100}});
  const json asked = MustAnswer(&session, {{"op", "ask"}, {"sequence", 1}, {"tokens", prompt_}});
  EXPECT_EQ(asked["predicted"][0], direct["predicted"]);
}

TEST_F(ServeTest, BadRequestsAreAnsweredWithWhatIsWrong) {
  ExpectError("x", "INVALID_ARGUMENT", "JSON object");
  ExpectError({{"no", "op"}}, "INVALID_ARGUMENT", "op");
  ExpectError({{"op", "dance"}}, "INVALID_ARGUMENT", "dance");
  ExpectError({{"op", "ask"}, {"sequence", 9}}, "NOT_FOUND", "9");
  ExpectError({{"op", "ask"}, {"sequence", "one"}}, "INVALID_ARGUMENT", "sequence");
  ExpectError({{"op", "ask"}, {"sequence", 1}, {"tokens", {1, -2}}}, "INVALID_ARGUMENT",
              "tokens[1] is -2");
  ExpectError({{"op", "ask"}, {"sequence", 1}, {"tokens", "1 2"}}, "INVALID_ARGUMENT", "tokens");
  ExpectError({{"op", "ask"}, {"sequence", 1}, {"tokens", {1, 99999}}}, "INVALID_ARGUMENT",
              "token 61 of the sequence has id 99999");
  ExpectError({{"op", "ask"}, {"sequence", 1}, {"tokens", json::array()}}, "INVALID_ARGUMENT",
              "no tokens");
  ExpectError({{"op", "ask"}, {"sequence", 1}, {"tokens", {1}}, {"temperature", -1}},
              "INVALID_ARGUMENT", "temperature is -1");
  ExpectError({{"op", "ask"}, {"sequence", 1}, {"tokens", {1}}, {"top_p", 1.5}}, "INVALID_ARGUMENT",
              "top_p is 1.5");
  ExpectError({{"op", "ask"}, {"sequence", 1}, {"tokens", {1}}, {"top_p", 0}}, "INVALID_ARGUMENT",
              "top_p is 0");
  ExpectError({{"op", "ask"}, {"sequence", 1}, {"tokens", {1}}, {"gold", {1, 2, 3}}},
              "INVALID_ARGUMENT", "gold has 3");
  ExpectError({{"op", "ask"}, {"sequence", 1}, {"tokens", {1}}, {"new", 41}}, "FAILED_PRECONDITION",
              "100");
  ExpectError({{"op", "open"}, {"tokens", {1}}, {"max_tokens", 1u << 30}}, "FAILED_PRECONDITION",
              std::to_string(1u << 30).c_str());
  ExpectError({{"op", "open"}, {"tokens", {1}}, {"max_tokens", -1}}, "INVALID_ARGUMENT",
              "max_tokens");
}

TEST_F(ServeTest, LinesThatAreNotJsonAreAnsweredToo) {
  WorkerSession session(*model_, *device_, nullptr, options_);
  std::istringstream in("{\"op\":\n\n[1,2]\n\xff\xfe\n{\"op\":\"stats\"}\n");
  std::ostringstream out;
  session.Serve(in, out);
  std::istringstream lines(out.str());
  std::vector<std::string> status;
  for (std::string line; std::getline(lines, line);) {
    status.push_back(json::parse(line)["status"].get<std::string>());
  }
  EXPECT_EQ(status, (std::vector<std::string>{"INVALID_ARGUMENT", "INVALID_ARGUMENT",
                                              "INVALID_ARGUMENT", "OK"}));
}

TEST_F(ServeTest, AVoidedTokenIsAnErrorInTheAnswerAndOtherSequencesGoOn) {
  FakeService service;
  service.failure = absl::UnavailableError("gone");
  WorkerSession session(*model_, *device_, &service, options_);
  for (int i = 0; i < 2; ++i) {
    MustAnswer(&session, {{"op", "open"}, {"tokens", prompt_}, {"max_tokens", 100}});
  }
  service.fail_attend = service.attends + 1;
  const json failed =
      session.Answer({{"op", "ask"}, {"sequence", 1}, {"tokens", {1, 2}}, {"new", 3}});
  EXPECT_EQ(failed["status"], "UNAVAILABLE");
  EXPECT_NE(failed["error"].get<std::string>().find("void"), std::string::npos) << failed;
  EXPECT_FALSE(failed.contains("predicted"));
  MustAnswer(&session, {{"op", "ask"}, {"sequence", 2}, {"tokens", {1, 2}}, {"new", 3}});
}

}  // namespace
}  // namespace quarry

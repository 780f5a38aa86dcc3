// The command line `quarry` against a real daemon: what it prints, for people and as JSON, and how it
// ends. QUARRY_CLI is its path.
#include <sys/wait.h>

#include <cstdio>
#include <fstream>
#include <memory>
#include <string>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "tests/support/daemon_process.h"
#include "tests/support/eventually.h"
#include "tests/support/kv_client.h"

namespace quarry {
namespace {

using nlohmann::json;
using testing::DaemonProcess;
using ::testing::HasSubstr;
using ::testing::Not;

class CliTest : public ::testing::Test {
 protected:
  struct Result {
    int status = -1;
    std::string out;  // standard output and error
  };

  void SetUp() override {
    options_.arguments = {"--arena-bytes", "128MiB"};
    auto daemon = DaemonProcess::Start(options_);
    ASSERT_TRUE(daemon.ok()) << daemon.status();
    daemon_ = *std::move(daemon);
    auto client = testing::ConnectTo(daemon_->socket_path());
    ASSERT_TRUE(client.ok()) << client.status();
    client_ = *std::move(client);
  }

  Result Run(const std::string& arguments) const {
    return RunCommand(std::string(QUARRY_CLI) + " --socket '" + daemon_->socket_path() + "' " +
                      arguments);
  }
  Result RunCommand(std::string command) const {
    command += " 2>&1 </dev/null";
    Result result;
    FILE* pipe = popen(command.c_str(), "r");
    EXPECT_NE(pipe, nullptr);
    char buffer[4096];
    for (size_t n; (n = fread(buffer, 1, sizeof(buffer), pipe)) > 0;) result.out.append(buffer, n);
    result.status = WEXITSTATUS(pclose(pipe));
    return result;
  }
  // Of a command that succeeds and prints one JSON value, with --json before or behind it.
  json Json(const std::string& arguments) const {
    const Result result = Run(arguments + " --json");
    EXPECT_EQ(result.status, 0) << arguments << ": " << result.out;
    const json value = json::parse(result.out, nullptr, false);
    EXPECT_FALSE(value.is_discarded()) << arguments << ": " << result.out;
    return value;
  }

  // A context of kTokens tokens whose whole blocks are published.
  ContextId Fill() {
    auto opened = client_->Open(testing::OpenFor(spec_, data_, 1024));
    EXPECT_TRUE(opened.ok()) << opened.status();
    EXPECT_TRUE(testing::AppendTokens(client_.get(), opened->context, data_,
                                      opened->reused_tokens, kTokens).ok());
    EXPECT_TRUE(client_->Seal(opened->context).ok());
    return opened->context;
  }

  static constexpr uint32_t kTokens = 600, kBlocks = 2;
  testing::DaemonOptions options_;
  ModelSpec spec_ = testing::SmallSpec();
  testing::KvData data_{spec_.shape, kTokens, 5};
  std::unique_ptr<DaemonProcess> daemon_;
  std::unique_ptr<Client> client_;
};

TEST_F(CliTest, StatusTellsWhoAnswers) {
  const json status = Json("status");
  EXPECT_EQ(status["pid"], daemon_->pid());
  EXPECT_EQ(status["tenant"], client_->tenant());
  EXPECT_EQ(status["draining"], false);
  EXPECT_EQ(status["statistics"]["quarry_arena_capacity_bytes"], 128 << 20);
  EXPECT_THAT(Run("status").out, HasSubstr("quarry_arena_capacity_bytes"));
  Fill();
  const json filled = Json("status")["statistics"];
  EXPECT_GE(filled["quarry_arena_committed_bytes"], filled["quarry_arena_used_bytes"]);
  EXPECT_GT(filled["quarry_arena_extents_count"], 0);
  EXPECT_TRUE(filled.contains("quarry_arena_spare_bytes"));
  EXPECT_TRUE(filled.contains("quarry_arena_given_back_bytes_total"));
}

TEST_F(CliTest, OptionsStandBeforeOrBehindTheCommand) {
  const Result before = Run("--json contexts"), behind = Run("contexts --json");
  EXPECT_EQ(before.status, 0);
  EXPECT_EQ(behind.status, 0) << behind.out;
  EXPECT_EQ(before.out, behind.out);
}

TEST_F(CliTest, ContextsAndBlocksAreListed) {
  const ContextId context = Fill();
  const json contexts = Json("contexts");
  ASSERT_EQ(contexts.size(), 1u);
  EXPECT_EQ(contexts[0]["context"], context.value);
  EXPECT_EQ(contexts[0]["tokens"], kTokens);
  EXPECT_EQ(contexts[0]["shared_tokens"], kBlocks * kBlockTokens);
  EXPECT_EQ(contexts[0]["sealed"], true);

  const json blocks = Json("blocks");
  ASSERT_EQ(blocks.size(), kBlocks);
  const json& root = blocks[0]["parent"] == std::string(64, '0') ? blocks[0] : blocks[1];
  const json& leaf = &root == &blocks[0] ? blocks[1] : blocks[0];
  EXPECT_EQ(leaf["parent"], root["id"]);
  EXPECT_EQ(leaf["namespace"], root["namespace"]);
  EXPECT_NE(leaf["namespace"], std::string(64, '0'));
  EXPECT_EQ(root["bytes"], spec_.shape.block_bytes());
  EXPECT_EQ(Json("blocks --limit 1").size(), 1u);
  EXPECT_THAT(Run("blocks").out, HasSubstr(root["id"].get<std::string>()));
}

TEST_F(CliTest, PinsAreMadeShownAndEnded) {
  const ContextId context = Fill();
  const std::string pin = "pin system-prompt --context " + std::to_string(context.value);
  EXPECT_EQ(Json(pin)["bytes"], kBlocks * spec_.shape.block_bytes());
  for (const json& block : Json("blocks")) EXPECT_EQ(block["pins"], json({"system-prompt"}));
  EXPECT_EQ(Json("unpin system-prompt")["unpinned"], "system-prompt");
  const Result again = Run("unpin system-prompt");
  EXPECT_EQ(again.status, 1);
  EXPECT_THAT(again.out, HasSubstr("NOT_FOUND"));
  EXPECT_EQ(Run("pin nothing").status, 1);
}

TEST_F(CliTest, ABlockIsPinnedByItsId) {
  Fill();
  const json blocks = Json("blocks");
  const bool first_is_leaf = blocks[0]["children"] == 0;
  const std::string leaf = blocks[first_is_leaf ? 0 : 1]["id"].get<std::string>();
  EXPECT_EQ(Json("pin leaf --block " + leaf)["bytes"], spec_.shape.block_bytes());
  EXPECT_THAT(Run("pin leaf --block " + leaf.substr(1)).out, HasSubstr("64 hex digits"));
}

TEST_F(CliTest, AFlushWithoutADiskSaysThatThereIsNone) {
  Fill();
  for (const json& block : Json("blocks")) {
    EXPECT_EQ(block["in_ram"], true);
    EXPECT_EQ(block["on_disk"], false);
  }
  const Result flush = Run("flush");
  EXPECT_EQ(flush.status, 1);
  EXPECT_THAT(flush.out, HasSubstr("there is no disk"));
}

TEST_F(CliTest, PurgeTakesExactlyOneSelector) {
  Fill();
  const json blocks = Json("blocks");
  const std::string name_space = blocks[0]["namespace"].get<std::string>();
  for (const std::string wrong : {"purge", "purge --all --namespace ", "purge --all --block "}) {
    const bool complete = wrong == "purge";
    const Result result = Run(complete ? wrong : wrong + name_space);
    EXPECT_EQ(result.status, 1) << wrong;
    EXPECT_THAT(result.out, HasSubstr("exactly one of --all, --namespace and --block"));
  }
  EXPECT_EQ(Json("blocks").size(), kBlocks);  // untouched
  EXPECT_EQ(Json("purge --namespace " + std::string(64, 'f'))["blocks"], 0);
  EXPECT_EQ(Json("purge --namespace " + name_space)["blocks"], kBlocks);
  EXPECT_EQ(Json("blocks").size(), 0u);
}

TEST_F(CliTest, VerifyChecksEachBlockOnceAndCountsThoseOutOfReach) {
  const ContextId first = Fill(), second = Fill();  // they share their blocks
  const json checked = Json("verify");
  EXPECT_EQ(checked["contexts"], 2);
  EXPECT_EQ(checked["blocks"], kBlocks);
  EXPECT_EQ(checked["bytes"], kBlocks * spec_.shape.block_bytes());
  EXPECT_EQ(checked["failed"], 0);
  EXPECT_EQ(checked["unreached"], 0);
  ASSERT_TRUE(client_->Close(first).ok() && client_->Close(second).ok());
  const json closed = Json("verify");
  EXPECT_EQ(closed["blocks"], 0);
  EXPECT_EQ(closed["unreached"], kBlocks);
  EXPECT_THAT(Run("verify").out, HasSubstr("2 published blocks were not checked"));
}

// Of a daemon that audits every answer.
class AuditCliTest : public CliTest {
 protected:
  void SetUp() override {
    options_.config = "[audit]\nfraction = 1\n";
    CliTest::SetUp();
  }
  // Asks under a budget in both layers, and waits until both KV heads of each are audited.
  void AuditSome(uint32_t positions) {
    const ContextId context = Fill();
    for (uint32_t i = 0; i < positions; ++i) {
      for (uint32_t layer = 0; layer < spec_.shape.layers; ++layer) {
        testing::OneRow row(spec_.shape, context, layer, {0, kTokens}, i);
        row.row.budget = {Budget::Kind::kFixedK, 60};
        ASSERT_TRUE(row.Run(client_.get()).ok());
      }
    }
    const double answers = positions * spec_.shape.layers * spec_.shape.kv_heads;
    const auto done = [&] {
      const auto values = client_->Statistics();
      EXPECT_TRUE(values.ok()) << values.status();
      return values.ok() && values->at("quarry_audit_done_total") >= answers;
    };
    ASSERT_TRUE(testing::Eventually(done));
  }
};

TEST_F(AuditCliTest, AuditShowsEachHeadAndTheModel) {
  EXPECT_THAT(Run("audit").out, HasSubstr("no audits"));
  AuditSome(5);
  const json audit = Json("audit");
  const size_t heads = size_t{spec_.shape.layers} * spec_.shape.kv_heads;
  ASSERT_EQ(audit["heads"].size(), heads);
  for (const json& head : audit["heads"]) {
    EXPECT_EQ(head["model"], spec_.name);
    EXPECT_EQ(head["audits"], 5);
    EXPECT_EQ(head["recall"], 1);
    EXPECT_GT(head["mass"], 0.1);
    EXPECT_LT(head["mass"], 0.9);
    EXPECT_GT(head["error"], 0.05);
    EXPECT_EQ(head["within_twice"], 1);
  }
  EXPECT_EQ(audit["heads"].back()["layer"], spec_.shape.layers - 1);
  EXPECT_EQ(audit["heads"].back()["kv_head"], spec_.shape.kv_heads - 1);
  ASSERT_EQ(audit["models"].size(), 1u);
  EXPECT_EQ(audit["models"][0]["audits"], 5 * heads);
  const Result table = Run("audit");
  EXPECT_EQ(table.status, 0);
  EXPECT_THAT(table.out, HasSubstr(spec_.name));
  EXPECT_THAT(table.out, HasSubstr(" 100% "));
  EXPECT_THAT(table.out, HasSubstr("    all     all"));
}

TEST_F(AuditCliTest, AuditDrawsAPicture) {
  AuditSome(2);
  const std::string path = daemon_->directory() + "/audit.png";
  const Result drawn = Run("audit --image '" + path + "'");
  EXPECT_EQ(drawn.status, 0) << drawn.out;
  std::ifstream file(path, std::ios::binary);
  std::string head(8, '\0');
  file.read(head.data(), 8);
  EXPECT_EQ(head, "\x89PNG\r\n\x1a\n");
  const Result refused = Run("audit --image /no/such/folder/audit.png");
  EXPECT_EQ(refused.status, 1);
  EXPECT_THAT(refused.out,
              HasSubstr("cannot write the picture /no/such/folder/audit.png: No such file"));
}

TEST_F(CliTest, EveryFigureOfTopIsOneTheDaemonHas) {
  Fill();
  const Result frame = Run("top --once");
  EXPECT_EQ(frame.status, 0) << frame.out;
  EXPECT_THAT(frame.out, HasSubstr("contexts 1"));
  EXPECT_THAT(frame.out, HasSubstr(" 128.0 "));
  EXPECT_THAT(frame.out, Not(HasSubstr("nan")));
  EXPECT_EQ(Json("top --once")["quarry_engine_contexts_count"], 1);
}

TEST_F(CliTest, ErrorsNameTheSocketAndEndWithOne) {
  daemon_->Kill();
  const Result result = Run("status");
  EXPECT_EQ(result.status, 1);
  EXPECT_THAT(result.out, HasSubstr(daemon_->socket_path()));
}

TEST_F(CliTest, UnknownWordsAreNamed) {
  for (const std::string word : {"frob", "--frob"}) {
    const Result result = Run(word);
    EXPECT_NE(result.status, 0);
    EXPECT_THAT(result.out, HasSubstr(word + " is neither a command nor an option"));
    EXPECT_THAT(result.out, HasSubstr("status, contexts"));
  }
  EXPECT_THAT(Run("").out, HasSubstr("subcommand is required"));
  EXPECT_THAT(Run("unpin --frob").out, HasSubstr("name is required"));
  const Result behind = Run("status frob");
  EXPECT_NE(behind.status, 0);
  EXPECT_THAT(behind.out, HasSubstr("frob"));
}

TEST_F(CliTest, TellsItsVersionAsTheDaemonDoes) {
  const Result result = Run("--version");
  EXPECT_EQ(result.status, 0);
  EXPECT_EQ(result.out, RunCommand(testing::DefaultDaemonBinary() + " --version").out);
  EXPECT_THAT(result.out, HasSubstr("."));
}

TEST_F(CliTest, TheEnvironmentNamesTheSocketUnlessAnOptionDoes) {
  const std::string program = QUARRY_CLI;
  const Result named =
      RunCommand("QUARRY_SOCKET='" + daemon_->socket_path() + "' " + program + " status");
  EXPECT_EQ(named.status, 0) << named.out;
  const Result overridden = RunCommand("QUARRY_SOCKET='" + daemon_->socket_path() + "' " + program +
                                       " --socket /nonexistent/sock status");
  EXPECT_EQ(overridden.status, 1);
  EXPECT_THAT(overridden.out, HasSubstr("/nonexistent/sock"));
  EXPECT_THAT(overridden.out, HasSubstr("--socket or QUARRY_SOCKET"));
}

TEST_F(CliTest, DrainEndsTheDaemon) {
  EXPECT_EQ(Json("drain")["draining"], true);
  EXPECT_EQ(daemon_->Stop(), 0);
}

}  // namespace
}  // namespace quarry

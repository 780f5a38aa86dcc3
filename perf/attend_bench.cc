// Round trip of an attend: what the protocol costs beside the scan itself.
//
// Workload: one Llama-3-8B-shaped layer (32 query heads, 8 KV heads, head_dim 128, bf16), a shared
// prefix of 0, 1K, 16K or 128K tokens held by the daemon, batches of 1, 8 and 32 rows that all
// attend the whole prefix with an unlimited budget, bf16 queries. Shared memory against unary gRPC
// over a Unix socket, in turns; a turn is one token of an 8-layer model, and its paths are:
//   wake   the first round trip after arming, when the poller may have to be woken
//   nop    one that asks for nothing while armed: the protocol's own cost
//   shm    the attend; with an empty prefix neither q nor o is moved
//   copy   two threads of this program that hand over as many bytes of q and o by memcpy and a
//          flag, and attend nothing: what any protocol over these two cores has to pay
//   grpc   the attend over gRPC
// Floor of one batch: copy, and 2 * tokens * 8 * 128 * 2 bytes over the machine's read bandwidth.
//
// Prints microseconds at the median with the 10th and 90th percentile; --json prints JSON lines.
#include <grpcpp/grpcpp.h>

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/client.h"
#include "perf/bench_daemon.h"
#include "perf/statistics.h"
#include "proto/check.h"
#include "proto/convert.h"
#include "proto/half.h"
#include "quarry/v1/kv_store.grpc.pb.h"
#include "quarry/v1/retrieval.grpc.pb.h"
#include "tests/support/daemon_process.h"

namespace quarry {
namespace {

using perf::Microseconds;
using perf::Quantiles;
using perf::QuantilesOf;

constexpr KvShape kShape{.layers = 1, .heads = 32, .kv_heads = 8, .head_dim = 128,
                         .dtype = DType::kBf16};

constexpr int kLayers = 8;  // attends of one token

struct Settings {
  std::vector<uint32_t> tokens = {0, 1024, 16384, 131072};
  std::vector<uint32_t> batches = {1, 8, 32};
  double seconds = 1.0;  // per configuration
  uint32_t seed = 1;
  std::string config;  // of the daemon; empty: its defaults
  bool json = false;
};

std::vector<uint16_t> RandomBf16(size_t n, std::mt19937* random) {
  std::normal_distribution<float> normal;
  std::vector<uint16_t> out(n);
  for (uint16_t& x : out) x = FloatToBf16(normal(*random));
  return out;
}

ModelSpec BenchSpec() {
  ModelSpec spec;
  spec.name = "attend-bench";
  spec.shape = kShape;
  spec.weights.bytes.fill(0x42);
  return spec;
}

// A context of `tokens` random tokens; 0 tokens: an empty context with room for some.
ContextId MakeContext(Client* client, uint32_t tokens, std::mt19937* random) {
  OpenRequest open;
  open.spec = BenchSpec();
  open.max_tokens = std::max(tokens, 1u);
  open.accepts = {NumericRecipe{}};
  const ContextId context = perf::ValueOrDie(client->Open(open), "open").context;
  constexpr uint32_t kPiece = 1024;
  std::vector<uint32_t> ids(tokens);
  for (uint32_t& id : ids) id = static_cast<uint32_t>((*random)());
  for (uint32_t lo = 0; lo < tokens; lo += kPiece) {
    uint32_t hi = std::min(tokens, lo + kPiece);
    size_t elements = size_t{hi - lo} * kShape.kv_heads * kShape.head_dim;
    std::vector<uint16_t> k = RandomBf16(elements, random), v = RandomBf16(elements, random);
    AppendRequest append;
    append.context = context;
    append.kv_heads = kShape.kv_heads;
    append.range = {lo, hi};
    append.k = k.data();
    append.v = v.data();
    append.new_token_ids = std::span(ids).subspan(lo, hi - lo);
    perf::Die(client->Append(append), "append");
  }
  return context;
}

// Rows over one context, with room for their answers.
struct Batch {
  std::vector<uint16_t> q;  // bf16
  std::vector<float> o, lse;
  std::vector<AttendRow> rows;
  std::vector<AttendAnswer> answers;

  Batch(ContextId context, uint32_t tokens, uint32_t size, std::mt19937* random) {
    size_t per_row = size_t{kShape.heads} * kShape.head_dim;
    q = RandomBf16(size * per_row, random);
    o.resize(q.size());
    lse.resize(size_t{size} * kShape.heads);
    rows.resize(size);
    answers.resize(size);
    for (uint32_t r = 0; r < size; ++r) {
      rows[r].context = context;
      rows[r].range = {0, tokens};
      rows[r].heads = kShape.heads;
      rows[r].q_dtype = DType::kBf16;
      rows[r].q = q.data() + r * per_row;
      answers[r].o = std::span(o).subspan(r * per_row, per_row);
      answers[r].lse = std::span(lse).subspan(size_t{r} * kShape.heads, kShape.heads);
    }
  }
};

// A peer thread that takes a batch's queries and gives outputs, by memcpy alone.
class HandOver {
 public:
  explicit HandOver(const Batch& batch)
      : q_bytes_(batch.q.size() * sizeof(batch.q[0])), o_bytes_(batch.o.size() * sizeof(float)),
        shared_(q_bytes_ + o_bytes_), thread_([this] { Serve(); }) {}
  ~HandOver() {
    asked_.store(kStop, std::memory_order_release);
    thread_.join();
  }

  void Run(Batch* batch) {
    std::memcpy(shared_.data(), batch->q.data(), q_bytes_);
    const uint32_t turn = answered_.load(std::memory_order_relaxed) + 1;
    asked_.store(turn, std::memory_order_release);
    while (answered_.load(std::memory_order_acquire) != turn) sched_yield();
    std::memcpy(batch->o.data(), shared_.data() + q_bytes_, o_bytes_);
  }

 private:
  static constexpr uint32_t kStop = ~0u;
  void Serve() {
    std::vector<std::byte> q(q_bytes_), o(o_bytes_);
    for (uint32_t turn = 1;; ++turn) {
      uint32_t asked;
      while ((asked = asked_.load(std::memory_order_acquire)) != turn) {
        if (asked == kStop) return;
        sched_yield();
      }
      std::memcpy(q.data(), shared_.data(), q_bytes_);
      std::memcpy(shared_.data() + q_bytes_, o.data(), o_bytes_);
      answered_.store(turn, std::memory_order_release);
    }
  }

  const size_t q_bytes_, o_bytes_;
  std::vector<std::byte> shared_;
  alignas(64) std::atomic<uint32_t> asked_{0};
  alignas(64) std::atomic<uint32_t> answered_{0};
  std::thread thread_;
};

// The gRPC side: a session of the same tenant; contexts are the tenant's.
class GrpcPeer {
 public:
  explicit GrpcPeer(const std::string& socket) {
    grpc::ChannelArguments arguments;
    arguments.SetMaxReceiveMessageSize(-1);
    std::shared_ptr<grpc::Channel> channel = grpc::CreateCustomChannel(
        absl::StrCat("unix:", socket), grpc::InsecureChannelCredentials(), arguments);
    store_ = wire::KvStore::NewStub(channel);
    retrieval_ = wire::Retrieval::NewStub(channel);
    session_ = store_->Session(&session_context_, wire::SessionRequest());
    QUARRY_CHECK(session_->Read(&reply_));
  }
  ~GrpcPeer() {
    session_context_.TryCancel();
    session_->Finish();
  }

  void Attend(Batch* batch) {
    grpc::ClientContext context;
    context.AddMetadata("quarry-session", std::to_string(reply_.session()));
    wire::AttendRequest request;
    for (const AttendRow& row : batch->rows) {
      *request.add_rows() = ToProto(row, kShape.head_dim, kShape.group(), kShape.dtype);
    }
    wire::AttendReply reply;
    grpc::Status status = retrieval_->Attend(&context, request, &reply);
    if (!status.ok() || reply.answers_size() != static_cast<int>(batch->rows.size())) {
      std::fprintf(stderr, "gRPC attend: %s\n", status.error_message().c_str());
      std::exit(1);
    }
    for (int i = 0; i < reply.answers_size(); ++i) {
      QUARRY_CHECK(FromProto(reply.answers(i), &batch->answers[i]).ok());
    }
  }

 private:
  std::unique_ptr<wire::KvStore::Stub> store_;
  std::unique_ptr<wire::Retrieval::Stub> retrieval_;
  grpc::ClientContext session_context_;
  std::unique_ptr<grpc::ClientReader<wire::SessionReply>> session_;
  wire::SessionReply reply_;
};

void Print(const Settings& settings, const char* what, uint32_t tokens, uint32_t batch,
           const Quantiles& us, size_t rounds, double bytes) {
  if (settings.json) {
    nlohmann::json line = {{"bench", "attend"}, {"path", what}, {"tokens", tokens},
                           {"batch", batch}, {"us_p10", us.p10}, {"us_p50", us.p50},
                           {"us_p90", us.p90}, {"rounds", rounds},
                           {"kv_gb_per_s", bytes / us.p50 / 1e3}};
    std::printf("%s\n", line.dump().c_str());
  } else {
    std::printf("%-6s %8u tokens  batch %2u  %10.1f us  [%.1f, %.1f]  %6.2f GB/s of KV  (%zu)\n",
                what, tokens, batch, us.p50, us.p10, us.p90, bytes / us.p50 / 1e3, rounds);
  }
  std::fflush(stdout);
}

void RunOne(const Settings& settings, Client* client, GrpcPeer* grpc_peer, ContextId context,
            uint32_t tokens, uint32_t size, std::mt19937* random) {
  Batch batch(context, tokens, size, random);
  perf::Attend(client, batch.rows, batch.answers);  // warm
  grpc_peer->Attend(&batch);
  std::vector<double> shm, copy, grpc_us, nop, wake;
  absl::Time end = absl::Now() + absl::Seconds(settings.seconds);
  while (grpc_us.size() < 20 || (absl::Now() < end && grpc_us.size() < 20000)) {
    wake.push_back(Microseconds([&] {
      client->Arm();
      QUARRY_CHECK(client->Nop().ok());
    }));
    for (int layer = 0; layer < kLayers; ++layer) {
      nop.push_back(Microseconds([&] { QUARRY_CHECK(client->Nop().ok()); }));
      shm.push_back(Microseconds([&] { perf::Attend(client, batch.rows, batch.answers); }));
    }
    client->Disarm();
    grpc_us.push_back(Microseconds([&] { grpc_peer->Attend(&batch); }));
  }
  {
    HandOver peer(batch);
    for (size_t i = 0; i < shm.size(); ++i) copy.push_back(Microseconds([&] { peer.Run(&batch); }));
  }
  double bytes = 2.0 * tokens * kShape.kv_heads * static_cast<double>(kShape.vector_bytes());
  Print(settings, "wake", tokens, size, QuantilesOf(wake), wake.size(), 0);
  Print(settings, "nop", tokens, size, QuantilesOf(nop), nop.size(), 0);
  Print(settings, "shm", tokens, size, QuantilesOf(shm), shm.size(), bytes);
  Print(settings, "copy", tokens, size, QuantilesOf(copy), copy.size(), 0);
  Print(settings, "grpc", tokens, size, QuantilesOf(grpc_us), grpc_us.size(), bytes);
}

// Share of one core that an idle daemon with one connected client uses.
void PrintIdle(const Settings& settings, const testing::DaemonProcess& daemon) {
  absl::SleepFor(absl::Milliseconds(500));
  absl::Duration before = daemon.CpuTime();
  constexpr absl::Duration kWindow = absl::Seconds(5);
  absl::SleepFor(kWindow);
  double share = absl::FDivDuration(daemon.CpuTime() - before, kWindow);
  if (settings.json) {
    std::printf("%s\n", nlohmann::json({{"bench", "idle"}, {"core_share", share}}).dump().c_str());
  } else {
    std::printf("idle daemon: %.2f%% of a core\n", 100 * share);
  }
}

int Run(const Settings& settings) {
  testing::DaemonOptions options;
  options.arguments = {"--arena-bytes", "2GiB"};
  if (!settings.config.empty()) {
    options.arguments.insert(options.arguments.begin(), {"--config", settings.config});
  }
  const testing::DaemonProcess& daemon = perf::StartDaemon(options);
  const auto client = perf::ConnectTo(daemon, {.name = "attend_bench", .slot_bytes = 8 << 20});
  GrpcPeer grpc_peer(daemon.grpc_path());
  std::mt19937 random(settings.seed);
  std::fprintf(stderr, "seed %u\n", settings.seed);
  PrintIdle(settings, daemon);
  for (uint32_t tokens : settings.tokens) {
    ContextId context = MakeContext(client.get(), tokens, &random);
    for (uint32_t size : settings.batches) {
      RunOne(settings, client.get(), &grpc_peer, context, tokens, size, &random);
    }
    QUARRY_CHECK(client->Close(context).ok());
  }
  return 0;
}

}  // namespace
}  // namespace quarry

int main(int argc, char** argv) {
  quarry::Settings settings;
  CLI::App app("Attend round trips: shared memory against gRPC over a Unix socket");
  app.add_option("--tokens", settings.tokens, "prefix lengths");
  app.add_option("--batches", settings.batches, "rows per request");
  app.add_option("--seconds", settings.seconds, "per configuration");
  app.add_option("--config", settings.config, "the daemon's configuration file");
  app.add_option("--seed", settings.seed, "of the random K, V and queries");
  app.add_flag("--json", settings.json, "JSON lines");
  CLI11_PARSE(app, argc, argv);
  return quarry::Run(settings);
}

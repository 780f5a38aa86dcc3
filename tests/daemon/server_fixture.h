// A shared-memory server over a fake engine, in this process, on a socket of its own.
#pragma once

#include <stdlib.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>

#include "daemon/metrics.h"
#include "daemon/shm_server.h"
#include "gtest/gtest.h"
#include "tests/daemon/fake_engine.h"
#include "tests/daemon/raw_shm_client.h"
#include "tests/support/eventually.h"

namespace quarry::testing {

class TempDirectory {
 public:
  TempDirectory() {
    char name[] = "/tmp/quarry-test-XXXXXX";
    path_ = mkdtemp(name);
  }
  ~TempDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

class ServerFixture : public ::testing::Test {
 protected:
  static ShmOptions SmallOptions() {
    ShmOptions options;
    options.max_channels = 16;
    options.hello_timeout_ms = 300;
    options.armed_idle_ms = 30;
    return options;
  }

  void StartServer(ShmOptions options = SmallOptions(), VersionRange versions = {},
                   PeerTenantOptions tenants = {}) {
    options.socket = socket_path();
    tenants_ = std::make_unique<PeerTenants>(tenants, geteuid());
    auto server = ShmServer::Start(options, parts_, *tenants_, versions);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
  }
  void TearDown() override {
    engine_.HoldAttends(false);
    engine_.HoldAppends(false);
    engine_.ReleaseAttends();
    server_.reset();
  }

  std::string socket_path() const { return directory_.path() + "/shm.sock"; }
  std::unique_ptr<RawShmClient> Connect(const shm::HelloRequest& hello = RawShmClient::Hello()) {
    auto client = RawShmClient::Connect(socket_path(), hello);
    EXPECT_TRUE(client.ok()) << client.status();
    return client.ok() ? *std::move(client) : nullptr;
  }
  // Channels of clients that have gone are taken back soon, not at once.
  std::unique_ptr<RawShmClient> ConnectOnceThereIsRoom() {
    const auto deadline = absl::Now() + kPatience;
    for (;;) {
      auto client = RawShmClient::Connect(socket_path(), RawShmClient::Hello());
      if (client.ok()) return *std::move(client);
      if (!absl::IsResourceExhausted(client.status()) || absl::Now() > deadline) {
        ADD_FAILURE() << client.status();
        return nullptr;
      }
      std::this_thread::yield();
    }
  }
  TransportCounters& counters() { return metrics_.counters(); }
  // The tenant of this process's clients.
  std::string tenant() const { return "uid-" + std::to_string(geteuid()); }

  // A context of the client's session, without a message.
  uint64_t OpenContext(const RawShmClient& client, uint32_t max_tokens = 100) {
    OpenRequest request;
    request.max_tokens = max_tokens;
    return engine_.Open({client.hello_reply().session}, request)->context.value;
  }

  TempDirectory directory_;
  FakeEngine engine_;
  Metrics metrics_{engine_, [] { return 1.0; }};
  std::atomic<bool> draining_{false};
  std::atomic<int> drain_requests_{0};
  ServiceParts parts_{engine_,
                      metrics_,
                      "test",
                      "scalar",
                      [] { return 1.0; },
                      [this] { return draining_.load(); },
                      [this] { ++drain_requests_; }};
  std::unique_ptr<PeerTenants> tenants_;
  std::unique_ptr<ShmServer> server_;
};

// Writes an attend of `rows` rows into a slot: q of row r is r + i / 16. Returns request bytes.
inline uint64_t WriteAttend(const RawShmClient& client, uint32_t slot, uint64_t context,
                            uint32_t rows, uint32_t layer = 0) {
  const KvShape shape = FakeShape();
  const uint64_t floats = uint64_t{shape.heads} * shape.head_dim;
  const shm::AttendHeader header{rows, 0};
  std::memcpy(client.payload(slot), &header, sizeof(header));
  uint64_t at = shm::kSlotPayload + sizeof(header) + rows * sizeof(shm::AttendRowPod);
  for (uint32_t r = 0; r < rows; ++r) {
    shm::AttendRowPod pod{};
    pod.context = context;
    pod.layer = layer;
    pod.range_hi = 10;
    pod.heads = shape.heads;
    pod.q_dtype = static_cast<uint8_t>(DType::kFp32);
    pod.q_offset = at;
    std::vector<float> q(floats);
    for (size_t i = 0; i < q.size(); ++i) q[i] = static_cast<float>(r) + static_cast<float>(i) / 16;
    std::memcpy(client.slot(slot) + at, q.data(), floats * 4);
    at += floats * 4;
    pod.o_offset = at;
    at += floats * 4;
    pod.lse_offset = at;
    at += shape.heads * 4;
    std::memcpy(client.payload(slot) + sizeof(header) + r * sizeof(pod), &pod, sizeof(pod));
  }
  return at - shm::kSlotPayload;
}

inline shm::AttendRowPod RowOf(const RawShmClient& client, uint32_t slot, uint32_t row) {
  shm::AttendRowPod pod;
  std::memcpy(&pod, client.payload(slot) + sizeof(shm::AttendHeader) + row * sizeof(pod),
              sizeof(pod));
  return pod;
}
inline void SetRow(const RawShmClient& client, uint32_t slot, uint32_t row,
                   const shm::AttendRowPod& pod) {
  std::memcpy(client.payload(slot) + sizeof(shm::AttendHeader) + row * sizeof(pod), &pod,
              sizeof(pod));
}
inline shm::AttendAnswerPod AnswerOf(const RawShmClient& client, uint32_t slot, uint32_t row) {
  shm::AttendAnswerPod pod;
  std::memcpy(&pod, client.payload(slot) + row * sizeof(pod), sizeof(pod));
  return pod;
}

}  // namespace quarry::testing

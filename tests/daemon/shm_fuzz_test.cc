// Clients that write at random into their rings and slots, while others are served.
#include <sys/socket.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

#include "tests/daemon/server_fixture.h"
#include "tests/support/seed.h"

namespace quarry::testing {
namespace {

using shm::Opcode;

class ShmFuzzTest : public ServerFixture {
 protected:
  using Random = std::mt19937_64;
  static uint64_t Pick(Random& random, uint64_t n) { return random() % n; }

  // Values near what is valid, and near the edges of their types.
  static uint64_t Odd(Random& random, uint64_t near) {
    switch (Pick(random, 6)) {
      case 0:
        return near;
      case 1:
        return near + Pick(random, 8) - 4;
      case 2:
        return ~0ull - Pick(random, 300);
      case 3:
        return Pick(random, 1024);
      case 4:
        return 1ull << Pick(random, 64);
      default:
        return random();
    }
  }

  // A valid message of a random kind, then some of its bytes changed.
  uint64_t WriteMutated(const RawShmClient& client, uint32_t slot, Opcode opcode, uint64_t context,
                        Random& random) {
    uint64_t bytes = 64;
    switch (opcode) {
      case Opcode::kAttend:
        bytes = WriteAttend(client, slot, context, 1 + static_cast<uint32_t>(Pick(random, 4)));
        break;
      case Opcode::kAppend: {
        shm::AppendHeader header{};
        header.context = context;
        header.kv_heads = 2;
        header.token_hi = 1 + static_cast<uint32_t>(Pick(random, 4));
        header.k_offset = 256;
        header.v_offset = 4096;
        std::memcpy(client.payload(slot), &header, sizeof(header));
        bytes = 8192;
        break;
      }
      case Opcode::kPut: {
        shm::PutHeader header{};
        header.namespace_bytes = 2;
        header.key_bytes = 2;
        header.data_offset = 256;
        header.data_bytes = 100;
        std::memcpy(client.payload(slot), &header, sizeof(header));
        bytes = 512;
        break;
      }
      case Opcode::kCall: {
        const shm::CallHeader header{1 + static_cast<uint32_t>(Pick(random, 18)), 0};
        std::memcpy(client.payload(slot), &header, sizeof(header));
        bytes = sizeof(header) + Pick(random, 64);
        break;
      }
      default:
        break;
    }
    const uint64_t changes = Pick(random, 4);
    for (uint64_t i = 0; i < changes; ++i) {
      const uint64_t at = Pick(random, 24) * 4;
      const uint64_t value = Odd(random, bytes);
      std::memcpy(client.payload(slot) + at, &value, random() % 2 == 0 ? 4 : 8);
    }
    return bytes;
  }

  // Returns when the daemon has closed the client, after `steps` submissions, or once it waits in
  // vain after writing over a sequence of its own ring: that can make an entry of the round before
  // valid, which the daemon serves in place of the next one. Everything else is answered or closed.
  void RunWildClient(uint64_t seed, int steps) {
    Random random(seed);
    auto connected = RawShmClient::Connect(socket_path(), RawShmClient::Hello(4, 65536));
    if (!connected.ok()) return;  // the limit of channels, reached for a moment
    RawShmClient& client = **connected;
    const uint64_t context = OpenContext(client);
    bool ring_spoiled = false;
    for (int step = 0; step < steps; ++step) {
      const uint32_t slot = static_cast<uint32_t>(Pick(random, 4));
      const auto opcode = static_cast<Opcode>(Pick(random, 9));
      const uint64_t bytes = WriteMutated(client, slot, opcode, context, random);
      RawShmClient::Entry entry{slot, opcode, bytes, client.NextGeneration(slot)};
      const uint64_t kind = Pick(random, 200);
      if (kind == 0) entry.slot = static_cast<uint32_t>(Odd(random, 4));
      if (kind == 1) entry.generation = static_cast<uint32_t>(Odd(random, 1));
      if (kind == 2) {
        client.ring()[Pick(random, 4)].sequence.store(Odd(random, client.cursor()));
        ring_spoiled = true;
      }
      if (kind < 20) entry.request_bytes = Odd(random, bytes);
      if (kind == 21) entry.flags = 1;
      client.Submit(entry);
      // Change the message while it is being served.
      for (int i = 0; i < 8; ++i) {
        const uint64_t value = Odd(random, bytes);
        std::memcpy(client.payload(slot) + Pick(random, 64) * 4, &value, 4);
      }
      if (kind == 22) {
        const uint64_t garbage = random();
        (void)send(client.socket(), &garbage, 1 + Pick(random, 8), MSG_NOSIGNAL | MSG_DONTWAIT);
      }
      if (kind >= 30) {
        // Mostly wait, so that the next submission is legal; a closed channel ends the run.
        const absl::Time end = absl::Now() + absl::Seconds(ring_spoiled ? 0.1 : 30);
        while (!client.Await(slot, entry.generation, absl::Milliseconds(20))) {
          if (client.AwaitHangUp(absl::ZeroDuration())) return;
          if (absl::Now() < end) continue;
          EXPECT_TRUE(ring_spoiled) << "seed " << seed << ", step " << step << ": slot " << slot
                                    << " is neither answered nor closed";
          return;
        }
      }
    }
  }
};

TEST_F(ShmFuzzTest, WildClientsCrashNothingAndOthersAreServed) {
  ShmOptions options = SmallOptions();
  options.armed_idle_ms = 5;
  StartServer(options);
  auto calm = Connect(RawShmClient::Hello(4, 65536));
  const uint64_t context = OpenContext(*calm);
  const uint64_t seed = Seed();
  const char* text = std::getenv("QUARRY_FUZZ_RUNS");
  const int runs = text != nullptr ? std::atoi(text) : 150;
  std::atomic<int> next{0};
  std::vector<std::thread> wild;
  for (int t = 0; t < 2; ++t) {
    wild.emplace_back([&] {
      for (int run; (run = next++) < runs;) RunWildClient(seed + static_cast<uint64_t>(run), 200);
    });
  }
  uint64_t served = 0;
  while (next < runs) {
    const uint64_t bytes = WriteAttend(*calm, 0, context, 2, /*layer=*/1);
    const shm::AttendRowPod row = RowOf(*calm, 0, 1);
    ASSERT_EQ(calm->Run(0, Opcode::kAttend, bytes), absl::StatusCode::kOk);
    ASSERT_EQ(AnswerOf(*calm, 0, 1).status, 0u);
    ASSERT_EQ(reinterpret_cast<const float*>(calm->slot(0) + row.o_offset)[5], 2.0f + 5.0f / 16);
    ++served;
  }
  for (auto& thread : wild) thread.join();
  std::printf("%d wild clients, %llu calm attends, %llu channels closed as malformed\n", runs,
              static_cast<unsigned long long>(served),
              static_cast<unsigned long long>(counters().shm_channels_malformed.load()));
  EXPECT_GT(counters().shm_channels_malformed.load(), 0u);
  EXPECT_GT(served, 0u);
  // Everyone but the calm client has gone.
  EXPECT_TRUE(Eventually([&] { return engine_.sessions().size() == 1; }));
}

TEST_F(ShmFuzzTest, RandomHandshakesCrashNothing) {
  StartServer();
  Random random(Seed());
  for (int i = 0; i < 500; ++i) {
    auto socket = RawShmClient::Dial(socket_path());
    ASSERT_TRUE(socket.ok()) << socket.status();
    shm::HelloRequest hello = RawShmClient::Hello();
    auto* bytes = reinterpret_cast<unsigned char*>(&hello);
    for (uint64_t c = Pick(random, 6); c > 0; --c) {
      bytes[Pick(random, sizeof(hello))] = static_cast<unsigned char>(random());
    }
    const auto reply = RawShmClient::SayHello(
        socket->get(), std::as_bytes(std::span<const shm::HelloRequest>(&hello, 1))
                           .first(random() % 8 == 0 ? Pick(random, sizeof(hello)) : sizeof(hello)));
    if (reply) {
      EXPECT_EQ(reply->magic, shm::kMagic);
    }
  }
  const std::unique_ptr<RawShmClient> client = ConnectOnceThereIsRoom();
  ASSERT_NE(client, nullptr);
  EXPECT_EQ(client->Run(0, Opcode::kNop, 0), absl::StatusCode::kOk);
}

}  // namespace
}  // namespace quarry::testing

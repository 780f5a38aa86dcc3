// A daemon without a store: speaks the handshake and the ring as scripted by a test, in this
// process.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "proto/shm_layout.h"

namespace quarry::testing {

// One client per server. Answers requests on its own thread; the script's callbacks run there.
class FakeServer {
 public:
  struct Request {
    shm::Opcode opcode;
    uint32_t slot, generation;
    std::string payload;    // a copy
    std::byte* slot_start;  // live
  };
  struct Answer {
    uint32_t status = 0;
    std::string payload;
    bool given = true;   // false: never answered, or later by AnswerLater
    bool hang_up = false;  // close the socket instead
  };
  struct Script {
    uint16_t min_version = shm::kMinVersion, max_version = shm::kMaxVersion;
    uint32_t magic = shm::kMagic;
    bool choose_wrong_version = false;  // say OK with a version the client did not offer
    size_t reply_bytes = sizeof(shm::HelloReply);
    uint32_t status = 0;  // refuse
    std::string message;
    bool no_reply = false;  // read the hello and stay silent
    bool close_at_hello = false;
    int descriptors = 2;
    int hello_delay_ms = 0;
    uint32_t slots = 4;
    uint64_t slot_bytes = shm::kMinSlotBytes;
    uint64_t extent_bytes = 8192;  // of every extent asked for
    std::function<bool(uint32_t)> extent_gone;  // by default none is
    // Answers a request; by default OK with nothing in it.
    std::function<Answer(const Request&)> serve;
  };

  explicit FakeServer(Script script);
  ~FakeServer();
  FakeServer(const FakeServer&) = delete;
  FakeServer& operator=(const FakeServer&) = delete;

  const std::string& path() const { return path_; }
  // Answers a request that `serve` left open.
  void AnswerLater(const Request& request, const Answer& answer);
  std::vector<Request> requests() const;
  shm::ChannelHeader* header() const { return header_; }
  uint32_t extents_asked() const { return extents_asked_.load(); }

 private:
  void Run();
  bool Greet(int socket);
  void ServeRing();
  bool ServeSocket(int socket);
  void Write(const Request& request, const Answer& answer);

  const Script script_;
  std::string directory_, path_;
  int listener_ = -1, doorbell_ = -1;
  std::byte* memory_ = nullptr;
  uint64_t memory_bytes_ = 0;
  shm::ChannelHeader* header_ = nullptr;
  uint64_t cursor_ = 0;
  bool hang_up_ = false;
  std::atomic<bool> stop_{false};
  std::atomic<uint32_t> extents_asked_{0};
  mutable absl::Mutex mutex_;
  std::vector<Request> requests_ ABSL_GUARDED_BY(mutex_);
  std::thread thread_;
};

}  // namespace quarry::testing

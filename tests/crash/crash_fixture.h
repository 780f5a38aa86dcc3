// A quarryd on a disk that outlives it, load on it, and what it owes after any end.
#pragma once

#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>

#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "proto/identity.h"
#include "tests/support/daemon_process.h"
#include "tests/support/kv_client.h"

namespace quarry::testing {

class CrashTest : public ::testing::Test {
 protected:
  enum class State {
    kTried,    // may be there
    kDurable,  // must be there, unless the disk drops blocks
    kPurging,  // may be there
    kPurged,   // must not be there
  };

  void SetUp() override {
    directory_ = std::filesystem::temp_directory_path() / absl::StrCat("quarry-crash-", getpid());
    std::filesystem::create_directories(directory_);
  }
  void TearDown() override {
    daemon_ = nullptr;
    std::filesystem::remove_all(directory_);
  }

  // Of so many bytes, e.g. "1GiB": forgets what was.
  void NewDisk(const std::string& bytes) {
    daemon_ = nullptr;
    std::filesystem::remove(directory_ / "disk");
    disk_bytes_ = bytes;
    blocks_.clear();
    next_ = 1;
  }
  // Where the key of an encrypted disk is.
  std::filesystem::path KeyFile() {
    const std::filesystem::path path = directory_ / "key";
    if (!std::filesystem::exists(path)) {
      std::ofstream(path) << std::string(32, 'k');
      using std::filesystem::perms;
      std::filesystem::permissions(path, perms::owner_read | perms::owner_write);
    }
    return path;
  }
  absl::Status TryStart() {
    daemon_ = nullptr;
    DaemonOptions options;
    options.config =
        absl::StrCat("[disk]\npath = \"", (directory_ / "disk").string(), "\"\nbytes = \"",
                     disk_bytes_, "\"\nsegment_bytes = \"2MiB\"\n",
                     encrypted_ ? absl::StrCat("key_file = \"", KeyFile().string(), "\"\n") : "",
                     "[engine]\nextent_bytes = \"4MiB\"\nspare_bytes = 0\n"
                     "[tenants.users]\n",
                     getuid(), " = \"tester\"\n");
    options.arguments = {"--arena-bytes", "24MiB"};  // so that most is read from the disk
    auto daemon = DaemonProcess::Start(options);
    if (daemon.ok()) daemon_ = *std::move(daemon);
    return daemon.status();
  }
  std::unique_ptr<Client> Connect() {
    auto client = ConnectTo(daemon_->socket_path());
    EXPECT_TRUE(client.ok()) << client.status();
    return client.ok() ? *std::move(client) : nullptr;
  }

  // Every eight bytes name their owner and their place.
  static std::string BytesOf(uint64_t number) {
    constexpr size_t kMostBytes = 600000;
    std::mt19937_64 random(number);
    std::string bytes(1 + random() % (number % 4 == 0 ? kMostBytes : 20000), '\0');
    for (size_t at = 0; at < bytes.size(); at += 8) {
      const uint64_t word = number << 32 | at;
      std::memcpy(bytes.data() + at, &word, std::min<size_t>(8, bytes.size() - at));
    }
    return bytes;
  }

  // Puts, reads and purges until the daemon is gone, or `steps` times. False: it is gone.
  bool Load(Client* client, std::mt19937_64* random, uint64_t steps = ~0ull) {
    std::set<uint64_t> accepted;  // and not known to be durable
    for (uint64_t step = 0; step < steps; ++step) {
      const uint64_t what = (*random)() % 16;
      if (what < 10) {
        const uint64_t number = next_++;
        blocks_[number] = State::kTried;
        const std::string bytes = BytesOf(number);
        if (!client->Put("kill", std::to_string(number), std::as_bytes(std::span(bytes))).ok()) {
          return false;
        }
        accepted.insert(number);
      } else if (what < 12) {
        // What was accepted before the queue was seen empty is durable, if all of it was admitted.
        const auto statistics = client->Statistics();
        if (!statistics.ok()) return false;
        if (statistics->at("quarry_disk_queued_bytes") > 0) continue;
        if (statistics->at("quarry_disk_not_admitted_total") > 0) continue;
        for (const uint64_t number : accepted) blocks_[number] = State::kDurable;
        accepted.clear();
      } else if (what < 15) {
        const uint64_t number = 1 + (*random)() % next_;
        if (!Check(client, number)) return false;
      } else {
        const uint64_t number = 1 + (*random)() % next_;
        const auto found = blocks_.find(number);
        if (found == blocks_.end()) continue;
        found->second = State::kPurging;
        accepted.erase(number);
        if (encrypted_ && (*random)() % 4 == 0) {
          if (!PurgeAll(client)) return false;
          accepted.clear();
          continue;
        }
        PurgeRequest purge;
        purge.blocks = {EngineBlockIdOf("tester", "kill", std::to_string(number))};
        if (!client->Purge(purge).ok()) return false;
        found->second = State::kPurged;
      }
    }
    return true;
  }

  // All that the tenant has, and its keys with it. False: the daemon has gone.
  bool PurgeAll(Client* client) {
    for (auto& [number, state] : blocks_) {
      if (state != State::kPurged) state = State::kPurging;
    }
    PurgeRequest all;
    all.whole_tenant = true;
    if (!client->Purge(all).ok()) return false;
    for (auto& [number, state] : blocks_) state = State::kPurged;
    return true;
  }

  // False: the daemon has gone.
  bool CheckAll(Client* client) {
    for (const auto& [number, state] : blocks_) {
      if (!Check(client, number)) return false;
    }
    return true;
  }
  bool Check(Client* client, uint64_t number) {
    const auto found = blocks_.find(number);
    const auto got = client->Get("kill", std::to_string(number));
    if (!got.ok() && !absl::IsNotFound(got.status())) return false;
    if (found == blocks_.end()) {
      EXPECT_FALSE(got.ok()) << number << " was never put";
      return true;
    }
    if (got.ok()) {
      EXPECT_TRUE(*got == BytesOf(number)) << "wrong bytes of " << number;
      EXPECT_NE(found->second, State::kPurged) << number << " came back";
      ++right_;
    } else if (!drops_) {
      EXPECT_NE(found->second, State::kDurable) << number << " is lost";
    }
    return true;
  }
  uint64_t CountOf(State state) const {
    uint64_t count = 0;
    for (const auto& [number, its] : blocks_) count += its == state ? 1 : 0;
    return count;
  }

  std::filesystem::path directory_;
  std::string disk_bytes_;
  std::unique_ptr<DaemonProcess> daemon_;
  std::map<uint64_t, State> blocks_;
  uint64_t next_ = 1;
  bool encrypted_ = false;  // from NewDisk on
  bool drops_ = false;      // the disk has no room for all: what was durable may be gone
  uint64_t right_ = 0;      // blocks read
};

}  // namespace quarry::testing

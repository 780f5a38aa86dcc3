// Put and get of opaque blocks over shared memory against memcpy.
//
// Workload: blocks of 64 KiB to 8 MiB under engine keys, enough of them that a walk through all
// does not fit the caches (at least 512 MiB held, 1 GiB with the buffers). Per round, interleaved:
// memcpy between two rotating buffers of the same size; lease and release without a copy; get with
// copy, digest off and on; put, digest off and on (a put is two copies: into the slot and into the
// arena). Floor of a get with copy: one memcpy. Prediction: the digest runs at about the speed of
// memcpy on data still in the cache, so a get with it is at 60-90% of memcpy.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "client/client.h"
#include "perf/statistics.h"
#include "proto/check.h"
#include "tests/support/daemon_process.h"

namespace quarry {
namespace {

struct Settings {
  std::vector<uint64_t> sizes = {64 << 10, 256 << 10, 1 << 20, 2 << 20, 8 << 20};
  uint64_t held_bytes = 512ull << 20;
  uint32_t rounds = 200;
  uint32_t seed = 1;
  bool json = false;
};

struct Series {
  const char* name;
  std::vector<double> us, ratio;  // ratio: memcpy's time over this one's
};

void Die(const absl::Status& status, const char* what) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s: %s\n", what, status.ToString().c_str());
  std::exit(1);
}

std::unique_ptr<Client> Connect(const testing::DaemonProcess& daemon,
                                ClientOptions::Verify verify) {
  ClientOptions options;
  options.socket_path = daemon.socket_path();
  options.name = "put_get_bench";
  options.slot_bytes = 9 << 20;
  options.slots = 4;
  options.verify = verify;
  auto client = Client::Connect(options);
  Die(client.status(), "connect");
  return *std::move(client);
}

// The blocks of one size, put and read in turn.
class Workload {
 public:
  Workload(const Settings& settings, Client* checked, Client* unchecked, uint64_t size)
      : checked_(checked), unchecked_(unchecked), size_(size),
        count_(std::max<uint64_t>(8, settings.held_bytes / 2 / size)),
        source_(settings.held_bytes / 2), target_(settings.held_bytes / 2) {
    std::mt19937_64 random(settings.seed);
    for (size_t i = 0; i + 8 <= source_.size(); i += 8) {
      const uint64_t x = random();
      std::memcpy(source_.data() + i, &x, 8);
    }
    std::memset(target_.data(), 1, target_.size());
  }

  void Run(const Settings& settings) {
    const uint32_t rounds = static_cast<uint32_t>(
        std::min<uint64_t>(settings.rounds, count_));
    Series copy{"memcpy", {}, {}}, put{"put", {}, {}}, put_digest{"put+digest", {}, {}};
    Series lease{"lease", {}, {}}, get{"get", {}, {}}, get_digest{"get+digest", {}, {}};
    for (uint32_t i = 0; i < rounds; ++i) {
      const double base = TimeCopy();
      copy.us.push_back(base);
      Add(&put, base, [&] { Put(unchecked_, 2 * i); });
      Add(&put_digest, base, [&] { Put(checked_, 2 * i + 1); });
    }
    for (uint32_t i = 0; i < rounds; ++i) {
      const double base = TimeCopy();
      copy.us.push_back(base);
      Add(&lease, base, [&] { Lease(unchecked_, 2 * i); });
      Add(&get, base, [&] { Get(unchecked_, 2 * i); });
      Add(&get_digest, base, [&] { Get(checked_, 2 * i + 1); });
    }
    for (const Series& s : {copy, put, put_digest, lease, get, get_digest}) Print(settings, s);
    PurgeRequest everything;
    everything.whole_tenant = true;
    Die(checked_->Purge(everything).status(), "purge");
  }

 private:
  std::span<std::byte> Next(std::vector<std::byte>* buffer, size_t* at) const {
    if (*at + size_ > buffer->size()) *at = 0;
    std::span<std::byte> out(buffer->data() + *at, size_);
    *at += size_;
    return out;
  }
  double TimeCopy() {
    const auto from = Next(&source_, &source_at_), to = Next(&target_, &target_at_);
    return perf::Microseconds([&] { std::memcpy(to.data(), from.data(), size_); });
  }
  template <typename F>
  static void Add(Series* series, double base, F&& f) {
    const double us = perf::Microseconds(f);
    series->us.push_back(us);
    series->ratio.push_back(base / us);
  }
  std::string KeyOf(uint32_t i) const { return absl::StrCat(size_, "-", i); }
  void Put(Client* client, uint32_t i) {
    Die(client->Put("bench", KeyOf(i), Next(&source_, &source_at_)), "put");
  }
  void Lease(Client* client, uint32_t i) {
    Die(client->Lease("bench", KeyOf(i)).status(), "lease");
  }
  void Get(Client* client, uint32_t i) {
    auto block = client->Lease("bench", KeyOf(i));
    Die(block.status(), "lease");
    Die((*block)->CopyTo(0, Next(&target_, &target_at_)), "copy");
  }
  void Print(const Settings& settings, const Series& s) const {
    const auto us = perf::QuantilesOf(s.us), ratio = perf::QuantilesOf(s.ratio);
    if (settings.json) {
      nlohmann::json line = {{"bench", "put_get"}, {"what", s.name}, {"bytes", size_},
                             {"us_p50", us.p50}, {"us_p10", us.p10}, {"us_p90", us.p90},
                             {"gb_per_s", static_cast<double>(size_) / us.p50 / 1e3},
                             {"rounds", s.us.size()}};
      if (!s.ratio.empty()) {
        line["share_of_memcpy"] = ratio.p50;
        line["share_p10"] = ratio.p10;
        line["share_p90"] = ratio.p90;
      }
      std::printf("%s\n", line.dump().c_str());
    } else {
      std::printf("%8llu KiB  %-10s %9.1f us  %6.2f GB/s",
                  static_cast<unsigned long long>(size_ >> 10), s.name, us.p50,
                  static_cast<double>(size_) / us.p50 / 1e3);
      if (!s.ratio.empty()) {
        std::printf("   %.2f of memcpy [%.2f, %.2f]", ratio.p50, ratio.p10, ratio.p90);
      }
      std::printf("\n");
    }
    std::fflush(stdout);
  }

  Client* const checked_;
  Client* const unchecked_;
  const uint64_t size_, count_;
  std::vector<std::byte> source_, target_;
  size_t source_at_ = 0, target_at_ = 0;
};

int Run(const Settings& settings) {
  testing::DaemonOptions options;
  options.arguments = {"--arena-bytes", "4GiB", "--metrics", "off"};
  auto daemon = testing::DaemonProcess::Start(options);
  Die(daemon.status(), "quarryd");
  const auto checked = Connect(**daemon, ClientOptions::Verify::kAlways);
  const auto unchecked = Connect(**daemon, ClientOptions::Verify::kNever);
  for (uint64_t size : settings.sizes) {
    Workload(settings, checked.get(), unchecked.get(), size).Run(settings);
  }
  return 0;
}

}  // namespace
}  // namespace quarry

int main(int argc, char** argv) {
  quarry::Settings settings;
  CLI::App app("Put and get over shared memory against memcpy");
  app.add_option("--sizes", settings.sizes, "block sizes in bytes, at most 8 MiB");
  app.add_option("--held-bytes", settings.held_bytes, "memory that is rotated through");
  app.add_option("--rounds", settings.rounds, "interleaved rounds per size");
  app.add_option("--seed", settings.seed, "of the random bytes");
  app.add_flag("--json", settings.json, "JSON lines");
  CLI11_PARSE(app, argc, argv);
  return quarry::Run(settings);
}

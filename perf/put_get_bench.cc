// Put and get of opaque blocks over shared memory against memcpy.
//
// Workload: 64 KiB to 8 MiB blocks under engine keys, `held-bytes` of them in the daemon, and as
// many bytes of source and destination buffers in this process. Every operation takes the next
// block and the next buffers, so none finds its bytes in a cache because of an earlier round (a
// cache larger than held-bytes would still flatter both sides). The client arms the daemon's poller
// as an engine does while it fetches. Per round, interleaved, each against the memcpy of the round:
//   put, put+digest   into the slot, by the daemon into the arena: two copies
//   lease             lease and release, without a copy; lease idle: with the poller parked
//   get, get+digest   lease, copy out without and with checking the digest, release
//   get ahead         get+digest of 16 blocks, each leased while the one before it is copied, as an
//                     engine loads a prefix; time and share are of one block
//   copy+digest       the same copy of a block that is leased already: without the round trip
//   store copy        BlockStore::CopyOut with its digest check, in this process
// Floor of a get: one memcpy. Rows give the median with the 10th and 90th percentile; the share is
// the median of the rounds' ratios, memcpy's time over the operation's.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <spdlog/spdlog.h>

#include "absl/strings/str_cat.h"
#include "client/client.h"
#include "perf/bench_daemon.h"
#include "perf/statistics.h"
#include "storage/block_store.h"
#include "tests/support/daemon_process.h"

namespace quarry {
namespace {

using perf::Die;

struct Settings {
  std::vector<uint64_t> sizes = {64 << 10, 256 << 10, 1 << 20, 2 << 20, 8 << 20};
  uint64_t held_bytes = 1ull << 30;
  uint32_t rounds = 200;
  uint32_t seed = 1;
  std::string daemon;
  bool json = false;
};

struct Series {
  const char* name;
  std::vector<double> us, share;  // share: of memcpy's rate
};

std::unique_ptr<Client> Connect(const testing::DaemonProcess& daemon,
                                ClientOptions::Verify verify) {
  return perf::ConnectTo(
      daemon, {.name = "put_get_bench", .slots = 4, .slot_bytes = 9 << 20, .verify = verify});
}

// Bytes handed out piece by piece, from the start again at the end.
class Rotation {
 public:
  explicit Rotation(uint64_t bytes) : bytes_(bytes) {}
  void FillRandom(uint32_t seed) {
    std::mt19937_64 random(seed);
    for (size_t i = 0; i + 8 <= bytes_.size(); i += 8) {
      const uint64_t x = random();
      std::memcpy(bytes_.data() + i, &x, 8);
    }
  }
  std::span<std::byte> Next(uint64_t size) {
    if (at_ + size > bytes_.size()) at_ = 0;
    std::span<std::byte> out(bytes_.data() + at_, size);
    at_ += size;
    return out;
  }

 private:
  std::vector<std::byte> bytes_;
  size_t at_ = 0;
};

// A store in this process with blocks of one size.
class LocalStore {
 public:
  LocalStore(uint64_t size, uint32_t blocks, Rotation* source) {
    BlockStoreOptions options;
    options.arena.capacity_bytes = 2 * size * blocks + (64 << 20);
    store_ = *BlockStore::Create(options);
    Die(store_->Reserve("bench", size, blocks), "reserve");
    for (uint32_t i = 0; i < blocks; ++i) {
      auto view = store_->Begin("bench", size);
      Die(view.status(), "begin");
      std::memcpy(view->memory.data, source->Next(size).data(), size);
      BlockKey key;
      std::memcpy(key.id.bytes.data(), &i, sizeof(i));
      bool existed = false;
      Die(store_->Publish(view->handle, key, std::nullopt, &existed).status(), "publish");
      blocks_.push_back(view->handle);
    }
  }
  void CopyOut(uint32_t i, std::span<std::byte> out) {
    Die(store_->CopyOut(blocks_[i % blocks_.size()], 0, out), "copy out");
  }

 private:
  std::unique_ptr<BlockStore> store_;
  std::vector<BlockHandle> blocks_;
};

// Blocks of one prefix that are loaded one behind another.
constexpr uint32_t kAhead = 16;

// The blocks of one size, put and read in turn.
class Workload {
 public:
  Workload(const Settings& settings, Client* checked, Client* unchecked, Rotation* source,
           Rotation* target, uint64_t size)
      : settings_(settings), checked_(checked), unchecked_(unchecked), source_(source),
        target_(target), size_(size),
        blocks_(static_cast<uint32_t>(std::max<uint64_t>(64, settings.held_bytes / size))) {}

  void Run() {
    Puts();
    Gets();
    PurgeRequest everything;
    everything.whole_tenant = true;
    Die(checked_->Purge(everything).status(), "purge");
    StoreCopies();
  }

 private:
  struct Operation {
    std::function<void()> run;
    uint32_t blocks = 1;  // that it moves: its time is divided by them
  };

  // One round: memcpy, then each operation, in an order that turns with the rounds.
  void Round(uint32_t round, std::vector<Series>* series, const std::vector<Operation>& operations) {
    const auto from = source_->Next(size_), to = target_->Next(size_);
    const double base =
        perf::Microseconds([&] { std::memcpy(to.data(), from.data(), size_); });
    (*series)[0].us.push_back(base);
    for (size_t k = 0; k < operations.size(); ++k) {
      const size_t i = (k + round) % operations.size();
      const double us = perf::Microseconds(operations[i].run) / operations[i].blocks;
      (*series)[i + 1].us.push_back(us);
      (*series)[i + 1].share.push_back(base / us);
    }
  }

  void Puts() {
    std::vector<Series> series = {{"memcpy", {}, {}}, {"put", {}, {}}, {"put+digest", {}, {}}};
    const uint32_t rounds = std::min(settings_.rounds, blocks_ / 2);
    uint32_t next = 0;
    const std::vector<Operation> operations = {{[&] { Put(unchecked_, next++); }},
                                               {[&] { Put(checked_, next++); }}};
    checked_->Arm();
    for (uint32_t round = 0; round < rounds; ++round) Round(round, &series, operations);
    checked_->Disarm();
    while (next < blocks_) Put(checked_, next++);
    Print(series);
  }

  void Gets() {
    std::vector<Series> series = {{"memcpy", {}, {}}, {"lease", {}, {}}, {"get", {}, {}},
                                  {"get+digest", {}, {}}, {"copy+digest", {}, {}},
                                  {"get ahead", {}, {}}};
    const uint32_t stride = std::max(1u, blocks_ / (4 * settings_.rounds));
    uint32_t next = 0;
    auto key = [&] { return KeyOf((next += stride) % blocks_); };
    std::unique_ptr<LeasedBlock> held;
    const auto get_ahead = [&] {
      std::unique_ptr<PendingLease> ahead = Ask(checked_, key());
      for (uint32_t i = 0; i < kAhead; ++i) {
        const auto block = ahead->Wait();
        Die(block.status(), "lease");
        if (i + 1 < kAhead) ahead = Ask(checked_, key());
        Copy(**block);
      }
    };
    const std::vector<Operation> operations = {{[&] { Lease(unchecked_, key()); }},
                                               {[&] { Get(unchecked_, key()); }},
                                               {[&] { Get(checked_, key()); }},
                                               {[&] { Copy(*held); }},
                                               {get_ahead, kAhead}};
    for (uint32_t i = 0; i < blocks_; ++i) {  // both clients map every extent
      Lease(checked_, KeyOf(i));
      Lease(unchecked_, KeyOf(i));
    }
    checked_->Arm();
    for (uint32_t round = 0; round < settings_.rounds; ++round) {
      held = LeaseOf(checked_, key());
      Round(round, &series, operations);
    }
    checked_->Disarm();
    Print(series);

    std::vector<Series> idle = {{"memcpy", {}, {}}, {"lease idle", {}, {}}};
    const std::vector<Operation> lease_idle = {{[&] { Lease(unchecked_, key()); }}};
    for (uint32_t round = 0; round < std::min(settings_.rounds, 50u); ++round) {
      Round(round, &idle, lease_idle);
    }
    Print({idle[1]});
  }

  void StoreCopies() {
    LocalStore store(size_, blocks_, source_);
    std::vector<Series> series = {{"memcpy", {}, {}}, {"store copy", {}, {}}};
    uint32_t next = 0;
    const uint32_t stride = std::max(1u, blocks_ / settings_.rounds);
    const std::vector<Operation> operations = {
        {[&] { store.CopyOut(next += stride, target_->Next(size_)); }}};
    for (uint32_t round = 0; round < settings_.rounds; ++round) Round(round, &series, operations);
    Print({series[1]});
  }

  std::string KeyOf(uint32_t i) const { return absl::StrCat(size_, "-", i); }
  void Put(Client* client, uint32_t i) {
    Die(client->Put("bench", KeyOf(i), source_->Next(size_)), "put");
  }
  static std::unique_ptr<LeasedBlock> LeaseOf(Client* client, const std::string& key) {
    return perf::ValueOrDie(client->Lease("bench", key), "lease");
  }
  static std::unique_ptr<PendingLease> Ask(Client* client, const std::string& key) {
    return perf::ValueOrDie(client->LeaseAsync("bench", key), "lease");
  }
  void Lease(Client* client, const std::string& key) { LeaseOf(client, key); }
  void Get(Client* client, const std::string& key) { Copy(*LeaseOf(client, key)); }
  void Copy(const LeasedBlock& block) { Die(block.CopyTo(0, target_->Next(size_)), "copy"); }

  void Print(const std::vector<Series>& all) const {
    for (const Series& series : all) Print(series);
  }
  void Print(const Series& series) const {
    const auto us = perf::QuantilesOf(series.us), share = perf::QuantilesOf(series.share);
    const double rate = static_cast<double>(size_) / us.p50 / 1e3;
    if (settings_.json) {
      nlohmann::json line = {{"bench", "put_get"}, {"what", series.name}, {"bytes", size_},
                             {"us_p10", us.p10}, {"us_p50", us.p50}, {"us_p90", us.p90},
                             {"gb_per_s", rate}, {"rounds", series.us.size()}};
      if (!series.share.empty()) {
        line.update({{"share_of_memcpy", share.p50}, {"share_p10", share.p10},
                     {"share_p90", share.p90}});
      }
      std::printf("%s\n", line.dump().c_str());
    } else {
      std::printf("%8llu KiB  %-11s %9.1f us [%.1f, %.1f]  %6.2f GB/s",
                  static_cast<unsigned long long>(size_ >> 10), series.name, us.p50, us.p10,
                  us.p90, rate);
      if (!series.share.empty()) {
        std::printf("   %.2f of memcpy [%.2f, %.2f]", share.p50, share.p10, share.p90);
      }
      std::printf("\n");
    }
    std::fflush(stdout);
  }

  const Settings& settings_;
  Client* const checked_;
  Client* const unchecked_;
  Rotation* const source_;
  Rotation* const target_;
  const uint64_t size_;
  const uint32_t blocks_;
};

int Run(const Settings& settings) {
  testing::DaemonOptions options;
  options.binary = settings.daemon;
  options.config = absl::StrCat("[engine]\narena_bytes = \"",
                                (2 * settings.held_bytes >> 20) + 512, "MiB\"\n");
  options.arguments = {"--metrics", "off"};
  testing::DaemonProcess& daemon = perf::StartDaemon(options);
  std::fprintf(stderr, "seed %u\n", settings.seed);
  const auto checked = Connect(daemon, ClientOptions::Verify::kAlways);
  const auto unchecked = Connect(daemon, ClientOptions::Verify::kNever);
  Rotation source(settings.held_bytes / 2), target(settings.held_bytes / 2);
  source.FillRandom(settings.seed);
  for (uint64_t size : settings.sizes) {
    Workload(settings, checked.get(), unchecked.get(), &source, &target, size).Run();
  }
  return daemon.Stop() == 0 ? 0 : 1;
}

}  // namespace
}  // namespace quarry

int main(int argc, char** argv) {
  quarry::Settings settings;
  CLI::App app("Put and get over shared memory against memcpy");
  app.add_option("--sizes", settings.sizes, "block sizes in bytes, at most 8 MiB");
  app.add_option("--held-bytes", settings.held_bytes, "memory that is rotated through")
      ->check(CLI::Range(uint64_t{64} << 20, uint64_t{1} << 40));
  app.add_option("--rounds", settings.rounds, "interleaved rounds per size")
      ->check(CLI::Range(1, 1000000));
  app.add_option("--seed", settings.seed, "of the random bytes");
  app.add_option("--daemon", settings.daemon, "quarryd (default: beside this build's folder)");
  app.add_flag("--json", settings.json, "JSON lines");
  CLI11_PARSE(app, argc, argv);
  spdlog::set_level(spdlog::level::warn);  // the store in this process logs to standard output
  return quarry::Run(settings);
}

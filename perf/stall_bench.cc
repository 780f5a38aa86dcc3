// What a disk that stalls does to blocks that are in RAM.
//
// Workload: a store of two tiers, blocks of --block-bytes. One thread gets blocks of a set that is
// in RAM, copies them out and checks their digests, as fast as it can; another puts --puts new
// blocks a second, which go to the disk behind it. Each is pinned to a processor of its own. In
// turns, --pairs times: --seconds with the disk as it is, and --seconds in which no call of the
// disk returns; which comes first changes from pair to pair.
// Floor: the same threads without the stall, in the same pair. Rows give p50 and p99 of gets and
// puts, medians of the pairs; the ratio is stalled / as it is, of each pair, median [least, most].
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <spdlog/spdlog.h>
#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "perf/die.h"
#include "perf/statistics.h"
#include "storage/disk/aligned_buffer.h"
#include "storage/disk/file_disk.h"
#include "storage/tiered_block_store.h"

namespace quarry {
namespace {

using perf::Die;

struct Settings {
  std::string path = "stall_bench.log";
  uint64_t disk_bytes = 4ull << 30;
  uint64_t arena_bytes = 1ull << 30;
  uint64_t max_queued_bytes = 512ull << 20;
  uint64_t block_bytes = 256 << 10;
  uint32_t hot_blocks = 128;
  uint32_t puts = 100;
  uint32_t pairs = 7;
  double seconds = 5;
  bool json = false;
};

// A disk of which no call returns while it stalls.
class StallingDisk final : public Disk {
 public:
  explicit StallingDisk(std::unique_ptr<Disk> disk) : disk_(std::move(disk)) {}

  void Stall(bool stalls) {
    absl::MutexLock lock(&mutex_);
    stalls_ = stalls;
  }
  uint64_t bytes() const override { return disk_->bytes(); }
  const std::string& name() const override { return disk_->name(); }
  absl::Status Read(uint64_t offset, ReadPieces out) override {
    Wait();
    return disk_->Read(offset, out);
  }
  absl::Status Write(uint64_t offset, WritePieces pieces) override {
    Wait();
    return disk_->Write(offset, pieces);
  }
  absl::Status Sync() override {
    Wait();
    return disk_->Sync();
  }
  absl::Status Discard(uint64_t offset, uint64_t bytes) override {
    Wait();
    return disk_->Discard(offset, bytes);
  }

 private:
  void Wait() {
    absl::MutexLock lock(&mutex_);
    mutex_.Await(absl::Condition(this, &StallingDisk::Goes));
  }

  bool Goes() const ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return !stalls_; }

  const std::unique_ptr<Disk> disk_;
  absl::Mutex mutex_;
  bool stalls_ ABSL_GUARDED_BY(mutex_) = false;
};

void PinTo(uint32_t processor) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(processor % std::thread::hardware_concurrency(), &set);
  (void)pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
}

// Latencies of one stretch, in microseconds.
struct Stretch {
  perf::Quantiles gets, puts;
};

class Bench {
 public:
  explicit Bench(const Settings& settings) : settings_(settings) {
    std::filesystem::remove(settings_.path);
    FileDiskOptions file;
    file.path = settings_.path;
    file.bytes = settings_.disk_bytes;
    auto opened = OpenFileDisk(file);
    Die(opened.status(), "open");
    auto disk = std::make_unique<StallingDisk>(*std::move(opened));
    disk_ = disk.get();
    auto log = BlockLog::Open(std::move(disk), {});
    Die(log.status(), "open the log");
    BlockStoreOptions options;
    options.arena.capacity_bytes = settings_.arena_bytes;
    auto ram = BlockStore::Create(options);
    Die(ram.status(), "make the store");
    store_ = std::make_unique<TieredBlockStore>(
        *std::move(ram), *std::move(log),
        TieredOptions{.max_queued_bytes = settings_.max_queued_bytes});
    // The whole arena, so that no put has to have memory mapped; the last of it is the hot set.
    for (; next_ < settings_.arena_bytes / settings_.block_bytes; ++next_) {
      Put(next_);
      hot_.push_back(KeyOf(next_));
    }
    hot_.erase(hot_.begin(), hot_.end() - std::min<size_t>(hot_.size(), settings_.hot_blocks));
    AwaitWritten();
    filled_ = next_;
    refused_before_ = store_->Stats().disk->not_admitted;
  }
  ~Bench() {
    disk_->Stall(false);
    store_ = nullptr;
    std::filesystem::remove(settings_.path);
  }

  void Run() {
    (void)RunStretch(false);  // all is faulted in, and the disk has begun
    for (uint32_t pair = 0; pair < settings_.pairs; ++pair) {
      Stretch stretches[2];  // as it is, stalled
      for (const bool stalled : {pair % 2 == 1, pair % 2 == 0}) {
        stretches[stalled] = RunStretch(stalled);
      }
      Note("get", stretches[0].gets, stretches[1].gets);
      Note("put", stretches[0].puts, stretches[1].puts);
    }
    Print();
  }

 private:
  struct Series {
    std::string name;
    std::vector<double> p50, p99, stalled_p50, stalled_p99, ratio;
  };

  static BlockKey KeyOf(uint64_t number) {
    BlockKey key;
    std::memcpy(key.id.bytes.data(), &number, sizeof(number));
    key.full_key = absl::StrCat("block ", number);
    return key;
  }
  void Put(uint64_t number) {
    Die(store_->Reserve("bench", settings_.block_bytes, 1), "reserve");
    const auto view = store_->Begin("bench", settings_.block_bytes);
    Die(view.status(), "begin");
    std::memset(view->memory.data, static_cast<int>(number), settings_.block_bytes);
    bool existed = false;
    const auto published = store_->Publish(view->handle, KeyOf(number), std::nullopt, &existed);
    Die(published.status(), "publish");
    store_->Release(published->handle);
  }
  void AwaitWritten() {
    while (store_->Stats().disk->queued_bytes > 0) absl::SleepFor(absl::Milliseconds(5));
  }
  // Stretches end with what they queued written, so that each begins alike.
  Stretch RunStretch(bool stalled) {
    std::vector<double> gets, puts;
    std::atomic<bool> ends{false};
    disk_->Stall(stalled);
    std::thread getter([&] {
      PinTo(0);
      std::mt19937_64 random(7);
      std::vector<std::byte> out(settings_.block_bytes);
      while (!ends) {
        const BlockKey& key = hot_[random() % hot_.size()];
        gets.push_back(perf::Microseconds([&] {
          const auto view = store_->Acquire("bench", key);
          Die(view.status(), "get");
          Die(store_->CopyOut(view->handle, 0, out), "copy");
          store_->Release(view->handle);
        }));
      }
    });
    std::thread putter([&] {
      PinTo(1);
      const auto step = std::chrono::duration<double>(1.0 / settings_.puts);
      const auto start = std::chrono::steady_clock::now();
      for (uint64_t n = 0; !ends; ++n) {
        std::this_thread::sleep_until(
            start + std::chrono::duration_cast<std::chrono::nanoseconds>(step * n));
        puts.push_back(perf::Microseconds([&] { Put(next_++); }));
      }
    });
    absl::SleepFor(absl::Seconds(settings_.seconds));
    ends = true;
    getter.join();
    putter.join();
    disk_->Stall(false);
    AwaitWritten();
    return {perf::QuantilesOf(gets), perf::QuantilesOf(puts)};
  }
  void Note(const std::string& name, const perf::Quantiles& free, const perf::Quantiles& stalled) {
    auto series = std::find_if(series_.begin(), series_.end(),
                               [&](const Series& s) { return s.name == name; });
    if (series == series_.end()) {
      series = series_.insert(series_.end(), Series());
      series->name = name;
    }
    series->p50.push_back(free.p50);
    series->p99.push_back(free.p99);
    series->stalled_p50.push_back(stalled.p50);
    series->stalled_p99.push_back(stalled.p99);
    series->ratio.push_back(stalled.p99 / free.p99);
  }

  void Print() const {
    for (const Series& s : series_) {
      const double ratio = perf::Median(s.ratio);
      const auto [least, most] = std::minmax_element(s.ratio.begin(), s.ratio.end());
      if (settings_.json) {
        std::printf("%s\n", nlohmann::json({{"what", s.name},
                                            {"block_bytes", settings_.block_bytes},
                                            {"pairs", settings_.pairs},
                                            {"p50_us", perf::Median(s.p50)},
                                            {"p99_us", perf::Median(s.p99)},
                                            {"stalled_p50_us", perf::Median(s.stalled_p50)},
                                            {"stalled_p99_us", perf::Median(s.stalled_p99)},
                                            {"p99_ratio", ratio},
                                            {"p99_ratio_least", *least},
                                            {"p99_ratio_most", *most}})
                                .dump()
                                .c_str());
        continue;
      }
      std::printf(
          "%-4s  p50 %6.0f us, p99 %6.0f us; stalled p50 %6.0f us, p99 %6.0f us; "
          "p99 ratio %.2f [%.2f, %.2f]\n",
          s.name.c_str(), perf::Median(s.p50), perf::Median(s.p99), perf::Median(s.stalled_p50),
          perf::Median(s.stalled_p99), ratio, *least, *most);
    }
    const BlockStoreStats stats = store_->Stats();
    std::printf(settings_.json ? "{\"what\":\"blocks\",\"put\":%lu,\"not_admitted\":%lu}\n"
                               : "%lu blocks put, %lu of them not taken by the queue\n",
                next_ - filled_, stats.disk->not_admitted - refused_before_);
  }

  const Settings& settings_;
  StallingDisk* disk_ = nullptr;  // the store's
  std::unique_ptr<TieredBlockStore> store_;
  std::vector<BlockKey> hot_;
  uint64_t next_ = 0;    // block to put
  uint64_t filled_ = 0;  // blocks put before, and of these
  uint64_t refused_before_ = 0;
  std::vector<Series> series_;
};

}  // namespace
}  // namespace quarry

int main(int argc, char** argv) {
  quarry::Settings settings;
  CLI::App app("What a disk that stalls does to blocks that are in RAM.");
  app.add_option("--path", settings.path, "file, made and removed")->capture_default_str();
  app.add_option("--disk-bytes", settings.disk_bytes)->capture_default_str();
  app.add_option("--arena-bytes", settings.arena_bytes)->capture_default_str();
  app.add_option("--max-queued-bytes", settings.max_queued_bytes)->capture_default_str();
  app.add_option("--block-bytes", settings.block_bytes)->capture_default_str();
  app.add_option("--hot-blocks", settings.hot_blocks)
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--puts", settings.puts, "a second")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--pairs", settings.pairs)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--seconds", settings.seconds, "of each half of a pair")->capture_default_str();
  app.add_flag("--json", settings.json, "JSON lines");
  CLI11_PARSE(app, argc, argv);
  spdlog::set_level(spdlog::level::warn);
  quarry::Bench(settings).Run();
  return 0;
}

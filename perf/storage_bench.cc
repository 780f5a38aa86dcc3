// The log of the disk tier against the disk by itself, and fio where it is installed.
//
// Workload: blocks of `sizes`, `bytes` of them in all, appended in group commits of `batch` bytes
// and read back in an order drawn at random, digests checked, on one file of --path. Per round, in
// turns, each against the disk of the round:
//   disk write   the same bytes in the same batches by Disk::Write, a Sync after each
//   append       BlockLog::Append: digests, frames, two syncs a batch
//   disk read    each block by one Disk::Read
//   read         BlockLog::Read: frames, keys and digests checked
//   append+aes, read+aes   with --encrypt, the same of a log that is encrypted
//   fio write    fio with 1 MiB at a depth of 8, direct, one fdatasync for each batch; fio read
// Floor: the disk's own rate. A round reopens the log at its end; the time that takes is
// `recovery`. Rows give medians with the 10th and 90th percentile; shares are medians of the
// rounds' ratios.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include <spdlog/spdlog.h>
#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "perf/die.h"
#include "perf/statistics.h"
#include "proto/byte_digest.h"
#include "storage/disk/aligned_buffer.h"
#include "storage/disk/file_disk.h"
#include "storage/log/block_log.h"
#include "storage/slot_size.h"

namespace quarry {
namespace {

using perf::Die;

struct Settings {
  std::string path = "storage_bench.log";
  std::vector<uint64_t> sizes = {64 << 10, 1 << 20, 8 << 20, 32 << 20};
  uint64_t bytes = 1ull << 30;
  uint64_t batch = 64ull << 20;
  uint32_t rounds = 5;
  std::string io = "auto";
  bool encrypt = false;
  bool json = false;
};

struct Series {
  std::string name;
  std::vector<double> bytes_per_s, share;  // share: of the disk's own rate, by this program
};

constexpr char kKeyVariable[] = "QUARRY_STORAGE_BENCH_KEY";

template <typename F>
double Seconds(const F& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

class Bench {
 public:
  Bench(const Settings& settings, uint64_t size)
      : settings_(settings), size_(size), count_(settings.bytes / size), memory_(count_ * size) {
    std::mt19937_64 random(size);
    for (uint64_t at = 0; at < memory_.size(); at += 8) {
      const uint64_t word = random();
      std::memcpy(memory_.bytes().data() + at, &word, 8);
    }
    order_.resize(count_);
    std::iota(order_.begin(), order_.end(), 0);
    std::shuffle(order_.begin(), order_.end(), random);
    for (uint64_t i = 0; i < count_; ++i) {
      BlockKey& key = keys_.emplace_back();
      std::memcpy(key.id.bytes.data(), &i, sizeof(i));
      key.full_key = absl::StrCat("block ", i);
      digests_.push_back(DigestOf(Block(i)));
    }
  }

  void Run() {
    for (uint32_t round = 0; round < settings_.rounds; ++round) {
      OneRound();
      if (HasFio()) {
        Note("fio write", FioRate("write"), write_rate_);
        Note("fio read", FioRate("read"), read_rate_);
      }
    }
    std::filesystem::remove(settings_.path);
    Print();
  }

 private:
  std::span<const std::byte> Block(uint64_t i) const {
    return memory_.bytes().subspan(i * size_, size_);
  }
  uint64_t total() const { return count_ * size_; }
  uint64_t PerBatch() const { return std::max<uint64_t>(1, settings_.batch / size_); }

  std::unique_ptr<Disk> Open() const {
    FileDiskOptions options;
    options.path = settings_.path;
    // Frames of small blocks, and segments that are not full.
    options.bytes = RoundUp(2 * settings_.bytes + (512ull << 20), kSectorBytes);
    options.io = settings_.io == "auto"    ? FileDiskOptions::Io::kAuto
                 : settings_.io == "uring" ? FileDiskOptions::Io::kUring
                                           : FileDiskOptions::Io::kThreads;
    auto disk = OpenFileDisk(options);
    Die(disk.status(), "open");
    return *std::move(disk);
  }
  std::unique_ptr<BlockLog> OpenLog(const LogKeyOptions& key) const {
    BlockLogOptions options;
    options.key = key;
    auto log = BlockLog::Open(Open(), options);
    Die(log.status(), "open the log");
    return *std::move(log);
  }
  void Note(const std::string& name, double rate, double disk_rate) {
    auto series = std::find_if(series_.begin(), series_.end(),
                               [&](const Series& s) { return s.name == name; });
    if (series == series_.end()) series = series_.insert(series_.end(), Series{name, {}, {}});
    series->bytes_per_s.push_back(rate);
    series->share.push_back(rate / disk_rate);
  }
  double Rate(double seconds) const { return static_cast<double>(total()) / seconds; }

  void OneRound() {
    std::filesystem::remove(settings_.path);
    {
      const std::unique_ptr<Disk> disk = Open();
      // Once before: the first writes to new room cost the file system more.
      for (int pass = 0; pass < 2; ++pass) {
        write_rate_ = Rate(Seconds([&] { WriteRaw(disk.get()); }));
      }
      read_rate_ = Rate(Seconds([&] { ReadRaw(disk.get()); }));
    }
    Note("disk write", write_rate_, write_rate_);
    Note("disk read", read_rate_, read_rate_);
    LogRound({}, "");
    if (settings_.encrypt) {
      std::filesystem::remove(settings_.path);
      WriteRaw(Open().get());  // the first writes to new room cost the file system more
      LogRound({.file = {}, .environment = kKeyVariable}, "+aes");
    }
  }
  void LogRound(const LogKeyOptions& key, const std::string& suffix) {
    std::unique_ptr<BlockLog> log = OpenLog(key);
    Note("append" + suffix, Rate(Seconds([&] { Append(log.get()); })), write_rate_);
    std::vector<double> latency_us;
    Note("read" + suffix, Rate(Seconds([&] { latency_us = Read(log.get()); })), read_rate_);
    log = nullptr;
    log = OpenLog(key);
    if (!suffix.empty()) return;
    latency_us_.insert(latency_us_.end(), latency_us.begin(), latency_us.end());
    recovery_s_.push_back(log->Stats().recovery_seconds);
  }

  // Behind where the log's superblock will be, which wants a blank place.
  void WriteRaw(Disk* disk) {
    for (uint64_t i = 0; i < count_; i += PerBatch()) {
      const uint64_t n = std::min(PerBatch(), count_ - i);
      const std::span<const std::byte> piece[] = {memory_.bytes().subspan(i * size_, n * size_)};
      Die(disk->Write((1 << 20) + i * size_, piece), "write");
      Die(disk->Sync(), "sync");
    }
  }
  void ReadRaw(Disk* disk) {
    AlignedBuffer out(size_);
    const std::span<std::byte> piece[] = {out.bytes()};
    for (const uint64_t i : order_) Die(disk->Read((1 << 20) + i * size_, piece), "read");
  }
  void Append(BlockLog* log) {
    for (uint64_t i = 0; i < count_;) {
      std::vector<BlockToLog> batch;
      for (const uint64_t end = std::min(count_, i + PerBatch()); i < end; ++i) {
        batch.push_back({"bench", &keys_[i], digests_[i], Block(i), nullptr});
      }
      for (const absl::Status& status : log->Append(batch)) Die(status, "append");
    }
  }
  // Microseconds of each.
  std::vector<double> Read(BlockLog* log) {
    std::vector<double> latency_us;
    AlignedBuffer out(size_);
    for (const uint64_t i : order_) {
      const double seconds = Seconds(
          [&] { Die(log->Read("bench", keys_[i], out.bytes()).status(), "read from the log"); });
      latency_us.push_back(seconds * 1e6);
    }
    return latency_us;
  }

  static bool HasFio() { return std::system("command -v fio >/dev/null 2>&1") == 0; }
  // With the same file, sizes and syncs.
  double FioRate(const std::string& kind) const {
    const uint64_t syncs = std::max<uint64_t>(1, PerBatch() * size_ >> 20);
    const std::string command = absl::StrCat(
        "fio --name=x --output-format=json --ioengine=io_uring --direct=1 --bs=1m --iodepth=8 "
        "--filename='",
        settings_.path, "' --offset=1m --size=", total() >> 20, "m --rw=", kind,
        kind == "write" ? absl::StrCat(" --fdatasync=", syncs) : "", " 2>/dev/null");
    std::string text;
    FILE* const pipe = popen(command.c_str(), "r");
    if (pipe == nullptr) return 0;
    char buffer[4096];
    while (const size_t n = std::fread(buffer, 1, sizeof(buffer), pipe)) text.append(buffer, n);
    pclose(pipe);
    const auto report = nlohmann::json::parse(text, nullptr, false);
    if (report.is_discarded()) return 0;
    return report["jobs"][0][kind]["bw_bytes"].get<double>();
  }

  void Print() {
    for (Series& s : series_) {
      const perf::Quantiles rate = perf::QuantilesOf(s.bytes_per_s);
      const double share = perf::Median(s.share);
      if (settings_.json) {
        std::printf("%s\n", nlohmann::json({{"block_bytes", size_},
                                            {"blocks", count_},
                                            {"what", s.name},
                                            {"bytes_per_s", rate.p50},
                                            {"bytes_per_s_p10", rate.p10},
                                            {"bytes_per_s_p90", rate.p90},
                                            {"share_of_disk", share}})
                                .dump()
                                .c_str());
        continue;
      }
      std::printf("%9lu  %-10s  %8.0f MB/s [%.0f, %.0f]  %.2f of the disk\n", size_ >> 10,
                  s.name.c_str(), rate.p50 / 1e6, rate.p10 / 1e6, rate.p90 / 1e6, share);
    }
    const perf::Quantiles latency = perf::QuantilesOf(latency_us_);
    const double recovery = perf::Median(recovery_s_);
    if (settings_.json) {
      std::printf("%s\n", nlohmann::json({{"block_bytes", size_},
                                          {"what", "latency"},
                                          {"read_us_p50", latency.p50},
                                          {"read_us_p99", latency.p99},
                                          {"recovery_s", recovery}})
                              .dump()
                              .c_str());
      return;
    }
    std::printf("%9lu  a read takes %.0f us, p99 %.0f; recovery of %lu blocks %.3f s\n",
                size_ >> 10, latency.p50, latency.p99, count_, recovery);
  }

  const Settings& settings_;
  const uint64_t size_, count_;
  AlignedBuffer memory_;
  std::vector<uint64_t> order_;
  std::vector<BlockKey> keys_;
  std::vector<ByteDigest> digests_;
  std::vector<Series> series_;
  std::vector<double> latency_us_, recovery_s_;
  double write_rate_ = 0, read_rate_ = 0;  // of the disk, this round
};

}  // namespace
}  // namespace quarry

int main(int argc, char** argv) {
  quarry::Settings settings;
  CLI::App app(
      "The log of the disk tier against the disk by itself, and fio where it is installed.");
  app.add_option("--path", settings.path, "file, made and removed")->capture_default_str();
  app.add_option("--sizes", settings.sizes, "bytes of blocks, multiples of 4096")
      ->check(CLI::Range(uint64_t{4096}, uint64_t{32} << 20))
      ->capture_default_str();
  app.add_option("--bytes", settings.bytes, "of all blocks of a size")->capture_default_str();
  app.add_option("--batch", settings.batch, "bytes of a group commit")->capture_default_str();
  app.add_option("--rounds", settings.rounds)->capture_default_str();
  app.add_option("--io", settings.io)->check(CLI::IsMember({"auto", "uring", "threads"}));
  app.add_flag("--encrypt", settings.encrypt, "also a log that is encrypted");
  app.add_flag("--json", settings.json, "JSON lines");
  CLI11_PARSE(app, argc, argv);
  spdlog::set_level(spdlog::level::warn);
  setenv(quarry::kKeyVariable, std::string(64, '5').c_str(), 1);
  for (const uint64_t size : settings.sizes) {
    if (size % 4096 != 0) {
      std::fprintf(stderr, "storage_bench: --sizes %lu is no multiple of 4096\n", size);
      return 1;
    }
    quarry::Bench(settings, size).Run();
  }
  return 0;
}

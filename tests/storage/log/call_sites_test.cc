// Every place in the log's sources that calls the disk, with every fault that can befall it there:
// which were struck is written to disk_call_sites.txt beside this program, and one that was
// not is a failure.
//
//   QUARRY_CALLS_PER_SITE=N   calls of a life that are struck at each (1 by default)
#include <execinfo.h>
#include <link.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include <gtest/gtest.h>
#include <spdlog/spdlog.h>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "tests/storage/disk/simulated_disk.h"
#include "tests/storage/log/log_case.h"
#include "tests/support/given_number.h"

namespace quarry {
namespace {

using testing::DiskCall;
using testing::DiskOperation;
using testing::Fault;
using testing::LoggedBatch;
using testing::OwnedBlock;
using testing::SimulatedDisk;

// The innermost return addresses of a call of the disk.
using Stack = std::vector<const void*>;

struct CallRecord {
  DiskOperation operation;
  Stack stack;
};

// Counts the calls of the disks of a life, and has a fault strike one of them.
struct Watch {
  uint64_t calls = 0;
  std::optional<std::pair<uint64_t, Fault::Kind>> strikes;
  std::vector<CallRecord>* records = nullptr;
};

class WatchedDisk final : public Disk {
 public:
  // All outlive it. Calls come one at a time, as the log promises.
  WatchedDisk(SimulatedDisk* disk, Watch* watch) : disk_(disk), watch_(watch) {}

  uint64_t bytes() const override { return disk_->bytes(); }
  const std::string& name() const override { return disk_->name(); }
  absl::Status Read(uint64_t offset, ReadPieces out) override {
    Note(DiskCall::kRead, offset, Sum(out));
    return disk_->Read(offset, out);
  }
  absl::Status ReadMany(std::span<const DiskRead> reads) override {
    for (const DiskRead& read : reads) {
      Note(DiskCall::kRead, read.offset, Sum(read.out));
      if (absl::Status status = disk_->Read(read.offset, read.out); !status.ok()) return status;
    }
    return absl::OkStatus();
  }
  absl::Status Write(uint64_t offset, WritePieces pieces) override {
    Note(DiskCall::kWrite, offset, Sum(pieces));
    return disk_->Write(offset, pieces);
  }
  absl::Status Sync() override {
    Note(DiskCall::kSync, 0, 0);
    return disk_->Sync();
  }
  absl::Status Discard(uint64_t offset, uint64_t bytes) override {
    Note(DiskCall::kDiscard, offset, bytes);
    return disk_->Discard(offset, bytes);
  }

 private:
  template <typename Pieces>
  static uint64_t Sum(Pieces pieces) {
    uint64_t bytes = 0;
    for (const auto& piece : pieces) bytes += piece.size();
    return bytes;
  }
  void Note(DiskCall call, uint64_t offset, uint64_t bytes) {
    if (watch_->records != nullptr) {
      std::array<void*, 12> frames;
      const int n = backtrace(frames.data(), static_cast<int>(frames.size()));
      watch_->records->push_back({{call, offset, bytes}, Stack(frames.data(), frames.data() + n)});
    }
    if (watch_->strikes.has_value() && watch_->calls == watch_->strikes->first) {
      disk_->Schedule({watch_->strikes->second, disk_->operations()});
    }
    ++watch_->calls;
  }

  SimulatedDisk* const disk_;
  Watch* const watch_;
};

constexpr uint64_t kSegment = 4 << 20;

// Formats, writes, reads, looks through, purges, reclaims and recovers a log; what fails
// is left at that, and nothing wrong is read. Returns whether the fault has struck. The same calls
// each time, until one fails.
class Life {
 public:
  Life(Watch* watch, bool encrypted)
      : watch_(watch),
        encrypted_(encrypted),
        layout_(encrypted ? LogLayout::Encrypted(kSegment, 6) : LogLayout{kSegment, 6}) {}

  bool Run() {
    {
      // A footer that is longer than what is read of a segment's end at once.
      LoggedBatch many;
      for (uint32_t i = 0; i < 420; ++i) many.Add({0, i, 1, 8});
      Open();
      Append(many);
      Purge(3);
      LoggedBatch others;
      others.Add({2, 0, 1, 5000});
      Append(others);
      PurgeTenant(2);  // and its key
    }
    for (uint32_t i = 0; i < 14; ++i) {
      LoggedBatch large;
      large.Add({1, 1000 + i, 1, 1'600'000});
      Append(large);
      Check({1, 1000});  // is used, and so moved when its segment is reclaimed
    }
    for (int start = 0; start < 2; ++start) {
      Purge(5);
      Open();
      for (uint32_t i = 0; i < 14; ++i) Check({1, 1000 + i});
      Hold({1, 1000});
      while (start == 0 && log_ != nullptr && !log_->ScrubNext().ends_pass) NoteStruck();
      LoggedBatch one;
      one.Add({0, 7, 2, 100});
      Append(one);
      CheckHeld();
    }
    return struck_ > 0;
  }

 private:
  void Open() {
    reader_ = nullptr;
    log_ = nullptr;
    if (disk_ == nullptr) {
      disk_ = std::make_unique<SimulatedDisk>(
          testing::SimulatedDiskOptions{.bytes = layout_.bytes(), .stall = [] {}});
    } else {
      NoteStruck();
      disk_ = disk_->Crashed(testing::PowerCut::kAllKept, 1);
      // In a key, which is mended.
      if (encrypted_) disk_->FlipBit((layout_.KeyOffset(0, 0) + 100) * 8);
      disk_->FlipBit(99);  // in a superblock
    }
    BlockLogOptions options;
    options.segment_bytes = kSegment;
    options.max_part_bytes = 256 << 10;
    if (encrypted_) options.key.environment = testing::SetTestKey('7');
    options.random = [n = uint64_t{7}]() mutable { return n = n * 6364136223846793005 + 1; };
    auto log = BlockLog::Open(std::make_unique<WatchedDisk>(disk_.get(), watch_), options);
    if (log.ok()) log_ = *std::move(log);
    NoteStruck();
  }
  void NoteStruck() {
    if (!watch_->strikes.has_value()) return;
    struck_ = std::max(struck_, disk_->struck(watch_->strikes->second));
  }
  void Append(const LoggedBatch& batch) {
    if (log_ != nullptr) (void)log_->Append(batch.blocks());
    NoteStruck();
  }
  void Purge(uint32_t number) {
    const BlockId id[] = {OwnedBlock{0, number}.key().id};
    if (log_ != nullptr) (void)log_->Purge("tenant-0", std::nullopt, id);
    NoteStruck();
  }
  void PurgeTenant(uint32_t tenant) {
    if (log_ != nullptr) (void)log_->Purge(OwnedBlock{tenant}.tenant_name(), std::nullopt, {});
    NoteStruck();
  }
  // To be read in pieces.
  void Hold(const OwnedBlock& block) {
    if (log_ == nullptr) return;
    auto reader = log_->OpenBlock(block.tenant_name(), block.key());
    if (reader.ok()) reader_ = *std::move(reader);
    NoteStruck();
    held_ = block;
    held_.version = 1;
    held_.bytes = 1'600'000;
  }
  // From two of its parts.
  void CheckHeld() {
    if (reader_ == nullptr) return;
    AlignedBuffer first(2 * kSectorBytes), last(kSectorBytes);
    const PieceToRead pieces[] = {{10 * kSectorBytes, first.bytes()},
                                  {300 * kSectorBytes, last.bytes()}};
    if (reader_->Read(pieces).ok()) {
      const AlignedBuffer want = held_.Make();
      for (const PieceToRead& piece : pieces) {
        EXPECT_EQ(
            std::memcmp(piece.out.data(), want.bytes().data() + piece.offset, piece.out.size()), 0);
      }
    }
    NoteStruck();
  }
  void Check(const OwnedBlock& block) {
    if (log_ == nullptr) return;
    const auto version = testing::ReadVersion(*log_, block);
    if (version.ok()) {
      EXPECT_EQ(*version, 1u) << block.number;
    }
    NoteStruck();
  }

  Watch* const watch_;
  const bool encrypted_;
  const LogLayout layout_;
  std::unique_ptr<SimulatedDisk> disk_;
  std::unique_ptr<BlockLog> log_;  // after its disk
  std::unique_ptr<LoggedBlockReader> reader_;
  OwnedBlock held_;
  uint64_t struck_ = 0;
};

uintptr_t OwnBase() {
  uintptr_t base = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        *static_cast<uintptr_t*>(out) = info->dlpi_addr;  // the first is the program
        return 1;
      },
      &base);
  return base;
}

// By file and line, of those that lie in storage/log: "sectors.cc:16".
std::map<const void*, std::string> LinesOf(const std::set<const void*>& addresses) {
  std::string command =
      absl::StrCat("addr2line -e '", std::filesystem::read_symlink("/proc/self/exe").string(), "'");
  for (const void* const address : addresses) {
    // Of the call, not of what follows it.
    absl::StrAppend(&command, " 0x",
                    absl::Hex(reinterpret_cast<uintptr_t>(address) - 1 - OwnBase()));
  }
  std::map<const void*, std::string> lines;
  FILE* const pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return lines;
  char buffer[4096];
  for (const void* const address : addresses) {
    if (std::fgets(buffer, sizeof(buffer), pipe) == nullptr) break;
    const std::string line = buffer;
    const size_t at = line.rfind("storage/log/");
    if (at == std::string::npos || absl::StrContains(line, "tests/")) continue;
    const std::string place = line.substr(at + 12);
    lines[address] = place.substr(0, place.find_first_of(" \n"));
  }
  pclose(pipe);
  return lines;
}

// What the sources say: file and line of every call of a disk, also by way of others.
std::set<std::pair<std::string, int>> CallsInSources() {
  constexpr std::string_view kCalls[] = {
      // and not their declarations
      "->Read(",          "->Write(",     "->Sync(",           "->Discard(",
      "ReadBlock(s",      "->ReadMany(",  "ReadFrames(log_",   "ReadSectors(d",
      "ReadEachSector(d", "ReadFooter(d", "WriteFooter(d",     "ReadPurge(d",
      "ReadNote(d",       "WriteNote(d",  "WriteEmptyNotes(d", "WriteNoKeys(d"};
  std::set<std::pair<std::string, int>> out;
  for (const auto& file : std::filesystem::directory_iterator(QUARRY_SOURCE_DIR "/storage/log")) {
    if (file.path().extension() != ".cc") continue;
    std::ifstream in(file.path());
    std::string text;
    for (int line = 1; std::getline(in, text); ++line) {
      const bool calls =
          std::any_of(std::begin(kCalls), std::end(kCalls),
                      [&](std::string_view call) { return text.find(call) != text.npos; });
      if (calls) out.emplace(file.path().filename().string(), line);
    }
  }
  return out;
}

std::set<const void*> AddressesOf(const std::vector<CallRecord>& records) {
  std::set<const void*> addresses;
  for (const CallRecord& record : records) {
    addresses.insert(record.stack.begin(), record.stack.end());
  }
  return addresses;
}

// Those that others call to read and write: a site is what calls them, too.
bool IsShared(const std::string& line) {
  constexpr std::string_view kShared[] = {"sectors.cc:",      "footer.cc:",     "read_block.cc:",
                                          "block_reader.cc:", "purge_note.cc:", "tenant_keys.cc:"};
  return std::any_of(std::begin(kShared), std::end(kShared),
                     [&](std::string_view file) { return line.starts_with(file); });
}

// Calls of each site, by their number in a life.
std::map<std::string, std::vector<uint64_t>> SitesOf(
    const std::vector<CallRecord>& records, const std::map<const void*, std::string>& lines) {
  std::map<std::string, std::vector<uint64_t>> sites;
  for (size_t n = 0; n < records.size(); ++n) {
    std::string site;
    for (const void* const address : records[n].stack) {
      const auto line = lines.find(address);
      if (line == lines.end()) continue;
      absl::StrAppend(&site, site.empty() ? "" : " < ", line->second);
      if (!IsShared(line->second)) break;
    }
    sites[absl::StrCat(site, " ", std::string(NameOf(records[n].operation.call)))].push_back(n);
  }
  return sites;
}

// Lives of a log that is encrypted or not: adds to the lines that were met, and to the table.
void StrikeAllSites(bool encrypted, std::ostream& table, std::set<std::string>* met) {
  std::vector<CallRecord> records;
  Watch whole;
  whole.records = &records;
  (void)Life(&whole, encrypted).Run();
  std::map<const void*, std::string> lines = LinesOf(AddressesOf(records));
  const auto sites = SitesOf(records, lines);
  const LogLayout layout = encrypted ? LogLayout::Encrypted(kSegment, 6) : LogLayout{kSegment, 6};
  const uint64_t per_site = GivenNumber("QUARRY_CALLS_PER_SITE", 1);
  std::vector<CallRecord> others;  // what follows faults
  for (const auto& [site, calls] : sites) {
    table << (encrypted ? "encrypted: " : "") << site << ": " << calls.size() << " calls;";
    for (int i = 0; i < Fault::kKinds; ++i) {
      const auto kind = static_cast<Fault::Kind>(i);
      if (kind == Fault::kStall) continue;  // nothing fails
      uint64_t tried = 0, struck = 0;
      for (uint64_t which = 0; which < std::min<uint64_t>(per_site, calls.size()); ++which) {
        const uint64_t n = calls[which * calls.size() / std::min<uint64_t>(per_site, calls.size())];
        if (!CanBefall(kind, records[n].operation, layout.bytes())) continue;
        SCOPED_TRACE(absl::StrCat(std::string(NameOf(kind)), " at call ", n, ", ", site));
        Watch watch;
        watch.strikes = {n, kind};
        watch.records = &others;
        ++tried;
        struck += Life(&watch, encrypted).Run() ? 1 : 0;
      }
      if (tried == 0) continue;
      table << " " << NameOf(kind) << " " << struck;
      EXPECT_EQ(struck, tried) << NameOf(kind) << " has not struck at " << site;
    }
    table << "\n";
  }
  lines.merge(LinesOf(AddressesOf(others)));
  for (const auto& [address, line] : lines) met->insert(line);
  std::printf("%zu sites of %zu calls\n", sites.size(), records.size());
}

TEST(CallSitesTest, EveryFaultAtEveryCallOfTheDisk) {
  spdlog::set_level(spdlog::level::off);
  const std::filesystem::path path =
      std::filesystem::read_symlink("/proc/self/exe").replace_filename("disk_call_sites.txt");
  std::ofstream table(path);
  std::set<std::string> met;
  for (const bool encrypted : {true, false}) StrikeAllSites(encrypted, table, &met);
  if (met.empty()) GTEST_SKIP() << "a build without line numbers, or no addr2line";
  for (const auto& [file, line] : CallsInSources()) {
    // A call in a macro is at the macro's line.
    bool found = false;
    for (int up = 0; up < 4; ++up) found |= met.contains(absl::StrCat(file, ":", line - up));
    EXPECT_TRUE(found) << file << ":" << line << " calls the disk, and no life does so";
  }
  std::printf("%s\n", path.c_str());
  spdlog::set_level(spdlog::level::info);
}

}  // namespace
}  // namespace quarry

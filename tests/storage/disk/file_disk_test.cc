#include "storage/disk/file_disk.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <climits>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "storage/disk/aligned_buffer.h"
#include "tests/daemon/other_user.h"
#include "tests/storage/disk/disk_region.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

using ::testing::HasSubstr;
using Io = FileDiskOptions::Io;

constexpr uint64_t kMiB = 1 << 20;

std::string Message(const absl::Status& status) { return std::string(status.message()); }

// A directory of its own for each test, and one disk in it.
class FileDiskTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "quarry-disk-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    directory_ = name;
    options_.path = name + "/disk";
    options_.bytes = 8 * kMiB;
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  void Open() {
    disk_.reset();
    auto disk = OpenFileDisk(options_);
    ASSERT_TRUE(disk.ok()) << disk.status();
    disk_ = *std::move(disk);
  }
  absl::Status Refusal() const { return OpenFileDisk(options_).status(); }
  struct stat Stat() const {
    struct stat found {};
    EXPECT_EQ(stat(options_.path.c_str(), &found), 0);
    return found;
  }
  bool Exists() const { return std::filesystem::exists(options_.path); }
  // Behind the disk's back.
  void Truncate(uint64_t bytes) { std::filesystem::resize_file(options_.path, bytes); }

  absl::Status Read(uint64_t offset, AlignedBuffer* out) {
    const std::span<std::byte> piece = out->bytes();
    return disk_->Read(offset, std::span(&piece, 1));
  }
  absl::Status Write(uint64_t offset, const AlignedBuffer& in) {
    const std::span<const std::byte> piece = in.bytes();
    return disk_->Write(offset, std::span(&piece, 1));
  }

  std::filesystem::path directory_;
  FileDiskOptions options_;
  std::unique_ptr<Disk> disk_;
};

// By each way in which I/O is done.
class FileDiskIoTest : public FileDiskTest, public ::testing::WithParamInterface<Io> {
 protected:
  void SetUp() override {
    FileDiskTest::SetUp();
    options_.io = GetParam();
    const absl::Status status = Refusal();
    if (options_.io == Io::kUring && absl::IsFailedPrecondition(status)) GTEST_SKIP() << status;
    ASSERT_TRUE(status.ok()) << status;
  }
};

INSTANTIATE_TEST_SUITE_P(Io, FileDiskIoTest, ::testing::Values(Io::kUring, Io::kThreads),
                         [](const auto& info) {
                           return info.param == Io::kUring ? "Uring" : "Threads";
                         });

AlignedBuffer Filled(size_t bytes, std::mt19937_64& random) {
  AlignedBuffer buffer(bytes);
  for (size_t at = 0; at < bytes; at += 512) {
    const uint64_t word = random();
    std::memcpy(buffer.bytes().data() + at, &word, sizeof(word));
  }
  return buffer;
}

TEST_P(FileDiskIoTest, WhatIsWrittenIsReadWhateverItsPiecesAndCuts) {
  for (const auto& [depth, io_bytes] : {std::pair(8u, kMiB), std::pair(3u, 5 * kSectorBytes),
                                        std::pair(1u, kSectorBytes), std::pair(64u, 64 * kMiB)}) {
    SCOPED_TRACE(::testing::Message() << "depth " << depth << ", io_bytes " << io_bytes);
    options_.queue_depth = depth;
    options_.io_bytes = io_bytes;
    Open();
    testing::DiskRegion region(*disk_, 0, options_.bytes / kSectorBytes, Seed() + depth);
    region.WriteAll();
    for (int i = 0; i < 100 && !HasFatalFailure(); ++i) region.WriteOrReadSome();
    region.ReadAll();
  }
}

TEST_P(FileDiskIoTest, ThreadsDoNotDisturbEachOther) {
  options_.io_bytes = 64 << 10;
  Open();
  constexpr uint64_t kThreads = 6;
  const uint64_t sectors = options_.bytes / kSectorBytes / kThreads;
  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      testing::DiskRegion region(*disk_, t * sectors, sectors, Seed() + t);
      region.WriteAll();
      for (int i = 0; i < 60 && !HasFatalFailure(); ++i) {
        region.WriteOrReadSome();
        if (i % 20 == 0) {
          EXPECT_TRUE(disk_->Sync().ok());
        }
      }
      region.ReadAll();
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_P(FileDiskIoTest, MorePiecesThanASystemCallTakes) {
  options_.io_bytes = 64 * kMiB;
  Open();
  std::mt19937_64 random(Seed());
  constexpr size_t kPieces = IOV_MAX + IOV_MAX / 2;
  const AlignedBuffer in = Filled(kPieces * kSectorBytes, random);
  AlignedBuffer out(in.size());
  std::vector<std::span<const std::byte>> from;
  std::vector<std::span<std::byte>> into;
  for (size_t at = 0; at < in.size(); at += kSectorBytes) {
    from.push_back(in.bytes().subspan(at, kSectorBytes));
    into.push_back(out.bytes().subspan(at, kSectorBytes));
  }
  ASSERT_TRUE(disk_->Write(kSectorBytes, from).ok());
  ASSERT_TRUE(disk_->Read(kSectorBytes, into).ok());
  EXPECT_EQ(std::memcmp(in.bytes().data(), out.bytes().data(), in.size()), 0);
}

TEST_P(FileDiskIoTest, NoPiecesAreNoWork) {
  Open();
  EXPECT_TRUE(disk_->Read(0, {}).ok());
  EXPECT_TRUE(disk_->Write(options_.bytes, {}).ok());
}

TEST_P(FileDiskIoTest, ContentsOutliveTheDisk) {
  Open();
  std::mt19937_64 random(Seed());
  const AlignedBuffer in = Filled(3 * kMiB, random);
  ASSERT_TRUE(Write(kMiB, in).ok());
  ASSERT_TRUE(disk_->Sync().ok());
  Open();
  AlignedBuffer out(in.size());
  ASSERT_TRUE(Read(kMiB, &out).ok());
  EXPECT_EQ(std::memcmp(in.bytes().data(), out.bytes().data(), in.size()), 0);
}

TEST_P(FileDiskIoTest, AFileThatShrankIsUnavailableWhereItEnds) {
  Open();
  AlignedBuffer buffer(4 * kSectorBytes);
  ASSERT_TRUE(Write(0, buffer).ok());
  for (uint64_t file_bytes : {2 * kSectorBytes, 2 * kSectorBytes + 512, uint64_t{100}}) {
    SCOPED_TRACE(file_bytes);
    Truncate(file_bytes);
    const absl::Status status = Read(0, &buffer);
    EXPECT_TRUE(absl::IsUnavailable(status)) << status;
    EXPECT_THAT(Message(status), HasSubstr(options_.path + ": read of "));
    const uint64_t whole = file_bytes / kSectorBytes * kSectorBytes;
    EXPECT_THAT(Message(status), HasSubstr("offset " + std::to_string(whole)));
    EXPECT_TRUE(absl::IsUnavailable(Read(4 * kSectorBytes, &buffer)));
  }
  // What is left of it is read, and the disk goes on.
  Truncate(4 * kSectorBytes);
  EXPECT_TRUE(Read(0, &buffer).ok());
}

TEST_P(FileDiskIoTest, MemoryIsLeftAloneAfterAFailure) {
  options_.io_bytes = 16 << 10;
  Open();
  AlignedBuffer buffer(4 * kMiB), other(kMiB);
  ASSERT_TRUE(Write(0, buffer).ok());
  Truncate(2 * kMiB + kSectorBytes);
  for (int i = 0; i < 50; ++i) {
    // Fails in the middle, with reads of what is there in flight.
    ASSERT_TRUE(absl::IsUnavailable(Read(0, &buffer)));
    std::memset(buffer.bytes().data(), 0x5a, buffer.size());
    ASSERT_TRUE(Read(0, &other).ok());
    for (std::byte byte : buffer.bytes()) ASSERT_EQ(byte, std::byte{0x5a});
  }
}

TEST_P(FileDiskIoTest, WhatIsNotInWholeSectorsIsRefusedWithNumbers) {
  Open();
  AlignedBuffer buffer(4 * kSectorBytes);
  const auto read = [&](uint64_t offset, size_t skip, size_t bytes) {
    const std::span<std::byte> pieces[] = {buffer.bytes().first(kSectorBytes),
                                           buffer.bytes().subspan(skip, bytes)};
    const absl::Status status = disk_->Read(offset, pieces);
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    return Message(status);
  };
  EXPECT_THAT(read(512, 0, kSectorBytes), HasSubstr("read of 8192 bytes at offset 512"));
  EXPECT_THAT(read(0, 0, 1000), HasSubstr("read of 5096 bytes at offset 0"));
  EXPECT_THAT(read(0, 512, kSectorBytes), HasSubstr("piece 1 has 4096 bytes at address 0x"));
  // Whole sectors together are not enough.
  const std::span<const std::byte> halves[] = {buffer.bytes().first(2048),
                                               buffer.bytes().first(2048)};
  const absl::Status status = disk_->Write(0, halves);
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  EXPECT_THAT(Message(status), HasSubstr("piece 0 has 2048 bytes"));
}

TEST_P(FileDiskIoTest, WhatPassesTheEndIsRefusedWithNumbers) {
  Open();
  AlignedBuffer buffer(2 * kSectorBytes);
  for (uint64_t offset : {options_.bytes - kSectorBytes, options_.bytes, uint64_t{1} << 63,
                          uint64_t{0} - kSectorBytes}) {
    const absl::Status status = Write(offset, buffer);
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_THAT(Message(status), HasSubstr("write of 8192 bytes at offset " +
                                           std::to_string(offset) + ": the disk has 8388608"));
    EXPECT_EQ(Read(offset, &buffer).code(), absl::StatusCode::kInvalidArgument);
  }
  EXPECT_EQ(static_cast<uint64_t>(Stat().st_size), options_.bytes);
}

TEST_P(FileDiskIoTest, AKilledProcessLetsGoOfItsDisk) {
  int ready[2];
  ASSERT_EQ(pipe2(ready, O_CLOEXEC), 0);
  const pid_t child = fork();
  if (child == 0) {
    Open();
    AlignedBuffer buffer(4 * kMiB);
    const bool failed = disk_ == nullptr || !Read(0, &buffer).ok() || write(ready[1], "r", 1) != 1;
    while (!failed && Read(0, &buffer).ok()) {
    }
    _exit(1);
  }
  close(ready[1]);
  char byte = 0;
  EXPECT_EQ(read(ready[0], &byte, 1), 1);
  close(ready[0]);
  EXPECT_TRUE(absl::IsFailedPrecondition(Refusal()));
  kill(child, SIGKILL);
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(Refusal().ok()) << Refusal();
}

TEST_F(FileDiskTest, ANewFileIsItsOwnersAndHasItsRoom) {
  const mode_t mask = umask(0);
  Open();
  umask(mask);
  EXPECT_EQ(disk_->bytes(), options_.bytes);
  EXPECT_EQ(disk_->name(), options_.path);
  EXPECT_EQ(Stat().st_mode & 0777, mode_t{0600});
  EXPECT_EQ(static_cast<uint64_t>(Stat().st_size), options_.bytes);
  EXPECT_GE(static_cast<uint64_t>(Stat().st_blocks) * 512, options_.bytes);
}

TEST_F(FileDiskTest, AFileKeepsItsRoomAtADiscard) {
  Open();
  EXPECT_EQ(disk_->Discard(0, kMiB).code(), absl::StatusCode::kUnimplemented);
  EXPECT_GE(static_cast<uint64_t>(Stat().st_blocks) * 512, options_.bytes);
  EXPECT_TRUE(absl::IsInvalidArgument(disk_->Discard(100, kSectorBytes)));
  EXPECT_TRUE(absl::IsInvalidArgument(disk_->Discard(options_.bytes, kSectorBytes)));
}

TEST_F(FileDiskTest, AShorterFileGrowsAndALongerOneKeepsItsLength) {
  std::ofstream(options_.path) << "kept";
  Open();
  AlignedBuffer buffer(kSectorBytes);
  ASSERT_TRUE(Read(0, &buffer).ok());
  EXPECT_EQ(std::memcmp(buffer.bytes().data(), "kept", 5), 0);
  EXPECT_GE(static_cast<uint64_t>(Stat().st_blocks) * 512, options_.bytes);

  options_.bytes = kMiB;
  Open();
  EXPECT_EQ(disk_->bytes(), kMiB);
  EXPECT_EQ(static_cast<uint64_t>(Stat().st_size), 8 * kMiB);
  EXPECT_TRUE(absl::IsInvalidArgument(Read(kMiB, &buffer)));
}

TEST_F(FileDiskTest, AFileOfHolesGetsItsRoom) {
  std::ofstream(options_.path) << "kept";
  Truncate(options_.bytes);
  Open();
  EXPECT_GE(static_cast<uint64_t>(Stat().st_blocks) * 512, options_.bytes);
}

TEST_F(FileDiskTest, ASecondOpenerIsRefusedUntilTheFirstIsGone) {
  Open();
  const absl::Status status = Refusal();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_THAT(Message(status), HasSubstr(options_.path + " is in use by another process"));
  EXPECT_TRUE(Exists());
  disk_.reset();
  EXPECT_TRUE(Refusal().ok());
}

TEST_F(FileDiskTest, AMissingDirectoryIsNotFound) {
  options_.path = (directory_ / "nosuch" / "disk").string();
  const absl::Status status = Refusal();
  EXPECT_TRUE(absl::IsNotFound(status)) << status;
  EXPECT_THAT(Message(status), HasSubstr(options_.path));
}

TEST_F(FileDiskTest, AnotherUsersFileIsPermissionDenied) {
  if (!testing::IsRoot()) GTEST_SKIP() << "needs root, to be somebody else";
  Open();
  disk_.reset();
  std::filesystem::permissions(directory_, std::filesystem::perms::all);
  absl::Status status;
  testing::AsUser(65534, [&] { status = Refusal(); });
  EXPECT_TRUE(absl::IsPermissionDenied(status)) << status;
}

TEST_F(FileDiskTest, WhatIsNeitherAFileNorADeviceIsRefused) {
  options_.path = directory_.string();
  EXPECT_TRUE(absl::IsInvalidArgument(Refusal())) << Refusal();
  options_.path = "/dev/null";
  EXPECT_TRUE(absl::IsInvalidArgument(Refusal())) << Refusal();
}

TEST_F(FileDiskTest, MoreThanTheFileSystemHasIsRefusedAndLeavesNothingBehind) {
  options_.bytes = 1ull << 60;
  absl::Status status = Refusal();
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_THAT(Message(status),
              HasSubstr(options_.path + ": preallocating 1152921504606846976 bytes"));
  EXPECT_FALSE(Exists());
  // A file that was there stays as it was.
  std::ofstream(options_.path) << "kept";
  EXPECT_TRUE(absl::IsResourceExhausted(Refusal()));
  EXPECT_EQ(Stat().st_size, 4);
}

TEST_F(FileDiskTest, ImpossibleOptionsAreRefusedByName) {
  const auto refused = [&](auto change) {
    const FileDiskOptions options = options_;
    change();
    const absl::Status status = Refusal();
    options_ = options;
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_FALSE(Exists());
    return Message(status);
  };
  EXPECT_THAT(refused([&] { options_.bytes = 5000; }), HasSubstr("bytes is 5000"));
  EXPECT_THAT(refused([&] { options_.bytes = 0; }), HasSubstr("bytes is 0"));
  EXPECT_THAT(refused([&] { options_.queue_depth = 0; }), HasSubstr("queue_depth is 0"));
  EXPECT_THAT(refused([&] { options_.queue_depth = 1025; }), HasSubstr("queue_depth is 1025"));
  EXPECT_THAT(refused([&] { options_.io_bytes = 0; }), HasSubstr("io_bytes is 0"));
  EXPECT_THAT(refused([&] { options_.io_bytes = 5000; }), HasSubstr("io_bytes is 5000"));
  EXPECT_THAT(refused([&] { options_.io_bytes = 2ull << 30; }),
              HasSubstr("io_bytes is 2147483648"));
}

// The descriptor of this process's only ring.
std::optional<int> RingDescriptor() {
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code gone;
    if (std::filesystem::read_symlink(entry.path(), gone) == "anon_inode:[io_uring]") {
      return std::stoi(entry.path().filename().string());
    }
  }
  return std::nullopt;
}

TEST_F(FileDiskTest, ARingThatFailsIsUnavailableAndTheNextCallHasAnother) {
  options_.io = Io::kUring;
  if (absl::IsFailedPrecondition(Refusal())) GTEST_SKIP() << Refusal();
  Open();
  AlignedBuffer buffer(2 * kMiB);
  ASSERT_TRUE(Read(0, &buffer).ok());
  const std::optional<int> ring = RingDescriptor();
  ASSERT_TRUE(ring.has_value());
  const int null = open("/dev/null", O_RDWR | O_CLOEXEC);
  ASSERT_EQ(dup2(null, *ring), *ring);
  close(null);
  const absl::Status status = Read(0, &buffer);
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_THAT(Message(status), HasSubstr(options_.path + ": io_uring"));
  EXPECT_TRUE(Read(0, &buffer).ok());
}

}  // namespace
}  // namespace quarry
